"""What a reward is: scores of plans or of videos, with *missing* as a result of its own.

The four rewards of the method, scored together (ALGORITHM.md 2.6).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tempact.types import PlanBatch, Rollout, Scored

log = logging.getLogger(__name__)


class PlanReward(Protocol):
    """Judges plans as text."""

    def score(self, plans: PlanBatch) -> Tensor:
        """[P] fp32; NaN where no score could be had (ALGORITHM.md decision 7)."""
        ...


class VideoReward(Protocol):
    """Judges every continuation of every plan."""

    def score(self, plans: PlanBatch, rollout: Rollout) -> Tensor:
        """[P, N] fp32; NaN where no score could be had."""
        ...


class Scores(Protocol):
    """A reward's scores, which may be still on their way."""

    def result(self) -> Tensor:
        """Waits for them; NaN where missing."""
        ...


@dataclass(frozen=True)
class Known:
    scores: Tensor

    def result(self) -> Tensor:
        return self.scores


class VideoScores(NamedTuple):
    """Of the videos of a few plans, [plans, N] each."""

    temporal_following: Scores
    step_following: Scores
    aesthetics: Scores


@dataclass(frozen=True)
class RewardSet:
    """Plan quality J, temporal following V (whole video), step following L (the step at the switch),
    aesthetics P (the transition chunk)."""

    plan_quality: PlanReward
    temporal_following: VideoReward
    step_following: VideoReward
    aesthetics: VideoReward

    def begin(self, plans: PlanBatch) -> Scoring:
        """Starts to score plans whose videos are still to be made."""
        return Scoring(self, plans, self.start_plans(plans))

    def score(self, plans: PlanBatch, rollout: Rollout) -> Scored:
        """All raw rewards on the CPU. A number outside [0, 1] is no score: it counts as missing."""
        scoring = self.begin(plans)
        scoring.add(rollout)
        return scoring.result()

    def start_plans(self, plans: PlanBatch) -> Scores:
        return Known(self.plan_quality.score(plans))

    def start_videos(self, plans: PlanBatch, rollout: Rollout) -> VideoScores:
        rewards = self.temporal_following, self.step_following, self.aesthetics
        return VideoScores(*(Known(reward.score(plans, rollout)) for reward in rewards))

    def metrics(self) -> dict[str, float]:
        """How the scoring itself went since the last call of this; names as in `metrics.jsonl`."""
        return {}

    def close(self) -> None:
        """Ends what the rewards have started; they score nothing afterwards."""


@dataclass
class Scoring:
    """The scores of a batch of plans, whose videos come a few plans at a time.

    Where judges serve, they work while the next videos are made.
    """

    rewards: RewardSet
    plans: PlanBatch
    quality: Scores
    parts: list[VideoScores] = field(default_factory=list)
    seen: int = 0  # plans whose videos have come

    def add(self, rollout: Rollout) -> None:
        """The videos of the next plans, P' x N."""
        own = range(self.seen, self.seen + len(rollout.frames))
        prompts, plans = [self.plans.prompt_of(p) for p in own], [self.plans.plans[p] for p in own]
        self.parts.append(self.rewards.start_videos(PlanBatch(prompts, plans, 1), rollout))
        self.seen = own.stop

    def result(self) -> Scored:
        """Waits for all. Every tensor has its whole shape, NaN where missing."""
        assert self.seen == len(self.plans.plans), f"videos of {self.seen} of {len(self.plans.plans)} plans"
        names = VideoScores._fields
        videos = {name: torch.cat([getattr(part, name).result().cpu() for part in self.parts]) for name in names}
        return Scored(
            plan_quality=_valid("plan_quality", self.quality.result()),
            format_score=torch.tensor([plan.format_score for plan in self.plans.plans]),
            **{name: _valid(name, scores) for name, scores in videos.items()},
        )


def _valid(name: str, scores: Tensor) -> Tensor:
    scores = scores.detach().float().cpu()
    outside = ~torch.isnan(scores) & ~((scores >= 0) & (scores <= 1))
    if outside.any():
        log.warning("%s: %d scores outside [0, 1] count as missing", name, int(outside.sum()))
    return scores.masked_fill(outside, float("nan"))
