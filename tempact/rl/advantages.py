"""Hierarchical advantages: plans against plans of the same prompt, continuations against those of the same plan.

Formulas: ALGORITHM.md 2.5 with the global standard deviation of *centred* rewards (section 3). A missing
reward (NaN) is left out of every mean and deviation; a group with fewer than two scored members is left out
of the update.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tempact.config import RewardConfig
from tempact.types import Scored

PLAN_EPS, EXECUTION_EPS = 1e-4, 1e-6


def plan_rewards(scored: Scored, weights: RewardConfig) -> Tensor:
    """R [P]: weighted mean over continuations of V and J, less the format penalty; NaN where J or all V miss."""
    following = torch.nanmean(_weighted(scored.temporal_following, weights.temporal_following), dim=1)
    quality = _weighted(scored.plan_quality, weights.plan_quality)
    return following + quality - weights.format_penalty * (1.0 - scored.format_score)


def execution_rewards(scored: Scored, weights: RewardConfig) -> Tensor:
    """U [P, N]: weighted L and P; NaN where either misses."""
    following = _weighted(scored.step_following, weights.step_following)
    return following + _weighted(scored.aesthetics, weights.aesthetics)


def _weighted(scores: Tensor, weight: float) -> Tensor:
    """A reward of no weight cannot be missed."""
    return weight * scores if weight else torch.zeros_like(scores)


def group_advantages(rewards: Tensor, clip: float, eps: float) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Centred on the group, over the global deviation of centred rewards, clipped.

    rewards [G, S], NaN where missing. Returns advantages [G, S] (0 where masked), mask [G, S] and metrics
    reward, reward_std, frac_reward_zero_std (of the groups that count), missing.
    """
    present = ~torch.isnan(rewards)
    counted = present & (present.sum(1, keepdim=True) >= 2)
    values = torch.where(counted, rewards, 0.0)
    mean = values.sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp_min(1)
    centred = torch.where(counted, values - mean, 0.0)
    total = int(counted.sum())
    deviation = (centred.square().sum() / max(total, 1)).sqrt()
    advantage = (centred / (deviation + eps)).clamp(-clip, clip)
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
    """The counted advantages permuted over the whole iteration: the control that must learn nothing."""
    result = advantage.clone()
    values = advantage[mask]
    result[mask] = values[torch.randperm(len(values), generator=generator).to(values.device)]
    return result
