"""Hierarchical advantages: plans against plans of the same prompt, continuations against those of the same plan.

Formulas of docs/algorithm.md 2.5, by default with the global standard deviation of *centred* rewards (section 3). A
missing reward (NaN) is left out of every mean and deviation; a group with fewer than two scored members is left out of
the update.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tempact.config import RewardConfig
from tempact.types import RewardLevel, Scored, Siblings

PLAN_EPS, EXECUTION_EPS = 1e-4, 1e-6  # added to the standard deviations


def plan_rewards(scored: Scored, weights: RewardConfig) -> Tensor:
    """R [P]: weighted mean of V over continuations, plus weighted J, less the format penalty, plus own rewards of
    plans (their mean where they score continuations). NaN where a reward of some weight is missing, of V and of own
    scores of continuations where all of a plan's are."""
    following = torch.nanmean(_weighted(scored.temporal_following, weights.temporal_following), dim=1)
    quality = _weighted(scored.plan_quality, weights.plan_quality)
    reward = following + quality - weights.format_penalty * (1.0 - scored.format_score)
    for own in _own(scored, "plan"):
        reward = reward + (torch.nanmean(own, dim=1) if own.ndim == 2 else own)
    return reward


def execution_rewards(scored: Scored, weights: RewardConfig) -> Tensor:
    """U [P, N]: weighted L and P, plus own rewards of continuations. NaN where a reward of some weight is missing."""
    following = _weighted(scored.step_following, weights.step_following)
    reward = following + _weighted(scored.aesthetics, weights.aesthetics)
    for own in _own(scored, "execution"):
        reward = reward + own
    return reward


def _own(scored: Scored, level: RewardLevel) -> list[Tensor]:
    return [_weighted(own.scores, own.weight) for own in scored.custom if own.level == level]


def _weighted(scores: Tensor, weight: float) -> Tensor:
    """Scores times their weight; a reward of weight 0 cannot be missed."""
    return weight * scores if weight else torch.zeros_like(scores)


def group_advantages(
    rewards: Tensor, clip: float, eps: float, *, std: str = "global", leave_one_out: bool = False
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Rewards less their group's mean, over a standard deviation, clipped to +-`clip`.

    std: the deviation is that of the centred rewards of all groups ("global"), of the group's own ("group"; GRPO, arXiv
    2402.03300), or there is none ("none"; Dr. GRPO, arXiv 2503.20783). leave_one_out: the mean is that of the group's
    other members (RLOO, arXiv 2402.14740).

    rewards [G, S] of G groups, NaN where missing. Returns advantages [G, S] (0 where masked), the mask [G, S] of
    members that count, and the metrics reward, reward_std (of all groups), frac_reward_zero_std (share of the groups
    that count whose rewards are equal) and missing.
    """
    present = ~torch.isnan(rewards)
    counted = present & (present.sum(1, keepdim=True) >= 2)
    values = torch.where(counted, rewards, 0.0)
    members = counted.sum(1, keepdim=True)
    mean = values.sum(1, keepdim=True) / members.clamp_min(1)
    centred = torch.where(counted, values - mean, 0.0)
    total = int(counted.sum())
    deviation = (centred.square().sum() / max(total, 1)).sqrt()
    advantage = centred
    if std != "none":
        own = (centred.square().sum(1, keepdim=True) / members.clamp_min(1)).sqrt()
        advantage = centred / ((deviation if std == "global" else own) + eps)
    if leave_one_out:  # S / (S - 1) times the distance from the mean of all S is that from the mean of the others
        advantage = advantage * (members / (members - 1).clamp_min(1))
    advantage = advantage.clamp(-clip, clip)
    groups = counted.any(1)
    # rounding leaves specks on equal rewards; a group that differs by less carries no signal
    flat = groups & (centred.abs().amax(1) < 1e-6)
    advantage = torch.where(flat[:, None], 0.0, advantage)
    metrics = {
        "reward": torch.nanmean(rewards).item(),
        "reward_std": deviation.item(),
        "frac_reward_zero_std": (flat.sum() / groups.sum().clamp_min(1)).item(),
        "missing": 1.0 - present.float().mean().item(),
    }
    return advantage, counted, metrics


def sibling_advantages(
    rewards: Sequence[Tensor],
    rows: Sequence[Siblings],
    clip: float,
    eps: float,
    *,
    std: str = "global",
    by_depth: bool = False,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Execution advantages of branches, against their siblings: the branches of one fork.

    A branch's reward is the mean of its leaves' (BranchGRPO, arXiv 2509.06040, with equal weights: leaves are drawn
    from the policy, and come as often as it makes them), missing ones left out. Each depth is normalised by itself, as
    `group_advantages` does it with the siblings of a fork as a group: "global" is the deviation of a depth's centred
    rewards.

    rewards: of every depth, U [P, N] by the step that begins at its fork, NaN where missing. rows: of the record, G of
    S branches each; those of the same leaves at one depth, chunks of one branch, have one advantage. by_depth: a group
    is all branches of a plan at a depth, as in BranchGRPO. Returns advantages and mask [G, S], and the metrics of
    `group_advantages`, those of the second depth named depth2/reward and so on.
    """
    width = len(rows[0].leaves)
    advantage, mask = torch.zeros(len(rows), width), torch.zeros(len(rows), width, dtype=torch.bool)
    metrics: dict[str, float] = {}
    for depth, values in enumerate(rewards):
        # of every group: its branches, by their first leaves, and the places of each in the record
        groups: dict[tuple[int, ...], dict[int, list[tuple[int, int]]]] = {}
        for number, row in enumerate(rows):
            if row.depth == depth:
                group = groups.setdefault((row.plan,) if by_depth else row.shared, {})
                for column, leaves in enumerate(row.leaves):
                    group.setdefault(leaves.start, []).append((number, column))
        if not groups:
            continue
        table = torch.full((len(groups), max(map(len, groups.values()))), float("nan"))
        branches = [(g, i, own) for g, group in enumerate(groups.values()) for i, own in enumerate(group.values())]
        for g, i, own in branches:
            first, column = own[0]
            leaves = rows[first].leaves[column]
            table[g, i] = values[rows[first].plan, leaves.start : leaves.stop].nanmean()
        found, counted, told = group_advantages(table, clip, eps, std=std)
        for g, i, own in branches:
            for place in own:
                advantage[place], mask[place] = found[g, i], counted[g, i]
        if len(branches) < table.numel():  # what a smaller group has not is not missing
            told["missing"] = 1.0 - (~torch.isnan(table)).sum().item() / len(branches)
        metrics |= {f"depth{depth + 1}/{name}" if depth else name: value for name, value in told.items()}
    return advantage, mask, metrics


def shuffled(advantage: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """[G, S] advantages, the counted ones permuted over the whole iteration: the control that must learn nothing."""
    result = advantage.clone()
    values = advantage[mask]
    result[mask] = values[torch.randperm(len(values), generator=generator).to(values.device)]
    return result
