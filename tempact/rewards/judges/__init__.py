"""Calls to judges, their replies, and metrics of them. Light on purpose: no network library is imported here."""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from pydantic import BaseModel

from tempact.types import Missing

JudgeResult: TypeAlias = BaseModel | Missing  # an instance of the call's `rubric.fields`, or why there is none


@dataclass(frozen=True)
class Rubric:
    """Instructions to a judge.

    system   the system message
    fields   the reply: a JSON object with these fields, all of them in range (`replies.read_reply`)
    version  a change of the wording is a new version: scores of two versions are not the same measurement
    """

    name: str
    version: str
    system: str
    fields: type[BaseModel]


@dataclass(frozen=True)
class JudgeCall:
    """One question to a judge.

    role        selects endpoints and model (`TEMPACT_JUDGE_<ROLE>_...`), and names the metrics `judge/<role>/...`
    text        the user message; its author has quoted what is quoted in it
    images      JPEG files, sent in this order after the text
    media_hash  of the images, any stable text; with `text`, rubric, model and parameters it is the key of the cache
    """

    role: str
    rubric: Rubric
    text: str
    images: tuple[bytes, ...] = ()
    media_hash: str = ""


class Judges(Protocol):
    """The part of `judges.client.JudgeClient` that rewards use."""

    def submit(self, calls: Sequence[JudgeCall]) -> list[Future[JudgeResult]]:
        """Starts the calls and returns at once."""
        ...

    def stats(self) -> dict[str, float]:
        """Metrics of the calls that ended since the last call of this method."""
        ...

    def close(self) -> None:
        """Ends the client."""
        ...


class JudgeOutage(RuntimeError):
    """A role has no judge: no endpoint has answered for `outage_s`, or none judges. The run should save and stop."""


class JudgeRefusal(JudgeOutage):
    """Every endpoint of a role refuses the address, the key or the model, or the account has no credit left."""


class JudgeBudget(JudgeOutage):
    """The requests that a run may make (`judges.max_calls`) are spent. The run should save and stop."""


SHOWN_WARNINGS = 3  # of a kind, before only every doubling is written


class Repeated:
    """Warnings that may come with every call or iteration, counted by kind.

    The first SHOWN_WARNINGS of a kind are written; after them those whose number is a power of two, with that number.
    """

    def __init__(self, log: logging.Logger):
        self._log, self._counts = log, Counter[str]()

    def __call__(self, kind: str, text: str, *values: object) -> None:
        self._counts[kind] += 1
        count = self._counts[kind]
        if count <= SHOWN_WARNINGS or not count & (count - 1):
            self._log.warning(f"{text}%s", *values, f" ({count} so far)" if count > SHOWN_WARNINGS else "")


SHARES = ("missing", "cache_hits")  # of the calls
TOKENS = ("prompt_tokens", "completion_tokens", "reasoning_tokens", "cached_tokens")  # of a request's bill
LATENCIES_KEPT = 10_000  # of each role between two readings
PERCENTILE = 0.95


class JudgeStats:
    """Counts of calls by role, added to on the client's thread and read on the trainer's."""

    def __init__(self, roles: Iterable[str]):
        self._lock, self._roles = threading.Lock(), tuple(roles)
        self._reset()

    def _reset(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._latencies_s = {role: deque[float](maxlen=LATENCIES_KEPT) for role in self._roles}

    def count(self, role: str, *names: str) -> None:
        """One more of each name: calls (that have ended), missing, cache_hits, retries, requests (paid for)."""
        self.add(role, Counter(names))

    def add(self, role: str, amounts: Mapping[str, int]) -> None:
        """Adds amounts by name: those of `count`, and TOKENS."""
        with self._lock:
            self._counts.update({(role, name): amount for name, amount in amounts.items()})

    def latency(self, role: str, seconds: float) -> None:
        """Of a call that went to a server: from its first turn to its result, retries included."""
        with self._lock:
            self._latencies_s[role].append(seconds)

    def take(self) -> dict[str, float]:
        """Metrics `judge/<role>/...` of every role that had calls since the last reading: calls, missing and cache_hits
        (shares of the calls), retries; latency_mean_s, _p95_s and _max_s where a server was asked. Of every role that
        had requests: requests, and TOKENS where servers told."""
        with self._lock:
            counts, all_latencies = self._counts, self._latencies_s
            self._reset()
        metrics: dict[str, float] = {}
        for role in self._roles:
            named: dict[str, float] = {}
            if calls := counts[role, "calls"]:
                named |= {"calls": float(calls)} | {name: counts[role, name] / calls for name in SHARES}
                named["retries"] = float(counts[role, "retries"])
            named |= {name: float(counts[role, name]) for name in ("requests", *TOKENS) if counts[role, name]}
            if calls and (latencies := sorted(all_latencies[role])):
                named["latency_mean_s"] = sum(latencies) / len(latencies)
                named["latency_p95_s"] = latencies[min(int(PERCENTILE * len(latencies)), len(latencies) - 1)]
                named["latency_max_s"] = latencies[-1]
            metrics |= {f"judge/{role}/{name}": value for name, value in named.items()}
        return metrics


def merged_stats(processes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """`JudgeStats.take` of several processes as one: counts are added, shares and mean latencies weighted by calls, of
    the other latencies the largest is taken (for the 95th percentile a bound). So it is with events, NAME/success being
    a share of NAME/count. Other metrics are those of the first."""
    if len(processes) == 1:
        return dict(processes[0])
    merged: dict[str, float] = {}
    for name in dict.fromkeys(name for own in processes for name in own):
        values = {i: own[name] for i, own in enumerate(processes) if name in own}
        role, _, kind = name.rpartition("/")
        calls = {i: processes[i].get(f"{role}/calls", 0.0) for i in values}
        if role.startswith("events/"):
            count = {i: processes[i].get(f"{role}/count", 0.0) for i in values}
            total = sum(count.values())
            # events that have happened are whole numbers, and their share is that of one process, bit for bit
            merged[name] = total if kind == "count" else sum(round(values[i] * count[i]) for i in values) / total
        elif not role.startswith("judge/"):
            merged[name] = next(iter(values.values()))
        elif kind in ("calls", "retries", "requests", *TOKENS):
            merged[name] = sum(values.values())
        elif kind in (*SHARES, "latency_mean_s"):
            merged[name] = sum(values[i] * calls[i] for i in values) / sum(calls.values())
        else:
            merged[name] = max(values.values())
    return merged
