"""Temporal following V: a vision judge on the whole video, which knows the instruction and nothing of the plan
(ALGORITHM.md 2.6)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, Field, create_model
from torch import Tensor

from tempact.rewards.frame_picks import jpegs, media_hash, spread
from tempact.rewards.judge_types import JudgeCall
from tempact.rewards.pending import Judges, Pending, Replies
from tempact.rewards.rubrics import quoted, rubric
from tempact.types import PlanBatch, Rollout

ROLE, HELD_OUT = "temporal_following", "held_out"  # HELD_OUT: of evaluations, never trained against
FRAMES, FINAL, TEMPORAL_ORDER, PHYSICAL, CONSISTENCY, ALIGNMENT = 0.2, 0.3, 0.2, 0.1, 0.1, 0.1
TOP_MARK = 10.0
TASK = "Judge this video."

Mark = Annotated[float, Field(ge=0, le=TOP_MARK)]


class VideoVerdict(BaseModel):
    """The judge's reply; names beside these are ignored. `video_fields` asks for one frame score a picture."""

    frame_scores: list[Mark]
    temporal_order: Mark
    physical: Mark
    consistency: Mark
    alignment: Mark
    final: Mark


@cache
def video_fields(frames: int) -> type[VideoVerdict]:
    """A verdict on `frames` pictures: a reply with more or fewer frame scores is no reply."""
    scores: Any = (list[Mark], Field(min_length=frames, max_length=frames))
    return create_model(f"VideoVerdict{frames}", __base__=VideoVerdict, frame_scores=scores)


def video_score(verdict: VideoVerdict) -> float:
    """V in [0, 1]."""
    marks = FRAMES * sum(verdict.frame_scores) / len(verdict.frame_scores) + FINAL * verdict.final
    marks += TEMPORAL_ORDER * verdict.temporal_order + PHYSICAL * verdict.physical
    marks += CONSISTENCY * verdict.consistency + ALIGNMENT * verdict.alignment
    return min(1.0, marks / TOP_MARK)


def rubric_version() -> str:
    """Of the wording: scores of two versions are not the same measurement."""
    return rubric(ROLE, video_fields(1), 1).version


def video_call(instruction: str, pictures: Tensor, role: str = ROLE) -> JudgeCall:
    """The question about a video.

    pictures  uint8 [k, 3, height, width], what the judge sees: the first frame, the last, and frames evenly between
    role      which judge is asked
    """
    images = jpegs(pictures)
    asked = rubric(ROLE, video_fields(len(images)), len(images))
    return JudgeCall(role, asked, quoted(TASK, {"instruction": instruction}), images, media_hash(images))


@dataclass(frozen=True)
class TemporalFollowing:
    judges: Judges
    frames: int = 6  # that the judge sees
    role: str = ROLE

    def start(self, plans: PlanBatch, rollout: Rollout) -> Pending:
        """Sends all videos to the judge, plan by plan; scores [P, N]."""
        replies: Replies = {}
        picks = spread(0, rollout.frames.shape[2] - 1, self.frames)
        for p, (plan, videos) in enumerate(zip(plans.plans, rollout.frames, strict=True)):
            asked = self.judges.submit([video_call(plan.instruction, video[picks], self.role) for video in videos])
            replies |= {(p, n): reply for n, reply in enumerate(asked)}
        return Pending(tuple(rollout.frames.shape[:2]), replies, video_score)

    def score(self, plans: PlanBatch, rollout: Rollout) -> Tensor:
        """[P, N] in [0, 1], NaN where missing."""
        return self.start(plans, rollout).result()
