"""What hosted judges do not take, what is sent to them, and what they may answer."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest
from rewards.fault_proxy import score_of
from rewards.judge_cases import KEY, ROLE, Score, call, client_of, is_right
from rewards.judge_server import Server

from tempact.diagnostics.judges import why_not_served
from tempact.rewards.judged import VideoVerdict, video_fields
from tempact.rewards.judges import JudgeRefusal, JudgeResult, Repeated
from tempact.rewards.judges.client import JudgeClient
from tempact.rewards.judges.config import EndpointConfig, JudgeConfig
from tempact.rewards.judges.endpoints import Dispatcher, Endpoint, Pool
from tempact.rewards.judges.replies import optional_fields, refused_fields, response_format
from tempact.types import Missing

OPTIONAL = {"max_tokens", "max_completion_tokens", "temperature", "response_format"}


class Picky(Server):
    """A server that refuses a request for the first of the fields that it does not take, in its own words."""

    def __init__(self, refusals: dict[str, str], status: int = 400):
        self.refusals, self.status = refusals, status
        super().__init__(self.says)

    def says(self, text: str) -> tuple[int, Any]:
        for name, words in self.refusals.items():
            if name in self.requests[-1]:
                return self.status, words
        return 200, json.dumps({"score": score_of(text)})

    def fields(self) -> list[set[str]]:
        """Optional fields of each request."""
        return [OPTIONAL & set(request) for request in self.requests]


def asked(client: JudgeClient, *numbers: int) -> list[JudgeResult]:
    futures: Sequence[Future[JudgeResult]] = client.submit([call(n) for n in numbers])
    return [future.result(20) for future in futures]


REASONING = {
    "max_tokens": "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead.",
    "temperature": "Unsupported value: 'temperature' does not support 0.0 with this model.",
}


def test_a_reasoning_model_is_asked_once_more_without_and_then_never_again(caplog: pytest.LogCaptureFixture) -> None:
    with Picky(REASONING) as server, client_of([server.address], attempts=1, max_tokens=77) as client:
        assert is_right(asked(client, 1)[0], 1)
        assert server.fields() == [
            {"max_tokens", "temperature", "response_format"},
            {"max_completion_tokens", "temperature", "response_format"},
            {"max_completion_tokens", "response_format"},
        ]
        assert server.requests[-1]["max_completion_tokens"] == 77
        assert all(is_right(result, n) for n, result in zip(range(2, 20), asked(client, *range(2, 20)), strict=True))
        assert len(server.requests) == 3 + 18
    assert [record.getMessage().count("does not take") for record in caplog.records] == [1, 1]


def test_many_calls_at_once_learn_it_together() -> None:
    with Picky(REASONING) as server, client_of([server.address], attempts=1, concurrency=16) as client:
        results = asked(client, *range(40))
        assert all(is_right(result, n) for n, result in enumerate(results))
        assert len(server.requests) <= 40 + 2 * 16


@pytest.mark.parametrize(
    ("name", "words", "status"),
    [
        ("response_format", "This response_format type is unavailable now", 400),
        ("response_format", "Grammar error: Unimplemented keys: ['minItems']", 400),
        ("response_format", "[{'type': 'extra_forbidden', 'loc': ['body', 'response_format']}]", 422),
        ("response_format", "Bad Request", 400),
        ("response_format", "not implemented", 501),
        ("temperature", "`temperature` is deprecated for this model.", 400),
        ("max_tokens", "unknown field max_tokens", 422),
    ],
)
def test_other_words_and_statuses(name: str, words: str, status: int) -> None:
    with Picky({name: words}, status) as server, client_of([server.address], attempts=1) as client:
        assert all(is_right(result, n) for n, result in enumerate(asked(client, 0))) and len(server.requests) == 2
        assert is_right(asked(client, 1)[0], 1) and len(server.requests) == 3


def test_a_server_that_takes_no_limit_at_all() -> None:
    refusals = {name: f"unknown field {name}" for name in ("max_tokens", "max_completion_tokens")}
    with Picky(refusals) as server, client_of([server.address], attempts=1) as client:
        assert is_right(asked(client, 1)[0], 1)
        assert server.fields()[-1] == {"temperature", "response_format"}


def test_each_server_of_a_role_has_its_own_fields() -> None:
    with Picky(REASONING) as first, Picky({}) as second:
        with client_of([first.address, second.address], concurrency=1) as client:
            assert all(is_right(result, n) for n, result in enumerate(asked(client, *range(20))))
        assert all("temperature" in sent for sent in second.fields()) and len(second.requests) > 3


def test_a_call_that_is_too_long_changes_nothing_for_the_others() -> None:
    words = "'max_tokens' is too large: this model's maximum context length is 8192 tokens"
    with Picky({"max_tokens": words}) as server, client_of([server.address]) as client:
        result = asked(client, 1)[0]
        assert isinstance(result, Missing) and "HTTP 400" in result.reason and len(server.requests) == 1
        server.refusals.clear()
        assert is_right(asked(client, 2)[0], 2) and server.fields()[-1] == {
            "max_tokens",
            "temperature",
            "response_format",
        }


def test_a_refusal_that_names_nothing_is_blamed_on_the_schema_only_where_leaving_it_out_helps(caplog) -> None:
    """vLLM refuses pictures for a model of text in words that name no field: the schema stays for other calls."""
    with Picky({"messages": "the model is not a multimodal model"}) as server:
        with client_of([server.address]) as client:
            result = asked(client, 1)[0]
            assert isinstance(result, Missing) and "multimodal" in result.reason and "HTTP 400" in result.reason
            assert ["response_format" in sent for sent in server.fields()] == [True, False]
            assert "does not take" not in caplog.text
            server.refusals.clear()
            assert is_right(asked(client, 2)[0], 2) and "response_format" in server.fields()[-1]
            server.refusals["messages"] = "the model is not a multimodal model"
            asked(client, 3)
            assert "response_format" in server.fields()[-1] and len(server.requests) == 4  # it does take schemas
    with Picky({"response_format": "Bad Request"}) as server, client_of([server.address]) as client:
        assert is_right(asked(client, 1)[0], 1) and is_right(asked(client, 2)[0], 2) and len(server.requests) == 3
    assert caplog.text.count("does not take response_format") == 1


@pytest.mark.parametrize(
    ("told", "refused"),
    [
        ("response_format of type json_schema is not supported with this model in this context", {"response_format"}),
        ("max_tokens is not allowed in the context of this deployment", {"max_tokens"}),
        ("max_tokens is too large: it exceeds the model's Context Window", set()),
        ("context_length_exceeded: lower max_tokens", set()),
        ("max_tokens and the prompt exceed the available context size", set()),
    ],
)
def test_a_context_that_is_no_length_hides_no_refused_field(told: str, refused: set[str]) -> None:
    assert refused_fields({"max_tokens", "response_format"}, told) == refused


def test_a_400_that_names_no_field_at_a_server_that_has_answered_is_of_the_call() -> None:
    with Picky({}) as server, client_of([server.address]) as client:
        assert is_right(asked(client, 1)[0], 1)
        server.refusals["messages"] = "At most 1 image(s) may be provided"
        assert isinstance(asked(client, 2)[0], Missing) and len(server.requests) == 2


def test_names_and_values_of_fields_are_settings() -> None:
    def fields(**settings: Any) -> dict[str, Any]:
        return optional_fields(JudgeConfig({}, **settings), Score, set())

    plain = fields()
    assert (plain["max_tokens"], plain["temperature"], plain["response_format"]) == (2048, 0.0, response_format(Score))
    assert fields(max_tokens_name="max_completion_tokens", max_tokens=5, schemas=False, temperature=1.0) == {
        "max_completion_tokens": 5,
        "temperature": 1.0,
    }
    assert fields(max_tokens_name="", temperature_name="", schemas=False) == {}
    assert fields(max_tokens_name="n_predict", temperature_name="temp", schemas=False) == {
        "n_predict": 2048,
        "temp": 0.0,
    }


def test_the_schema_asks_for_what_is_read() -> None:
    schema = response_format(video_fields(6))["json_schema"]["schema"]
    assert set(schema["required"]) == set(VideoVerdict.model_fields) == set(schema["properties"])
    assert schema["additionalProperties"] is False and schema["type"] == "object"
    assert (schema["properties"]["frame_scores"]["minItems"], schema["properties"]["frame_scores"]["maxItems"]) == (
        6,
        6,
    )
    assert schema["properties"]["final"]["maximum"] == 10


# what is sent


@pytest.fixture
def of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "OPENAI_ORG_ID": "org-secret", "OPENAI_PROJECT_ID": "proj-secret", "OPENAI_API_KEY": "sk-secret",
        "OPENAI_ADMIN_KEY": "sk-secret-admin", "OPENAI_BASE_URL": "http://secret.invalid/v1",
        "OPENAI_CUSTOM_HEADERS": "X-Team: secret\nAuthorization: Bearer secret\nHost: secret\nUser-Agent: secret\n"
        "Cookie: secret\nAccept: secret\nContent-Length: 3\nX-Stainless-Raw-Response: secret",
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("of_others")
@pytest.mark.parametrize("key", [KEY, ""])
def test_nothing_of_other_clients_is_sent(key: str) -> None:
    with Picky({}) as server:
        endpoint = EndpointConfig(server.address, "m", key)
        with JudgeClient(JudgeConfig({ROLE: (endpoint,)}, deadline_s=5.0)) as client:
            assert is_right(asked(client, 1)[0], 1)
        assert why_not_served(endpoint, 5.0) == ""
        host = server.address.removeprefix("http://").removesuffix("/v1")
        for head in server.heads:
            assert "secret" not in json.dumps(head) and head["host"] == host
            assert head.get("authorization") == (f"Bearer {key}" if key else None)
        assert len(server.heads) == 2 and set(server.heads[0]) <= {
            "host", "accept", "content-type", "content-length", "authorization", "x-stainless-raw-response",
        }  # fmt: skip


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.usefixtures("soon_asked_again")
def test_a_redirect_is_not_followed_and_said_in_one_line(status: int, caplog: pytest.LogCaptureFixture) -> None:
    with Picky({}) as other:
        to = f"{other.address}/chat/completions"
        with Server(lambda text: (status, "over there"), headers=lambda: {"Location": to}) as server:
            with client_of([server.address]) as client, pytest.raises(JudgeRefusal, match=f"a redirect to {to}, which"):
                asked(client, 1)
            assert why_not_served(EndpointConfig(server.address, "m", KEY), 5.0) == ""
        assert other.heads == []
    assert all("\n" not in record.getMessage() for record in caplog.records)


# what they answer

G = '{"score": 0.25}'


@pytest.mark.parametrize(
    "message",
    [
        {"content": [{"type": "text", "text": G}]},
        {"content": [{"type": "text", "text": G[:5]}, {"type": "text", "text": G[5:]}]},
        {"content": [{"type": "output_text", "text": G}]},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "{}"}]}, {"type": "text", "text": G}]},
        {"content": [G]},
        {"content": None, "reasoning_content": G},
        {"content": None, "reasoning": f"\n{G}\n"},
        {"content": "", "reasoning_content": f"```json\n{G}\n```"},
        {"content": " \n", "reasoning_content": G},
        {"content": [], "reasoning_content": G},
        {"content": G, "reasoning_content": "it might be {}"},
        {"content": f"<|begin_of_box|>{G}<|end_of_box|>"},
    ],
)
def test_a_reply_in_another_shape_is_read(message: dict[str, Any]) -> None:
    with Server(lambda text: (200, message)) as server, client_of([server.address], attempts=1) as client:
        assert asked(client, 1) == [Score(score=0.25)]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"content": None, "reasoning_content": f"I would say {G}"}, "accepted: a server without --reasoning-parser"),
        ({"content": None, "reasoning_content": f"{G}{G}"}, "all text is in its reasoning"),
        ({"content": None}, "the reply is empty"),
        ({"content": [{"type": "image_url", "image_url": "x"}]}, "accepted: text"),
        ({"content": {"score": 0.25}}, "accepted: text"),
        ({"content": 3}, "accepted: text"),
        ({"content": [{"type": "text", "text": G}, {"type": "text", "text": G}]}, "not one JSON object"),
        ({"content": [None]}, "accepted: text"),
    ],
)
def test_a_judge_that_answers_something_else_is_no_dead_server(message: dict[str, Any], reason: str) -> None:
    """Twenty in a row: no breaker opens, and each call says why."""
    with Server(lambda text: (200, message)) as server, client_of([server.address], attempts=1) as client:
        results = asked(client, *range(20))
        assert all(isinstance(result, Missing) and reason in result.reason for result in results), results
        assert len(server.requests) == 20


def test_repeated_warnings_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    with Server(lambda text: (200, "I like it. " * 100)) as server, client_of([server.address], attempts=2) as client:
        asked(client, *range(200))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) <= 3 + 7 + 3 + 6 and sum(map(len, told)) < 30_000
    assert any("missing" in line and "(128 so far)" in line for line in told)
    assert any("not as asked for" in line and "(256 so far)" in line for line in told)


def test_the_first_of_a_kind_and_every_doubling_are_written(caplog: pytest.LogCaptureFixture) -> None:
    warn = Repeated(logging.getLogger("tests"))
    for n in range(20):
        warn("a", "a %d", n)
    warn("b", "b")
    assert caplog.messages == ["a 0", "a 1", "a 2", "a 3 (4 so far)", "a 7 (8 so far)", "a 15 (16 so far)", "b"]


# a call that waits while every server is down


def test_a_waiting_call_does_not_spin_while_its_servers_are_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock stands still a moment before the call's deadline: it must neither spin nor end, until it goes on."""
    looks = 0
    clock = Pool.clock

    def counted(pool: Pool) -> float:
        nonlocal looks
        looks += 1
        return clock(pool)

    async def wait() -> tuple[int, float]:
        dispatcher = Dispatcher([(ROLE, [EndpointConfig("http://a", "m", concurrency=1)])])
        pool = dispatcher.pools[ROLE]
        endpoint: Endpoint = pool.endpoints[0]
        endpoint.failed(time.monotonic() + 3600, probe=False, at_once=True)
        dispatcher._changed()
        turn = asyncio.create_task(dispatcher.acquire(pool, 0, None, pool.clock() + 1e-4))
        await asyncio.sleep(0.5)
        assert not turn.done()
        seen, began = looks, time.monotonic()
        endpoint.alive()
        dispatcher._changed()
        with pytest.raises(TimeoutError):
            await turn
        return seen, time.monotonic() - began

    monkeypatch.setattr(Pool, "clock", counted)
    seen, seconds = asyncio.run(wait())
    assert seen < 10 and seconds < 2


def test_a_call_that_waits_has_its_turn_when_its_server_is_back() -> None:
    async def wait() -> bool:
        dispatcher = Dispatcher([(ROLE, [EndpointConfig("http://a", "m", concurrency=1)])])
        pool = dispatcher.pools[ROLE]
        endpoint: Endpoint = pool.endpoints[0]
        endpoint.failed(time.monotonic() - 0.8, probe=False, at_once=True)  # its cooldown ends in 0.2 s
        dispatcher._changed()
        lease = await asyncio.wait_for(dispatcher.acquire(pool, 0, None, pool.clock() + 0.01), 5)
        return lease.probe

    assert asyncio.run(wait())
