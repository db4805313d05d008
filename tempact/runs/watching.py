"""Looks for reward hacking in a run's videos, every few iterations: metrics, and a line in the log for an alarm."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

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
        """Metrics of what is seen in the iteration's videos; none where no look is due.

        All ranks take part. The first one looks at all videos in one order and one batch, because a judge's rounding
        depends on them.
        """
        watch = self.watch
        if watch is None or not self.settings.every or iteration.number % self.settings.every:
            return {}
        videos = {place: video for own in self.ranks.gather(self._shown(iteration)) for place, video in own.items()}
        return self.ranks.from_first(lambda: self._seen(iteration, watch, videos))

    def _shown(self, iteration: Iteration) -> dict[tuple[int, int], Tensor]:
        """The videos that are looked at and that this process has made, by plan and continuation, on the host; none
        that is broken."""
        frames, broken = iteration.rollout.frames, iteration.rollout.broken
        places = {
            (plan, n): (plan, iteration.continuations.index(n))
            for plan in iteration.own
            for n in iteration.continuations
            if n < self.settings.continuations
        }
        return {own: frames[at].cpu() for own, at in places.items() if broken is None or not bool(broken[at])}

    def _seen(self, iteration: Iteration, watch: Watch, videos: Mapping[tuple[int, int], Tensor]) -> dict[str, float]:
        """Means over the videos, and the alarms that follow."""
        places = sorted(videos)
        if not places:
            return {}
        texts = [iteration.plans.prompt_of(plan).text for plan, _ in places]
        scores = watch(texts, torch.stack([videos[place] for place in places]))
        scores["reward"] = [iteration.scored.temporal_following[place].item() for place in places]
        scores["gap"] = [paid - seen for paid, seen in zip(scores["reward"], scores["held_out"], strict=True)]
        seen = {f"{WATCH}{name}": _mean(values) for name, values in scores.items()}
        return seen | self._alarms(iteration.number, seen)

    def _alarms(self, number: int, seen: Mapping[str, float]) -> dict[str, float]:
        """1 for every signal that is an alarm now, 0 for the others; tells those that begin."""
        before = {change.name for change in changes(self.rows, self.settings) if change.alarm}
        self.rows.append({"step": number, **{name: value for name, value in seen.items() if value == value}})
        found = changes(self.rows, self.settings)
        for change in found:
            if change.alarm and change.name not in before:
                log.warning("iteration %d: %s", number, change.line())
        return {f"{ALARMS}{change.name}": float(change.alarm) for change in found}


def _mean(values: Iterable[float]) -> float:
    """Of those that are no NaN, the missing ones; NaN where all are."""
    present = [value for value in values if value == value]
    return math.fsum(present) / len(present) if present else math.nan
