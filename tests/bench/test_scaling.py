"""The bench of several GPUs: what it computes from runs, and where two runs differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bench import bench_scaling
from bench.bench_scaling import efficiency, first_difference, main, of_preset, of_real
from tempact.errors import EXIT_USER_ERROR, guarded


def run(folder: Path, loss: float = 0.5, weight: float = 1.0, seconds: float = 2.0) -> Path:
    """The files of a run of two iterations that are compared."""
    folder.mkdir(parents=True)
    rows = [
        {"step": step, "time_s": seconds * step, "timing_s/plan": seconds, "ranks/idle": 0.1, "planner/loss": loss}
        for step in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for policy in ("planner", "executor"):
        own = folder / "checkpoints" / "step-000002" / policy
        own.mkdir(parents=True)
        save_file({"lora": torch.tensor([1.0, weight])}, own / "adapter_model.safetensors")
    return folder


def test_the_first_difference_of_two_runs_is_named(tmp_path: Path) -> None:
    one = run(tmp_path / "one")
    assert first_difference(one, run(tmp_path / "same", seconds=3.0)) is None
    assert first_difference(one, run(tmp_path / "loss", loss=0.25)) == "iteration 1, planner/loss: 0.5 and 0.25"
    assert first_difference(one, run(tmp_path / "weight", weight=1.5)) == "planner: lora differs by up to 5.0e-01"


def test_the_first_iteration_is_left_out() -> None:
    rows = [
        {"step": step, "timing_s/plan": plan, "timing_s/update": 1.0, "ranks/idle": idle, "memory/peak_gib": peak}
        for step, plan, idle, peak in ((1, 90.0, 0.9, 9.0), (2, 2.0, 0.1, 3.0), (3, 4.0, 0.3, 5.0), (4, 9.0, 0.2, 4.0))
    ]
    assert of_preset(rows) == {
        "seconds": 5.0, "phases": {"plan": 4.0, "update": 1.0}, "idle": {"ranks/idle": 0.2}, "peak_gib": 5.0
    }  # fmt: skip
    iteration = {"seconds": {"plan": 3.0, "all": 8.0, "between rows": 9.0}, "idle": {}, "peak_gib": {"peak": 61.0}}
    assert of_real({"measured": [{}, iteration]}) == {
        "seconds": 8.0, "phases": {"plan": 3.0}, "idle": {}, "peak_gib": 61.0
    }  # fmt: skip


@pytest.mark.parametrize(("weak", "seconds", "expected"), [(False, 2.5, 0.8), (False, 2.0, 1.0), (True, 5.0, 0.8)])
def test_efficiency(weak: bool, seconds: float, expected: float) -> None:
    first = {"gpus": 2, "seconds": 4.0}
    assert efficiency(first, {"gpus": 4, "seconds": seconds}, weak) == expected


def test_a_run_that_fails_ends_the_bench_and_keeps_what_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Done:
        returncode, stdout = 3, "abc"

    def measured(given: object, keys: object, gpus: int) -> dict[str, object]:
        if gpus > 1:
            return real(given, keys, gpus)
        return {"gpus": 1, "seconds": 2.0, "phases": {"plan": 2.0}, "idle": {}}

    real = bench_scaling.measure
    monkeypatch.setattr(bench_scaling, "measure", measured)
    monkeypatch.setattr(bench_scaling.subprocess, "run", lambda *given, **more: Done)
    save = tmp_path / "scaling.json"
    arguments = [str(tmp_path), "--preset", "shapeworld-smoke", "--save", str(save)]
    assert guarded(lambda: main(arguments)) == EXIT_USER_ERROR
    shown = capsys.readouterr()
    assert "found exit code 3 of tempact.train shapeworld-smoke --gpus 2 --deterministic" in shown.err
    assert [own["gpus"] for own in json.loads(save.read_text())["counts"]] == [1]
    assert guarded(lambda: main([*arguments, "--iterations", "1"])) == EXIT_USER_ERROR
