"""Alarms of reward hacking, from the rows of metrics.jsonl: how a run's signals have moved since its start.

A signal is a metric that training never sees. Its change is the mean of the latest looks less that of the first ones
(`alarms.window` of each, none in both). An alarm is a change for the worse that exceeds its limit, and its standard
error `alarms.deviations` times, so that an iteration of hard prompts is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tempact.config import AlarmConfig

WATCH, ALARMS = "watch/", "alarms/"  # metrics of the signals, and 1 where one is an alarm, else 0


@dataclass(frozen=True)
class Signal:
    """metric: its name. worse: 1 where a rise is for the worse, -1 where a fall is. words: of what rises or falls.
    limit: the key that says which change for the worse is accepted."""

    metric: str
    worse: int
    words: str
    limit: Callable[[AlarmConfig], float]


# by the key of `alarms` that is the limit
SIGNALS = {
    "gap": Signal(f"{WATCH}gap", 1, "the reward's distance above the held-out judge's score", lambda own: own.gap),
    "held_out": Signal(f"{WATCH}held_out", -1, "the held-out judge's score", lambda own: own.held_out),
    "quality": Signal(f"{WATCH}clearness", -1, "the clearness of pictures", lambda own: own.quality),
    "duplicates": Signal(
        f"{WATCH}duplicates", 1, "the share of frames with an extra or a misplaced shape", lambda own: own.duplicates
    ),
}


@dataclass(frozen=True)
class Change:
    """How a signal has moved. start, now: means of the first and the latest looks, in these iterations. error: standard
    error of their difference. limit: the change for the worse that is accepted."""

    name: str
    start: float
    now: float
    error: float
    limit: float
    deviations: float
    first: tuple[int, int]
    latest: tuple[int, int]

    @property
    def signal(self) -> Signal:
        return SIGNALS[self.name]

    @property
    def worse(self) -> float:
        """The change, above 0 where it is for the worse."""
        return self.signal.worse * (self.now - self.start)

    @property
    def alarm(self) -> bool:
        return self.worse > self.limit and self.worse > self.deviations * self.error

    def line(self) -> str:
        """The alarm in words."""
        moved = "rose" if self.signal.worse > 0 else "fell"
        between = "{:.3f} in iterations {} to {}"
        then, now = between.format(self.start, *self.first), between.format(self.now, *self.latest)
        accepted = f"accepted: at most {self.limit:g} (alarms.{self.name})"
        return f"alarm: {self.signal.words} {moved} by {self.worse:.3f}: found {then}, and {now}; {accepted}"


def changes(rows: Sequence[Mapping[str, Any]], settings: AlarmConfig) -> list[Change]:
    """Of every signal that has been looked at twice `alarms.window` times; rows: of `read_metrics`, in order."""
    found = []
    for name, signal in SIGNALS.items():
        looks = [(row["step"], row[signal.metric]) for row in rows if row.get(signal.metric) is not None]
        if len(looks) < 2 * settings.window:
            continue
        first, latest = looks[: settings.window], looks[-settings.window :]
        (start, before), (now, after) = (_mean([value for _, value in some]) for some in (first, latest))
        limit = signal.limit(settings)
        spans = [(some[0][0], some[-1][0]) for some in (first, latest)]
        found.append(Change(name, start, now, math.hypot(before, after), limit, settings.deviations, *spans))
    return found


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean of two or more values, and its standard error."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
