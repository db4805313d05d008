"""What judges cost: requests and tokens by role, and a run's limit of requests, over processes and resumed runs."""

from __future__ import annotations

import json
import multiprocessing
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rewards.fault_proxy import score_of
from rewards.judge_cases import ROLE, Score, call, client_of, is_right
from rewards.judge_server import Server

from tempact.errors import UserError
from tempact.rewards.judges import JudgeBudget, JudgeRefusal, merged_stats
from tempact.rewards.judges.budget import COUNTED, Ledger
from tempact.rewards.judges.replies import read_usage
from tempact.types import Missing

USAGE = {"prompt_tokens": 100, "completion_tokens": 30, "total_tokens": 130,
         "completion_tokens_details": {"reasoning_tokens": 20},
         "prompt_tokens_details": {"cached_tokens": 64}}  # fmt: skip
BILL = {"prompt_tokens": 100, "completion_tokens": 30, "reasoning_tokens": 20, "cached_tokens": 64}


def paid(usage: Any = USAGE, content: Callable[[str], str] | None = None) -> Server:
    """A server that says what its answers cost."""

    def says(text: str) -> tuple[int, Any]:
        message = {"role": "assistant", "content": content(text) if content else json.dumps({"score": score_of(text)})}
        return 200, {"choices": [{"index": 0, "message": message}], "usage": usage}

    return Server(says, whole=lambda reply: True)


def spent(path: Path) -> dict[str, int]:
    return json.loads(path.read_text())[ROLE]


def test_requests_and_tokens_are_counted_by_role(tmp_path: Path) -> None:
    ledger = tmp_path / "run" / "judges.json"
    with paid() as server, client_of([server.address], ledger=ledger, cache=tmp_path / "cache") as client:
        for future in client.submit([call(n) for n in (1, 2, 3, 3)]):
            future.result(10)
        assert is_right(client.submit([call(1)])[0].result(10), 1)  # of the cache: nothing is paid
        stats = client.stats()
        assert len(server.requests) == 3 and stats[f"judge/{ROLE}/calls"] == 5
    found = {"requests": 3} | {name: 3 * tokens for name, tokens in BILL.items()}
    assert {name: stats[f"judge/{ROLE}/{name}"] for name in COUNTED} == found
    assert spent(ledger) == found


def test_replies_that_are_no_scores_are_paid_for() -> None:
    with paid(content=lambda text: "no") as server, client_of([server.address], attempts=3) as client:
        assert isinstance(client.submit([call(1)])[0].result(10), Missing)
        stats = client.stats()
    assert (stats[f"judge/{ROLE}/requests"], stats[f"judge/{ROLE}/completion_tokens"]) == (3, 90)


@pytest.mark.parametrize("status", [400, 404, 429, 500])
def test_requests_that_a_server_refuses_are_free(tmp_path: Path, status: int) -> None:
    answers = iter([status, 200])

    def says(text: str) -> tuple[int, str]:
        code = next(answers)
        return code, "temperature" if code != 200 else json.dumps({"score": score_of(text)})

    ledger = tmp_path / "judges.json"
    with Server(says) as server, client_of([server.address], ledger=ledger, max_calls=1) as client:
        assert is_right(client.submit([call(1)])[0].result(20), 1) and len(server.requests) == 2
        stats = client.stats()
    assert (spent(ledger)["requests"], stats[f"judge/{ROLE}/requests"]) == (1, 1)
    assert f"judge/{ROLE}/prompt_tokens" not in stats


@pytest.mark.usefixtures("soon_asked_again")
def test_a_request_on_its_way_to_a_server_that_refuses_all_is_free(tmp_path: Path) -> None:
    ledger, held, over = tmp_path / "judges.json", threading.Event(), threading.Event()

    def says(text: str) -> tuple[int, str]:
        if not held.is_set():
            held.set()
            over.wait(20)
        return 401, "wrong key"

    with Server(says) as server, client_of([server.address], ledger=ledger) as client:
        waiting = client.submit([call(0)])
        assert held.wait(10)
        for future in [*client.submit([call(1)]), *waiting]:
            with pytest.raises(JudgeRefusal, match="HTTP 401"):
                future.result(10)
        over.set()
    assert ledger.read_bytes() == b""


def test_requests_that_nobody_receives_are_free(tmp_path: Path) -> None:
    ledger = tmp_path / "judges.json"
    with paid() as server:
        address = server.address
    with client_of([address], ledger=ledger, max_calls=1, attempts=3) as client:
        result = client.submit([call(1)])[0].result(20)
    assert isinstance(result, Missing) and "3 attempts" in result.reason
    assert ledger.read_bytes() == b""


def test_the_limit_ends_the_calls_in_one_line_and_what_was_asked_is_kept(tmp_path: Path) -> None:
    limits = {"ledger": tmp_path / "judges.json", "cache": tmp_path / "cache"}
    with paid() as server:
        with client_of([server.address], max_calls=7, **limits) as client:
            futures = client.submit([call(n) for n in range(20)])
            errors = [future.exception(10) for future in futures]
            assert [isinstance(error, JudgeBudget) for error in errors] == [False] * 7 + [True] * 13
            said = f"judges: 7 requests are spent ({ROLE} 7; "
            assert said in str(errors[-1]) and "judges.max_calls is 7; one above 7" in str(errors[-1])
            assert "\n" not in str(errors[-1])
        assert len(server.requests) == 7
        with client_of([server.address], max_calls=3, **limits) as client:
            told = "700 prompt and 210 completion tokens), judges.max_calls is 3; one above 7"
            with pytest.raises(JudgeBudget, match=re.escape(told)):
                client.submit([call(1)])
        assert len(server.requests) == 7
        with client_of([server.address], max_calls=10, **limits) as client:  # goes on from where the run is
            futures = client.submit([call(n) for n in range(10)])
            assert all(is_right(future.result(10), n) for n, future in enumerate(futures))
            assert isinstance(client.submit([call(11)])[0].exception(10), JudgeBudget)
        assert len(server.requests) == 10 and spent(limits["ledger"])["requests"] == 10


def take_all(path: Path, limit: int, took: Any) -> None:
    ledger, count = Ledger(path, limit), 0
    try:
        while True:
            ledger.take("plan_quality" if count % 2 else "step_following")
            ledger.add("plan_quality", {"prompt_tokens": 3})
            count += 1
    except JudgeBudget:
        took.put(count)


def test_processes_share_the_limit(tmp_path: Path) -> None:
    """Three at once: together they take exactly what there is, and lose no count."""
    context = multiprocessing.get_context("fork")
    took, path = context.Queue(), tmp_path / "judges.json"
    processes = [context.Process(target=take_all, args=(path, 1000, took)) for _ in range(3)]
    for process in processes:
        process.start()
    counts = [took.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(10)
    found = json.loads(path.read_text())
    assert sum(counts) == 1000 == sum(each["requests"] for each in found.values())
    assert found["plan_quality"]["prompt_tokens"] == 3000


@pytest.mark.parametrize("raw", ["[1]", "{", '{"a": 1}', '{"a": {"requests": -1}}', '{"a": {"requests": true}}', "\0"])
def test_a_file_that_is_no_ledger_is_named(tmp_path: Path, raw: str) -> None:
    path = tmp_path / "judges.json"
    path.write_text(raw)
    with pytest.raises(UserError, match="found no ledger of judges"):
        Ledger(path, 0)
    assert path.read_text() == raw
    with pytest.raises(UserError, match="found no ledger of judges"):
        Ledger(path / "folder" / "judges.json", 0)


def test_a_ledger_that_fails_in_mid_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """Without a limit it is told once; with one, no request goes that cannot be counted."""
    free, limited = Ledger(tmp_path / "free", 0), Ledger(tmp_path / "limited", 5)
    monkeypatch.setattr("os.pwrite", lambda *given: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    for _ in range(3):
        free.take(ROLE)
        free.add(ROLE, {"prompt_tokens": 1})
    assert len(caplog.records) == 1 and "No space left" in caplog.text
    with pytest.raises(JudgeBudget, match="cannot be counted .*No space left"):
        limited.take(ROLE)


@pytest.mark.parametrize(
    ("usage", "found"),
    [
        (USAGE, BILL),
        ({"prompt_tokens": 4, "completion_tokens": 0}, {"prompt_tokens": 4}),
        ({"prompt_tokens": 4, "prompt_tokens_details": None, "completion_tokens_details": []}, {"prompt_tokens": 4}),
        ({"prompt_tokens": "4", "completion_tokens": -2, "reasoning_tokens": True, "cached_tokens": 1.5}, {}),
        (None, {}), ([], {}), (3, {}),
    ],
)  # fmt: skip
def test_usage_is_read_where_it_is_told(usage: Any, found: dict[str, int]) -> None:
    assert read_usage(json.dumps({"choices": [], "usage": usage}).encode()) == found


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"null", b"\xff", b"[" * 50_000])
def test_usage_of_no_completion_is_nothing(body: bytes) -> None:
    assert read_usage(body) == {}


def test_a_server_without_usage_is_counted_in_requests() -> None:
    says = {"content": json.dumps({"score": 0.5})}
    with Server(lambda text: (200, says)) as server, client_of([server.address]) as client:
        assert client.submit([call(1)])[0].result(10) == Score(score=0.5)
        stats = client.stats()
    assert stats[f"judge/{ROLE}/requests"] == 1 and not [name for name in stats if "tokens" in name]


def test_costs_of_processes_add_up() -> None:
    own = {"judge/a/calls": 2.0, "judge/a/requests": 3.0, "judge/a/prompt_tokens": 50.0}
    other = {"judge/a/requests": 1.0, "judge/a/completion_tokens": 7.0}
    assert merged_stats([own, other]) == {
        "judge/a/calls": 2.0,
        "judge/a/requests": 4.0,
        "judge/a/prompt_tokens": 50.0,
        "judge/a/completion_tokens": 7.0,
    }
