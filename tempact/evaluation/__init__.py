"""What the tables compare: methods, and what is registered for the Temporal Order Benchmark. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tempact.evaluation.prompts import OrderPrompt

SINGLE, STEP, BOTH = "single-prompt", "step-prompt", "+ TempAct"  # STEP is the baseline that changes are against
PLANNER_ONLY, EXECUTOR_ONLY = "planner only", "executor only"
SINGLE_AFTER = "single-prompt, trained executor"
REWORDED, REWORDED_AFTER = "reworded steps", "reworded steps, trained executor"


@dataclass(frozen=True)
class Method:
    """A row of the table: which planner and which executor make its videos.

    planner: "start" (before training), "trained", or None, which gives the whole instruction as one prompt.
    executor: "start" or "trained".
    reworded: the executor is given the steps in words that training never has, their meaning unchanged.
    baseline: name of the method that its change is against.
    """

    name: str
    planner: str | None
    executor: str
    reworded: bool = False
    baseline: str = STEP
    best_of: int = 1  # continuations at each switch, of which the best goes on

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
# after training: does an executor follow better, or only the prompts that training has shown?
OVERFITTING = (
    Method(SINGLE_AFTER, None, "trained", baseline=SINGLE),
    Method(REWORDED, "start", "start", reworded=True),
    Method(REWORDED_AFTER, "start", "trained", reworded=True, baseline=REWORDED),
)
BASELINES = {method.name: method.baseline for method in OVERFITTING}  # those that are not step prompts among them
FORKED = (STEP, BOTH)  # methods that `--best-of` adds rows of
NAMES = ("single-prompt", "step-prompt", "planner-only", "executor-only", "trained")  # on the command line
CONDITIONS = dict(zip(NAMES, METHODS, strict=True))


def with_best_of(methods: Sequence[Method], count: int) -> list[Method]:
    """The methods, and those of step prompts and of both policies among them with the best of `count` continuations at
    every switch."""
    again = [replace(one, name=f"{one.name}, best of {count}", best_of=count) for one in methods if one.name in FORKED]
    return [*methods, *again]


# names of the benchmark's judges and their roles at the judge client; training is rewarded by the in-domain judge
ROLES = {"in-domain": "temporal_following", "held-out": "held_out"}
PAPER_FRAMES = {"simple": 36, "hard": 60}  # latent frames (docs/algorithm.md section 7)
SEEDS = 2  # videos of a prompt and method


@dataclass(frozen=True)
class BenchmarkOptions:
    """What to evaluate on the Temporal Order Benchmark; prompts and latent frames by set."""

    prompts: dict[str, list[OrderPrompt]]
    frames: dict[str, int]
    methods: list[Method]
    seeds: int
    judges: tuple[str, ...]  # names of ROLES
    pickscore: bool
    export: bool  # copies of the videos for VBench
    retry_missing: bool  # asks again for missing scores
