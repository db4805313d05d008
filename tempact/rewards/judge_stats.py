"""How the judges did, per role, for the metrics of an iteration."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

LATENCIES_KEPT = 10_000  # of each role between two readings
PERCENTILE = 0.95


@dataclass
class _Role:
    calls: int = 0
    missing: int = 0
    hits: int = 0
    retries: int = 0
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCIES_KEPT))


class JudgeStats:
    """Counts on the client's thread, is read on the trainer's."""

    def __init__(self, roles: Iterable[str]):
        self._lock = threading.Lock()
        self._roles = {role: _Role() for role in roles}

    def ended(self, role: str, missing: bool) -> None:
        with self._lock:
            self._roles[role].calls += 1
            self._roles[role].missing += missing

    def hit(self, role: str) -> None:
        with self._lock:
            self._roles[role].hits += 1

    def retry(self, role: str) -> None:
        with self._lock:
            self._roles[role].retries += 1

    def latency(self, role: str, seconds: float) -> None:
        """Of a call that went to a server: from its first turn to its result, retries included."""
        with self._lock:
            self._roles[role].latencies_s.append(seconds)

    def take(self) -> dict[str, float]:
        """Of every role that had calls since the last reading: calls, missing and cache_hits (shares of the calls),
        retries, latency_mean_s, _p95_s and _max_s; the latencies only where a server was asked."""
        with self._lock:
            taken = self._roles
            self._roles = {role: _Role() for role in taken}
        metrics: dict[str, float] = {}
        for role, seen in taken.items():
            if not seen.calls:
                continue
            named = {
                "calls": float(seen.calls),
                "missing": seen.missing / seen.calls,
                "cache_hits": seen.hits / seen.calls,
                "retries": float(seen.retries),
            }
            if latencies := sorted(seen.latencies_s):
                named["latency_mean_s"] = sum(latencies) / len(latencies)
                named["latency_p95_s"] = latencies[min(int(PERCENTILE * len(latencies)), len(latencies) - 1)]
                named["latency_max_s"] = latencies[-1]
            metrics |= {f"judge/{role}/{name}": value for name, value in named.items()}
        return metrics
