"""Processes that share the executor's frozen weights train: the bits of one process that adds up in their order."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch
from distributed import faulty
from distributed.processes import SMALL, differences, ended, launched, left, metrics, trained
from distributed.test_faults import CODES, END_S, LOGGED, STALL_S, ending

from tempact import distributed, evaluate, generate
from tempact.cli import to_yaml
from tempact.distributed import Ranks
from tempact.distributed.reduction import _top, blocks, leaves_of
from tempact.errors import UserError
from tempact.executor.sampler import NoiseSource
from tempact.presets import get_preset
from tempact.rewards import Reward, RewardSet, placed
from tempact.runs.checkpoint import verify
from tempact.types import Plan, PlanBatch, Prompt, Rollout, Step

GROUPS_OF_2 = ("--executor.shard", "2", "--executor.cuda-graphs", "false")
FOUR = ("--executor.continuations", "4")
HALVES = ("--data.prompts-per-iteration", "2", "--trainer.updates-per-iteration", "2")
SMALL_BATCHES = ("--executor.micro-batch", "3", "--planner.micro-batch", "1", "--executor.rollout-videos", "2")
SPARSE = ("--rewards.custom", "distributed.faulty:sparse")
ONCE = ("--trainer.iterations", "1")


def one_after_another() -> None:
    faulty.one_step_plans()
    faulty.members_in_turn()


CASES = {
    "two updates of small batches": (*ONCE, *HALVES, *SMALL_BATCHES),
    "four continuations, missing rewards": (*FOUR, *HALVES, *SMALL_BATCHES, *SPARSE),
    "one update, recached": (*FOUR, "--executor.text-switch", "recache"),
}


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if i == 0 else pytest.mark.slow) for i, name in enumerate(CASES)]
)
def test_groups_have_the_bits_of_one_process_that_adds_up_in_their_order(
    name: str, size: int, tmp_path: Path, alone: Callable[..., Path]
) -> None:
    one = alone(*CASES[name], plant=faulty.members_in_turn)
    assert any(float(row["executor/grad_norm"]) > 0 for row in metrics(one))
    if "missing" in name:
        assert {(True, False), (False, True)} & {(any(its[:2]), any(its[2:])) for its in counted(one)}
    assert differences(one, trained(tmp_path, size, *CASES[name], *GROUPS_OF_2)) == []


def counted(folder: Path) -> list[list[bool]]:
    """Which continuations of every plan are trained on."""
    files = sorted((folder / "samples").glob("*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    plans: dict[tuple, list[bool]] = {}
    for row in rows:
        of_plan = plans.setdefault((row["step"], row["prompt_id"], row["plan_index"]), [])
        of_plan.append(row["execution_advantage"] is not None)
    return [*plans.values()]


ENDS = [  # of a member while the other waits for its part of a call
    ("term", 1, "rollout"), ("kill", 1, "rollout"), ("kill", 0, "rollout"), ("kill", 1, "update"),
    ("stop", 1, "rollout"), ("exception", 1, "rollout"), ("exception", 0, "update"), ("term", 0, "rollout"),
    ("term", 1, "update"), ("outage", 1, "rollout"), ("exception", 1, "step"), ("term", 1, "meeting"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "rank", "phase"),
    [pytest.param(*each, marks=[] if i == 0 else pytest.mark.slow) for i, each in enumerate(ENDS)],
)
def test_a_member_that_ends_leaves_nobody_in_a_call(kind: str, rank: int, phase: str, tmp_path: Path) -> None:
    folder, log, planted = tmp_path / "run", tmp_path / "log", tmp_path / "planted"
    arguments = [*SMALL, "--trainer.stall-s", str(STALL_S), *GROUPS_OF_2, "--output", str(folder)]
    (code,) = ended([launched(log, arguments, 2, 0, (kind, rank, phase, 2), planted)])
    took = time.time() - float(planted.read_text())
    said = [line for line in log.read_text().splitlines() if not LOGGED.fullmatch(line)]
    assert code == CODES[kind] and took < STALL_S + END_S, (code, took, said)
    (line,) = said
    told = ending(kind, rank, {"meeting": "update"}.get(phase, phase))
    assert re.match(told.replace(r"\S+ ERROR ", "error: "), line), line
    if (kind, rank) != ("kill", 0):
        assert "saved after iteration" in line
    assert left(tmp_path) == []
    for checkpoint in (folder / "checkpoints").glob("step-*[0-9]"):
        verify(checkpoint)


@pytest.mark.parametrize(
    ("units", "groups", "members"), [(5, 2, 2), (1, 2, 2), (3, 1, 4), (8, 3, 2), (0, 1, 2), (7, 3, 1)]
)
def test_leaves_fall_to_one_rank_each_and_their_sum_has_one_order(units: int, groups: int, members: int) -> None:
    """Numbers of very different size, whose sum depends on its order."""
    size, leaves = groups * members, units * members
    owned = [leaves_of(units, rank, size, members) for rank in range(size)]
    assert sorted(chain(*owned)) == [*range(leaves)]
    assert all(
        leaf % units in leaves_of(units, rank // members, groups, 1) for rank in range(size) for leaf in owned[rank]
    )
    values = torch.randn(leaves, 3) * 10.0 ** torch.randint(-6, 6, (leaves, 1))

    def added(level: int, index: int) -> torch.Tensor:
        if level == 0:
            return values[index]
        left, right = 2 * index, 2 * index + 1
        there = right << (level - 1) < leaves
        return added(level - 1, left) + added(level - 1, right) if there else added(level - 1, left)

    if units:
        nodes = [(*node, added(*node)) for own in owned for node in blocks(own)]
        assert torch.equal(_top(nodes), added(leaves.bit_length(), 0))


def test_ranks_of_groups() -> None:
    ranks = [Ranks(rank, 6, members=2) for rank in range(6)]
    assert [(each.member, each.groups, [*each.alike]) for each in ranks] == [(0, 3, [0, 2, 4]), (1, 3, [1, 3, 5])] * 3


def test_a_block_follows_the_first_continuations_noise_until_its_fork() -> None:
    noise = NoiseSource((3, 4, 1), lambda plan, continuation, chunk: torch.tensor([plan, continuation, chunk]))
    own = noise.block(range(2, 4), [1, 3, 2]).part(slice(1, 3))
    assert own.shape == (2, 2, 1)
    seen = {chunk: [video.tolist() for video in own(chunk, [(0, 0), (0, 1), (1, 1)])] for chunk in (0, 2, 3)}
    assert seen == {
        0: [[1, 0, 0], [1, 0, 0], [2, 0, 0]], 2: [[1, 0, 2], [1, 0, 2], [2, 3, 2]], 3: [[1, 2, 3], [1, 3, 3], [2, 3, 3]]
    }  # fmt: skip


def test_scores_of_blocks_are_put_together_by_their_place() -> None:
    whole = torch.arange(12.0).view(3, 4)
    parts = [(plans, own, whole[plans.start : plans.stop, own.start : own.stop])
             for own in (range(2, 4), range(2)) for plans in (range(1, 3), range(1))]  # fmt: skip
    assert torch.equal(placed(parts, 3, 4), whole)
    assert torch.equal(
        placed([(range(1, 3), range(0), whole[1:, 0]), (range(1), range(0), whole[:1, 0])], 3, 4), whole[:, 0]
    )
    with pytest.raises(AssertionError, match=r"scores of others than \[3, 4\]"):
        placed(parts[1:], 3, 4)


def test_a_plans_one_score_is_not_that_of_a_part_of_its_videos() -> None:
    """[P, N] scores at the plan level, of which the mean is taken, come from blocks."""
    plans = PlanBatch([Prompt("a", "i")], [Plan("i", (Step(0, 6, "a"), Step(6, 9, "b")))], 1)
    rollout = Rollout(torch.zeros(1, 2, 9, 3, 8, 8, dtype=torch.uint8))

    def scored(score: object, own: range | None) -> torch.Tensor:
        def nothing(prompts: list[str], plans: list[Plan], frames: torch.Tensor, spans: object) -> torch.Tensor:
            return torch.zeros(frames.shape[:2] if frames.shape[1] else len(plans))

        rewards = RewardSet(nothing, nothing, nothing, nothing, (Reward("own", lambda *_: score, level="plan"),))
        scoring = rewards.begin(plans, None, own)
        scoring.add(rollout, range(1))
        return scoring.scores()[1][2]["own"]

    assert scored([0.5], None).tolist() == [0.5] and scored([[0.5, 1.0]], range(2, 4)).tolist() == [[0.5, 1.0]]
    with pytest.raises(
        UserError, match=r"rewards.custom: own: found scores of shape \[1\]; accepted: \[1, 2\] \(plans,"
    ):
        scored([0.5], range(2, 4))


@pytest.mark.parametrize("command", [evaluate.main, generate.main])
def test_commands_that_do_not_train_hold_all_weights(
    command: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--prompt", "a cat"] if command is generate.main else []
    assert command(["wan-14b", *more, "--executor.shard", "2"]) == 2
    assert capsys.readouterr().err == "error: executor.shard: found 2; accepted: 1 in a command that does not train\n"
    (tmp_path / "config.yaml").write_text(to_yaml(get_preset("wan-14b")))
    for target in ("wan-14b", str(tmp_path)):
        assert command([target, *more, "--device", "cpu"]) == 2
        assert "executor.shard" not in capsys.readouterr().err


def test_a_gpu_that_waits_for_a_member_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Event:
        def record(self) -> None:
            asked.clear()

        def query(self) -> bool:
            asked.append(1)
            return len(asked) == ends

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(distributed, "GRACE_S", 0.1)
    ends = 2
    Ranks(0, 2, members=2, direct=True).drain()
    assert len(asked) == 2
    ends = 0
    with pytest.raises(RuntimeError, match="the GPU waits for a process that has left"):
        Ranks(0, 2, members=2, direct=True).drain()
    asked.clear()
    Ranks(0, 2, direct=True).drain()
    Ranks(0, 2, members=2).drain()
    assert not asked
