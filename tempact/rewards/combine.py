"""The four rewards of the method, scored together (ALGORITHM.md 2.6)."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from tempact.rewards.base import PlanReward, VideoReward
from tempact.types import PlanBatch, Rollout, Scored

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardSet:
    """Plan quality J, temporal following V (whole video), step following L (the step at the switch),
    aesthetics P (the transition chunk)."""

    plan_quality: PlanReward
    temporal_following: VideoReward
    step_following: VideoReward
    aesthetics: VideoReward

    def begin(self, plans: PlanBatch) -> None:
        """Tells of plans whose videos are still to be made, so that scoring them may begin."""

    def metrics(self) -> dict[str, float]:
        """How the scoring itself went since the last call of this; names as in `metrics.jsonl`."""
        return {}

    def close(self) -> None:
        """Ends what the rewards have started; they score nothing afterwards."""

    def score(self, plans: PlanBatch, rollout: Rollout) -> Scored:
        """All raw rewards on the CPU. A number outside [0, 1] is no score: it counts as missing."""
        return Scored(
            plan_quality=_valid("plan_quality", self.plan_quality.score(plans)),
            format_score=torch.tensor([plan.format_score for plan in plans.plans]),
            temporal_following=_valid("temporal_following", self.temporal_following.score(plans, rollout)),
            step_following=_valid("step_following", self.step_following.score(plans, rollout)),
            aesthetics=_valid("aesthetics", self.aesthetics.score(plans, rollout)),
        )


def _valid(name: str, scores: Tensor) -> Tensor:
    scores = scores.detach().float().cpu()
    outside = ~torch.isnan(scores) & ~((scores >= 0) & (scores <= 1))
    if outside.any():
        log.warning("%s: %d scores outside [0, 1] count as missing", name, int(outside.sum()))
    return scores.masked_fill(outside, float("nan"))
