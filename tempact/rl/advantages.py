"""Hierarchical advantages: plans against plans of the same prompt, continuations against those of the same plan.

Formulas of docs/algorithm.md 2.5, by default with the global standard deviation of *centred* rewards (section 3). A
missing reward (NaN) is left out of every mean and deviation; a group with fewer than two scored members is left out of
the update.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tempact.config import RewardConfig
from tempact.types import RewardLevel, Scored

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


def shuffled(advantage: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """[G, S] advantages, the counted ones permuted over the whole iteration: the control that must learn nothing."""
    result = advantage.clone()
    values = advantage[mask]
    result[mask] = values[torch.randperm(len(values), generator=generator).to(values.device)]
    return result
