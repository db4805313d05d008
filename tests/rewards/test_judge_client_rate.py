"""Judges whose servers limit the rate of requests: nothing is missing, and the rate is used."""

from __future__ import annotations

import email.utils
import json
import logging
import math
import time
from collections.abc import Callable

import pytest
from rewards.fault_proxy import score_of
from rewards.judge_cases import ROLE, call, client_of, is_right
from rewards.judge_server import Bucket, Server

from tempact.rewards.judges import JudgeOutage, JudgeRefusal
from tempact.rewards.judges.endpoints import SLOWEST, START, Pace
from tempact.types import Missing

LIMITS = {"deadline_s": 60.0, "attempt_s": 10.0, "outage_s": 120.0, "backoff_s": 0.5}
ASKS_FOR: dict[str, Callable[[], dict[str, str]]] = {
    "nothing": dict,
    "seconds": lambda: {"Retry-After": "1"},
    "date": lambda: {"Retry-After": email.utils.formatdate(math.ceil(time.time()), usegmt=True)},
}


def says(status: int = 429) -> Callable[[str], tuple[int, object]]:
    def answer(text: str) -> tuple[int, object]:
        return (200, json.dumps({"score": score_of(text)})) if text else (status, "too many requests")

    return answer


def used_rate(server: Server, calls: int, rate: float, **limits: object) -> float:
    """Share of the rate that `calls` calls at once use; none of them may be missing."""
    with client_of([server.address], **(LIMITS | limits)) as client:
        started = time.monotonic()
        results = [future.result(300) for future in client.submit([call(n) for n in range(calls)])]
        seconds = time.monotonic() - started
    assert all(is_right(result, n) for n, result in enumerate(results)), [r for r in results if isinstance(r, Missing)]
    return calls / rate / seconds


@pytest.mark.parametrize("asks_for", ASKS_FOR)
@pytest.mark.parametrize(("status", "rate"), [(429, 20.0), (429, 80.0), (503, 40.0)])
def test_a_rate_costs_no_reply(status: int, rate: float, asks_for: str) -> None:
    if status == 503 and asks_for == "nothing":
        pytest.skip("a 503 without Retry-After is a fault; nothing would run this")
    with Server(says(status), bucket=Bucket(rate), headers=ASKS_FOR[asks_for]) as server:
        used_rate(server, 48, rate)
        assert server.statuses[200] == 48


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("asks_for", ASKS_FOR)
@pytest.mark.parametrize("rate", [2.0, 5.0, 10.0])
def test_256_calls_at_nine_tenths_of_the_rate(rate: float, asks_for: str) -> None:
    deadline_s = 256 / rate / 0.9
    with Server(says(), bucket=Bucket(rate, burst=2.0), headers=ASKS_FOR[asks_for]) as server:
        assert used_rate(server, 256, rate, deadline_s=deadline_s, concurrency=256) >= 0.9
