from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import compare, report
from bench.harness import Bench, Contender, worst
from bench.report import Row

CPU = torch.device("cpu")


def row(case: str = "c", impl: str = "ours", ms: float | None = 2.0, **other: object) -> Row:
    return Row("op", case, impl, ms=ms, p20=ms, p80=ms, **other)  # type: ignore[arg-type]


def make_bench(folder: Path | None = None, *, timed: bool = True) -> tuple[Bench, list[str]]:
    printed: list[str] = []
    return Bench(CPU, timed, folder, printed.append), printed


def contender(name: str, value: Tensor) -> Contender:
    return Contender(name, lambda: value, lambda out: {"out": out}, flops=2e9, nbytes=4e6)


EXACT = torch.linspace(-1, 1, 8, dtype=torch.float64)
SAME = EXACT + 1e-3 * torch.ones(8)


def test_a_wrong_kernel_gets_no_speed_and_fails(tmp_path: Path) -> None:
    bench, printed = make_bench(tmp_path)
    ours, peer = contender("ours", EXACT + 3e-3), contender("peer", EXACT + 1.9e-3)
    with pytest.raises(AssertionError, match="out is off by 3.00e-03, allowed 2.00e-03"):
        bench.measure("op", "c", [ours, peer], {"out": EXACT}, {"out": SAME})
    rows = {r["impl"]: r for r in json.loads((tmp_path / "cpu.json").read_text())["rows"]}
    assert rows["ours"]["ms"] is None and rows["ours"]["error"] == pytest.approx(3e-3)
    assert rows["peer"]["ms"] is not None
    assert "ours: no speed" in printed[0]


@pytest.mark.parametrize("value", [EXACT * float("nan"), EXACT[:3]])
def test_nan_and_a_wrong_shape_never_pass(value: Tensor) -> None:
    bench, _ = make_bench()
    with pytest.raises(AssertionError):
        bench.measure("op", "c", [contender("ours", value)], {"out": EXACT}, {"out": SAME})


def test_a_peer_that_cannot_run_is_a_note() -> None:
    def run() -> Tensor:
        raise RuntimeError("no such kernel\nmore")

    bench, printed = make_bench()
    bench.measure(
        "op", "c", [contender("ours", SAME), Contender("peer", run, lambda out: {})], {"out": EXACT}, {"out": SAME}
    )
    assert bench.rows[1].ms is None and "peer: no speed, RuntimeError: no such kernel" in printed[0]


def test_rows_hold_work_per_time_and_ratios() -> None:
    bench, printed = make_bench()
    bench.measure(
        "op", "c", [contender("ours", SAME), contender("peer", EXACT)], {"out": EXACT}, {"out": SAME}, parts=4
    )
    ours, peer = bench.rows
    assert ours.ms is not None and peer.ms is not None
    assert ours.tflops == pytest.approx(2e9 / ours.ms / 1e9) and ours.gbps == pytest.approx(4e6 / ours.ms / 1e6)
    assert ours.ratio_to == {"peer": pytest.approx(peer.ms / ours.ms)}
    assert ours.error == pytest.approx(1e-3) and ours.torch == torch.__version__ and ours.commit
    assert "best peer: peer" in printed[0]


def test_without_times_only_errors_are_reported_and_compiled_peers_are_left_out(tmp_path: Path) -> None:
    bench, printed = make_bench(tmp_path, timed=False)
    slow = Contender("compiled", lambda: SAME, lambda out: {"out": out}, compiled=True)
    bench.measure("op", "c", [contender("ours", SAME), slow], {"out": EXACT}, {"out": SAME})
    assert [r.impl for r in bench.rows] == ["ours"] and bench.rows[0].ms is None
    assert list(tmp_path.iterdir()) == [] and " ms" not in printed[0]


def test_worst_is_the_largest_difference() -> None:
    assert worst(torch.tensor([1.0, -2.0]), torch.tensor([1.0, 3.0])) == 5.0
    assert worst(torch.tensor([float("nan")]), torch.tensor([3.0])) == float("inf")


def test_the_table_says_how_ours_compares() -> None:
    rows = [row(ratio_to={"peer": 1.5}, error=1e-3, gbps=100.0), row(impl="peer", ms=3.0)]
    lines = report.table(rows, ["a note"]).splitlines()
    assert lines[0] == "op: c" and lines[-1].strip() == "a note"
    assert lines[1].split() == ["impl", "ms", "p20-p80", "GB/s", "ours", "is", "error"]
    assert lines[2].split() == ["ours", "2.000", "2.000-2.000", "100", "1.0e-03"]
    assert lines[3].split() == ["peer", "3.000", "3.000-3.000", "1.50x"]


def test_memory_is_compared_where_no_time_is() -> None:
    bench, printed = make_bench()
    bench.record([Row("op", "memory", "ours", mib=1.0), Row("op", "memory", "copies", mib=8.0)])
    assert bench.rows[0].ratio_to == {"copies": 8.0}
    assert "MiB" in printed[0] and "8.00x" in printed[0]


def test_a_partial_run_keeps_the_other_cases(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    report.save(path, [row("a"), row("a", "peer"), row("b")], {"device": "x"})
    report.save(path, [row("a", ms=9.0)], {"device": "x"})
    assert [(r.case, r.impl, r.ms) for r in report.load(path)] == [("a", "ours", 9.0), ("b", "ours", 2.0)]
    assert json.loads(path.read_text())["device"] == "x"


def test_slug_and_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert report.slug("NVIDIA H200") == "nvidia-h200"
    assert report.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    monkeypatch.setenv("BENCH_COMMIT", "abc1234")
    assert report.commit() == "abc1234"


def test_the_chart_is_a_picture(tmp_path: Path) -> None:
    report.chart(tmp_path / "c.png", [row(), row(impl="peer", ms=3.0), row("alone")], "title")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("new", "code", "said"),
    [
        ([row(ms=4.0, ratio_to={"peer": 1.5}), row("m", ms=None, mib=10.0)], 0, "0 worse and 0 better"),
        (
            [row(ms=2.0, ratio_to={"peer": 1.3}), row("m", ms=None, mib=10.0)],
            1,
            "REGRESSION op: c: 0.867x (against peer",
        ),
        ([row(ms=2.0, ratio_to={"peer": 1.8}), row("m", ms=None, mib=10.0)], 0, "better     op: c: 1.200x"),
        ([row(ms=2.0), row("m", ms=None, mib=10.0)], 0, "0 worse"),
        ([row(ms=2.2), row("m", ms=None, mib=10.0)], 1, "REGRESSION op: c: 0.909x (2.000 -> 2.200 ms)"),
        (
            [row(ratio_to={"peer": 1.5}), row("m", ms=None, mib=12.0)],
            1,
            "REGRESSION op: m: 0.833x (10.000 -> 12.000 MiB)",
        ),
        ([row(ratio_to={"peer": 1.5})], 1, "REGRESSION op: m: lost (not in the new file)"),
        ([row(ms=None, error=7.0), row("m", ms=None, mib=10.0)], 1, "REGRESSION op: c: lost (no figure, error 7.0)"),
    ],
)
def test_compare_lists_regressions(
    new: list[Row], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = tmp_path / "old.json", tmp_path / "new.json"
    report.save(paths[0], [row(ratio_to={"peer": 1.5}), row(impl="peer", ms=3.0), row("m", ms=None, mib=10.0)], {})
    report.save(paths[1], new, {})
    assert compare.main([str(path) for path in paths]) == code
    assert said in capsys.readouterr().out


def test_compare_takes_a_threshold(tmp_path: Path) -> None:
    paths = tmp_path / "old.json", tmp_path / "new.json"
    report.save(paths[0], [row()], {})
    report.save(paths[1], [row(ms=2.2)], {})
    assert compare.main([*map(str, paths), "--threshold", "10"]) == 0


def test_a_command_names_no_place_of_the_machine() -> None:
    given = ["runs/here", "/tmp/there/folder", "../swruns", "--save", "/out/file.json", "--trainer.iterations", "3"]
    expected = "python -m bench.x runs/here folder swruns --save file.json --trainer.iterations 3"
    assert report.command("bench.x", given) == expected
