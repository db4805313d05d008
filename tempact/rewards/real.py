"""The rewards for real video: three judges and PickScore, working at the same time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tempact.config import JudgeSettings
from tempact.rewards.aesthetics import Aesthetics, PickScorer
from tempact.rewards.base import VideoReward
from tempact.rewards.combine import RewardSet
from tempact.rewards.judge_client import JudgeClient
from tempact.rewards.judge_config import ROLES, JudgeConfig
from tempact.rewards.pending import Judges, Pending
from tempact.rewards.plan_quality import PlanQuality
from tempact.rewards.step_following import StepFollowing
from tempact.rewards.temporal_following import TemporalFollowing
from tempact.types import PlanBatch, Rollout, Scored


@dataclass(frozen=True)
class PendingScores:
    """Scores of an iteration while the judges work."""

    plans: PlanBatch
    plan_quality: Pending
    temporal_following: Pending
    step_following: Pending
    aesthetics: torch.Tensor

    def result(self) -> Scored:
        """Waits for the judges. Every tensor has its whole shape, NaN where missing. Raises JudgeOutage."""
        return Scored(
            plan_quality=self.plan_quality.result(),
            format_score=torch.tensor([plan.format_score for plan in self.plans.plans]),
            temporal_following=self.temporal_following.result(),
            step_following=self.step_following.result(),
            aesthetics=self.aesthetics,
        )


@dataclass(frozen=True)
class RealRewards(RewardSet):
    """A RewardSet whose judges work while the executor draws and while PickScore runs.

    `begin` sends the plans off as soon as they are there; `start` sends the videos and computes PickScore on this
    thread in the meantime; `score` waits for all of it.
    """

    plan_quality: PlanQuality
    temporal_following: TemporalFollowing
    step_following: StepFollowing
    judges: Judges
    _begun: list[tuple[PlanBatch, Pending]] = field(default_factory=list, init=False, repr=False)

    def begin(self, plans: PlanBatch) -> None:
        """Sends plans to their judge before there are videos. At most one batch waits: another replaces it."""
        self._begun[:] = [(plans, self.plan_quality.start(plans))]

    def start(self, plans: PlanBatch, rollout: Rollout) -> PendingScores:
        """Sends all that `begin` has not sent, and scores aesthetics. Raises JudgeOutage."""
        begun = next((pending for batch, pending in self._begun if batch is plans), None)
        self._begun.clear()
        quality = begun or self.plan_quality.start(plans)
        following = self.temporal_following.start(plans, rollout)
        step = self.step_following.start(plans, rollout)
        return PendingScores(plans, quality, following, step, self.aesthetics.score(plans, rollout))

    def score(self, plans: PlanBatch, rollout: Rollout) -> Scored:
        """All raw rewards on the CPU. Raises JudgeOutage."""
        return self.start(plans, rollout).result()

    def metrics(self) -> dict[str, float]:
        """`judge/<role>/...` and `rewards/aesthetics/truncated` since the last call of this."""
        picked = self.aesthetics.scorer.stats() if isinstance(self.aesthetics, Aesthetics) else {}
        return self.judges.stats() | picked

    def close(self) -> None:
        """Ends the judges' thread."""
        self.judges.close()


def real_rewards(client: Judges, scorer: PickScorer, settings: JudgeSettings) -> RealRewards:
    """The four rewards of ALGORITHM.md 2.6; closing them closes the client."""
    return judged_rewards(client, Aesthetics(scorer, settings.aesthetics_frames), settings)


def judged_rewards(client: Judges, aesthetics: VideoReward, settings: JudgeSettings) -> RealRewards:
    """The three rewards of judges, and one of pictures; closing them closes the client."""
    return RealRewards(
        plan_quality=PlanQuality(client),
        temporal_following=TemporalFollowing(client, settings.video_frames),
        step_following=StepFollowing(client, settings.step_frames),
        aesthetics=aesthetics,
        judges=client,
    )


def judge_config(settings: JudgeSettings, roles: Mapping[str, str] = ROLES) -> JudgeConfig:
    """The judges of these roles as the environment names them (docs/judges.md); UserError for what is missing there.

    roles: role to the prefix of its fallback names, "" for none
    """
    return JudgeConfig.from_environment(
        roles,
        deadline_s=settings.deadline_s,
        attempt_s=settings.attempt_s,
        attempts=settings.attempts,
        outage_s=settings.outage_s,
        cache=Path(settings.cache) if settings.cache else None,
    )


def open_judges(settings: JudgeSettings) -> JudgeClient:
    """A client of the judges of training; UserError as `judge_config`, and without the package openai."""
    return JudgeClient(judge_config(settings))


def open_scorer(settings: JudgeSettings, device: torch.device) -> PickScorer:
    """PickScore on a device; UserError if its weights are not there."""
    return PickScorer.load(
        settings.aesthetics_weights, settings.aesthetics_processor, device, settings.aesthetics_batch
    )
