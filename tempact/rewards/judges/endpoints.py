"""Choice of the server and the time of a judge's call: slots, rates, circuit breakers, queue.

For one asyncio loop. Every wait has an end: a slot is free after `attempt_s` at the latest, a breaker tries again
after COOLDOWN_MAX_S, a server's Retry-After counts up to RETRY_AFTER_MAX_S, and no pace is below SLOWEST.
"""

from __future__ import annotations

import asyncio
import email.utils
import heapq
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tempact.rewards.judges.config import EndpointConfig

BREAKS_AFTER = 5  # failures in a row
COOLDOWN_S, COOLDOWN_MAX_S = 1.0, 15.0  # before a broken endpoint is probed; doubles with each failed probe
RETRY_AFTER_MAX_S = 60.0
REFUSALS = 3  # answers in a row that refuse the key, the address or the model, before an endpoint counts as unusable
START, SLOWEST = 8.0, 1 / 15  # requests a second: the first guess of a rate, the lowest pace
EASING, DROP = 0.05, 0.5  # share that a refusal takes from the pace; doubles with each in a row, up to DROP
SETTLED, SHUT = 3, 6  # answers that end a row of refusals; refusals of a row that tell nothing about the rate
GROWTH, SURE_AFTER = 0.003, 15  # share that an answer adds to the pace; as much again for each SURE_AFTER answers
SEARCHING = 0.13  # share that an answer adds to a first guess
AT_ONCE = 0.25  # of a request's interval: wait after a refusal; doubles with each in a row, up to the interval


class Pace:
    """The rate of requests that a server grants, found from its refusals; without a limit until there is one.

    The pace falls a little with a refusal, more with each further one in a row, and grows with every answer: it stays
    close to the server's rate, on both sides of it. Answers to requests that were sent before the pace fell say nothing
    new. After refusals in a row it goes to the middle (geometric) between the last rate that was refused and the one
    that is granted; after many, which speak of a window of time that ran out, from the first that was refused.
    """

    def __init__(self) -> None:
        self.rate = math.inf  # requests a second
        self.next = -math.inf  # time of the next request
        self._fell, self._answers, self._gain = -math.inf, 0, 0.0
        self._refused: list[float] = []  # rates of refusals with fewer than SETTLED answers between
        self._used = False  # the last request had to wait for its turn: faster ones might be granted

    def take(self, now: float) -> None:
        """Notes that a request goes."""
        interval = 1 / self.rate
        self._used = now < self.next + interval
        self.next = max(now, self.next) + interval

    def refused(self, now: float, sent: float) -> bool:
        """Slows down, unless the refused request was sent before that happened last: then False."""
        if sent <= self._fell:
            return False
        first = self.rate == math.inf
        self.rate = min(self.rate, START) if first else self.rate
        self._gain = SEARCHING if first else self._gain if self._refused else 0.0
        self._refused.append(self.rate)
        doubled = 2.0 ** min(len(self._refused) - 1, 10)
        self._fell, self._answers = now, 0
        self.rate = max(SLOWEST, self.rate * (1 - min(DROP, EASING * doubled)))
        self.next = now + min(1.0, AT_ONCE * doubled) / self.rate
        return True

    def answered(self, sent: float) -> None:
        """Speeds up, if there is a limit and the last request waited for it."""
        if sent <= self._fell or self.rate == math.inf:
            return
        self._answers += 1
        shut = len(self._refused) >= SHUT
        if self._answers < SETTLED and len(self._refused) > 1 and not shut:
            return
        if len(self._refused) > 1:
            self.rate = math.sqrt(self.rate * self._refused[0 if shut else -1])
        self._refused.clear()
        if self._used:
            self._gain += GROWTH / SURE_AFTER
            self.rate *= 1 + GROWTH + self._gain


class Endpoint:
    """State of one server: broken after BREAKS_AFTER failures in a row, then probed by one request at a time."""

    def __init__(self, config: EndpointConfig, now: float):
        self.config, self.pace = config, Pace()
        self.in_flight = self.failures = self.limited = self.refusals = 0
        self.broken = self.probing = False
        self.proven = False  # it has answered in this run
        self.fault = ""  # the last failure
        self.not_taken: set[str] = set()  # optional fields of a request that it refuses
        self.taken: set[str] = set()  # those of requests that it has answered
        self._cooldown = COOLDOWN_S
        self._not_before = now  # of a cooldown, a Retry-After or the configured rate

    def ready_at(self) -> float:
        """Time at which the next request may go; infinity while that depends on another request."""
        full = self.probing if self.broken else self.in_flight >= self.config.concurrency
        return math.inf if full else max(self._not_before, self.pace.next)

    @property
    def load(self) -> float:
        """Share of the slots in use; 1 for a broken endpoint."""
        return 1.0 if self.broken else self.in_flight / self.config.concurrency

    def take(self, now: float) -> Lease:
        self.in_flight += 1
        lease = Lease(self, probe=self.broken, sent=now)
        self.probing |= lease.probe
        self.pace.take(now)
        if self.config.requests_per_minute:
            self.hold(max(now, self._not_before) + 60.0 / self.config.requests_per_minute)
        return lease

    def hold(self, until: float) -> None:
        """Lets no further request go before `until`."""
        self._not_before = max(self._not_before, until)

    def alive(self) -> None:
        """Closes the breaker: the server can be reached."""
        self.failures = self.refusals = 0
        self.broken, self.probing, self._cooldown = False, False, COOLDOWN_S

    def limit(self, until: float) -> None:
        """Notes a Retry-After. One may be meant for its call alone; a second without an answer between holds all."""
        self.limited += 1
        if self.limited > 1:
            self.hold(until)

    def failed(self, now: float, probe: bool, at_once: bool) -> None:
        """Notes a request without an answer. at_once: it breaks the endpoint (a wrong key, an unknown model)."""
        self.failures += 1
        self.refusals += at_once
        if not self.broken and (at_once or self.failures >= BREAKS_AFTER):
            self.broken, self.probing = True, False
        elif not probe:
            return  # sent before the breaker opened, or below its limit
        self.hold(now + self._cooldown)
        self._cooldown = min(2 * self._cooldown, COOLDOWN_MAX_S)

    def give_back(self, probe: bool) -> None:
        self.in_flight -= 1
        if probe:
            self.probing = False


@dataclass(frozen=True)
class Lease:
    """A slot of an endpoint, for one request."""

    endpoint: Endpoint
    probe: bool
    sent: float


class Pool:
    """The endpoints of a role, or of several that share them all, and the calls that wait for a turn."""

    def __init__(self, endpoints: Sequence[Endpoint]):
        self.endpoints = tuple(endpoints)
        self.waiting: list[tuple[int, int, asyncio.Future[Lease], Endpoint | None]] = []
        self.pending = 0  # calls between their start and their result
        self._busy_since = self._silent_s = 0.0
        self._down_since: float | None = None
        self._down_s = 0.0
        self._up: asyncio.Future[None] | None = None  # done when the clock goes on

    def clock(self) -> float:
        """Seconds of a clock that stands still while every endpoint is broken."""
        now = time.monotonic()
        return now - self._down_s - (now - self._down_since if self._down_since is not None else 0.0)

    def note_down(self, now: float) -> None:
        """Stops or starts the clock, after an endpoint broke or came back."""
        down = all(endpoint.broken for endpoint in self.endpoints)
        if down and self._down_since is None:
            self._down_since = now
        elif not down and self._down_since is not None:
            self._down_s += now - self._down_since
            self._down_since = None
            if self._up is not None:
                self._up.set_result(None)
                self._up = None

    async def wait(self, turn: asyncio.Future[Lease], left_s: float) -> None:
        """Returns when `turn` is done, when the clock goes on after it stood still, or after `left_s` of its time."""
        if self._down_since is None:
            await asyncio.wait([turn], timeout=None if left_s == math.inf else left_s)
            return
        if self._up is None:
            self._up = asyncio.get_running_loop().create_future()
        either: list[asyncio.Future[Any]] = [turn, self._up]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Counts a call as pending from its start to its result."""
        if not self.pending:
            self._busy_since = time.monotonic()
        self.pending += 1
        try:
            yield
        finally:
            self.pending -= 1
            if not self.pending:
                self._silent_s += time.monotonic() - self._busy_since

    def heard(self, now: float) -> None:
        """Notes that an endpoint has answered a call."""
        self._silent_s, self._busy_since = 0.0, now

    def silent_s(self) -> float:
        """Seconds that calls have waited since any of them had an answer; time without calls does not count."""
        return self._silent_s + (time.monotonic() - self._busy_since if self.pending else 0.0)

    def next_ready(self) -> float:
        """Time at which the next request may go to some endpoint."""
        return min(endpoint.ready_at() for endpoint in self.endpoints)

    def choose(self, now: float, avoid: Endpoint | None) -> Endpoint:
        """The least busy of the ready endpoints, if possible not `avoid`, which has just failed the call."""
        ready = [endpoint for endpoint in self.endpoints if endpoint.ready_at() <= now]
        return min(ready, key=lambda endpoint: (endpoint is avoid, endpoint.load))

    def pop_next(self, now: float) -> tuple[asyncio.Future[Lease], Endpoint]:
        """Removes the first waiting call and chooses its endpoint; some endpoint must be ready.

        A call that has just failed at a broken endpoint does not probe it again while others wait: this very call may
        break the server. It keeps its place in the queue.
        """
        entry, endpoint = self.waiting[0], self.choose(now, self.waiting[0][3])
        if endpoint.broken and endpoint is entry[3]:
            others = (each for each in self.waiting if each[3] is not endpoint and not each[2].done())
            entry = min(others, default=entry, key=lambda each: each[:2])
            endpoint = self.choose(now, entry[3])
        self.waiting.remove(entry)
        heapq.heapify(self.waiting)
        return entry[2], endpoint

    def drop_done(self) -> None:
        while self.waiting and self.waiting[0][2].done():
            heapq.heappop(self.waiting)


class Dispatcher:
    """Gives free slots to the calls that were submitted first, over the pools of all roles."""

    def __init__(self, roles: Iterable[tuple[str, Sequence[EndpointConfig]]]):
        now = time.monotonic()
        self.endpoints: dict[EndpointConfig, Endpoint] = {}
        pools: dict[tuple[EndpointConfig, ...], Pool] = {}
        self.pools: dict[str, Pool] = {}
        for role, configs in roles:
            for config in configs:
                self.endpoints.setdefault(config, Endpoint(config, now))
            pool = pools.setdefault(tuple(configs), Pool([self.endpoints[config] for config in configs]))
            self.pools[role] = pool
        self._unique = list(pools.values())
        self._tie = itertools.count()
        self._timer: asyncio.TimerHandle | None = None

    async def acquire(self, pool: Pool, order: int, avoid: Endpoint | None, until: float) -> Lease:
        """A slot; calls with a smaller `order` come first. TimeoutError when the pool's clock passes `until`."""
        turn: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        heapq.heappush(pool.waiting, (order, next(self._tie), turn, avoid))
        self.dispatch()
        try:
            while (left := until - pool.clock()) > 0:
                await pool.wait(turn, left)
                if turn.done():
                    return turn.result()
            raise TimeoutError
        except BaseException:
            if turn.done():
                self.release(turn.result())
            turn.cancel()
            raise

    def release(self, lease: Lease) -> None:
        lease.endpoint.give_back(lease.probe)
        self.dispatch()

    def answered(self, lease: Lease) -> None:
        """Notes that a call was answered."""
        now = time.monotonic()
        lease.endpoint.proven, lease.endpoint.limited = True, 0
        lease.endpoint.pace.answered(lease.sent)
        for pool in self._unique:
            if lease.endpoint in pool.endpoints:
                pool.heard(now)
        self.alive(lease)

    def alive(self, lease: Lease) -> None:
        """Notes that the server is there, but has not answered the call (too many requests, for example)."""
        lease.endpoint.alive()
        self._changed()

    def limited(self, lease: Lease, pause_s: float) -> bool:
        """Slows down an endpoint that has refused a call for its rate; False if it was slowed down since that call."""
        now = time.monotonic()
        slowed = lease.endpoint.pace.refused(now, lease.sent)
        if slowed and pause_s:
            lease.endpoint.limit(now + pause_s)
        return slowed

    def failed(self, lease: Lease, at_once: bool = False) -> None:
        lease.endpoint.failed(time.monotonic(), lease.probe, at_once)
        self._changed()

    def _changed(self) -> None:
        now = time.monotonic()
        for pool in self._unique:
            pool.note_down(now)

    def dispatch(self) -> None:
        """Serves every waiting call that can be served, and wakes up when the next one may go."""
        now = time.monotonic()
        while True:
            for pool in self._unique:
                pool.drop_done()
            waiting = [pool for pool in self._unique if pool.waiting]
            served = [pool for pool in waiting if pool.next_ready() <= now]
            if not served:
                break
            pool = min(served, key=lambda each: each.waiting[0][:2])
            turn, endpoint = pool.pop_next(now)
            turn.set_result(endpoint.take(now))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wake = min((pool.next_ready() for pool in waiting), default=math.inf)
        if wake < math.inf:
            self._timer = asyncio.get_running_loop().call_later(wake - now, self.dispatch)


def retry_after_s(header: str, now: float | None = None) -> float:
    """Seconds that a Retry-After header asks for, at most RETRY_AFTER_MAX_S; 0 if it cannot be read.

    header: a number of seconds or an HTTP date; now: Unix time, for tests.
    """
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(header)
            seconds = date.timestamp() - (time.time() if now is None else now)
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(seconds, RETRY_AFTER_MAX_S) if seconds > 0 else 0.0  # false for NaN
