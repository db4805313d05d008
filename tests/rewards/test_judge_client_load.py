"""The judge client under load: small here, and with `-m slow` at the size of bench/bench_judge_client.py."""

from __future__ import annotations

import pytest

from bench.bench_judge_client import ATTEMPT_S, DEADLINE_S, Load, run, saturation


def check(load: Load) -> None:
    assert load.right + load.missing == load.calls  # none lost, none with another's reply
    assert load.rows == load.right  # and none twice
    assert load.missing <= load.calls / 500  # four faults in a row: 1 in 10,000
    assert load.slowest_s < DEADLINE_S + ATTEMPT_S


def test_a_few_hundred_calls_with_faults() -> None:
    load = run(500, 0.1, delay_s=0.02)
    check(load)
    assert load.faulty > 30


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_calls_at_ten_percent_faults() -> None:
    faultless, faulty = run(10_000, 0.0), run(10_000, 0.1)
    check(faulty)
    check(run(10_000, 0.1, away=True))
    assert faultless.right == 10_000
    assert faulty.efficiency(faultless) >= 0.9
    assert faulty.growth_mib < 16  # MiB; the images of 10,000 calls are 286 MiB


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_64_calls_at_a_time_saturate_16_slots() -> None:
    assert saturation() >= 0.95
