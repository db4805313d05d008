"""Valid replies of judges, in one SQLite file for all ranks and runs on a machine."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel

from tempact.errors import UserError
from tempact.rewards.judges import JudgeCall

log = logging.getLogger(__name__)

BUSY_S = 2.0  # how long a write waits for another rank's; the client's other calls wait with it
OPEN_S = 30.0  # how long a cache that others open or write at the same time is waited for
_PAUSE_S = 0.02  # between tries to open a busy cache
_TABLE = """create table if not exists replies (
    key text primary key, role text not null, model text not null, rubric text not null,
    reply text not null, created_s real not null
) without rowid"""


def cache_key(call: JudgeCall, model: str, parameters: Mapping[str, float]) -> str:
    """SHA-256 of everything that a reply depends on; the server's address and API key are not part of it."""
    rubric = call.rubric
    media = call.media_hash or [hashlib.sha256(image).hexdigest() for image in call.images]
    parts = [
        model, rubric.name, rubric.version, rubric.system, _schema(rubric.fields), call.text, media,
        len(call.images), dict(parameters),
    ]  # fmt: skip
    # lone surrogates, which a plan may hold, have no UTF-8: escapes have
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


@functools.lru_cache(maxsize=256)
def _schema(fields: type[BaseModel]) -> str:
    return json.dumps(fields.model_json_schema(), sort_keys=True)


class JudgeCache:
    """The JSON texts of replies by key. For one thread at a time.

    WAL lets ranks read while one writes; not for network file systems, which have no shared memory. A cache that
    fails in mid-run (disk full, locked for too long) costs calls, not the run: it is reported once.
    """

    def __init__(self, path: Path):
        """UserError if the file cannot be made, is no cache or stays locked for `OPEN_S`."""
        self.path, self._reported = path, False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        except (sqlite3.Error, OSError) as error:
            raise _unusable(path, error) from error
        give_up_s = time.monotonic() + OPEN_S
        while True:
            try:
                self._prepare()
                return
            except sqlite3.Error as error:
                if not _is_busy(error) or time.monotonic() >= give_up_s:
                    self._file.close()
                    raise _unusable(path, error) from error
                time.sleep(_PAUSE_S)

    def _prepare(self) -> None:
        """Settings and table; sqlite3.Error if the file is no cache or is busy.

        Of connections that turn a new file to WAL together, SQLite refuses all but one at once, without the wait
        of its busy handler (each holds the lock that another waits for: https://sqlite.org/c3ref/busy_handler.html).
        """
        self._file.execute("pragma journal_mode = wal")
        self._file.execute("pragma synchronous = normal")
        self._file.execute(_TABLE)
        self._file.execute("select key, role, model, rubric, reply, created_s from replies limit 1")

    def get(self, key: str) -> str | None:
        """The reply's JSON text, None where there is none."""
        row = self._execute("select reply from replies where key = ?", key)
        return row[0] if row and isinstance(row[0], str) else None

    def put(self, key: str, call: JudgeCall, model: str, reply: str) -> None:
        """Keeps a reply; of two ranks that asked the same, the first one's stays."""
        rubric = f"{call.rubric.name} {call.rubric.version}"
        statement = "insert or ignore into replies values (?, ?, ?, ?, ?, ?)"
        self._execute(statement, key, call.role, model, rubric, reply, time.time())

    def drop(self, key: str) -> None:
        """Forgets a reply that can no longer be read."""
        self._execute("delete from replies where key = ?", key)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _execute(self, statement: str, *values: str | float) -> tuple | None:
        """The first row of the answer, None where there is none and where the cache has failed."""
        try:
            return self._file.execute(statement, values).fetchone()
        except (sqlite3.Error, UnicodeEncodeError) as error:
            if not self._reported:
                log.warning("%s: %s; judges are asked again where it does not serve", self.path, error)
            self._reported = True
            return None


def _is_busy(error: sqlite3.Error) -> bool:
    """True where another connection was in the way: the low byte of SQLite's extended codes is the code."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF == sqlite3.SQLITE_BUSY


def _unusable(path: Path, error: Exception) -> UserError:
    if isinstance(error, sqlite3.Error) and _is_busy(error):
        return UserError(f"{path}: found a cache locked for {OPEN_S:g} s; accepted: one that no other program holds")
    return UserError(f"{path}: found no usable cache ({error}); accepted: a new file, or a cache")
