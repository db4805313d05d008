"""The rewards for real video: three judges and PickScore, working at the same time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tempact.config import JudgeSettings
from tempact.rewards.base import Known, RewardSet, Scores, VideoReward, VideoScores
from tempact.rewards.judged import PlanQuality, StepFollowing, TemporalFollowing
from tempact.rewards.judges.calls import Judges
from tempact.rewards.judges.client import JudgeClient
from tempact.rewards.judges.config import ROLES, JudgeConfig
from tempact.rewards.pickscore import Aesthetics, PickScorer
from tempact.types import PlanBatch, Rollout


@dataclass(frozen=True)
class RealRewards(RewardSet):
    """A RewardSet whose judges work while the executor draws and while PickScore runs.

    Plans go to their judge as soon as they are there, videos as soon as those of a plan are, and PickScore runs on
    this thread in the meantime. Waiting for the scores raises JudgeOutage.
    """

    plan_quality: PlanQuality
    temporal_following: TemporalFollowing
    step_following: StepFollowing
    judges: Judges

    def start_plans(self, plans: PlanBatch) -> Scores:
        return self.plan_quality.start(plans)

    def start_videos(self, plans: PlanBatch, rollout: Rollout) -> VideoScores:
        following = self.temporal_following.start(plans, rollout)
        step = self.step_following.start(plans, rollout)
        return VideoScores(following, step, Known(self.aesthetics.score(plans, rollout)))

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
