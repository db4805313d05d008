"""Plan quality J: a text judge compares the plan with the instruction (ALGORITHM.md 2.6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, Field
from torch import Tensor

from tempact.rewards.judge_types import JudgeCall
from tempact.rewards.pending import Judges, Pending
from tempact.rewards.rubrics import quoted, rubric
from tempact.types import Plan, PlanBatch

ROLE = "plan_quality"
FAITHFULNESS, COVERAGE, TEMPORAL, HALLUCINATION = 0.4, 0.25, 0.25, 0.3
TASK = "Judge this plan."

Share = Annotated[float, Field(ge=0, le=1)]


class PlanVerdict(BaseModel):
    """The judge's reply; names beside these are ignored."""

    faithfulness: Share
    coverage: Share
    temporal: Share
    hallucination: Share


def plan_score(verdict: PlanVerdict) -> float:
    """J in [0, 0.9]."""
    raw = FAITHFULNESS * verdict.faithfulness + COVERAGE * verdict.coverage + TEMPORAL * verdict.temporal
    return min(1.0, max(0.0, raw - HALLUCINATION * verdict.hallucination))


def plan_call(plan: Plan) -> JudgeCall:
    """The question about a plan: its instruction and its steps as the planner wrote them, not smoothed."""
    data = {"instruction": plan.instruction, "steps": [step.prompt for step in plan.steps]}
    return JudgeCall(ROLE, rubric(ROLE, PlanVerdict), quoted(TASK, data))


@dataclass(frozen=True)
class PlanQuality:
    judges: Judges

    def start(self, plans: PlanBatch) -> Pending:
        """Sends all plans to the judge; scores [P]."""
        replies = self.judges.submit([plan_call(plan) for plan in plans.plans])
        return Pending((len(plans.plans),), {(p,): reply for p, reply in enumerate(replies)}, plan_score)

    def score(self, plans: PlanBatch) -> Tensor:
        """[P] in [0, 0.9], NaN where missing."""
        return self.start(plans).result()
