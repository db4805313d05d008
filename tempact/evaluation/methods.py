"""The rows of the table: who plans and who draws. All of them share the noise of a prompt and seed."""

from __future__ import annotations

from dataclasses import dataclass

from tempact.evaluation.statistics import BASELINE, TRAINED

SINGLE, STEP, BOTH = "single-prompt", BASELINE, TRAINED
PLANNER_ONLY, EXECUTOR_ONLY = "planner only", "executor only"


@dataclass(frozen=True)
class Method:
    """A row of the table: who plans and who draws. planner None gives the whole instruction as one prompt."""

    name: str
    planner: str | None  # "start", "trained" or None
    executor: str  # "start" or "trained"

    @property
    def trained(self) -> bool:
        return "trained" in (self.planner, self.executor)


METHODS = (
    Method(SINGLE, None, "start"),
    Method(STEP, "start", "start"),
    Method(PLANNER_ONLY, "trained", "start"),
    Method(EXECUTOR_ONLY, "start", "trained"),
    Method(BOTH, "trained", "trained"),
)
NAMES = ("single-prompt", "step-prompt", "planner-only", "executor-only", "trained")  # on the command line
CONDITIONS = dict(zip(NAMES, METHODS, strict=True))
