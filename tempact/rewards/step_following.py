"""Step following L: a vision judge on the step that starts at the switch (ALGORITHM.md 2.6)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, Field
from torch import Tensor

from tempact.rewards.frame_picks import jpegs, media_hash, pixel_window, spread
from tempact.rewards.judge_types import JudgeCall
from tempact.rewards.pending import Judges, Pending, Replies
from tempact.rewards.rubrics import quoted, rubric
from tempact.types import PlanBatch, Rollout, Step

ROLE = "step_following"
SUBJECT, SCENE, ACTION, APPEARANCE, FINAL = 0.15, 0.15, 0.2, 0.2, 0.3
TOP_MARK = 10.0
TASK = "Judge this part of a video."

Mark = Annotated[float, Field(ge=0, le=TOP_MARK)]


class StepVerdict(BaseModel):
    """The judge's reply; names beside these are ignored."""

    subject: Mark
    scene: Mark
    action: Mark
    appearance: Mark
    final: Mark


def step_score(verdict: StepVerdict) -> float:
    """L in [0, 1]."""
    marks = SUBJECT * verdict.subject + SCENE * verdict.scene + ACTION * verdict.action
    marks += APPEARANCE * verdict.appearance + FINAL * verdict.final
    return min(1.0, marks / TOP_MARK)


def step_call(prompt: str, frames: Tensor) -> JudgeCall:
    """The question about a step: its prompt as the planner wrote it, and pictures uint8 [k, 3, height, width]."""
    images = jpegs(frames)
    asked = rubric(ROLE, StepVerdict, len(images))
    return JudgeCall(ROLE, asked, quoted(TASK, {"step": prompt}), images, media_hash(images))


def switched_steps(plans: PlanBatch, rollout: Rollout, count: int) -> Iterator[tuple[int, Step, list[int]]]:
    """Of every plan with a step that starts at the switch: its index, that step, and `count` pixel frames of the step,
    its first and its last among them. Where no step starts at the switch nothing can be compared."""
    assert rollout.transition is not None
    for p, (plan, start) in enumerate(zip(plans.plans, rollout.transition.start.tolist(), strict=True)):
        step = plan.steps[plan.step_at(start)]
        if step.start == start:
            window = pixel_window(step.start, step.end, plan.frames, rollout.frames.shape[2])
            yield p, step, spread(*window, count)


@dataclass(frozen=True)
class StepFollowing:
    judges: Judges
    frames: int = 6  # that the judge sees

    def start(self, plans: PlanBatch, rollout: Rollout) -> Pending:
        """Sends the switched step of all videos to the judge, plan by plan; scores [P, N]."""
        replies: Replies = {}
        for p, step, picks in switched_steps(plans, rollout, self.frames):
            asked = self.judges.submit([step_call(step.prompt, video[picks]) for video in rollout.frames[p]])
            replies |= {(p, n): reply for n, reply in enumerate(asked)}
        return Pending(tuple(rollout.frames.shape[:2]), replies, step_score)

    def score(self, plans: PlanBatch, rollout: Rollout) -> Tensor:
        """[P, N] in [0, 1], NaN where missing or where no step starts at the switch."""
        return self.start(plans, rollout).result()
