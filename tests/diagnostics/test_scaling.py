"""The simulator of more GPUs: what it makes of measured phases, against the scaling model of the published setting."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from tempact import doctor
from tempact.diagnostics.scaling import (
    Seconds,
    Shape,
    forks_of,
    last_free,
    measured_seconds,
    scaling,
    shape_of,
    simulated,
)
from tempact.errors import UserError
from tempact.presets import get_preset
from tempact.types import Forks

RUN = Path(__file__).parents[1] / "runs" / "run-0.1"
PROMPTS, PLANS = 16, 4
# seconds of an H200: a context's chunk and one of a branch, both decoded; pairs and contexts of the executor's update
CONTEXT, BRANCH = 0.234 + 0.102, 0.254 + 0.102
UPDATE = 64 * (8 * 3 * 0.178 + 0.18) + 13  # and the planner's
TAIL = 5.0


def published(forks: list[list[int]], plans: int = 1) -> tuple[Seconds, Shape]:
    """16 prompts x 4 plans x 8 continuations of 30 latent frames; each plan in so many blocks of continuations, which
    are plans with fewer continuations here. Sampling takes 25 s in two batches, half of it in one."""
    forks, n = [[fork for fork in own for _ in range(plans)] for own in forks], 8 // plans
    seconds = sum(CONTEXT * fork + BRANCH * n * (30 - fork) for own in forks for fork in own) / 3 / len(forks)
    shape = Shape(forks, n, 30, 3, sampled=32 * plans, exchanged=4 * 264_000_000)
    return Seconds(25.0, seconds, TAIL, UPDATE), shape


def drawn(frames: tuple[int, ...], draws: int = 100) -> list[list[int]]:
    rng = random.Random(0)
    return [[fork for _ in range(PROMPTS) for fork in [rng.choice(frames)] * PLANS] for _ in range(draws)]


@pytest.mark.parametrize(
    ("frames", "expected"), [((6,), (99, 97, 93, 77, 29)), ((6, 12, 18, 24), (99, 96, 91, 69, 22))]
)
def test_the_published_setting_scales_as_the_model_of_its_design(frames: tuple[int, ...], expected: tuple) -> None:
    """Percent at 2, 4, 8, 32 and 256 GPUs; beyond the 64 plans, quarters of a plan's continuations are dealt."""
    measured, _ = published(drawn(frames))
    for gpus, percent in zip((2, 4, 8, 32, 256), expected, strict=True):
        own, cut = published(drawn(frames), 4 if gpus == 256 else 1)
        found = simulated(own, cut, gpus).total
        assert 100 * measured.total / gpus / found == pytest.approx(percent, abs=2)


def test_one_gpu_takes_what_was_measured() -> None:
    measured, shape = published(drawn((6, 12, 18, 24), 20))
    assert simulated(measured, shape, 1).total == pytest.approx(measured.total, rel=1e-12)
    assert simulated(measured, shape, 1).waiting == pytest.approx(0, abs=1e-6)


def test_equal_units_alone_scale_perfectly() -> None:
    shape = Shape([[6] * 64], 8, 30, 3)
    for gpus in (2, 8, 64):
        found = simulated(Seconds(0.0, 640.0, 0.0, 64.0), shape, gpus)
        assert found.total == pytest.approx(704 / gpus) and found.waiting == pytest.approx(0, abs=1e-9)
    found = simulated(Seconds(0.0, 640.0, 0.0, 64.0), shape, 48)  # 16 of them have two
    assert (found.rollout, found.update, found.waiting) == pytest.approx((20, 2, 48 * 22 - 704))
    assert simulated(Seconds(0.0, 640.0, 0.0, 64.0), shape, 128).total == pytest.approx(11)  # half of them wait


def test_units_are_taken_longest_first_by_whoever_is_free() -> None:
    units = [1.0, 1.0, 2.0, 4.0]
    assert max(last_free(sorted(units, reverse=True), 2)) == 4 < max(last_free(units, 2)) == 5
    rng, times = random.Random(1), {"queue": 0.0, "in order": 0.0, "dealt": 0.0}
    for _ in range(100):
        units = [rng.choice((8.0, 13.0, 18.0, 24.0)) for _ in range(64)]
        times["queue"] += max(last_free(sorted(units, reverse=True), 8))
        times["in order"] += max(last_free(units, 8))
        times["dealt"] += max(sum(units[first : first + 8]) for first in range(0, 64, 8))
    assert times["queue"] < 0.97 * times["in order"] < 0.9 * times["dealt"]


def test_a_slow_gpu_holds_the_others_less_than_a_unit() -> None:
    measured, shape = published([[6] * 64])
    even, slow = (simulated(measured, shape, 8, factor) for factor in (1.0, 1.2))
    assert last_free([1.0] * 8, 2, 3.0) == [6.0, 6.0]
    assert even.rollout < slow.rollout <= measured.rollout * (1 / (7 + 1 / 1.2) + 1.2 / 64)
    assert slow.plan == pytest.approx(1.2 * even.plan) and slow.update == pytest.approx(1.2 * even.update)
    assert slow.waiting > even.waiting


def test_more_gpus_are_never_slower_but_for_what_they_exchange() -> None:
    measured, shape = published(drawn((6, 12, 18, 24), 10))
    for own in (replace(shape, exchanged=0), replace(shape, exchanged=0, updated=4, updates=2)):
        totals = [simulated(measured, own, gpus).total for gpus in range(1, 70)]
        assert all(later <= before * (1 + 1e-9) for before, later in pairwise(totals))
    assert simulated(measured, shape, 8).exchange == pytest.approx(2 * 1.056 * 7 / 8 / 450)
    assert simulated(measured, replace(shape, updates=2), 16).exchange == pytest.approx(4 * 1.056 * 15 / 16 / 50)


def test_whole_shares_are_units_where_a_rank_rolls_out_at_once() -> None:
    shape = Shape([[6] * 12], 4, 24, 3, rolled=0)
    assert [len(shape.costs(shape.forks[0], gpus)) for gpus in (1, 2, 5, 12, 20)] == [1, 2, 4, 12, 12]
    assert sum(shape.costs(shape.forks[0], 5)) == pytest.approx(sum(shape.costs(shape.forks[0], 1)))


# a run's folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RUN, tmp_path / "run"))


def rows(run: Path, *changes: dict) -> None:
    """metrics.jsonl with one more iteration for each change, 10 s after the other."""
    kept = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    more = [{**kept[-1], "step": 3 + i, "time_s": 15.205 + 10 * i, **change} for i, change in enumerate(changes)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept + more))


def test_phases_are_those_of_iterations_that_compile_nothing(run: Path) -> None:
    measured, steps, on_gpu = measured_seconds(run)
    assert (steps, on_gpu) == ("iteration 2", False) and measured.total == pytest.approx(5.205 - 2.502)
    rows(run, {"timing_s/plan": 1.0}, {"timing_s/plan": 3.0, "memory/peak_gib": 9.0})
    measured, steps, on_gpu = measured_seconds(run)
    assert (steps, on_gpu) == ("iterations 2 to 4", True)
    assert measured.plan == pytest.approx((0.294275 + 1 + 3) / 3, rel=1e-5)
    assert measured.total == pytest.approx((2.703 + 10 + 10) / 3)
    sessions = json.loads((run / "environment.json").read_text()) if (run / "environment.json").is_file() else []
    session = {"started": "", "from_step": 2, "command": "", "versions": {}, "cpu": "", "cores": 1, "memory_gib": 1.0}
    (run / "environment.json").write_text(json.dumps([*sessions, session | {"gpus": []}]))
    assert measured_seconds(run)[1] == "iterations 2 to 4"  # 3 is the first of another process
    assert measured_seconds(run)[0].plan == pytest.approx((0.294275 + 3) / 2, rel=1e-5)
    (run / "metrics.jsonl").write_text((RUN / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    assert measured_seconds(run)[1] == "iteration 1"  # there is no other


def test_iterations_of_several_processes_are_left_out(run: Path) -> None:
    rows(run, {"ranks/idle": 0.1})
    assert measured_seconds(run)[1] == "iteration 2"
    one = json.loads((RUN / "metrics.jsonl").read_text().splitlines()[0])
    (run / "metrics.jsonl").write_text(json.dumps(one | {"ranks/idle": 0.0}) + "\n")
    with pytest.raises(UserError, match="found iterations of several processes alone; accepted: iterations of a run"):
        measured_seconds(run)


def test_forks_are_drawn_over_the_plans_of_the_newest_samples(run: Path) -> None:
    config = replace(
        get_preset("shapeworld-smoke"), data=replace(get_preset("shapeworld-smoke").data, prompts_per_iteration=1)
    )
    forks, told = forks_of(run, config)
    assert "samples/step-000002.jsonl" in told
    assert {tuple(each) for each in forks} == {(6, 3), (15, 9), (15, 21)}  # plans of 3 and 4 steps
    shutil.rmtree(run / "samples")
    forks, told = forks_of(run, config)
    assert "no sample tables" in told
    assert {fork for each in forks for fork in each} == set(range(3, 24, 3)) and all(a == b for a, b in forks)


def test_a_tree_costs_its_branches_chunks(run: Path) -> None:
    shape = Shape([[Forks((6, 12), (2, 2)), 6]], 4, 24, 3)
    assert shape.costs(shape.forks[0], 1) == pytest.approx(
        [2 * CONTEXT / BRANCH + 2 * 2 + 4 * 4, 2 * CONTEXT / BRANCH + 6 * 4]
    )
    config = get_preset("shapeworld-smoke")
    executor = replace(config.executor, continuations=4, forks="tree", branching=(2, 2), micro_batch=36)
    config = replace(config, executor=executor, data=replace(config.data, prompts_per_iteration=1))
    forks, _ = forks_of(run, config)
    drawn = {tree for each in forks for tree in each}
    assert all(isinstance(tree, Forks) for tree in drawn) and {len(tree.frames) for tree in drawn} == {1, 2}
    assert shape_of(run, config, forks, on_gpu=False).updated == 36 // (6 * 3)
    whole = replace(config, executor=replace(executor, forks="none", branching=(), trained_chunks="video"))
    forks, _ = forks_of(run, whole)
    chunks = [len(tree.frames) - 1 for tree in forks[0]]
    assert shape_of(run, whole, forks, on_gpu=False).updated == max(1, 36 // (sum(chunks) // len(chunks) * 4 * 3))


def test_the_table_says_what_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["scaling", str(run), "--gpus", "4", "2", "2", "--slow-rank", "1.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("an estimate, not a measurement: phases of one process in iteration 2 of ")
    assert "samples/step-000002.jsonl" in lines[1] and "450 GB/s" in lines[2] and "1.5 times as long" in lines[3]
    table = [line.split() for line in lines[lines.index("") + 1 :]]
    assert table[0][:4] == ["GPUs", "s/iteration", "efficiency", "waiting"]
    assert [row[0] for row in table[1:]] == ["1", "2", "4"]
    assert table[1][1:4] == ["2.70", "100.0%", "0.0%"]
    assert all(sum(map(float, row[4:])) == pytest.approx(float(row[1]), abs=0.04) for row in table[1:])
    assert not any("slow" in line or "times as long" in line for line in scaling(run, [2]))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere", "--gpus", "2"], "nowhere: holds no config.yaml; accepted: the folder of a training run"),
        (["RUN", "--gpus", "0"], "argument --gpus: found '0', accepted: 1 to 4096"),
        (["RUN", "--gpus", "2", "4097"], "argument --gpus: found '4097', accepted: 1 to 4096"),
        (["RUN", "--gpus", "-3"], "argument --gpus: found '-3', accepted: 1 to 4096"),
        (["RUN", "--gpus"], "argument --gpus: expected at least one argument"),
        (["RUN"], "the following arguments are required: --gpus"),
        (["RUN", "--gpus", "2", "--slow-rank", "0.9"], "argument --slow-rank: found '0.9', accepted: 1 or more"),
        (["RUN", "--gpus", "2", "--slow-rank", "inf"], "argument --slow-rank: found 'inf', accepted: "),
    ],
)
def test_wrong_words_are_one_line(words: list[str], told: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["scaling", *(str(run) if word == "RUN" else word for word in words)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {told}") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("metrics.jsonl", None, "holds no metrics.jsonl"),
        ("metrics.jsonl", "", "found no row with timing_s/plan, timing_s/rollout, timing_s/rewards, timing_s/update"),
        ("metrics.jsonl", '{"step": 1, "time_s": 2.0, "timing_s/plan": null}\n', "found no row with timing_s/plan"),
        ("samples/step-000002.jsonl", "{}\n", "cannot be read (KeyError: 'plan_index')"),
        ("samples/step-000002.jsonl", "", "cannot be read (KeyError: 0)"),
        ("environment.json", "[1]", "cannot be read"),
    ],
)
def test_a_folder_that_is_no_runs_is_one_line(
    file: str, content: str | None, told: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / file).unlink(missing_ok=True)
    if content is not None:
        (run / file).write_text(content)
    assert doctor.main(["scaling", str(run), "--gpus", "2"]) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1
