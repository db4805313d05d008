"""What goes to a judge and what comes back; light on purpose: no network library is imported here.

How the judges did, per role, for the metrics of an iteration.

Scores that judges are still working on.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from pydantic import BaseModel
from torch import Tensor

from tempact.types import Missing

JudgeResult: TypeAlias = BaseModel | Missing  # an instance of the call's `rubric.fields`, or why there is none


@dataclass(frozen=True)
class Rubric:
    """What a judge is asked, in this project's words.

    system  the system message
    fields  the reply: a JSON object with these fields, all of them in range (`judge_schema.read_reply`)
    version a change of the wording is a new version: scores of two versions are not the same measurement
    """

    name: str
    version: str
    system: str
    fields: type[BaseModel]


@dataclass(frozen=True)
class JudgeCall:
    """One question to a judge.

    role        selects endpoints and model (`TEMPACT_JUDGE_<ROLE>_...`), and names the metrics `judge/<role>/...`
    text        the user message; what is quoted in it is quoted by the caller
    images      JPEG files, sent in this order after the text
    media_hash  of the images, any stable text; with `text`, rubric, model and parameters it is the key of the cache
    """

    role: str
    rubric: Rubric
    text: str
    images: tuple[bytes, ...] = ()
    media_hash: str = ""


class JudgeOutage(RuntimeError):
    """No endpoint of a role has answered for longer than `outage_s`: the run should save and stop."""


LATENCIES_KEPT = 10_000  # of each role between two readings
PERCENTILE = 0.95


@dataclass
class _Role:
    calls: int = 0
    missing: int = 0
    hits: int = 0
    retries: int = 0
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCIES_KEPT))


class JudgeStats:
    """Counts on the client's thread, is read on the trainer's."""

    def __init__(self, roles: Iterable[str]):
        self._lock = threading.Lock()
        self._roles = {role: _Role() for role in roles}

    def ended(self, role: str, missing: bool) -> None:
        with self._lock:
            self._roles[role].calls += 1
            self._roles[role].missing += missing

    def hit(self, role: str) -> None:
        with self._lock:
            self._roles[role].hits += 1

    def retry(self, role: str) -> None:
        with self._lock:
            self._roles[role].retries += 1

    def latency(self, role: str, seconds: float) -> None:
        """Of a call that went to a server: from its first turn to its result, retries included."""
        with self._lock:
            self._roles[role].latencies_s.append(seconds)

    def take(self) -> dict[str, float]:
        """Of every role that had calls since the last reading: calls, missing and cache_hits (shares of the calls),
        retries, latency_mean_s, _p95_s and _max_s; the latencies only where a server was asked."""
        with self._lock:
            taken = self._roles
            self._roles = {role: _Role() for role in taken}
        metrics: dict[str, float] = {}
        for role, seen in taken.items():
            if not seen.calls:
                continue
            named = {
                "calls": float(seen.calls),
                "missing": seen.missing / seen.calls,
                "cache_hits": seen.hits / seen.calls,
                "retries": float(seen.retries),
            }
            if latencies := sorted(seen.latencies_s):
                named["latency_mean_s"] = sum(latencies) / len(latencies)
                named["latency_p95_s"] = latencies[min(int(PERCENTILE * len(latencies)), len(latencies) - 1)]
                named["latency_max_s"] = latencies[-1]
            metrics |= {f"judge/{role}/{name}": value for name, value in named.items()}
        return metrics


Replies: TypeAlias = dict[tuple[int, ...], Future[JudgeResult]]  # by place in the scores


class Judges(Protocol):
    """What a reward needs of `judge_client.JudgeClient`."""

    def submit(self, calls: Sequence[JudgeCall]) -> list[Future[JudgeResult]]:
        """Starts the calls and returns at once."""
        ...

    def stats(self) -> dict[str, float]:
        """Metrics of the calls that ended since the last call of this."""
        ...

    def close(self) -> None:
        """Ends the client."""
        ...


@dataclass(frozen=True)
class Pending:
    """A reward's scores on their way.

    shape     of the scores
    replies   a place without one has no score
    score_of  from a validated reply to a score in [0, 1]
    """

    shape: tuple[int, ...]
    replies: Replies
    score_of: Callable[[Any], float]

    def result(self) -> Tensor:
        """Waits for all. fp32 on the CPU, NaN where no score could be had; always of the whole shape, so that
        ranks stay in step whatever is missing. Raises JudgeOutage, and nothing else on purpose."""
        scores = torch.full(self.shape, float("nan"))
        for place, reply in self.replies.items():
            found = reply.result()
            if not isinstance(found, Missing):
                scores[place] = self.score_of(found)
        return scores
