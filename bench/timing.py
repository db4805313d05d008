"""Comparable times of several implementations of one case.

All implementations run in one process, in rounds: each once a round, in an order that rotates. On a GPU a pair of
device events around each run measures it, and the L2 cache is overwritten before; on a CPU the host's clock does.
pytest-benchmark times one function after the other on the host's clock, so it serves for host code only.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WARM_UP_S = 0.5  # for the group, after each implementation has run once
FLUSH_BYTES = 256 * 2**20  # several times any L2
FLUSHES = 32  # about 2 ms of device time, in which the host issues the launches that are timed next
COPY_BYTES = 2 * 2**30
MATMUL_SIZE = 8192


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile, in ms."""

    ms: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> Spread:
        points = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
        return cls(*torch.quantile(torch.tensor(samples_ms, dtype=torch.float64), points).tolist())


@dataclass(frozen=True)
class Timed:
    """`run(*setup())` is one run; only `run` is on the clock."""

    run: Callable[..., Any]
    setup: Callable[[], tuple[Any, ...]] = tuple


def interleaved(
    timed: Mapping[str, Timed], device: torch.device, *, budget_s: float, rounds: tuple[int, int] = (7, 100)
) -> dict[str, Spread]:
    """Times of each, from as many rounds as fit into `budget_s` of wall time, within `rounds` (least, most)."""
    one = _gpu_round if device.type == "cuda" else _cpu_round
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    names = list(timed)
    one(names, timed, flush)
    begun, warm_up = time.perf_counter(), 0
    while warm_up == 0 or time.perf_counter() - begun < (WARM_UP_S if flush is not None else 0.0):
        one(names, timed, flush)
        warm_up += 1
    each_s = (time.perf_counter() - begun) / warm_up
    count = int(min(max(budget_s / each_s, rounds[0]), rounds[1]))
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(count):
        turn = i % len(names)
        for name, ms in one(names[turn:] + names[:turn], timed, flush).items():
            samples[name].append(ms)
    return {name: Spread.of(values) for name, values in samples.items()}


def _gpu_round(names: list[str], timed: Mapping[str, Timed], flush: Tensor | None) -> dict[str, float]:
    assert flush is not None
    events = {}
    for name in names:
        arguments = timed[name].setup()
        for value in range(FLUSHES):
            flush.fill_(value)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        timed[name].run(*arguments)
        end.record()
        events[name] = start, end
    torch.cuda.synchronize(flush.device)
    return {name: start.elapsed_time(end) for name, (start, end) in events.items()}


def _cpu_round(names: list[str], timed: Mapping[str, Timed], flush: Tensor | None) -> dict[str, float]:
    taken = {}
    for name in names:
        arguments = timed[name].setup()
        start = time.perf_counter()
        timed[name].run(*arguments)
        taken[name] = (time.perf_counter() - start) * 1e3
    return taken


def memory_of(run: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """Device memory in bytes that tensors hold: before the first run, and the most during three runs.

    The first runs count: where a CUDA graph is recorded, that is when its memory is taken.
    """
    torch.cuda.synchronize(device)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    for _ in range(3):
        run()
    torch.cuda.synchronize(device)
    return before, torch.cuda.max_memory_allocated(device)


def yardsticks(device: torch.device) -> dict[str, tuple[Spread, float]]:
    """Speeds of this machine at this time: "copy" in GB/s (read plus written) and "matmul" (bf16) in TFLOP/s."""
    source = torch.randint(-99, 99, (COPY_BYTES,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))
    timed = {"copy": Timed(lambda: target.copy_(source)), "matmul": Timed(lambda: a @ b)}
    found = interleaved(timed, device, budget_s=0.5)
    return {
        "copy": (found["copy"], 2 * COPY_BYTES / found["copy"].ms / 1e6),
        "matmul": (found["matmul"], 2 * MATMUL_SIZE**3 / found["matmul"].ms / 1e9),
    }
