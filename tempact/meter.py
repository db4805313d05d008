"""Seconds and GPU memory of an iteration's phases."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

GIB = 2**30


class Meter:
    """Seconds of an iteration's phases and, on a GPU, the most memory that tensors took in each.

    What happens in a phase within another one counts in the inner one alone.
    """

    peak_gib = 0.0  # of all meters, since the process began

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    def begin(self) -> None:
        """Forgets the iteration before, which may have ended within a phase."""
        self._running = []
        self._lap()
        self.metrics = {}
        if torch.cuda.is_available():
            self.metrics = {
                "memory/held_gib": torch.cuda.memory_allocated() / GIB,
                "memory/graphs_gib": idle_in_pools(torch.cuda.memory_snapshot()) / GIB,
            }

    @contextmanager
    def timed(self, told: Callable[[str], None], name: str) -> Iterator[None]:
        """Measures the phase `name`; `told` hears it begin, and the outer one go on."""
        self._lap()
        self._running.append(name)
        told(name)
        yield
        self._lap()
        self._running.pop()
        if self._running:
            told(self._running[-1])

    def _lap(self) -> None:
        """Counts what has been since the last lap in the phase that is running."""
        metrics, now = self.metrics, time.monotonic()
        for name in self._running[-1:]:
            metrics[f"timing_s/{name}"] = metrics.get(f"timing_s/{name}", 0.0) + now - self._since
        self._since = now
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / GIB
            torch.cuda.reset_peak_memory_stats()
            for name in self._running[-1:]:
                metrics[f"memory/{name}_gib"] = max(metrics.get(f"memory/{name}_gib", 0.0), peak)
            metrics["memory/peak_gib"] = Meter.peak_gib = max(Meter.peak_gib, peak)


def idle_in_pools(segments: list[dict[str, Any]]) -> int:
    """Bytes that CUDA graphs keep for their next replay: what private pools of a snapshot hold beside tensors."""
    return sum(own["total_size"] - own["allocated_size"] for own in segments if tuple(own["segment_pool_id"]) != (0, 0))
