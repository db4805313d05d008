"""Sum of an update's gradients in one order, against a plain all-reduce.

    torchrun --nproc-per-node N -m bench.bench_reduction [--numbers 255600000] [--units 64] [--save FILE]

One process a GPU through NCCL, or on the CPU through gloo. Three things are timed, each the median of some runs:

    units       what the tree adds to each unit of a process: its gradient becomes a node, and nodes are added
    tree        the top of the tree over the processes, as `UpdateSum.finish` leaves it in the gradients
    all-reduce  `torch.distributed.all_reduce` of as many numbers

255.6 million numbers, 1.02 GB, are the executor's adapter at full size. With one process the exchange is NCCL's with
itself. The bus bandwidth is that of nccl-tests: 2 (W - 1) / W bytes a byte of the gradient.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from bench import report
from tempact.distributed import Ranks
from tempact.distributed.reduction import Gradient, UpdateSum
from tempact.errors import StopRequest, guarded
from tempact.files import write_atomic

RUNS = 7


def timed(
    act: Callable[[], object], ranks: Ranks, device: torch.device, before: Callable[[], object] = lambda: None
) -> float:
    """Median seconds of `act`, the slowest process' of each run; `before` comes first, untimed."""

    def finished() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    found = []
    for _ in range(RUNS + 1):  # the first allocates
        before()
        finished()
        ranks.arrive()
        began = time.perf_counter()
        act()
        finished()
        found.append(max(ranks.gather(time.perf_counter() - began)))
    return statistics.median(found[1:])


def measure(ranks: Ranks, numbers: int, units: int) -> dict[str, float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parameter = nn.Parameter(torch.zeros(numbers, device=device))
    gradient = Gradient([parameter], ranks)
    sums: list[UpdateSum] = []

    def work() -> None:
        """The units of this process, each with a gradient that is there already."""
        sums[:] = [UpdateSum(gradient, units, units)]
        for _ in sums[0].own:
            sums[0].add({"loss": 0.0})

    unit_s = timed(work, ranks, device) / max(1, len(UpdateSum(gradient, units, units).own))

    tree_s = timed(lambda: sums[0].finish(), ranks, device, before=work)
    plain = timed(lambda: dist.all_reduce(gradient.flat), ranks, device)
    size = numbers * 4 / 1e9
    bus = 2 * (ranks.size - 1) / ranks.size * size
    return {
        "gigabytes": size, "unit_s": unit_s, "tree_s": tree_s, "all_reduce_s": plain,
        "tree_bus_gb_s": bus / tree_s, "all_reduce_bus_gb_s": bus / plain,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numbers", type=int, default=255_600_000)
    parser.add_argument("--units", type=int, default=64, help="plans of an update")
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    with StopRequest().listening() as stop, Ranks.joined(stop, 600.0, torch.cuda.is_available()) as ranks:
        found = measure(ranks, given.numbers, given.units)
        if ranks.first:
            name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
            about = {"commit": report.commit(), "device": name, "torch": torch.__version__, "processes": ranks.size}
            print(json.dumps(about | {"units": given.units} | found, indent=1), flush=True)
            if given.save:
                write_atomic(given.save, json.dumps(about | {"units": given.units} | found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
