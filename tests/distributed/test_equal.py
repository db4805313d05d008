"""A run has the same bits on any number of processes, whatever of it falls to whom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from distributed import faulty
from distributed.processes import differences, metrics, trained

MANY = ("--data.prompts-per-iteration", "3")
HALVES = ("--data.prompts-per-iteration", "2", "--trainer.updates-per-iteration", "2")
SMALL_BATCHES = ("--executor.micro-batch", "3", "--planner.micro-batch", "1")
TREE = ("--executor.forks", "tree", "--executor.continuations", "4", "--executor.branching", "2", "2")
PATCHY = ("--rewards.custom", "distributed.faulty:patchy")


@dataclass(frozen=True)
class Case:
    """arguments: of the run. seen: a metric which shows, in some iteration, that the case is what it is called.
    soon: numbers of processes in every run of the tests."""

    arguments: tuple[str, ...] = ()
    plant: Callable[[], None] | None = None
    seen: tuple[str, Callable[[float], bool]] = ("planner/reward", lambda value: True)
    soon: tuple[int, ...] = ()


CASES = {
    "smoke": Case(),
    "six plans": Case((*MANY, *SMALL_BATCHES)),
    "two updates of small batches": Case((*HALVES, *SMALL_BATCHES), seen=("planner/loss@2", lambda value: True)),
    "missing rewards": Case((*MANY, *PATCHY), seen=("rewards/patchy/missing", lambda share: 0 < share < 1)),
    "one-step plans": Case(MANY, faulty.one_step_plans, ("executor/missing", lambda share: share > 0)),
    "missing rewards, one-step plans, two updates": Case(
        (*HALVES, *SMALL_BATCHES, *PATCHY, "--alarms.every", "1"), faulty.one_step_plans,
        ("rewards/patchy/missing", lambda share: 0 < share < 1), (3,),
    ),
    "gradients that are not finite": Case(
        (), faulty.broken_gradients, ("executor/skipped_updates", lambda count: count == 1)
    ),
    "videos a call": Case((*HALVES, "--executor.rollout-videos", "1")),
    "a tree": Case((*MANY, *SMALL_BATCHES, *TREE), seen=("executor/depth2/reward", lambda value: True)),
    "a tree, missing rewards, one-step plans, two updates": Case(
        (*HALVES, *SMALL_BATCHES, *TREE, *PATCHY), faulty.one_step_plans,
        ("rewards/patchy/depth2/missing", lambda share: 0 < share < 1),
    ),
    "a tree by depth": Case((*MANY, *SMALL_BATCHES, *TREE, "--executor.compared", "depth")),
    "no fork, all chunks of a step": Case(
        (*HALVES, *SMALL_BATCHES, *PATCHY, "--executor.forks", "none", "--executor.trained-chunks", "step")
    ),
    "a random chunk, seed groups": Case((*MANY, "--executor.forks", "random_chunk", "--executor.seed-group", "true")),
    "a frozen planner": Case((*MANY, "--planner.train", "false"), seen=("executor/loss", lambda value: True)),
    "a frozen executor": Case((*MANY, "--executor.train", "false"), seen=("planner/loss", lambda value: True)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=[] if size in case.soon else pytest.mark.slow)
        for name, case in CASES.items()
        for size in (2, 3, 4)
    ],
)
def test_several_processes_have_the_bits_of_one(
    name: str, size: int, tmp_path: Path, alone: Callable[..., Path]
) -> None:
    case = CASES[name]
    one = alone(*case.arguments, plant=case.plant)
    metric, holds = case.seen
    values = [float(row[metric]) for row in metrics(one) if metric in row]
    assert any(map(holds, values)), values
    assert differences(one, trained(tmp_path, size, *case.arguments, plant=case.plant)) == []


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_default_preset_has_the_bits_of_one_process(tmp_path: Path) -> None:
    """With its evaluation."""
    short = ("--evaluation.simple", "8", "--evaluation.hard", "8")
    one, *others = (
        trained(tmp_path / str(size), size, *short, preset="shapeworld", whole=True, longest_s=700)
        for size in (1, 2, 3, 4)
    )
    for other in others:
        assert differences(one, other) == []
        assert (one / "evaluation.json").read_text() == (other / "evaluation.json").read_text()
