"""The judge client under load, on this machine: `PYTHONPATH=tests python -m bench.bench_judge_client [--out FILE]`.

A fake judge in a process of its own, 200 ms a reply; every call carries two images of 15 kB. Three runs of 10,000
calls: without faults, with faults in 10% of the requests, and with those and a server that is away for 3 s in the
middle. A fourth run: 64 calls at a time on a server of 16 slots of 1 s. `tests/rewards/test_judge_client_load.py`
asserts what the numbers must be, with `-m slow` at this size.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import sqlite3
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rewards.fault_proxy import Apart, Behaviour
from rewards.judge_cases import ROLE, call, client_of, is_right

from bench.report import commit
from tempact.files import write_atomic
from tempact.rewards.judges import JudgeCall, JudgeResult
from tempact.rewards.judges.client import JudgeClient
from tempact.types import Missing

CONCURRENCY, DELAY_S = 32, 0.2
BATCH = 500  # calls of an iteration; two are on their way
DEADLINE_S, ATTEMPT_S = 20.0, 2.0
IMAGES = tuple(random.Random(seed).randbytes(15_000) for seed in range(2))
AWAY_S = 3.0
MIB = 2**20


@dataclass(frozen=True)
class Load:
    """What a run did. `mib` is the memory of the client's process after every batch, MiB."""

    calls: int
    right: int
    missing: int
    requests: int
    faulty: int
    rows: int
    seconds: float
    slowest_s: float
    mib: list[float]

    @property
    def rate(self) -> float:
        """Calls a second."""
        return self.calls / self.seconds

    def efficiency(self, faultless: Load) -> float:
        """The rate over that of the run without faults, scaled by the requests that a call took."""
        return self.rate / (faultless.rate * self.calls / self.requests)

    @property
    def growth_mib(self) -> float:
        """Memory of the last tenth of the batches over that of the second tenth."""
        tenth = max(1, len(self.mib) // 10)
        return sum(self.mib[-tenth:]) / tenth - sum(self.mib[tenth : 2 * tenth]) / tenth

    def __str__(self) -> str:
        return (
            f"{self.calls} calls in {self.seconds:.1f} s ({self.rate:.1f}/s): {self.right} right, {self.missing} "
            f"missing, {self.calls - self.right - self.missing} lost or wrong; {self.requests} requests, {self.faulty} "
            f"faulty; {self.rows} rows in the cache; slowest {self.slowest_s:.1f} s; memory {self.mib[0]:.0f} MiB "
            f"after the first batch, {self.mib[len(self.mib) // 2]:.0f} in the middle, {self.mib[-1]:.0f} after the "
            f"last, growth {self.growth_mib:+.1f}"
        )

    def record(self) -> dict[str, float | int]:
        """For a results file; `mib_*` is the memory of the client's process after a batch."""
        kept = {name: value for name, value in vars(self).items() if name != "mib"}
        first, middle, last = self.mib[0], self.mib[len(self.mib) // 2], self.mib[-1]
        return kept | {"rate": self.rate, "mib_first": first, "mib_middle": middle, "mib_last": last}


def run(calls: int, share: float, away: bool = False, delay_s: float = DELAY_S) -> Load:
    """`share` of the requests fail; with `away` the server is gone for AWAY_S after half of the calls."""
    server = Apart(Behaviour(share=share, delay_s=delay_s, seed=5))
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache.sqlite"
        limits = {"deadline_s": DEADLINE_S, "attempt_s": ATTEMPT_S, "outage_s": 60.0, "backoff_s": 0.1}
        try:
            with client_of([server.url], concurrency=CONCURRENCY, cache=cache, **limits) as client:
                began = time.monotonic()
                results, slowest_s, mib = _submit(client, calls, server if away else None)
                seconds = time.monotonic() - began
            seen = server.seen()
        finally:
            server.stop()
        rows = sqlite3.connect(cache).execute("select count(*) from replies").fetchone()[0]
    right = sum(is_right(result, number) for number, result in enumerate(results))
    missing = sum(isinstance(result, Missing) for result in results)
    total = seen.total()
    return Load(calls, right, missing, total, total - seen[""], rows, seconds, slowest_s, mib)


def _submit(client: JudgeClient, calls: int, server: Apart | None) -> tuple[list[JudgeResult], float, list[float]]:
    """Two batches on their way at any time; also the longest time a call took and the memory after each batch."""
    waiting: deque[list[Future[JudgeResult]]] = deque()
    results: list[JudgeResult] = []
    mib, slowest_s, restart = [], 0.0, None
    for first in range(0, calls, BATCH):
        waiting.append(client.submit([_call(number) for number in range(first, min(first + BATCH, calls))]))
        if server is not None and first >= calls // 2 and restart is None:
            server.die()
            restart = threading.Timer(AWAY_S, server.revive)
            restart.start()
        while len(waiting) > 1 or (waiting and first + BATCH >= calls):
            results += [future.result(600) for future in waiting.popleft()]
            stats = client.stats()
            slowest_s = max(slowest_s, stats.get(f"judge/{ROLE}/latency_max_s", 0.0))
            mib.append(_memory_mib())
    return results, slowest_s, mib


def _call(number: int) -> JudgeCall:
    return call(number, images=IMAGES, media_hash="two")


def _memory_mib() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def saturation(calls: int = 640, delay_s: float = 1.0, slots: int = 16, at_a_time: int = 64) -> float:
    """Rate over the ideal one of a server with `slots` slots of `delay_s`."""
    server = Apart(Behaviour(delay_s=delay_s, slots=slots))
    limits = {"deadline_s": 60.0, "attempt_s": 30.0, "outage_s": 60.0}
    try:
        with client_of([server.url], concurrency=at_a_time, **limits) as client:
            began = time.monotonic()
            results = [future.result(120) for future in client.submit([call(number) for number in range(calls)])]
            seconds = time.monotonic() - began
    finally:
        server.stop()
    assert all(is_right(result, number) for number, result in enumerate(results))
    return calls / seconds / (slots / delay_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--out", type=Path, help="results file to write")
    arguments = parser.parse_args()
    calls = arguments.calls
    runs = {"no faults": run(calls, 0.0), "10% faults": run(calls, 0.1)}
    runs[f"10% faults, server away for {AWAY_S:g} s"] = run(calls, 0.1, away=True)
    for name, load in runs.items():
        print(f"{name}: {load}")
    efficiency, saturated = runs["10% faults"].efficiency(runs["no faults"]), saturation()
    print(f"10% faults: {efficiency:.1%} of the rate without, scaled by requests")
    print(f"64 at a time on 16 slots of 1 s: {saturated:.1%} of the ideal rate")
    if arguments.out:
        versions = {name: version(name) for name in ("openai", "pydantic")}
        about = {
            "command": f"PYTHONPATH=tests python -m bench.bench_judge_client --calls {calls}",
            "commit": commit(),
            "hardware": f"{os.cpu_count()} processors ({platform.machine()}), no GPU, shared with other work",
            "versions": {"python": platform.python_version(), **versions},
            "requests_at_a_time": CONCURRENCY,
            "deadline_s": DEADLINE_S,
            "runs": {name: load.record() for name, load in runs.items()},
            "rate_with_faults_over_scaled_rate_without": efficiency,
            "rate_of_64_calls_on_16_slots_over_ideal": saturated,
        }
        write_atomic(arguments.out, json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
