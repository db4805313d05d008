"""The cache: what a key depends on, ranks that share the file, and files that are damaged."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import BaseModel, Field
from rewards.fault_proxy import Behaviour, running
from rewards.judge_cases import ROLE, RUBRIC, call, client_of, is_right

from tempact.errors import UserError
from tempact.rewards.judges import JudgeCall
from tempact.rewards.judges import cache as judge_cache
from tempact.rewards.judges.cache import JudgeCache, cache_key
from tempact.types import Missing

PARAMETERS = {"temperature": 0.0, "max_tokens": 10}


def rows(path: Path) -> list[tuple]:
    return sqlite3.connect(path).execute("select key, reply from replies").fetchall()


def test_a_second_run_asks_nobody(tmp_path: Path) -> None:
    cache = tmp_path / "made" / "cache.sqlite"
    with running() as server:
        for run in range(2):
            with client_of([server.url], cache=cache) as client:
                results = [future.result(5) for future in client.submit([call(n) for n in range(20)])]
                assert all(is_right(result, n) for n, result in enumerate(results))
                assert client.stats()[f"judge/{ROLE}/cache_hits"] == run
        assert server.proxy.seen[""] == 20 and len(rows(cache)) == 20


def test_what_is_missing_is_not_kept(tmp_path: Path) -> None:
    cache = tmp_path / "cache.sqlite"
    with running(script=("nan", "nan")) as server, client_of([server.url], cache=cache, attempts=2) as client:
        assert isinstance(client.submit([call(1)])[0].result(5), Missing)
        assert rows(cache) == []
        assert is_right(client.submit([call(1)])[0].result(5), 1) and len(rows(cache)) == 1


class Other(BaseModel):
    score: float = Field(ge=0, le=10)


def test_everything_a_reply_depends_on_is_in_the_key() -> None:
    first = JudgeCall(ROLE, RUBRIC, "text", (b"image",), "hash")
    others = [
        replace(first, text="texts"),
        replace(first, media_hash="hashes"),
        replace(first, media_hash=""),
        replace(first, media_hash="", images=(b"images",)),
        replace(first, rubric=replace(RUBRIC, version="2")),
        replace(first, rubric=replace(RUBRIC, system="Score!")),
        replace(first, rubric=replace(RUBRIC, fields=Other)),
    ]
    keys = [cache_key(each, "m", PARAMETERS) for each in (first, *others)]
    keys += [cache_key(first, "n", PARAMETERS), cache_key(first, "m", PARAMETERS | {"temperature": 0.5})]
    assert len(set(keys)) == len(keys)
    assert cache_key(first, "m", PARAMETERS) == keys[0] == cache_key(replace(first, role="other"), "m", PARAMETERS)
    cache_key(replace(first, text="\ud800"), "m", PARAMETERS)


@pytest.mark.parametrize("reply", ["{", '{"score": 7}', "", '{"score": 0.9, "more": 1}'])
def test_a_row_that_cannot_be_read_is_asked_again(tmp_path: Path, reply: str) -> None:
    cache = tmp_path / "cache.sqlite"
    with running() as server:
        for _ in range(2):
            with client_of([server.url], cache=cache) as client:
                assert is_right(client.submit([call(1)])[0].result(5), 1)
            with sqlite3.connect(cache) as file:
                file.execute("update replies set reply = ?", (reply,))
        assert server.proxy.seen[""] == 2


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    path.write_text("not a database, but long enough to be looked at" * 50)
    with pytest.raises(UserError, match="cache.sqlite: found no usable cache"):
        JudgeCache(path)
    assert path.read_text().startswith("not a database")
    with sqlite3.connect(tmp_path / "other.sqlite") as file:
        file.execute("create table replies (something text)")
    with pytest.raises(UserError, match="other.sqlite: found no usable cache"):
        JudgeCache(tmp_path / "other.sqlite")


def test_ranks_open_a_new_cache_together(tmp_path: Path) -> None:
    """All turn the file to WAL at once, which SQLite refuses to all but one of them without waiting."""
    for n in range(50):
        barrier = threading.Barrier(4)

        def opened(path: Path = tmp_path / f"{n}.sqlite", barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            JudgeCache(path).close()

        with ThreadPoolExecutor(4) as ranks:
            for rank in [ranks.submit(opened) for _ in range(4)]:
                rank.result()
        with closing(sqlite3.connect(tmp_path / f"{n}.sqlite")) as file:
            assert file.execute("pragma journal_mode").fetchone() == ("wal",)
            assert file.execute("select count(*) from replies").fetchone() == (0,)


def test_a_locked_cache_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_cache, "BUSY_S", 0.01)
    with closing(sqlite3.connect(tmp_path / "cache.sqlite", isolation_level=None, check_same_thread=False)) as holder:
        holder.execute("begin exclusive")
        release = threading.Timer(0.3, holder.rollback)
        release.start()
        JudgeCache(tmp_path / "cache.sqlite").close()
        release.join()


def test_a_cache_that_stays_locked_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_cache, "BUSY_S", 0.01)
    monkeypatch.setattr(judge_cache, "OPEN_S", 0.1)
    with closing(sqlite3.connect(tmp_path / "cache.sqlite", isolation_level=None)) as holder:
        holder.execute("begin exclusive")
        with pytest.raises(UserError, match=r"cache.sqlite: found a cache locked for 0\.1 s"):
            JudgeCache(tmp_path / "cache.sqlite")


def test_a_cache_that_fails_costs_calls_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = tmp_path / "cache.sqlite"
    with running() as server, client_of([server.url], cache=cache) as client:
        with sqlite3.connect(cache) as file:
            file.execute("drop table replies")
        results = [future.result(10) for future in client.submit([call(n) for n in range(5)])]
        assert all(is_right(result, n) for n, result in enumerate(results))
    assert caplog.text.count("no such table") == 1


RANK = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from rewards.judge_cases import call, client_of, is_right
with client_of([sys.argv[3]], cache=Path(sys.argv[4])) as client:
    results = [future.result(60) for future in client.submit([call(n) for n in range(200)])]
    assert all(is_right(result, n) for n, result in enumerate(results))
"""


def test_ranks_share_the_file(tmp_path: Path) -> None:
    """Two processes write the same 200 calls at the same time: none is lost and none is there twice."""
    cache, tests = tmp_path / "cache.sqlite", Path(__file__).parents[1]
    with running(Behaviour(delay_s=0.01)) as server:
        command = [sys.executable, "-c", RANK, str(tests), str(tests.parent), server.url, str(cache)]
        ranks = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        for rank in ranks:
            assert rank.wait(60) == 0, rank.stderr.read() if rank.stderr else ""
        assert 200 <= server.proxy.seen[""] <= 400
    assert len(rows(cache)) == len({key for key, _ in rows(cache)}) == 200
