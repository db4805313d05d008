from __future__ import annotations

import time

import pytest
import torch

from bench.timing import Spread, Timed, interleaved, memory_of, yardsticks

CPU = torch.device("cpu")


def test_spread_is_median_and_percentiles() -> None:
    assert Spread.of([float(n) for n in range(101)]) == Spread(50.0, 20.0, 80.0)
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)


def test_every_round_runs_everyone_once_in_an_order_that_rotates() -> None:
    ran: list[str] = []
    timed = {name: Timed(lambda name=name: ran.append(name)) for name in "abc"}
    interleaved(timed, CPU, budget_s=0.0, rounds=(6, 100))
    rounds = ["".join(ran[i : i + 3]) for i in range(0, len(ran), 3)]
    assert rounds == ["abc", "abc", "abc", "bca", "cab", "abc", "bca", "cab"]  # first run, warm-up, six timed rounds


def test_setup_is_not_on_the_clock_and_feeds_the_run() -> None:
    given: list[int] = []

    def setup() -> tuple[int, ...]:
        time.sleep(0.02)
        return (7,)

    timed = {"slow": Timed(lambda: time.sleep(0.004)), "fed": Timed(given.append, setup)}
    found = interleaved(timed, CPU, budget_s=0.0, rounds=(3, 3))
    assert given == [7] * 5
    assert 4.0 <= found["slow"].ms < 20.0 and found["fed"].p80 < 4.0


@pytest.mark.parametrize(("budget_s", "count"), [(0.0, 2), (1e9, 9)])
def test_the_number_of_rounds_fits_the_budget(budget_s: float, count: int) -> None:
    ran: list[None] = []
    interleaved({"it": Timed(lambda: ran.append(None))}, CPU, budget_s=budget_s, rounds=(2, 9))
    assert len(ran) == count + 2


@pytest.mark.gpu
def test_device_time_and_memory_are_measured() -> None:
    device = torch.device("cuda")
    small, large = (torch.randn(n * 2**20, device=device) for n in (8, 64))
    found = interleaved({n: Timed(x.clone) for n, x in (("small", small), ("large", large))}, device, budget_s=0.2)
    assert 5 < found["large"].ms / found["small"].ms < 11
    before, most = memory_of(large.clone, device)
    assert most - before == large.nbytes
    assert 500 < yardsticks(device)["copy"][1] < 10_000
