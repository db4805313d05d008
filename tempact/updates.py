"""The updates of an iteration: the units that this process works on, and what the policies computed before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tempact.distributed import Ranks
from tempact.distributed.records import move_records
from tempact.distributed.reduction import UpdateSum
from tempact.executor.executor import Executor
from tempact.executor.sampler import NoiseSource
from tempact.planner.planner import Planner
from tempact.rl import PolicyOptimizer
from tempact.types import Batch, PlanBatch, Transition


class PlannerUpdates:
    """The planner's, on consecutive parts of the plans. Off-policy from the second on: old log-probs are those before
    the first."""

    def __init__(self, planner: Planner, policy: PolicyOptimizer, batch: Batch, parts: Sequence[list[int]]):
        self.planner, self.policy, self.batch, self.parts = planner, policy, batch, parts
        self.units = [planner.units(batch, part) for part in parts]
        later = [unit for units in self.units[1:] for unit in _own(units, policy.ranks)]
        self.old = planner.old_log_probs(batch, later) if later else {}

    def update(self, number: int) -> dict[str, float]:
        """Gradient and metrics of the update of a part, without its optimiser step."""
        units = self.units[number]
        total = UpdateSum(self.policy.gradient, len(units), sum(map(len, units)))
        return self.planner.update(self.batch, self.parts[number], self.old if number else None, total)


class ExecutorUpdates:
    """The executor's, as `PlannerUpdates`. Records of plans come to the process that works on them."""

    def __init__(
        self, executor: Executor, policy: PolicyOptimizer, plans: PlanBatch, batch: Batch, forks: list[int],
        records: dict[range, Transition], noise: NoiseSource, parts: Sequence[list[int]],
    ):  # fmt: skip
        self.executor, self.policy, self.batch, ranks = executor, policy, batch, policy.ranks
        mask = batch.execution_mask
        self.units = [executor.units(part, forks, mask) for part in parts]
        self.terms = [executor.terms(part, mask) for part in parts]
        self.own = [[plan for unit in _own(units, ranks) for plan in unit] for units in self.units]
        if batch.transition is None or not ranks.alone:
            wanted = [
                [plan for units in self.units for unit in _own(units, Ranks(rank, ranks.size)) for plan in unit]
                for rank in range(ranks.size)
            ]
            mine = wanted[ranks.rank]
            room = executor.blank([plans.plans[plan] for plan in mine], [forks[plan] for plan in mine], noise)
            assert room is not None, "a fork at frame 0"
            move_records(ranks, records, wanted, forks, room)
            advantage = batch.execution_advantage[mine]
            self.batch = replace(batch, execution_advantage=advantage, execution_mask=mask[mine], transition=room)
            rows = {plan: row for row, plan in enumerate(mine)}
            self.own = [[rows[plan] for plan in own] for own in self.own]
        transition = self.batch.transition
        assert transition is not None
        with torch.no_grad():
            self.old = [executor.velocities(transition, own) if i else None for i, own in enumerate(self.own)]

    def update(self, number: int) -> dict[str, float]:
        """Gradient and metrics of the update of a part, without its optimiser step."""
        total = UpdateSum(self.policy.gradient, len(self.units[number]), self.terms[number])
        return self.executor.update(self.batch, self.own[number], self.old[number], total)


def _own(units: list[list[int]], ranks: Ranks) -> list[list[int]]:
    share = ranks.share(len(units))
    return units[share.start : share.stop]
