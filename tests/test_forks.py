"""Where plans fork, and which of their chunks are trained (docs/algorithm.md 2.8)."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from test_references import undocumented
from test_trainer import iterate, make, smoke

from tempact.config import ExecutorConfig, validate
from tempact.errors import UserError
from tempact.forks import drawn_forks, random_chunks, switch_frames, trees
from tempact.planner.planner import Planner
from tempact.presets import get_preset
from tempact.reporting import execution_advantage_of
from tempact.trainer import Iteration, Trainer
from tempact.types import Forks, Plan, PlanBatch, Prompt, Siblings, Step, siblings_of


def plan(*bounds: int) -> Plan:
    return Plan("i", tuple(Step(a, b, f"step at {a}") for a, b in pairwise(bounds)))


def rngs(seed: int) -> list[random.Random]:
    return [random.Random(2 * seed + prompt) for prompt in range(2)]


def test_every_switch_is_the_start_of_a_step_and_never_0() -> None:
    plans = [plan(0, 3, 12, 24), plan(0, 6, 9, 15, 24), plan(0, 12, 24), plan(0, 21, 24)]
    batch = PlanBatch([Prompt("0", "i"), Prompt("1", "i")], plans, 2)
    seen: list[set[int]] = [set() for _ in plans]
    for seed in range(200):
        frames = switch_frames(batch, 3, rngs(seed))
        for each, own, frame in zip(seen, plans, frames, strict=True):
            assert frame > 0 and frame in {step.start for step in own.steps}
            each.add(frame)
        # one ordinal a group: 1, 2 or 3 of the longest plan; the shorter one stays at its last step
        assert tuple(frames[:2]) in {(3, 6), (12, 9), (12, 15)}
        assert tuple(frames[2:]) == (12, 21)
    assert seen == [{3, 12}, {6, 9, 15}, {12}, {21}]


def test_a_plan_of_one_step_forks_after_its_first_chunk() -> None:
    prompts = [Prompt("0", "i"), Prompt("1", "i")]
    batch = PlanBatch(prompts, [plan(0, 24), plan(0, 24), plan(0, 24), plan(0, 9, 24)], 2)
    for seed in range(20):
        assert switch_frames(batch, 3, rngs(seed)) == [3, 3, 3, 9]


def test_the_switches_of_a_group_are_drawn_apart_from_other_groups() -> None:
    plans = [plan(0, 3, 6, 9, 24), plan(0, 3, 6, 9, 24)]
    batch = PlanBatch([Prompt("0", "i"), Prompt("1", "i")], plans, 1)
    drawn = {tuple(switch_frames(batch, 3, rngs(seed))) for seed in range(200)}
    assert drawn == {(a, b) for a in (3, 6, 9) for b in (3, 6, 9)}


def test_a_groups_switch_is_the_same_whatever_the_groups_beside_it() -> None:
    """A group of one-step plans draws nothing, and a longer group may draw more often."""
    own = [plan(0, 3, 6, 9, 24)]
    for seed in range(20):
        found = set()
        for others in ([plan(0, 24)], [plan(0, 12, 24)], [plan(0, 3, 6, 9, 12, 15, 18, 21, 24)]):
            batch = PlanBatch([Prompt("0", "i"), Prompt("1", "i")], others + own, 1)
            found.add(switch_frames(batch, 3, rngs(seed))[1])
        assert len(found) == 1


def four(*plans: Plan) -> PlanBatch:
    """Two prompts of two plans."""
    return PlanBatch([Prompt("0", "i"), Prompt("1", "i")], list(plans), 2)


def test_a_tree_forks_at_starts_of_steps_of_the_same_ordinals_and_always_has_all_continuations() -> None:
    batch = four(plan(0, 3, 6, 9, 12, 24), plan(0, 3, 12, 24), plan(0, 12, 24), plan(0, 24))
    seen: list[set[Forks]] = [set() for _ in batch.plans]
    for seed in range(200):
        found = trees(batch, 3, (2, 3, 2), rngs(seed))
        for each, own, tree in zip(seen, batch.plans, found, strict=True):
            assert isinstance(tree, Forks) and math.prod(tree.numbers) == 12
            assert list(tree.frames) == sorted(set(tree.frames)) and tree.frames[0] > 0
            assert set(tree.frames) <= {step.start for step in own.steps} or len(own.steps) == 1
            each.add(tree)
    assert {tree.frames for tree in seen[0]} == {(3, 6, 9), (3, 6, 12), (3, 9, 12), (6, 9, 12)}
    assert {tree.numbers for tree in seen[0]} == {(2, 3, 2)}
    # the shorter plan of the group: ordinals beyond its last step are that step, whose fork makes what is missing
    assert seen[1] == {Forks((3, 12), (2, 6)), Forks((12,), (12,))}
    assert seen[2] == {Forks((12,), (12,))} and seen[3] == {Forks((3,), (12,))}


def test_a_tree_of_one_fork_is_drawn_as_the_switch_of_one() -> None:
    batch = four(plan(0, 3, 6, 9, 24), plan(0, 6, 24), plan(0, 24), plan(0, 24))
    for seed in range(100):
        one = switch_frames(batch, 3, rngs(seed))
        assert trees(batch, 3, (8,), rngs(seed)) == [Forks((frame,), (8,)) for frame in one]


def test_a_random_chunk_is_any_but_the_first_alike_for_a_group_and_uniform() -> None:
    batch = four(plan(0, 12), plan(0, 6, 12), plan(0, 3, 12), plan(0, 12))
    found = [random_chunks(batch, 3, rngs(seed)) for seed in range(600)]
    assert all(own[0] == own[1] and own[2] == own[3] for own in found)
    for group in (0, 2):
        counts = Counter(own[group] for own in found)
        assert set(counts) == {3, 6, 9} and all(abs(count - 200) < 60 for count in counts.values()), counts
    assert len({(own[0], own[2]) for own in found}) == 9


def test_draws_depend_on_the_prompts_own_numbers_alone() -> None:
    own = [plan(0, 3, 6, 9, 12, 24)] * 2
    for config in (
        changed(forks="tree", branching=(2, 2, 2)), changed(forks="random_chunk"), changed(), changed(forks="none"),
        changed(trained_chunks="video"),
    ):  # fmt: skip
        for seed in range(10):
            found = set()
            for others in ([plan(0, 24)] * 2, [plan(0, 3, 6, 9, 12, 15, 18, 24)] * 2):
                found.add(tuple(drawn_forks(config, four(*others, *own), rngs(seed))[2:]))
            assert len(found) == 1


def test_all_trained_chunks_follow_the_same_switch() -> None:
    batch = four(plan(0, 3, 12, 24), plan(0, 6, 9, 24), plan(0, 24), plan(0, 21, 24))
    for seed in range(20):
        at = switch_frames(batch, 3, rngs(seed))
        ends = [next((s.end for s in own.steps if s.start == f), 24) for own, f in zip(batch.plans, at, strict=True)]
        found = {}
        for forks, chunks in product(("one", "none"), ("first", "step", "video")):
            found[forks, chunks] = drawn_forks(changed(forks=forks, trained_chunks=chunks), batch, rngs(seed))
        assert found["one", "first"] == at
        assert found["none", "first"] == [Forks((0, frame), (8, 1)) for frame in at]
        for chunks, last in (("step", ends), ("video", [24] * 4)):
            frames = [tuple(range(*own, 3)) for own in zip(at, last, strict=True)]
            assert found["one", chunks] == [Forks(own, (8, *[1] * (len(own) - 1))) for own in frames]
            assert found["none", chunks] == [Forks((0, *own), (8, *[1] * len(own))) for own in frames]
        random_forks = drawn_forks(changed(forks="random_chunk", trained_chunks="step"), batch, rngs(seed))
        assert [tree.frames[0] for tree in random_forks] == random_chunks(batch, 3, rngs(seed))


def changed(**changes: object) -> ExecutorConfig:
    return replace(get_preset("shapeworld").executor, continuations=8, **changes)


def test_rows_of_a_record_are_the_branches_of_every_fork_with_their_leaves() -> None:
    rows = siblings_of([Forks((3, 9), (2, 4)), Forks((6,), (8,)), 3], 8, 2)
    assert rows[0] == Siblings(0, 0, 3, 0, (range(4), range(4, 8)))
    assert rows[1:5] == [
        Siblings(0, 1, 9, 0, (range(1), range(1, 2))), Siblings(0, 1, 9, 0, (range(2, 3), range(3, 4))),
        Siblings(0, 1, 9, 4, (range(4, 5), range(5, 6))), Siblings(0, 1, 9, 4, (range(6, 7), range(7, 8))),
    ]  # fmt: skip
    assert [(row.plan, row.depth, row.start, row.context) for row in rows[5:9]] == [(1, 0, 6, 0)] * 4
    assert [leaf for row in rows[5:9] for leaves in row.leaves for leaf in leaves] == list(range(8))
    assert rows[9:] == [replace(row, plan=2, start=3) for row in rows[5:9]]
    assert len({row.shared for row in rows}) == 5  # contexts
    apart = siblings_of([Forks((0, 6, 9), (2, 1, 1)), Forks((3, 6), (2, 1))], 2, 1)
    assert apart == [
        *(Siblings(0, 0, start, leaf, (range(leaf, leaf + 1),)) for start in (6, 9) for leaf in (0, 1)),
        *(Siblings(1, 0, 3, 0, (range(leaf, leaf + 1),)) for leaf in (0, 1)),
        *(Siblings(1, 0, 6, leaf, (range(leaf, leaf + 1),)) for leaf in (0, 1)),
    ]
    alone = siblings_of([6], 3)
    assert alone == [Siblings(0, 0, 6, 0, (range(1), range(1, 2), range(2, 3)))]


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("executor.branching", {"forks": "tree"}),
        ("executor.branching", {"forks": "tree", "branching": (2, 2)}),
        ("executor.branching", {"forks": "tree", "branching": (8, 1)}),
        ("executor.branching", {"forks": "tree", "branching": (2, 2, 2), "frames": 9}),
        ("executor.branching", {"branching": (8,)}),
        ("executor.branching", {"forks": "random_chunk", "branching": (8,)}),
        ("executor.forks", {"forks": "two"}),
        ("executor.frames", {"forks": "random_chunk", "frames": 3}),
        ("executor.shard", {"forks": "tree", "branching": (2, 4), "shard": 2, "cuda_graphs": False}),
        ("executor.frames", {"forks": "none", "frames": 3}),
        ("executor.shard", {"forks": "none", "shard": 2, "cuda_graphs": False}),
        ("executor.shard", {"trained_chunks": "step", "shard": 2, "cuda_graphs": False}),
        ("executor.trained_chunks", {"forks": "tree", "branching": (2, 4), "trained_chunks": "step"}),
        ("executor.trained_chunks", {"trained_chunks": "last"}),
        ("executor.compared", {"compared": "depth"}),
        ("executor.compared", {"forks": "tree", "branching": (2, 4), "compared": "all"}),
    ],
)
def test_settings_that_make_no_forks_are_refused(key: str, changes: dict[str, object]) -> None:
    with pytest.raises(UserError, match=rf"{key}: found .*; accepted: ") as error:
        validate(replace(get_preset("shapeworld"), executor=changed(**changes)))
    assert len(str(error.value).splitlines()) == 1


def test_what_is_said_to_be_accepted_is() -> None:
    for changes in (
        {"forks": "tree", "branching": (2, 2, 2)}, {"forks": "tree", "branching": (8,)},
        {"forks": "tree", "branching": (2, 2, 2), "frames": 12}, {"forks": "random_chunk", "frames": 6},
        {"forks": "random_chunk", "shard": 2, "cuda_graphs": False}, {"forks": "tree", "branching": (4, 2)},
        {"forks": "none", "frames": 6, "trained_chunks": "video"}, {"forks": "random_chunk", "trained_chunks": "step"},
        {"forks": "tree", "branching": (4, 2), "compared": "depth"},
    ):  # fmt: skip
        validate(replace(get_preset("shapeworld"), executor=changed(**changes)))


def with_steps(monkeypatch: pytest.MonkeyPatch, *spans: tuple[int, int]) -> None:
    """All plans have these steps, told as their first one and their last one; one alone as the instruction."""
    real = Planner.sample

    def sample(self: Planner, *given: object, **more: object) -> PlanBatch:
        batch = real(self, *given, **more)
        batch.plans[:] = [
            replace(own, steps=(*(Step(*span, own.steps[0].prompt) for span in spans[:-1]), Step(*spans[-1], last)))
            for own in batch.plans
            for last in [own.steps[-1].prompt if spans[1:] else own.instruction]
        ]
        return batch

    monkeypatch.setattr(Planner, "sample", sample)


def iterated(**changes: object) -> tuple[Trainer, Iteration]:
    """A trainer of the smoke preset, and its first iteration."""
    base = smoke(prompts=2)
    trainer = make(replace(base, executor=replace(base.executor, **changes)))
    return trainer, iterate(trainer)


def test_a_tree_of_one_fork_trains_as_one_does_to_the_last_bit() -> None:
    found = []
    for changes in ({}, {"forks": "tree", "branching": (2,)}):
        trainer, iteration = iterated(**changes)
        found.append((trainer.executor.parameters(), iteration))
    (one, first), (tree, second) = found
    assert first.metrics["executor/grad_norm"] > 0
    assert all(torch.equal(one[name], tree[name]) for name in one)
    for name, value in first.metrics.items():
        assert name.startswith(("timing_s/", "memory/")) or second.metrics[name] == value, name
    assert torch.equal(first.rollout.frames, second.rollout.frames)


@pytest.mark.parametrize("loss", ["flow_grpo", "diffusion_nft"])
def test_a_tree_is_trained_at_all_its_forks(loss: str) -> None:
    changes = {"forks": "tree", "continuations": 4, "branching": (2, 2), "loss": loss, "levels": "drawn"}
    _, iteration = iterated(**changes)
    batch, metrics = iteration.batch, iteration.metrics
    assert batch.transition is not None and batch.execution_advantage.shape == (len(batch.siblings), 2)
    assert batch.transition.siblings == batch.siblings
    depths = Counter(row.depth for row in batch.siblings)
    assert set(depths) == {0, 1} and depths[1] >= 2
    deep = [number for number, row in enumerate(batch.siblings) if row.depth == 1]
    assert batch.execution_mask[deep].any() and metrics["executor/grad_norm"] > 0
    assert undocumented(metrics) == [] and "rewards/step_following/depth2/mean" in metrics
    # leaves of a branch have one step behind the first fork, so its reward is that of any of them
    following = iteration.scored.step_following
    for row in batch.siblings:
        for leaves in row.leaves:
            each = (following if row.depth == 0 else iteration.scored.later[0].step_following)[row.plan, leaves.start :]
            assert torch.isnan(each[0]) or torch.allclose(each[: len(leaves)], each[0], atol=1e-3)
    for row, own in zip(batch.siblings, batch.execution_advantage, strict=True):
        for column, leaves in enumerate(row.leaves):
            for leaf in leaves if row.depth == 0 else ():
                found = execution_advantage_of(batch, row.plan, leaf)
                assert found is None or found == own[column].item()


@pytest.mark.parametrize("changes", [{"forks": "none"}, {"trained_chunks": "step"}])
@pytest.mark.parametrize("loss", ["flow_grpo", pytest.param("diffusion_nft", marks=pytest.mark.slow)])
def test_chunks_that_share_no_context_are_trained_with_their_videos_advantage(
    loss: str, changes: dict[str, str]
) -> None:
    _, iteration = iterated(loss=loss, **changes)
    batch, metrics = iteration.batch, iteration.metrics
    assert batch.transition is not None and batch.execution_advantage.shape == (len(batch.siblings), 1)
    assert batch.execution_mask.any() and metrics["executor/grad_norm"] > 0 and undocumented(metrics) == []
    known: dict[tuple[int, int], float | None] = {}
    for row, own, counted in zip(batch.siblings, batch.execution_advantage, batch.execution_mask, strict=True):
        video = row.plan, row.leaves[0].start
        told = own.item() if counted else None
        assert known.setdefault(video, told) == told == execution_advantage_of(batch, *video)
    assert len(known) == len(iteration.plans.plans) * 2
    frames = iteration.rollout.frames
    if changes.get("forks") == "none":
        assert (frames[:, 0, 0] != frames[:, 1, 0]).flatten(1).any(1).all()
        assert len(batch.siblings) == len(known)
    else:
        assert len(batch.siblings) > len(known)
        starts = Counter(batch.transition.start.tolist())  # the trained chunks of each video are one after another
        assert all(start % 3 == 0 and count % 2 == 0 for start, count in starts.items()) and len(starts) > 1


def test_one_chunk_of_one_fork_is_trained_alike_as_rows_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork whose step is one chunk: with `step` it has rows of one branch, the same loss and nearly its gradient."""
    with_steps(monkeypatch, (0, 21), (21, 24))
    found = []
    for chunks in ("first", "step"):
        base = smoke(prompts=1)
        executor = replace(base.executor, trained_chunks=chunks, continuations=4)
        trainer = make(replace(base, executor=executor))
        found.append((iterate(trainer).metrics, trainer.executor.parameters()))
    (one, first), (rows, second) = found
    assert one["executor/grad_norm"] > 0
    for name in ("executor/loss", "executor/grad_norm", "executor/reward", "executor/reward_std"):
        assert rows[name] == pytest.approx(one[name], rel=1e-4), name
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-5)


def test_a_random_chunk_trains_plans_of_one_step_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with_steps(monkeypatch, (0, 24))
    _, iteration = iterated(forks="random_chunk", seed_group=True)
    assert not torch.isnan(iteration.scored.step_following).all()
    assert iteration.batch.execution_mask.any() and iteration.batch.transition is not None
    states = iteration.batch.transition.states
    assert torch.equal(states[:, 0, 0], states[:, 1, 0]) and not torch.equal(states[:, 0, 1], states[:, 1, 1])
    assert all(start % 3 == 0 and start > 0 for start in iteration.batch.transition.start.tolist())
