"""The judge client against a server that fails: every call ends right or missing, in time, and is counted."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import logging
import math
import random
import threading
import time
from concurrent.futures import FIRST_COMPLETED, CancelledError, wait

import pytest
from rewards.fault_proxy import FAULTS, MALFORMED, SLOW, Behaviour, completion, running, score_of
from rewards.judge_cases import KEY, ROLE, RUBRIC, Score, call, client_of, is_right

from tempact.rewards.judges import JudgeCall, JudgeOutage
from tempact.rewards.judges.client import JudgeClient
from tempact.rewards.judges.config import EndpointConfig, JudgeConfig
from tempact.rewards.judges.endpoints import Dispatcher, Endpoint, Pool, retry_after_s
from tempact.types import Missing

RETRIED = [fault for fault in FAULTS if fault not in SLOW]


@pytest.mark.parametrize("fault", RETRIED)
def test_a_fault_is_asked_again_and_the_reply_is_right(fault: str) -> None:
    with running(Behaviour(retry_after="0.1"), script=(fault,)) as server, client_of([server.url]) as client:
        result = client.submit([call(3)])[0].result(10)
        assert is_right(result, 3)
        assert dict(server.proxy.seen) == {fault: 1, "": 1}
        assert client.stats()[f"judge/{ROLE}/retries"] == 1


@pytest.mark.parametrize("fault", ["nan", "wrong_fields", "500", "reset", "refusal", "not_json"])
def test_attempts_are_bounded_and_what_stays_wrong_is_missing(fault: str) -> None:
    with running(Behaviour(share=1, faults=(fault,))) as server, client_of([server.url]) as client:
        result = client.submit([call(3)])[0].result(10)
        assert isinstance(result, Missing) and result.reason.startswith("4 attempts")
        assert server.proxy.seen[fault] == 4
        assert client.stats()[f"judge/{ROLE}/missing"] == 1


def test_a_call_the_server_rejects_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("rewards.fault_proxy").fault_proxy.STATUSES, "400", 400)
    with running(Behaviour(share=1, faults=("400",))) as server, client_of([server.url], schemas=False) as client:
        result = client.submit([call(3)])[0].result(10)
        assert isinstance(result, Missing) and "HTTP 400" in result.reason
        assert server.proxy.seen["400"] == 1


@pytest.mark.parametrize("fault", SLOW)
def test_no_call_takes_longer_than_its_deadline(fault: str) -> None:
    behaviour = Behaviour(share=1, faults=(fault,), slow_s=30)
    with running(behaviour) as server, client_of([server.url], deadline_s=0.5, attempt_s=0.3) as client:
        started = time.monotonic()
        result = client.submit([call(3)])[0].result(10)
        assert 0.5 <= time.monotonic() - started < 10  # the server takes 30 s or more
        assert isinstance(result, Missing) and "within 0.5 s" in result.reason


def test_a_stalled_request_leaves_time_for_the_next() -> None:
    with running(script=("stalled",)) as server, client_of([server.url], attempt_s=0.2) as client:
        assert is_right(client.submit([call(3)])[0].result(10), 3)


@pytest.mark.parametrize("count", [200, pytest.param(400, marks=pytest.mark.slow)])
def test_random_faults_give_every_call_its_own_reply_or_none(count: int) -> None:
    behaviour = Behaviour(share=0.3, faults=tuple(RETRIED), retry_after="0.05", delay_s=0.01, seed=1)
    with running(behaviour) as server, client_of([server.url]) as client:
        results = [future.result(30) for future in client.submit([call(n) for n in range(count)])]
        right = [is_right(result, n) for n, result in enumerate(results)]
        missing = [isinstance(result, Missing) for result in results]
        assert all(a != b for a, b in zip(right, missing, strict=True))
        assert sum(missing) <= 0.03 * count  # 0.3 ** 4 is 0.008
        assert sum(server.proxy.seen.values()) > 1.25 * count
        stats = client.stats()
        assert stats[f"judge/{ROLE}/calls"] == count and stats[f"judge/{ROLE}/missing"] == sum(missing) / count


def test_concurrency_is_used_and_never_exceeded() -> None:
    with running(Behaviour(delay_s=0.05)) as server, client_of([server.url], concurrency=7) as client:
        started = time.monotonic()
        results = [future.result(30) for future in client.submit([call(n) for n in range(70)])]
        assert all(is_right(result, n) for n, result in enumerate(results))
        assert server.proxy.most_in_flight == 7
        assert time.monotonic() - started >= 0.5  # ten rounds of 0.05 s


@pytest.mark.parametrize("fault", ["refusal", "not_json", "not_a_completion", "prose"])
def test_what_came_instead_of_a_reply_is_logged(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    said = {"refusal": "I would rather not.", "not_json": "wireless network", "not_a_completion": '"choices": []',
            "prose": "I would say 0.5."}[fault]  # fmt: skip
    with running(script=(fault,)) as server, client_of([server.url]) as client:
        assert is_right(client.submit([call(3)])[0].result(10), 3)
    assert [said in record.getMessage() for record in caplog.records if "not as asked for" in record.msg] == [True]


@pytest.mark.parametrize("fault", ["429", "503"])
def test_a_busy_server_is_left_alone_for_as_long_as_it_asks(fault: str) -> None:
    """Longer than the call has: no second request. Another server does not keep it waiting."""
    busy = Behaviour(share=1, faults=(fault,), retry_after="60")
    with running(busy) as server, client_of([server.url], deadline_s=1.0) as client:
        assert isinstance(client.submit([call(3)])[0].result(10), Missing)
        assert server.proxy.seen[fault] == 1
    with running(busy) as server, running() as other, client_of([server.url, other.url], concurrency=1) as client:
        results = [future.result(30) for future in client.submit([call(n) for n in range(8)])]
        assert all(is_right(result, n) for n, result in enumerate(results))


def test_an_error_of_the_http_library_is_no_exception_of_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*given):
        raise RuntimeError(f"line one\nwith {KEY}")

    monkeypatch.setattr(JudgeClient, "_post", broken)
    with client_of(["http://127.0.0.1:9/v1"]) as client:
        result = client.submit([call(3)])[0].result(10)
    assert isinstance(result, Missing) and "RuntimeError: line one with ***" in result.reason
    assert KEY not in result.reason


def test_a_call_that_is_none_does_not_stop_the_others() -> None:
    with running() as server, client_of([server.url]) as client:
        odd, good = client.submit([call(1, images=("no bytes",)), call(2)])
        assert isinstance(odd.exception(10), TypeError) and is_right(good.result(10), 2)


def test_a_client_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "nonsense://proxy")
    with pytest.raises(Exception, match="(?i)proxy"), client_of(["http://127.0.0.1:9/v1"]):
        pass


def test_requests_per_minute_are_kept() -> None:
    with running() as server, client_of([server.url], requests_per_minute=600) as client:
        started = time.monotonic()
        for future in client.submit([call(n) for n in range(6)]):
            future.result(10)
        assert time.monotonic() - started >= 0.5


def test_retry_after_holds_back_everybody_once_it_is_repeated() -> None:
    behaviour = Behaviour(retry_after="1")
    with running(behaviour, script=("429", "429")) as server, client_of([server.url], concurrency=1) as client:
        started = time.monotonic()
        futures = client.submit([call(n) for n in range(8)])
        wait(futures, return_when=FIRST_COMPLETED)
        assert time.monotonic() - started >= 1
        results = [future.result(10) for future in futures]
        assert all(is_right(result, n) for n, result in enumerate(results))
        assert server.proxy.seen["429"] == 2


def test_a_single_retry_after_holds_back_its_own_call() -> None:
    behaviour = Behaviour(retry_after="4")
    with running(behaviour, script=("429",)) as server, client_of([server.url], concurrency=1) as client:
        held, *others = client.submit([call(n) for n in range(8)])
        assert all(is_right(future.result(10), n) for n, future in enumerate(others, start=1))
        assert not held.done()


def test_the_least_busy_server_is_next_and_not_the_one_that_failed() -> None:
    first, second, third = (Endpoint(EndpointConfig(f"http://{n}", "m", concurrency=4), 0.0) for n in "abc")
    pool = Pool([first, second, third])
    first.take(0.0), second.take(0.0), second.take(0.0)
    assert pool.choose(1.0, None) is third and pool.choose(1.0, third) is first
    third.failed(1.0, probe=False, at_once=True)
    assert pool.choose(1.5, None) is first  # the broken one has its cooldown
    assert pool.choose(2.5, None) is first and Pool([third]).choose(2.5, third) is third


def test_who_probes_a_broken_server_keeps_its_place() -> None:
    """The call that failed there leaves the probe to another, and is the first again when the server is back."""

    async def turns() -> list[int]:
        dispatcher = Dispatcher([(ROLE, [EndpointConfig("http://a", "m", concurrency=1)])])
        pool, taken = dispatcher.pools[ROLE], []
        endpoint = pool.endpoints[0]

        async def ask(order: int, avoid: Endpoint | None) -> None:
            lease = await dispatcher.acquire(pool, order, avoid, math.inf)
            taken.append(order)
            dispatcher.answered(lease)
            dispatcher.release(lease)

        endpoint.failed(0.0, probe=False, at_once=True)  # its cooldown is over by now
        dispatcher._changed()
        endpoint.probing = True  # nobody's turn yet
        waiting = [asyncio.create_task(ask(order, endpoint if order < 3 else None)) for order in range(5)]
        await asyncio.sleep(0)
        endpoint.probing = False
        dispatcher.dispatch()
        await asyncio.gather(*waiting)
        return taken

    assert asyncio.run(turns()) == [3, 0, 1, 2, 4]


def test_retry_after_in_both_forms() -> None:
    assert retry_after_s("2.5") == 2.5
    assert retry_after_s("Wed, 21 Oct 2015 07:28:30 GMT", now=1445412480.0) == 30
    assert [retry_after_s(odd) for odd in ("", "soon", "-3", "nan", "inf", "1e9")] == [0, 0, 0, 0, 60, 60]


def test_the_other_server_takes_over() -> None:
    broken, good = Behaviour(share=1, faults=("500",)), Behaviour(delay_s=0.01)
    with running(broken) as first, running(good) as second, client_of([first.url, second.url]) as client:
        results = [future.result(10) for future in client.submit([call(n) for n in range(60)])]
        assert all(is_right(result, n) for n, result in enumerate(results))
        assert first.proxy.seen["500"] < 40  # its breaker opens; what was sent before that is in flight
        assert second.proxy.seen[""] == 60


def test_a_wrong_key_at_one_server_leaves_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("rewards.fault_proxy").fault_proxy.STATUSES, "401", 401)
    with running(Behaviour(share=1, faults=("401",))) as first, running() as second:
        with client_of([first.url, second.url], concurrency=1) as client:
            results = [future.result(10) for future in client.submit([call(n) for n in range(20)])]
        assert all(is_right(result, n) for n, result in enumerate(results))
        assert first.proxy.seen["401"] <= 2  # once, and perhaps a probe


def test_calls_wait_for_a_server_that_comes_back() -> None:
    with running(Behaviour(delay_s=0.05)) as server:
        with client_of([server.url], concurrency=4, deadline_s=1.5, attempt_s=1.0) as client:
            futures = client.submit([call(n) for n in range(100)])
            futures[10].result(10)
            server.die()
            time.sleep(2.5)  # longer than a call's deadline, which stands still meanwhile
            assert not all(future.done() for future in futures)
            server.revive()
            results = [future.result(20) for future in futures]
    assert all(is_right(result, n) for n, result in enumerate(results))


def test_an_outage_that_lasts_reaches_the_trainer() -> None:
    with running() as server:
        server.die()
        with client_of([server.url], attempt_s=0.3, outage_s=1.0) as client:
            futures = client.submit([call(n) for n in range(20)])
            started = time.monotonic()
            with pytest.raises(JudgeOutage, match=f"{ROLE}: no answer from 127.0.0.1"):
                futures[0].result(10)
            # calls may be missing before the breaker has opened, but none is left hanging
            for future in futures:
                assert isinstance(future.exception(1), JudgeOutage) or isinstance(future.result(), Missing)
            assert 0.5 < time.monotonic() - started < 10
            with pytest.raises(JudgeOutage):
                client.submit([call(99)])


def test_time_without_calls_is_no_outage() -> None:
    with running(script=("", "500")) as server, client_of([server.url], attempt_s=0.3, outage_s=0.5) as client:
        assert is_right(client.submit([call(1)])[0].result(5), 1)
        time.sleep(1.0)
        assert is_right(client.submit([call(2)])[0].result(5), 2)


def test_a_call_that_breaks_the_server_does_not_stop_the_others() -> None:
    """A reset for one text only; the breaker opens and closes, the rest is answered."""
    with running() as server:
        answer = server.proxy._answer

        async def poisoned(fault, head, body, writer):
            return await answer("500" if b"plan 7777" in body else fault, head, body, writer)

        server.proxy._answer = poisoned
        with client_of([server.url], concurrency=2) as client:
            futures = client.submit([call(7777)] + [call(n) for n in range(10)])
            assert isinstance(futures[0].result(20), Missing)
            assert all(is_right(future.result(20), n) for n, future in enumerate(futures[1:]))


def test_images_and_rubric_are_sent_as_the_protocol_says() -> None:
    bodies = []
    with running() as server:
        reply = server.proxy._reply

        async def recorded(fault, head, body):
            bodies.append(json.loads(body))
            return await reply(fault, head, body)

        server.proxy._reply = recorded
        with client_of([server.url], max_tokens=77) as client:
            client.submit([call(5, images=(b"\xff\xd8one", b"\xff\xd8two"), media_hash="m")])[0].result(5)
            client.submit([call(6)])[0].result(5)
    system, user = bodies[0]["messages"]
    assert system == {"role": "system", "content": RUBRIC.system}
    assert user["content"][0] == {"type": "text", "text": "plan 5"}
    urls = [part["image_url"]["url"] for part in user["content"][1:]]
    assert urls == [f"data:image/jpeg;base64,{base64.b64encode(i).decode()}" for i in (b"\xff\xd8one", b"\xff\xd8two")]
    assert bodies[1]["messages"][1] == {"role": "user", "content": "plan 6"}
    assert (bodies[0]["model"], bodies[0]["temperature"], bodies[0]["max_tokens"]) == ("judge", 0, 77)


def test_identical_calls_are_one_request_and_all_are_answered() -> None:
    with running(Behaviour(delay_s=0.1)) as server, client_of([server.url]) as client:
        results = [future.result(5) for future in client.submit([call(4)] * 10)]
        assert all(is_right(result, 4) for result in results) and server.proxy.seen[""] == 1
        assert client.stats()[f"judge/{ROLE}/calls"] == 10


def test_closing_leaves_nobody_waiting() -> None:
    with running(Behaviour(delay_s=30)) as server:
        with client_of([server.url]) as client:
            futures = client.submit([call(n) for n in range(50)])
            time.sleep(0.1)
        for future in futures:
            with pytest.raises(CancelledError):
                future.result(1)
    assert "judges" not in {thread.name for thread in threading.enumerate() if thread is client._thread}


def test_submit_returns_at_once() -> None:
    with running(Behaviour(delay_s=30)) as server, client_of([server.url], attempt_s=29) as client:
        futures = client.submit([call(n) for n in range(16)])
        assert not any(future.done() for future in futures)


def test_latencies_are_those_of_the_server() -> None:
    with running(Behaviour(delay_s=0.2)) as server, client_of([server.url]) as client:
        for future in client.submit([call(n) for n in range(16)]):
            future.result(5)
        stats = client.stats()
        mean, p95, longest = (stats[f"judge/{ROLE}/latency_{name}_s"] for name in ("mean", "p95", "max"))
        assert 0.2 <= mean <= p95 <= longest < 5
        assert client.stats() == {}  # counted once


def test_the_key_is_sent_and_shown_nowhere(caplog: pytest.LogCaptureFixture, tmp_path, monkeypatch) -> None:
    """The server echoes the key in error messages, and in a reply."""
    monkeypatch.setitem(MALFORMED, "echo", f'{{"score": 0.5, "reason": "your key is {KEY}"}}')
    monkeypatch.setitem(MALFORMED, "echo_wrong", f'{{"score": "{KEY}"}}')
    cache = tmp_path / "cache.sqlite"
    script = ("500", "429", "echo_wrong", "", "echo", "500", "500", "500", "500")
    with caplog.at_level(logging.DEBUG), running(Behaviour(retry_after="0"), script=script) as server:
        with client_of([server.url], cache=cache) as client:
            results = [client.submit([call(n)])[0].result(10) for n in range(3)]
            config = client.config
    assert is_right(results[0], 0) and isinstance(results[1], Score) and isinstance(results[2], Missing)
    assert any(KEY.encode() in head for head in server.proxy.headers)
    assert KEY not in caplog.text and "***" in caplog.text
    assert KEY not in repr(config) and KEY not in str(results[2])
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert KEY.encode() not in written and b"as it should be" in written


def test_keys_of_other_services_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-service")
    with running() as server:
        config = JudgeConfig({ROLE: (EndpointConfig(server.url, "judge"),)})
        with JudgeClient(config) as client:
            client.submit([call(1)])[0].result(5)
        assert b"sk-of-another-service" not in b"".join(server.proxy.headers)


def test_fuzzed_plans_are_sent_and_answered() -> None:
    """Plans of any text: lone surrogates, control characters, quotes, long ones."""
    generator = random.Random(0)
    alphabet = ["\ud800", "\x00", '"', "\\", "\n", "```", "</think>", "{", "}", "é", "🎬", "a", "\u202e"]
    texts = ["".join(generator.choices(alphabet, k=generator.randrange(200))) + f" {n}" for n in range(500)]
    with running() as server, client_of([server.url]) as client:
        futures = client.submit([JudgeCall(ROLE, RUBRIC, text) for text in texts])
        results = [future.result(30) for future in futures]
    assert [r.score for r in results if isinstance(r, Score)] == [score_of(text) for text in texts]


@pytest.mark.parametrize("count", [300, pytest.param(1000, marks=pytest.mark.slow)])
def test_fuzzed_bodies_raise_nothing(count: int) -> None:
    """A body cut, or with a byte changed, anywhere: a reply in range, or missing."""
    generator = random.Random(1)
    whole = completion('{"score": 0.25, "reason": "x"}')
    odd = itertools.cycle([True, False])  # every other one is whole, so that the breaker stays closed

    def damaged() -> bytes:
        if next(odd):
            return whole
        at = generator.randrange(len(whole))
        return whole[:at] if generator.random() < 0.5 else whole[:at] + generator.randbytes(1) + whole[at + 1 :]

    with running() as server:

        async def reply(fault, head, body):
            return damaged()

        server.proxy._reply = reply
        with client_of([server.url], attempts=1) as client:
            results = [future.result(60) for future in client.submit([call(n) for n in range(count)])]
    scores = [result.score for result in results if isinstance(result, Score)]
    assert len(results) == count and count / 2 <= len(scores) < count
    assert all(math.isfinite(score) and 0 <= score <= 1 for score in scores)
    assert all(isinstance(result, Score | Missing) for result in results)
