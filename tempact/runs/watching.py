"""Looks for reward hacking in a run's videos, every few iterations: metrics, and a line in the log for an alarm."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tempact.config import AlarmConfig
from tempact.distributed import Ranks
from tempact.reporting.alarms import ALARMS, WATCH, changes
from tempact.trainer import Iteration
from tempact.worlds import Watch

log = logging.getLogger(__name__)


class Watching:
    """Of a run, by `watch`; None: there are no judges beside the rewards, and no look is taken.

    rows: what metrics.jsonl holds of the iterations before, on the first rank.
    """

    def __init__(
        self, settings: AlarmConfig, watch: Watch | None, ranks: Ranks, rows: Sequence[Mapping[str, Any]] = ()
    ):
        self.settings, self.watch, self.ranks = settings, watch, ranks
        self.rows = list(rows)

    def look(self, iteration: Iteration) -> dict[str, float]:
        """Metrics of what is seen in the iteration's videos; none where no look is due. All ranks look together."""
        if self.watch is None or not self.settings.every or iteration.number % self.settings.every:
            return {}
        scores = [score for own in self.ranks.gather(self._scores(iteration, self.watch)) for score in own.items()]
        # in the order of plans and continuations, whoever has made them
        ordered = [own for _, own in sorted(scores)]
        seen = {f"{WATCH}{name}": _mean([own[name] for own in ordered]) for name in ordered[0]}
        return seen | self.ranks.from_first(lambda: self._alarms(iteration.number, seen))

    def _scores(self, iteration: Iteration, watch: Watch) -> dict[tuple[int, int], dict[str, float]]:
        """Of the videos that are looked at and that this process has made, by plan and continuation."""
        found = {}
        for plan in sorted(iteration.own):
            shown = [n for n in iteration.continuations if n < self.settings.continuations]
            if not shown:
                continue
            places = [iteration.continuations.index(n) for n in shown]
            # plan by plan: a judge's rounding depends on the batch, and a plan is made by one process
            scores = watch(iteration.plans.prompt_of(plan).text, iteration.rollout.frames[plan, places])
            rewards = iteration.scored.temporal_following[plan, shown].tolist()
            for row, (n, reward) in enumerate(zip(shown, rewards, strict=True)):
                own = {name: values[row] for name, values in scores.items()}
                found[plan, n] = own | {"reward": reward, "gap": reward - own["held_out"]}
        return found

    def _alarms(self, number: int, seen: Mapping[str, float]) -> dict[str, float]:
        """1 for every signal that is an alarm now, 0 for the others; tells those that begin."""
        before = {change.name for change in changes(self.rows, self.settings) if change.alarm}
        self.rows.append({"step": number, **{name: value for name, value in seen.items() if value == value}})
        found = changes(self.rows, self.settings)
        for change in found:
            if change.alarm and change.name not in before:
                log.warning("iteration %d: %s", number, change.line())
        return {f"{ALARMS}{change.name}": float(change.alarm) for change in found}


def _mean(values: Sequence[float]) -> float:
    """Of those that are no NaN; NaN where all are."""
    present = [value for value in values if value == value]
    return math.fsum(present) / len(present) if present else math.nan
