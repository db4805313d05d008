"""Judges whose servers limit the rate of requests: nothing is missing, and the rate is used."""

from __future__ import annotations

import email.utils
import json
import math
import time
from collections.abc import Callable

import pytest
from rewards.fault_proxy import score_of
from rewards.judge_cases import ROLE, call, client_of, is_right
from rewards.judge_server import Bucket, Server

from tempact.rewards.judges import JudgeOutage, JudgeRefusal
from tempact.rewards.judges.endpoints import SLOWEST, Pace
from tempact.types import Missing

LIMITS = {"deadline_s": 120.0, "attempt_s": 10.0, "outage_s": 200.0, "backoff_s": 0.5}
ASKS_FOR: dict[str, Callable[[], dict[str, str]]] = {
    "nothing": dict,
    "seconds": lambda: {"Retry-After": "1"},
    "date": lambda: {"Retry-After": email.utils.formatdate(math.ceil(time.time()), usegmt=True)},
}


def says(status: int = 429, reason: object = "too many requests") -> Callable[[str], tuple[int, object]]:
    def answer(text: str) -> tuple[int, object]:
        return (200, json.dumps({"score": score_of(text)})) if text else (status, reason)

    return answer


def used_rate(server: Server, calls: int, rate: float, **limits: object) -> float:
    """Share of the rate that `calls` calls at once use; none of them may be missing."""
    with client_of([server.address], **(LIMITS | limits)) as client:
        started = time.monotonic()
        results = [future.result(300) for future in client.submit([call(n) for n in range(calls)])]
        seconds = time.monotonic() - started
    assert [result for result in results if isinstance(result, Missing)] == []
    assert all(is_right(result, n) for n, result in enumerate(results))
    return calls / rate / seconds


@pytest.mark.parametrize(
    ("status", "rate", "asks_for"),
    [(429, 20.0, "nothing"), (429, 40.0, "date"), (503, 40.0, "seconds"), (529, 40.0, "seconds"),
     *(pytest.param(*given, marks=pytest.mark.slow)
       for given in ((429, 80.0, "nothing"), (429, 40.0, "seconds"), (503, 40.0, "date")))],
)  # fmt: skip
def test_a_rate_costs_no_reply(status: int, rate: float, asks_for: str) -> None:
    with Server(says(status), bucket=Bucket(rate), headers=ASKS_FOR[asks_for]) as server:
        used_rate(server, 40, rate)
        assert server.statuses[200] == 40 and server.statuses[status] > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("asks_for", ASKS_FOR)
@pytest.mark.parametrize("rate", [2.0, 5.0, 10.0])
def test_256_calls_at_nine_tenths_of_the_rate(rate: float, asks_for: str) -> None:
    """With the deadline of a run; a second's worth of requests at once, as Retry-After counts in seconds."""
    with Server(says(), bucket=Bucket(rate, burst=rate), headers=ASKS_FOR[asks_for]) as server:
        assert used_rate(server, 256, rate) >= 0.9


def served(rate: Callable[[float], float], seconds: float, burst: float = 1.0) -> tuple[int, int]:
    """Requests that a token bucket grants and refuses at a pace, one at a time and without delays."""
    pace, now, tokens, granted, refused = Pace(), 0.0, burst, 0, 0
    while now < seconds:
        pace.take(now)
        sent, now = now, now + 1e-3
        if tokens >= 1:
            tokens, granted = tokens - 1, granted + 1
            pace.answered(sent)
        else:
            refused += 1
            pace.refused(now, sent)
        ready = max(now, pace.next)
        tokens, now = min(burst, tokens + (ready - sent) * rate(now)), ready
    return granted, refused


@pytest.mark.parametrize(("rate", "requests"), [(0.2, 256), (2.0, 256), (5.0, 256), (10.0, 256), (100.0, 2000)])
def test_a_pace_finds_the_rate(rate: float, requests: int) -> None:
    granted, refused = served(lambda now: rate, requests / rate)
    assert granted >= 0.9 * requests and refused < 0.3 * granted


def test_a_pace_follows_a_rate_that_changes() -> None:
    granted, refused = served(lambda now: 10.0 if now < 60 else 2.0, 120)
    assert granted >= 0.9 * 720 and refused < 0.3 * granted
    granted, refused = served(lambda now: 2.0 if now < 60 else 10.0, 120)
    assert granted >= 0.6 * 720 and refused < 0.3 * granted


def test_a_pace_has_a_lowest_and_is_none_where_nothing_is_refused() -> None:
    pace = Pace()
    for now in range(100):
        pace.take(now)
        pace.answered(now)
    assert pace.next <= 99
    for now in range(100, 4000, 20):
        pace.take(now)
        pace.refused(now + 0.1, now)
    assert pace.rate == SLOWEST and pace.next - now <= 1 / SLOWEST + 0.1


def test_what_was_sent_before_the_pace_fell_says_nothing_new() -> None:
    pace = Pace()
    pace.take(0.0)
    assert pace.refused(0.1, 0.0)
    rate = pace.rate
    assert [pace.refused(0.2, sent) for sent in (0.0, 0.05, 0.1)] == [False] * 3 and pace.rate == rate
    pace.answered(0.05)
    assert pace.rate == rate and pace.refused(0.5, 0.3) and pace.rate < rate


def test_a_rate_that_is_never_granted_ends_with_the_deadline() -> None:
    """A call is missing for its deadline, not for attempts, and the server is left in peace."""
    with Server(says(), bucket=Bucket(0.0, 0.0)) as server, client_of([server.address], deadline_s=1.0) as client:
        result = client.submit([call(3)])[0].result(20)
        assert isinstance(result, Missing) and "within 1 s" in result.reason and "HTTP 429" in result.reason
        assert server.statuses[429] < 12


def test_a_rate_that_is_never_granted_is_an_outage_that_says_why() -> None:
    with Server(says(), bucket=Bucket(0.0, 0.0)) as server:
        with client_of([server.address], deadline_s=60.0, attempt_s=0.5, outage_s=1.0) as client:
            with pytest.raises(JudgeOutage, match=f"{ROLE}: no answer from 127.0.0.1.* for 1 s; the last: .*HTTP 429"):
                client.submit([call(3)])[0].result(20)


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (429, {"message": "You exceeded your quota", "type": "insufficient_quota", "code": "insufficient_quota"}),
        (429, {"message": "Billing hard limit has been reached", "code": "billing_hard_limit_reached"}),
        (402, "Insufficient Balance"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("good", [0, 5])
@pytest.mark.usefixtures("soon_asked_again")
def test_an_account_without_credit_is_a_refusal_at_any_time(status: int, reason: object, good: int) -> None:
    """Also after answers: the calls do not wait for an outage."""
    with Server(says(status, reason), bucket=Bucket(0.0, good)) as server, client_of([server.address]) as client:
        for n in range(good):
            assert is_right(client.submit([call(n)])[0].result(10), n)
        with pytest.raises(JudgeRefusal, match=rf"{ROLE}: 127.0.0.1:\d+/v1: HTTP {status}"):
            client.submit([call(99)])[0].result(20)


@pytest.mark.usefixtures("soon_asked_again")
def test_one_account_without_credit_leaves_the_other() -> None:
    empty = says(429, {"message": "no", "code": "insufficient_quota"})
    with Server(empty, bucket=Bucket(0.0, 0.0)) as first, Server(says()) as second:
        with client_of([first.address, second.address]) as client:
            results = [future.result(20) for future in client.submit([call(n) for n in range(40)])]
            assert all(is_right(result, n) for n, result in enumerate(results))
            time.sleep(0.5)  # its probes are refused as well
            assert is_right(client.submit([call(99)])[0].result(20), 99)


def test_a_router_that_says_429_in_a_body_of_status_200_is_slowed_for() -> None:
    error = {"error": {"code": 429, "message": "rate limited"}}
    granted, refused = Bucket(20.0), list[str]()

    def answer(text: str) -> tuple[int, object]:
        if granted.grants():
            return 200, json.dumps({"score": score_of(text)})
        refused.append(text)
        return 200, error

    with Server(answer, whole=lambda reply: reply is error) as server:
        used_rate(server, 40, 20.0)  # asserts that no reply is missing
    assert refused
