"""Plans that fork several times, or not at all: videos, records, and updates on them (docs/algorithm.md 2.8)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tempact.executor.executor import Executor
from tempact.executor.rollout import cost_of
from tempact.executor.sampler import NoiseSource, gaussian_noise
from tempact.types import Batch, Fork, Forks, Plan, Step, Transition, starts_of, tree_of

Make = Callable[..., Executor]
CPU = torch.device("cpu")
COUNT, FRAMES = 4, 15
TREE = {"forks": "tree", "branching": (2, 2), "continuations": COUNT, "frames": FRAMES}


def plan(*bounds: int) -> Plan:
    return Plan("i", tuple(Step(a, b, f"step {a}") for a, b in pairwise(bounds)))


# the second plan has one switch, which makes all branches
PLANS = [plan(0, 3, 9, 15), plan(0, 6, 15), plan(0, 6, 12, 15)]
FORKS: list[Fork] = [Forks((3, 9), (2, 2)), Forks((6,), (4,)), Forks((6, 12), (2, 2))]


def noise_of(executor: Executor, plans: int = len(PLANS)) -> NoiseSource:
    return gaussian_noise(3, executor.noise_shape(plans, COUNT), CPU)


def rolled(executor: Executor) -> tuple[Tensor, Transition]:
    latents, record = executor.roll_out(PLANS, FORKS, noise_of(executor))
    assert record is not None
    return latents, record


def batch_of(record: Transition, seed: int = 1) -> Batch:
    rows, width = record.states.shape[:2]
    advantage = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(rows, width, dtype=torch.bool)
    return Batch(torch.zeros(3), torch.ones(3, dtype=torch.bool), advantage, mask, None, record, record.siblings)


def gradients(executor: Executor) -> Tensor:
    found = torch.cat([p.grad.flatten() for p in executor.parameters().values()])
    for parameter in executor.parameters().values():
        parameter.grad = None
    return found


@pytest.mark.parametrize("changes", [{}, {"window": "infinity-rope", "text_switch": "recache"}])
def test_a_leafs_video_is_that_of_the_noise_on_its_way(make_executor: Make, changes: dict[str, str]) -> None:
    """Made alone, without a fork: the noise of each chunk is that of the first leaf of the branch that makes it."""
    executor = make_executor(**TREE, **changes)
    latents, _ = rolled(executor)
    for p, (own, tree) in enumerate(zip(PLANS, FORKS, strict=True)):
        assert isinstance(tree, Forks)
        for leaf in range(COUNT):

            def draw(_: int, __: int, chunk: int, p: int = p, tree: Forks = tree, leaf: int = leaf) -> Tensor:
                each = COUNT // tree.branches_at(3 * chunk)
                return noise_of(executor).draw(p, leaf // each * each, chunk)

            alone = NoiseSource((1, 1, *noise_of(executor).shape[2:]), draw)
            torch.testing.assert_close(executor.roll_out([own], [0], alone)[0][0, 0], latents[p, leaf])
    for a, b, videos in ((0, 3, 1), (3, 9, 2), (9, 15, 4)):  # of plan 0
        assert len(latents[0, :, :, a:b].flatten(1).unique(dim=0)) == videos


def test_the_record_holds_every_branch_at_its_fork_on_the_context_that_it_comes_from(make_executor: Make) -> None:
    executor = make_executor(**TREE)
    latents, record = rolled(executor)
    noise = noise_of(executor)
    assert record.states.shape[:3] == (8, 2, 4) and record.noises.shape[:3] == (8, 2, 3)
    assert record.start.tolist() == [3, 9, 9, 6, 6, 6, 12, 12]
    for number, row in enumerate(record.siblings):
        start = row.start
        assert len(record.prompts[number]) == start // 3 + 1
        for column, leaves in enumerate(row.leaves):
            drawn = noise.draw(row.plan, leaves.start, start // 3)
            assert torch.equal(record.states[number, column, 0], drawn[0])
            assert torch.equal(record.noises[number, column], drawn[1:])
            for leaf in leaves:  # all leaves of a branch come from its context
                assert torch.equal(record.prefix[number, :, :start], latents[row.plan, leaf, :, :start])
        assert not record.prefix[number, :, start:].any()


@pytest.mark.parametrize("loss", ["flow_grpo", "diffusion_nft"])
def test_training_sees_the_context_of_the_roll_out_and_micro_batches_change_nothing(
    make_executor: Make, loss: str
) -> None:
    found = []
    for size in (64, 8, 2):
        executor = make_executor(**TREE, loss=loss, micro_batch=size)
        _, record = rolled(executor)
        metrics = executor.update(batch_of(record), list(range(8)))
        if loss == "flow_grpo":  # a wrong parent's context would be clips away
            gaps = [value for name, value in metrics.items() if name.startswith("rollout_gap/")]
            assert len(gaps) == 3 and max(gaps) < 1e-2, gaps
        assert not executor.cache.branches and not executor.cache.rows_used
        found.append((gradients(executor), metrics["loss"]))
    for gradient, value in found[1:]:
        torch.testing.assert_close(gradient, found[0][0], rtol=1e-3, atol=1e-8)
        assert value == pytest.approx(found[0][1], rel=1e-5)
    assert found[0][0].norm() > 0


# rows of videos that go on alone; those of the second share their context at frame 3
APART: list[Fork] = [Forks((0, 3), (COUNT, 1)), Forks((0, 6, 9, 12), (COUNT, 1, 1, 1)), Forks((0, 6), (COUNT, 1))]
CHUNKS: list[Fork] = [Forks((3, 6), (COUNT, 1)), Forks((6, 9, 12), (COUNT, 1, 1)), 6]


@pytest.mark.parametrize(("forks", "changes"), [(APART, {"forks": "none"}), (CHUNKS, {"trained_chunks": "step"})])
@pytest.mark.parametrize("text_switch", ["cross_attention", "recache"])
def test_videos_that_go_on_alone_are_recorded_and_trained_on_contexts_of_their_own(
    make_executor: Make, forks: list[Fork], changes: dict[str, str], text_switch: str
) -> None:
    found = []
    for size in (64, 3):
        window = {"window": "infinity-rope", "text_switch": text_switch} if text_switch == "recache" else {}
        executor = make_executor(continuations=COUNT, frames=FRAMES, micro_batch=size, **changes, **window)
        latents, record = executor.roll_out(PLANS, forks, noise_of(executor))
        assert record is not None and record.states.shape[1] == 1
        frames = [[f for f in tree_of(own, COUNT).frames if f] for own in forks]
        assert record.start.tolist() == [frame for own in frames for frame in own for _ in range(COUNT)]
        for number, row in enumerate(record.siblings):
            (leaf,), noise = row.leaves[0], noise_of(executor)
            assert torch.equal(record.prefix[number, :, : row.start], latents[row.plan, leaf, :, : row.start])
            assert torch.equal(record.states[number, 0, 0], noise.draw(row.plan, leaf, row.start // 3)[0])
        assert starts_of(record) == {p: own[0] for p, own in enumerate(frames)} and not starts_of(record, 1)
        metrics = executor.update(batch_of(record), list(range(len(record.siblings))))
        gaps = [value for name, value in metrics.items() if name.startswith("rollout_gap/")]
        assert len(gaps) == 3 and max(gaps) < 1e-2, gaps
        assert not executor.cache.branches and not executor.cache.rows_used
        found.append((gradients(executor), metrics["loss"]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=1e-8)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5) and found[0][0].norm() > 0


def test_without_a_fork_every_video_is_that_of_its_own_noise(make_executor: Make) -> None:
    executor = make_executor(continuations=COUNT, frames=FRAMES, forks="none")
    latents, _ = executor.roll_out(PLANS, APART, noise_of(executor))
    for p, own in enumerate(PLANS):
        for n in range(COUNT):
            alone = NoiseSource(
                (1, 1, *noise_of(executor).shape[2:]), lambda _, __, c, p=p, n=n: noise_of(executor).draw(p, n, c)
            )
            torch.testing.assert_close(executor.roll_out([own], [0], alone)[0][0, 0], latents[p, n])
    assert cost_of(range(3), APART, COUNT, executor.settings) == 3 * COUNT * 5


def test_the_gap_tells_a_wrong_context(make_executor: Make) -> None:
    """The check of the test above: with the context of another branch the gap is wide."""
    executor = make_executor(**TREE)
    _, record = rolled(executor)
    prefix = record.prefix.clone()
    prefix[1], prefix[2] = record.prefix[2], record.prefix[1]  # of the two branches at frame 9 of plan 0
    metrics = executor.update(batch_of(replace(record, prefix=prefix)), list(range(8)))
    assert max(value for name, value in metrics.items() if name.startswith("rollout_gap/")) > 0.1


def test_the_update_is_the_mean_over_all_branches_of_all_depths(make_executor: Make) -> None:
    """On policy and without KL: the sum of each row's own update, by its share of the terms."""
    executor = make_executor(**TREE, kl_weight=0.0)
    batch = batch_of(rolled(executor)[1])
    batch.execution_mask[1, 0] = False
    executor.update(batch, list(range(8)))
    whole, summed = gradients(executor), torch.zeros(())
    for row in range(8):
        executor.update(batch, [row])
        summed = summed + gradients(executor) * (batch.execution_mask[row].sum() / batch.execution_mask.sum())
    torch.testing.assert_close(summed, whole, rtol=1e-3, atol=1e-8)


def test_a_tree_of_one_fork_has_the_bits_of_one(make_executor: Make) -> None:
    found = []
    for changes, forks in (({"forks": "tree", "branching": (COUNT,)}, Forks((6,), (COUNT,))), ({}, 6)):
        executor = make_executor(continuations=COUNT, frames=FRAMES, **changes)
        latents, record = executor.roll_out(PLANS[1:], [forks] * 2, noise_of(executor, 2))
        advantage = torch.linspace(-1, 1, 2 * COUNT).view(2, COUNT)
        counted = torch.ones(2, COUNT, dtype=torch.bool)
        executor.update(Batch(torch.zeros(2), counted[:, 0], advantage, counted, None, record, record.siblings), [0, 1])
        found.append([latents, record.states, record.noises, record.prefix, gradients(executor)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_parts_of_a_roll_out_record_the_same(make_executor: Make) -> None:
    executor = make_executor(**TREE)
    _, whole = rolled(executor)
    executor.config = replace(executor.config, rollout_videos=COUNT)
    made: list[Transition] = []
    together = executor.rollout(PLANS, FORKS, noise_of(executor), lambda _, part: made.append(part.transition))
    assert together.transition is not None and [len(part.siblings) for part in made] == [3, 2, 3]
    assert [{row.plan for row in part.siblings} for part in made] == [{0}] * 3
    assert together.transition.siblings == whole.siblings
    for name in ("states", "noises"):
        parts = torch.cat([getattr(part, name) for part in made])
        torch.testing.assert_close(parts, getattr(whole, name), rtol=0, atol=1e-5)
        assert torch.equal(parts, getattr(together.transition, name))
    assert starts_of(whole) == {0: 3, 1: 6, 2: 6} and starts_of(whole, 1) == {0: 9, 2: 12}


def test_rows_of_one_context_share_it_and_the_cache_does_not_grow_with_the_plans(
    make_executor: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    real = Executor._rebuild
    monkeypatch.setattr(
        Executor, "_rebuild", lambda self, h, t, rows, *more: (made.append(len(rows)), real(self, h, t, rows, *more))
    )
    executor = make_executor(**TREE)
    _, record = rolled(executor)
    executor.velocities(record, [3, 4])
    assert made == [1]  # both rows of plan 1
    made.clear()
    executor.velocities(record, [1, 2, 5])
    assert made == [2, 1]  # two branches at frame 9; another switch frame
    frames = []
    for count in (2, 8):
        executor = make_executor(**TREE, window="infinity-rope", micro_batch=6, rollout_videos=COUNT)
        tree, mine = [Forks((3, 9), (2, 2))] * count, [PLANS[0]] * count
        record = executor.rollout(mine, tree, noise_of(executor, count)).transition
        executor.update(batch_of(record), list(range(3 * count)))
        frames.append(executor.cache.rows_total // executor.frame_tokens)
    assert frames[0] == frames[1]


def test_a_trees_cost_is_that_of_its_chunks(make_executor: Make) -> None:
    settings = make_executor(**TREE).settings
    assert cost_of(range(3), FORKS, COUNT, settings) == (1 + 2 + 2 + 4 + 4) + (1 + 1 + 4 + 4 + 4) + (1 + 1 + 2 + 2 + 4)
    assert cost_of(range(1), [6], COUNT, settings) == 2 + 4 * 3


def test_a_seed_group_begins_its_chunks_from_one_noise_and_draws_the_rest_apart(make_executor: Make) -> None:
    executor = make_executor(frames=FRAMES, loss="diffusion_nft")
    plain = noise_of(executor, 2)
    group = plain.seed_group(5)
    for p in range(2):
        for chunk in range(5):
            for n in range(COUNT):
                own = group.draw(p, n, chunk)
                assert torch.equal(own[0], plain.draw(p, 0, chunk)[0])
                assert torch.equal(own[1:], plain.draw(p, n, chunk)[1:])
        assert torch.equal(group.draw(p, 2, 5), plain.draw(p, 2, 5))  # of the forward process
    latents, record = executor.roll_out(PLANS[:2], [3, 6], group)
    assert (record.states[:, 0] - record.states[:, 1]).abs().amax() > 0.1
    assert (latents[:, 0, :, 6:9] - latents[:, 1, :, 6:9]).abs().amax() > 1e-3
    states = make_executor(frames=FRAMES).roll_out(PLANS[:2], [3, 6], group)[1].states
    assert all(torch.equal(states[:, n, 0], states[:, 0, 0]) for n in range(COUNT))
