"""The updates of an iteration: the units that this process works on, and what the policies computed before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, pairwise

import torch

from tempact.config import RunConfig
from tempact.distributed import share_of
from tempact.distributed.records import move_records
from tempact.distributed.reduction import UpdateSum
from tempact.executor.executor import Executor
from tempact.executor.sampler import NoiseSource
from tempact.planner.planner import Planner
from tempact.rl import PolicyOptimizer
from tempact.types import Batch, PlanBatch, Siblings, Transition


class PlannerUpdates:
    """The planner's, on consecutive parts of the plans. Off-policy from the second on: old log-probs are those before
    the first."""

    def __init__(self, planner: Planner, policy: PolicyOptimizer, batch: Batch, parts: Sequence[list[int]]):
        self.planner, self.policy, self.batch, self.parts = planner, policy, batch, parts
        self.units = [planner.units(batch, part) for part in parts]
        ranks = policy.ranks
        later = [unit for units in self.units[1:] for unit in _dealt(units, ranks.rank, ranks.size)]
        self.old = planner.old_log_probs(batch, later) if later else {}

    def update(self, number: int) -> dict[str, float]:
        """Gradient and metrics of the update of a part, without its optimiser step."""
        units = self.units[number]
        total = UpdateSum(self.policy.gradient, len(units), sum(map(len, units)))
        return self.planner.update(self.batch, self.parts[number], self.old if number else None, total)


class ExecutorUpdates:
    """The executor's, as `PlannerUpdates`, on these levels. Rows of the plans' records come to the process that works
    on them.

    Processes that share weights work on the same plans, each on its own of their continuations.
    """

    def __init__(
        self, executor: Executor, policy: PolicyOptimizer, plans: PlanBatch, batch: Batch,
        records: dict[range, Transition], noise: NoiseSource, parts: Sequence[list[int]], continuations: range,
        levels: range,
    ):  # fmt: skip
        self.executor, self.policy, self.batch, ranks = executor, policy, batch, policy.ranks
        siblings, mask = batch.siblings, batch.execution_mask
        starts, rows_of = [row.start for row in siblings], rows_by_plan(siblings)
        parts = [[row for plan in part for row in rows_of[plan]] for part in parts]
        self.units = [executor.units(part, starts, mask, len(levels)) for part in parts]
        self.terms = [executor.terms(part, mask, len(levels)) for part in parts]
        dealt = [[_dealt(units, group, ranks.groups) for units in self.units] for group in range(ranks.groups)]
        self.own = dealt[ranks.rank // ranks.members]
        if batch.transition is None or not ranks.alone:
            wanted = [[row for units in own for unit in units for row in unit] for own in dealt]
            wanted = [wanted[rank // ranks.members] for rank in range(ranks.size)]
            mine, block = wanted[ranks.rank], slice(continuations.start, continuations.stop)
            room = executor.blank(plans.plans, [siblings[row] for row in mine], noise)
            assert room is not None, "a fork at frame 0"
            held = {range(rows_of[own[0]].start, rows_of[own[-1]].stop): record for own, record in records.items()}
            move_records(ranks, held, wanted, starts, room)
            advantage, counted = batch.execution_advantage[mine, block], mask[mine, block]
            self.batch = replace(batch, execution_advantage=advantage, execution_mask=counted, transition=room)
            places = {row: place for place, row in enumerate(mine)}
            self.own = [[[places[row] for row in unit] for unit in own] for own in self.own]
        assert self.batch.transition is not None
        transition = self.batch.transition.at(levels)
        self.batch = replace(self.batch, transition=transition)
        with torch.no_grad():
            self.old = [
                executor.velocities(transition, [*chain(*own)]) if i else None for i, own in enumerate(self.own)
            ]

    def update(self, number: int) -> dict[str, float]:
        """Gradient and metrics of the update of a part, without its optimiser step."""
        own, ranks = self.own[number], self.policy.ranks
        total = UpdateSum(self.policy.gradient, len(self.units[number]), self.terms[number], ranks.members)
        return self.executor.update(self.batch, [*chain(*own)], self.old[number], total, own)


def rows_by_plan(siblings: Sequence[Siblings]) -> dict[int, range]:
    """The rows of every plan, which are consecutive."""
    found: dict[int, range] = {}
    for number, row in enumerate(siblings):
        found[row.plan] = range(found[row.plan].start if row.plan in found else number, number + 1)
    return found


def _dealt(units: list[list[int]], part: int, parts: int) -> list[list[int]]:
    own = share_of(len(units), part, parts)
    return units[own.start : own.stop]


def too_wide(found: dict[str, dict[str, float]], config: RunConfig) -> str:
    """Which gaps in the metrics of `planner` and `executor` are wider than allowed, in words; "" if none is.

    NaN is not a gap.
    """
    told = []
    for policy, metric, limit, unit, of in (
        ("planner", "sampling_gap", config.planner.max_sampling_gap, "nats a token", "sampling"),
        ("executor", "rollout_gap", config.executor.max_rollout_gap, "clips", "roll-out"),
    ):
        gaps = {name.partition("/")[2]: gap for name, gap in found.get(policy, {}).items() if name.startswith(metric)}
        wide = [f"{gap:.3g} {unit}" + (f" at sigma {at}" if at else "") for at, gap in gaps.items() if gap > limit]
        if wide:
            differ = f"log-probs of {of} and training differ by {', '.join(wide)}"
            told.append(f"{policy}.max_{metric}: {differ}; accepted: at most {limit:g}")
    return "; ".join(told)


def split(count: int, parts: int) -> list[list[int]]:
    """0 .. count-1 in `parts` consecutive lists of near-equal length, empty ones left out."""
    bounds = [count * i // parts for i in range(parts + 1)]
    return [list(range(a, b)) for a, b in pairwise(bounds) if b > a]
