from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tempact.config import RewardConfig
from tempact.rl.advantages import (
    EXECUTION_EPS,
    PLAN_EPS,
    execution_rewards,
    group_advantages,
    plan_rewards,
    shuffled,
    sibling_advantages,
)
from tempact.rl.flow_grpo import flow_grpo_gradient
from tempact.types import Forks, Scored, siblings_of

NAN = math.nan
WEIGHTS = RewardConfig()


def draw_scored(plans: int = 6, continuations: int = 5, seed: int = 0) -> Scored:
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    return Scored(
        plan_quality=0.9 * uniform(plans),
        format_score=torch.tensor([1.0, 0.5, 0.0])[torch.arange(plans) % 3],
        temporal_following=uniform(plans, continuations),
        step_following=uniform(plans, continuations),
        aesthetics=uniform(plans, continuations),
    )


def by_hand(rewards: list[list[float]], clip: float, eps: float) -> list[list[float]]:
    """Advantages as loops over the members that count; NaN where a member does not."""
    groups = [[r for r in group if not math.isnan(r)] for group in rewards]
    means = [sum(group) / len(group) if len(group) > 1 else NAN for group in groups]
    centred = [r - mean for group, mean in zip(groups, means, strict=True) if not math.isnan(mean) for r in group]
    std = math.sqrt(sum(c * c for c in centred) / len(centred))
    scale = [[(r - mean) / (std + eps) for r in group] for group, mean in zip(rewards, means, strict=True)]
    return [[a if math.isnan(a) else max(-clip, min(clip, a)) for a in group] for group in scale]


def test_plan_reward_of_known_scores():
    scored = Scored(
        plan_quality=torch.tensor([0.8, 0.5, NAN]),
        format_score=torch.tensor([1.0, 0.5, 1.0]),
        temporal_following=torch.tensor([[0.2, 0.6], [NAN, 0.4], [0.5, 0.5]]),
        step_following=torch.zeros(3, 2),
        aesthetics=torch.zeros(3, 2),
    )
    rewards = plan_rewards(scored, WEIGHTS)
    assert rewards[:2].tolist() == pytest.approx([0.85 * 0.4 + 0.15 * 0.8, 0.85 * 0.4 + 0.15 * 0.5 - 0.25])
    assert math.isnan(rewards[2])


def test_execution_reward_of_known_scores():
    scored = draw_scored(1, 3)
    scored.step_following = torch.tensor([[0.5, NAN, 1.0]])
    scored.aesthetics = torch.tensor([[0.25, 1.0, NAN]])
    rewards = execution_rewards(scored, WEIGHTS)
    assert rewards[0, 0].item() == pytest.approx(0.6 * 0.5 + 0.4 * 0.25)
    assert rewards.isnan().tolist() == [[False, True, True]]


def test_a_reward_without_weight_cannot_be_missed():
    scored = draw_scored()
    scored.aesthetics[:] = NAN
    scored.plan_quality[:] = NAN
    weights = replace(WEIGHTS, aesthetics=0.0, plan_quality=0.0)
    assert torch.equal(execution_rewards(scored, weights), 0.6 * scored.step_following)
    assert plan_rewards(scored, weights).isfinite().all()


def test_advantages_are_those_of_loops_and_clipped():
    rewards = draw_scored(4, 6).step_following
    rewards[0, 0] = 6.0
    for clip, eps in ((1.0, PLAN_EPS), (2.0, EXECUTION_EPS)):
        advantage, mask, metrics = group_advantages(rewards, clip, eps)
        torch.testing.assert_close(advantage, torch.tensor(by_hand(rewards.tolist(), clip, eps)), rtol=0, atol=1e-5)
        assert mask.all() and advantage.abs().max().item() == clip
        assert metrics["reward"] == pytest.approx(rewards.mean().item(), abs=1e-6)


def test_std_is_of_centred_rewards_so_gaps_between_groups_do_not_shrink_it():
    rewards = torch.tensor([[0.0, 0.2], [10.0, 10.2]])
    advantage, _, metrics = group_advantages(rewards, 5.0, 0.0)
    assert metrics["reward_std"] == pytest.approx(0.1, rel=1e-4)
    torch.testing.assert_close(advantage, torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]), rtol=0, atol=1e-4)


def test_deviations_of_a_group_of_all_or_none():
    """By the standard library, for groups of 4, 3 and 2 members that differ by 10, 1 and 0.1."""
    rewards = draw_scored(3, 4).step_following * torch.tensor([[10.0], [1.0], [0.1]])
    rewards[1, 0] = rewards[2, 0] = rewards[2, 3] = NAN
    groups = [[r for r in group if not math.isnan(r)] for group in rewards.tolist()]
    centred = [[r - statistics.fmean(group) for r in group] for group in groups]
    each = [statistics.pstdev(group) for group in groups]
    whole = math.sqrt(statistics.fmean([c * c for group in centred for c in group]))
    divisors = {"global": [whole] * 3, "group": each, "none": [1.0] * 3}
    for std, own in divisors.items():
        advantage, mask, metrics = group_advantages(rewards, 1e9, 0.0, std=std)
        expected = torch.tensor([c / by for group, by in zip(centred, own, strict=True) for c in group])
        torch.testing.assert_close(advantage[mask], expected, rtol=1e-4, atol=1e-6)
        assert metrics["reward_std"] == pytest.approx(whole, rel=1e-5)
    shifted = group_advantages(rewards + 0.5, 1e9, 0.0, std="group")[0]
    torch.testing.assert_close(shifted, group_advantages(rewards, 1e9, 0.0, std="group")[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("std", ["global", "group", "none"])
def test_a_group_of_equal_rewards_has_no_advantage_by_any_deviation(std: str):
    rewards = torch.full((2, 7), 0.7)
    rewards[1, 0] = 0.1
    advantage, mask, _ = group_advantages(rewards, 2.0, EXECUTION_EPS, std=std, leave_one_out=True)
    assert mask.all() and torch.equal(advantage[0], torch.zeros(7)) and advantage[1].all()


def test_a_leave_one_out_baseline_is_the_mean_of_the_others():
    rewards = draw_scored(3, 4).step_following
    rewards[1, 2] = NAN
    rewards[2, :3] = NAN  # one member has no others
    advantage, mask, _ = group_advantages(rewards, 1e9, 0.0, std="none", leave_one_out=True)
    for group in range(2):
        members = [i for i in range(4) if not math.isnan(rewards[group, i])]
        for i in members:
            others = statistics.fmean(rewards[group, j].item() for j in members if j != i)
            assert advantage[group, i].item() == pytest.approx(rewards[group, i].item() - others, abs=1e-6)
    assert not mask[2].any() and torch.equal(advantage[2], torch.zeros(4)) and advantage[1, 2] == 0
    torch.testing.assert_close(advantage.sum(1), torch.zeros(3), rtol=0, atol=1e-6)


def test_groups_sum_to_zero_before_clipping():
    scored = draw_scored(8, 5)
    for rewards in (plan_rewards(scored, WEIGHTS).view(2, 4), execution_rewards(scored, WEIGHTS)):
        advantage, _, _ = group_advantages(rewards, 1e9, EXECUTION_EPS)
        torch.testing.assert_close(advantage.sum(1), torch.zeros(len(advantage)), rtol=0, atol=1e-5)
        assert advantage.abs().max().item() > 0.5


def test_permuting_continuations_leaves_plan_rewards_and_permutes_execution_advantages():
    scored, order = draw_scored(), torch.tensor([3, 0, 4, 1, 2])
    fields = ("temporal_following", "step_following", "aesthetics")
    permuted = replace(scored, **{name: getattr(scored, name)[:, order] for name in fields})
    torch.testing.assert_close(plan_rewards(permuted, WEIGHTS), plan_rewards(scored, WEIGHTS), rtol=0, atol=1e-6)
    before, _, _ = group_advantages(execution_rewards(scored, WEIGHTS), 2.0, EXECUTION_EPS)
    after, _, _ = group_advantages(execution_rewards(permuted, WEIGHTS), 2.0, EXECUTION_EPS)
    torch.testing.assert_close(after, before[:, order], rtol=0, atol=1e-5)
    assert not torch.allclose(after, before, atol=0.1)


@pytest.mark.parametrize("others", [0.0, 1.0])
def test_a_group_of_equal_rewards_gets_exactly_zero_and_is_counted(others: float):
    rewards = torch.full((4, 7), 0.7)
    rewards[1] += others * torch.linspace(0, 1, 7)
    advantage, mask, metrics = group_advantages(rewards, 2.0, EXECUTION_EPS)
    assert mask.all() and torch.equal(advantage[[0, 2, 3]], torch.zeros(3, 7))
    assert metrics["frac_reward_zero_std"] == pytest.approx(0.75 if others else 1.0)
    v, v_old, noise = torch.randn(3, 28, 12, generator=torch.Generator().manual_seed(0))
    gradient, _ = flow_grpo_gradient(
        v, v_old, v_old, noise, advantage.flatten(), mask.flatten(), clip=0.1, kl_weight=0.0, terms=28
    )
    assert torch.equal(gradient[0:7], torch.zeros(7, 12)) and bool(gradient.any()) == bool(others)


def test_the_threshold_of_flat_groups_is_between_rounding_and_the_finest_scores():
    steps = torch.tensor([0.0, 1.0, 0.0, 1.0])
    rewards = 0.7 + torch.stack([6e-7 * steps, 1e-5 * steps, 0.1 * steps])  # half of that from their means
    advantage, _, metrics = group_advantages(rewards, 5.0, EXECUTION_EPS)
    assert torch.equal(advantage[0], torch.zeros(4)) and (advantage[1:] != 0).all()
    assert metrics["frac_reward_zero_std"] == pytest.approx(1 / 3)


def test_shift_and_scale_of_rewards_change_nothing():
    rewards = draw_scored(4, 6).aesthetics
    advantage, _, metrics = group_advantages(rewards, 2.0, EXECUTION_EPS)
    shifted, _, _ = group_advantages(rewards + 0.5, 2.0, EXECUTION_EPS)
    torch.testing.assert_close(shifted, advantage, rtol=0, atol=1e-5)
    for scale in (0.1, 7.0):
        scaled, _, _ = group_advantages(scale * rewards, 2.0, EXECUTION_EPS)
        allowed = 4 * EXECUTION_EPS / min(scale, 1.0) / metrics["reward_std"] + 1e-5
        torch.testing.assert_close(scaled, advantage, rtol=0, atol=allowed)


def test_a_missing_reward_counts_as_a_member_that_is_not_there():
    rewards = draw_scored(4, 6).step_following
    rewards[0, 2] = rewards[3, 0] = NAN
    advantage, mask, metrics = group_advantages(rewards, 2.0, EXECUTION_EPS)
    expected = torch.tensor(by_hand(rewards.tolist(), 2.0, EXECUTION_EPS))
    assert torch.equal(mask, ~rewards.isnan()) and torch.equal(mask, ~expected.isnan())
    torch.testing.assert_close(advantage, expected.nan_to_num(0.0), rtol=0, atol=1e-5)
    assert metrics["missing"] == pytest.approx(2 / 24)
    assert metrics["reward"] == pytest.approx(rewards.nanmean().item(), abs=1e-6)


def test_a_group_with_fewer_than_two_scores_is_masked_and_leaves_the_others_alone():
    rewards = draw_scored(4, 3).step_following
    alone, _, _ = group_advantages(rewards[:2], 2.0, EXECUTION_EPS)
    rewards[2, 1:] = NAN
    rewards[3] = NAN
    advantage, mask, metrics = group_advantages(rewards, 2.0, EXECUTION_EPS)
    assert mask.any(1).tolist() == [True, True, False, False]
    assert torch.equal(advantage[2:], torch.zeros(2, 3))
    torch.testing.assert_close(advantage[:2], alone, rtol=0, atol=1e-6)
    assert metrics["frac_reward_zero_std"] == 0.0


def test_nothing_scored_masks_everything_without_a_nan_advantage():
    advantage, mask, metrics = group_advantages(torch.full((2, 3), NAN), 2.0, EXECUTION_EPS)
    assert not mask.any() and torch.equal(advantage, torch.zeros(2, 3))
    assert metrics["missing"] == 1.0 and metrics["reward_std"] == 0.0 and math.isnan(metrics["reward"])


def test_shuffling_permutes_what_counts_and_follows_its_generator():
    values = torch.arange(40.0).view(8, 5)
    mask = torch.ones(8, 5, dtype=torch.bool)
    mask[2, 3] = mask[6] = False
    one = shuffled(values, mask, torch.Generator().manual_seed(1))
    assert torch.equal(one[~mask], values[~mask])
    assert torch.equal(one[mask].sort().values, values[mask])
    # over the whole iteration: most values leave their group
    assert ((one // 5)[mask] != (values // 5)[mask]).float().mean().item() > 0.5
    assert torch.equal(one, shuffled(values, mask, torch.Generator().manual_seed(1)))
    assert not torch.equal(one, shuffled(values, mask, torch.Generator().manual_seed(2)))


def tree_rewards(plans: int, seed: int = 0) -> list[Tensor]:
    """U [P, 4] of two depths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(plans, 4, generator=generator) for _ in range(2)]


TREES = [Forks((3, 9), (2, 2)), Forks((6,), (4,)), Forks((6, 12), (2, 2))]


def test_a_branchs_advantage_is_the_mean_of_its_leaves_against_its_siblings_of_one_depth() -> None:
    first, second = tree_rewards(3)
    rows = siblings_of(TREES, 4, 2)
    advantage, mask, metrics = sibling_advantages([first, second], rows, 9.0, EXECUTION_EPS)
    halves = first.view(3, 2, 2).mean(-1).tolist()  # of the two branches of plans 0 and 2 at their first fork
    one = [halves[0], first[1].tolist(), halves[2]]
    two = [second[p, i : i + 2].tolist() for p in (0, 2) for i in (0, 2)]
    expected = [by_hand(own, 9.0, EXECUTION_EPS) for own in (one, two)]
    by_depth = [
        [a for row, own in zip(rows, advantage.tolist(), strict=True) if row.depth == d for a in own] for d in (0, 1)
    ]
    for found, told in zip(by_depth, expected, strict=True):
        assert found == pytest.approx([a for own in told for a in own], abs=1e-5)
    assert mask.all() and advantage.shape == (8, 2)
    groups: dict[tuple, float] = {}
    for row, own in zip(rows, advantage, strict=True):
        groups[row.shared] = groups.get(row.shared, 0.0) + own.sum().item()
    assert len(groups) == 7 and all(abs(total) < 1e-5 for total in groups.values())
    assert metrics["missing"] == metrics["depth2/missing"] == 0.0
    assert metrics["reward"] == pytest.approx(torch.tensor([*halves[0], *first[1].tolist(), *halves[2]]).mean().item())
    assert metrics["depth2/reward"] == pytest.approx(second[[0, 2]].mean().item())


def test_each_depth_is_normalised_by_itself() -> None:
    first, second = tree_rewards(3)
    rows = siblings_of(TREES, 4, 2)
    whole = sibling_advantages([first, second], rows, 9.0, EXECUTION_EPS)[0]
    scaled = sibling_advantages([first, 100 * second + 7], rows, 9.0, EXECUTION_EPS)[0]
    torch.testing.assert_close(scaled, whole, rtol=1e-3, atol=1e-4)
    deep = torch.tensor([row.depth for row in rows]) == 1
    assert whole[deep].square().mean() == pytest.approx(1.0, abs=1e-4)
    assert whole[~deep].square().mean() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("std", ["global", "group", "none"])
def test_one_fork_has_the_bits_of_group_advantages(std: str) -> None:
    rewards = execution_rewards(draw_scored(), WEIGHTS)
    rewards[1, 2] = rewards[3, 1:] = NAN
    rows = siblings_of([3, 6, 3, 6, 9, 9], 5)
    assert all(len(row.leaves) == 5 for row in rows)
    found = sibling_advantages([rewards], rows, 2.0, EXECUTION_EPS, std=std)
    known = group_advantages(rewards, 2.0, EXECUTION_EPS, std=std)
    assert torch.equal(found[0], known[0]) and torch.equal(found[1], known[1]) and found[2] == known[2]


def test_by_depth_a_branch_is_compared_with_all_of_its_depth() -> None:
    first, second = tree_rewards(3)
    rows = siblings_of(TREES, 4, 2)
    advantage, mask, _ = sibling_advantages([first, second], rows, 9.0, EXECUTION_EPS, by_depth=True)
    deep = torch.stack([own for row, own in zip(rows, advantage, strict=True) if row.depth == 1]).view(2, 4)
    assert deep.flatten().tolist() == pytest.approx(
        [a for own in by_hand(second[[0, 2]].tolist(), 9.0, EXECUTION_EPS) for a in own], abs=1e-5
    )
    siblings = sibling_advantages([first, second], rows, 9.0, EXECUTION_EPS)[0]
    shallow = torch.tensor([row.depth for row in rows]) == 0
    torch.testing.assert_close(advantage[shallow], siblings[shallow])  # at the first fork all are siblings
    assert mask.all() and (advantage[~shallow] - siblings[~shallow]).abs().amax() > 0.1


def test_all_chunks_of_a_video_have_the_advantage_of_the_first() -> None:
    """Whether they share a context or not: that of `group_advantages`, also where plans have unlike numbers of them."""
    rewards = execution_rewards(draw_scored(), WEIGHTS)
    rewards[1, 2] = rewards[3, 1:] = NAN
    known, counted, metrics = group_advantages(rewards, 2.0, EXECUTION_EPS)
    for shared in ((), (0,)):
        frames = [(6,), (6, 9, 12), (3,), (6, 9), (9,), (12,)]
        trees = [Forks((*shared, *own), (5, *[1] * (len(own) + len(shared) - 1))) for own in frames]
        rows = siblings_of(trees, 5, 1)
        assert len(rows) == 5 * 9
        found = sibling_advantages([rewards], rows, 2.0, EXECUTION_EPS, by_depth=True)
        for row, advantage, mask in zip(rows, *found[:2], strict=True):
            place = row.plan, row.leaves[0].start
            assert advantage.item() == known[place].item() and mask.item() == counted[place].item()
        assert found[2] == metrics


def test_missing_leaves_are_left_out_of_a_branch_and_a_branch_of_none_out_of_its_siblings() -> None:
    first, second = tree_rewards(3)
    rows = siblings_of(TREES, 4, 2)
    first[0, 1] = NAN  # one of two leaves
    first[2, 2:] = NAN  # both
    advantage, mask, metrics = sibling_advantages([first, second], rows, 9.0, EXECUTION_EPS)
    assert mask[:-3].all() and not mask[5].any() and mask[6:].all()  # a branch alone is compared with nothing
    assert rows[5].plan == 2 and rows[5].depth == 0 and not advantage[5].any()
    assert metrics["missing"] == pytest.approx(1 / 8) and metrics["depth2/missing"] == 0.0
    assert (advantage[0, 0] > 0) == bool(first[0, 0] > first[0, 2:].mean())


def test_equal_branches_have_no_advantage_whatever_their_leaves() -> None:
    first = torch.tensor([[0.2, 0.8, 0.5, 0.5]])
    rows = siblings_of(TREES[:1], 4, 2)
    advantage, mask, metrics = sibling_advantages([first, first], rows, 2.0, EXECUTION_EPS)
    assert (
        mask.all() and not advantage[0].any() and advantage[1].tolist() == pytest.approx([-(2**0.5), 2**0.5], rel=1e-4)
    )
    assert not advantage[2].any()
    assert (metrics["frac_reward_zero_std"], metrics["depth2/frac_reward_zero_std"]) == (1.0, 0.5)
