"""The client of all judges: OpenAI's chat-completions protocol, on a thread of its own.

A call ends in one of three ways: with a validated reply, as Missing, or, when no server has answered any call for
`outage_s`, every server refuses key, address or model, or the run's requests are spent, with JudgeOutage for the
trainer. It is repeated after 408,
409, 5xx, broken connections, broken bodies and replies that are not as asked for, and then prefers other endpoints. A
refusal for the rate of requests (429) is none of its attempts: the endpoint finds a pace that the server grants.
Identical calls that wait at the same time are one request.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import random
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import CancelledError, Future
from typing import Any

from tempact.distributed.watch import moved
from tempact.rewards.judges import JudgeBudget, JudgeCall, JudgeOutage, JudgeRefusal, JudgeResult, JudgeStats, Repeated
from tempact.rewards.judges.budget import Ledger
from tempact.rewards.judges.cache import JudgeCache, cache_key
from tempact.rewards.judges.config import JudgeConfig, import_openai
from tempact.rewards.judges.endpoints import REFUSALS, Dispatcher, Endpoint, Lease, Pool, retry_after_s
from tempact.rewards.judges.replies import (
    BadBody,
    BadReply,
    doubted_fields,
    optional_fields,
    read_completion,
    read_reply,
    read_usage,
    refused_fields,
)
from tempact.rewards.judges.requests import (
    GATEWAY,
    NO_CREDIT,
    NO_CREDIT_CODES,
    RETRIED,
    TOO_MANY,
    UNKNOWN_FIELD,
    UNUSABLE,
    Failed,
    Rejected,
    Retry,
    messages_of,
)
from tempact.types import Missing

log = logging.getLogger(__name__)

BACKOFF_MAX_S = 8.0
REASON_CHARACTERS = 200
LOGGED_CHARACTERS = 2000  # of a reply that is not as asked for
CLOSING_S = 10.0


class JudgeClient:
    """Calls the judges of a configuration. `submit` may be called from any thread.

    Raises UserError if the package openai is not installed or cache or ledger cannot be used.
    """

    def __init__(self, config: JudgeConfig):
        self.config = config
        self._openai, self._warn = import_openai(), Repeated(log)
        self._stats = JudgeStats(config.roles)
        self._parameters = {"temperature": config.temperature, "max_tokens": config.max_tokens}
        self._cache = JudgeCache(config.cache) if config.cache else None
        self._ledger = Ledger(config.ledger, config.max_calls) if config.ledger else None
        spent = self._ledger.spent() if self._ledger else ""
        self._outage: JudgeOutage | None = JudgeBudget(spent) if spent else None
        self._closed = False
        self._order = itertools.count()
        self._running: dict[str, asyncio.Task[JudgeResult]] = {}  # by key of the cache
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="judges", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._prepare(), self._loop).result()
        except BaseException:
            self._end()
            raise

    def submit(self, calls: Sequence[JudgeCall]) -> list[Future[JudgeResult]]:
        """Starts the calls, in this order, and returns at once.

        A future holds an instance of the call's `rubric.fields`, or Missing, or raises JudgeOutage; only `close`
        cancels it. Raises JudgeOutage once there has been one.
        """
        if self._outage is not None:
            raise self._outage
        unknown = {call.role for call in calls} - set(self.config.roles)
        assert not unknown and not self._closed, f"{unknown or 'closed'}"
        futures: list[Future[JudgeResult]] = [Future() for _ in calls]
        for future in futures:
            future.set_running_or_notify_cancel()
        self._loop.call_soon_threadsafe(self._start, list(zip(calls, futures, strict=True)))
        return futures

    def stats(self) -> dict[str, float]:
        """Metrics `judge/<role>/...` of the calls that ended since the last call of this method."""
        return self._stats.take()

    def close(self) -> None:
        """Ends the thread and cancels calls without a result."""
        if not self._closed:
            self._closed = True
            asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(CLOSING_S)
            self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSING_S)

    def __enter__(self) -> JudgeClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # all below runs on the client's own thread

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    async def _prepare(self) -> None:
        self._dispatcher = Dispatcher(self.config.roles.items())
        self._servers = {config: config.connect(self.config.attempt_s) for config in self._dispatcher.endpoints}
        self._watcher = self._loop.create_task(self._watch())

    async def _stop(self) -> None:
        tasks = [self._watcher, *self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self._servers.values():
            await server.close()
        for file in (self._cache, self._ledger):
            if file is not None:
                file.close()

    async def _watch(self) -> None:
        """Ends all calls in an outage."""
        limit = self.config.outage_s
        while True:
            await asyncio.sleep(min(1.0, limit / 10))
            for role, pool in self._dispatcher.pools.items():
                fault = next((endpoint.fault for endpoint in pool.endpoints if endpoint.fault), "")
                if all(endpoint.refusals >= REFUSALS for endpoint in pool.endpoints):
                    accepted = "address, key and model of a server that judges (python -m tempact.doctor judges)"
                    self._end_all(JudgeRefusal(f"judge {role}: {fault}; accepted: {accepted}"))
                elif pool.silent_s() > limit:
                    servers = ", ".join(endpoint.config.shown for endpoint in pool.endpoints)
                    last = f"; the last: {fault}" if fault else ""
                    self._end_all(JudgeOutage(f"judge {role}: no answer from {servers} for {limit:g} s{last}"))

    def _end_all(self, outage: JudgeOutage) -> None:
        if self._outage is None:
            self._outage = outage
            for task in self._running.values():
                task.cancel()

    def _start(self, batch: list[tuple[JudgeCall, Future[JudgeResult]]]) -> None:
        for call, future in batch:
            if self._closed or self._outage is not None:
                self._abandon(future)
                continue
            model = self.config.roles[call.role][0].model
            try:
                key = cache_key(call, model, self._parameters)
            except (TypeError, ValueError) as error:  # no call at all: its caller is told, the others go on
                future.set_exception(error)
                continue
            if key not in self._running:
                task = self._loop.create_task(self._result(call, key, model, next(self._order)))
                task.add_done_callback(functools.partial(self._forget, key))
                self._running[key] = task
            self._running[key].add_done_callback(functools.partial(self._deliver, call.role, future))

    def _forget(self, key: str, _: asyncio.Task[JudgeResult]) -> None:
        del self._running[key]

    def _deliver(self, role: str, future: Future[JudgeResult], task: asyncio.Task[JudgeResult]) -> None:
        if task.cancelled():
            self._abandon(future)
        elif error := task.exception():
            future.set_exception(error)
        else:
            self._stats.count(role, "calls", *(["missing"] if isinstance(task.result(), Missing) else []))
            future.set_result(task.result())

    def _abandon(self, future: Future[JudgeResult]) -> None:
        future.set_exception(self._outage or CancelledError())

    async def _result(self, call: JudgeCall, key: str, model: str, order: int) -> JudgeResult:
        """The reply from the cache, else from a judge."""
        if (reply := self._cached(call, key)) is not None:
            self._stats.count(call.role, "cache_hits")
            return reply
        pool = self._dispatcher.pools[call.role]
        with pool.asking():
            result = await self._ask(call, pool, order)
        if self._cache is not None and not isinstance(result, Missing):
            text = result.model_dump_json()
            if self.config.redact(text) == text:  # what repeats a key is not written down
                self._cache.put(key, call, model, text)
        return result

    def _cached(self, call: JudgeCall, key: str) -> JudgeResult | None:
        text = self._cache.get(key) if self._cache is not None else None
        if text is None:
            return None
        try:
            return read_reply(text, call.rubric.fields)
        except BadReply as error:
            assert self._cache is not None
            self._warn("cache", "%s: a reply that cannot be read (%s); asked again", self._cache.path, error)
            self._cache.drop(key)
            return None

    async def _ask(self, call: JudgeCall, pool: Pool, order: int) -> JudgeResult:
        """Sends requests until one brings a valid reply, the attempts are used up, or the deadline has passed."""
        attempts, until = 0, float("inf")
        avoid, reason = None, ""
        began = 0.0
        doubted: defaultdict[Endpoint, set[str]] = defaultdict(set)
        try:
            while attempts < self.config.attempts:
                lease = await self._dispatcher.acquire(pool, order, avoid, until)
                if not began:
                    began, until = time.monotonic(), pool.clock() + self.config.deadline_s
                else:
                    self._stats.count(call.role, "retries")
                try:
                    reply = await self._request(call, lease, until - pool.clock(), doubted[lease.endpoint])
                    self._stats.latency(call.role, time.monotonic() - began)
                    return reply
                except Retry as retry:
                    attempts += retry.charged
                    doubted[lease.endpoint] |= retry.doubted
                    avoid, reason, asked_s, charged = lease.endpoint, str(retry), retry.pause_s, retry.charged
                finally:
                    self._dispatcher.release(lease)
                if attempts < self.config.attempts and not lease.endpoint.broken:
                    elsewhere = any(each is not avoid and not each.broken for each in pool.endpoints)
                    backoff = min(BACKOFF_MAX_S, self.config.backoff_s * 2 ** (attempts - 1)) if charged else 0.0
                    pause = max(0.0 if elsewhere else asked_s, backoff * random.uniform(0.5, 1.5))  # with jitter
                    await asyncio.sleep(min(pause, max(0.0, until - pool.clock())))
            reason = f"{attempts} attempts; the last: {reason}"
        except Rejected as error:
            reason = str(error)
        except TimeoutError:
            reason = f"no reply within {self.config.deadline_s:g} s; the last: {reason or 'no answer'}"
        self._stats.latency(call.role, time.monotonic() - began)
        self._warn(f"{call.role} missing", "judge %s: missing: %s", call.role, reason)
        return Missing(reason)

    async def _request(self, call: JudgeCall, lease: Lease, left_s: float, doubted: Set[str]) -> JudgeResult:
        """One request without the fields `doubted`, entered into the ledger if it is to be paid for.

        Raises Retry or Rejected, TimeoutError where the call has no time left, JudgeBudget where the run has no
        requests left.
        """
        if left_s <= 0:
            raise TimeoutError
        moved()
        if self._ledger is not None:
            self._ledger.take(call.role)
        try:
            reply = await self._answer(call, lease, left_s, doubted)
        except Failed as error:
            if error.free:
                if self._ledger is not None:
                    self._ledger.add(call.role, {"requests": -1})
            else:
                self._stats.count(call.role, "requests")
            raise
        except asyncio.CancelledError:  # on its way to an endpoint that refuses all, it costs nothing either
            if self._ledger is not None and lease.endpoint.refusals >= REFUSALS:
                self._ledger.add(call.role, {"requests": -1})
            raise
        self._stats.count(call.role, "requests")
        return reply

    async def _answer(self, call: JudgeCall, lease: Lease, left_s: float, doubted: Set[str]) -> JudgeResult:
        """One request, sent. Raises Retry or Rejected."""
        openai, endpoint, wanted = self._openai, lease.endpoint, call.rubric.fields
        where, optional = endpoint.config.shown, optional_fields(self.config, wanted, endpoint.not_taken | doubted)
        try:
            async with asyncio.timeout(min(self.config.attempt_s, left_s)):
                body = await self._post(call, lease, optional)
            self._count_tokens(call.role, body)
            reply = read_completion(body, wanted)
        except BadReply as error:
            self._answered(lease, optional, doubted)
            raise self._not_as_asked(call, where, error, body.decode(errors="replace")) from None
        except (TimeoutError, openai.APITimeoutError):
            raise self._failure(lease, "no answer in time", blames_call=True) from None
        except openai.APIStatusError as error:
            told = " ".join(str(part) for part in (error.message, error.type, error.code, error.param) if part)
            raise self._unpaid(error.status_code, told, error.response.headers, lease, optional) from None
        except BadBody as error:
            if error.status:
                raise self._unpaid(error.status, str(error), {}, lease, optional) from None
            self._not_as_asked(call, where, error, body.decode(errors="replace"))
            raise self._failure(lease, str(error), blames_call=True) from None
        except openai.OpenAIError as error:
            cause = error.__cause__ or error
            failure = self._failure(lease, self._line(f"{type(cause).__name__}: {cause}"))
            failure.free = type(cause).__name__.startswith("Connect")  # of the HTTP library: there was no connection
            raise failure from None
        except (OSError, RuntimeError, ValueError) as error:  # of the HTTP library: nothing reaches the trainer
            raise self._failure(lease, self._line(f"{type(error).__name__}: {error}"), blames_call=True) from None
        self._answered(lease, optional, doubted)
        return reply

    def _answered(self, lease: Lease, optional: dict[str, Any], doubted: Set[str]) -> None:
        """Notes that the judge has answered a request with the fields `optional`, and without those `doubted`."""
        endpoint = lease.endpoint
        endpoint.taken |= optional.keys()
        self._leave_out(endpoint, doubted - endpoint.taken, "refused with it, answered without")
        self._dispatcher.answered(lease)

    def _leave_out(self, endpoint: Endpoint, names: Set[str], reason: str) -> None:
        if new := names - endpoint.not_taken:
            where, left_out = endpoint.config.shown, ", ".join(sorted(new))
            log.warning("judges: %s does not take %s (%s); asked without from now on", where, left_out, reason)
        endpoint.not_taken |= names

    def _count_tokens(self, role: str, body: bytes) -> None:
        usage = read_usage(body)
        self._stats.add(role, usage)
        if self._ledger is not None:
            self._ledger.add(role, usage)

    async def _post(self, call: JudgeCall, lease: Lease, optional: dict[str, Any]) -> bytes:
        server = self._servers[lease.endpoint.config]
        answer = await server.chat.completions.with_raw_response.create(
            model=lease.endpoint.config.model,
            messages=messages_of(call),
            extra_body=optional,
        )
        return answer.content

    def _not_as_asked(self, call: JudgeCall, where: str, error: Exception, text: str) -> Retry:
        """Logs the text that came instead of a reply."""
        reason, shown = self._line(str(error)), self.config.redact(text)[:LOGGED_CHARACTERS]
        told = "judge %s: %s: not as asked for (%s): %r"
        self._warn(f"{call.role} not as asked for", told, call.role, where, reason, shown)
        return Retry(f"{where}: {reason}")

    def _line(self, text: str) -> str:
        """A server's words as part of one line of a log: no key, no line ends, no odd characters."""
        told = " ".join(self.config.redact(text).split())[:REASON_CHARACTERS]
        return "".join(each if each.isprintable() else "?" for each in told)

    def _failure(self, lease: Lease, reason: str, *, blames_call: bool = False, at_once: bool = False) -> Retry:
        """Notes the endpoint's failure. A call that only probed a broken endpoint loses no attempt, unless the fault
        may be the call's: a server may well be there and fail at this call alone."""
        endpoint = lease.endpoint
        before = endpoint.broken
        self._dispatcher.failed(lease, at_once)
        endpoint.fault = f"{endpoint.config.shown}: {reason}"
        if endpoint.broken and not before:
            told = "judges: %s does not answer (%s); trying again by and by"
            self._warn(f"{endpoint.config.shown} does not answer", told, endpoint.config.shown, reason)
        return Retry(endpoint.fault, blames_call or not (before or at_once))

    def _unpaid(
        self, status: int, told: str, headers: Mapping[str, str], lease: Lease, optional: dict[str, Any]
    ) -> Failed:
        failed = self._refused(status, told, headers, lease, optional)
        failed.free = True
        return failed

    def _refused(
        self, status: int, told: str, headers: Mapping[str, str], lease: Lease, optional: dict[str, Any]
    ) -> Failed:
        """Retry or Rejected: the consequence of an HTTP error for the call. optional: fields that were sent with it."""
        endpoint, unproven = lease.endpoint, not lease.endpoint.proven
        reason, pause = self._line(f"HTTP {status}: {told}"), retry_after_s(headers.get("retry-after", ""))
        if status // 100 == 3:
            where = self._line(headers.get("location", "nowhere"))
            reason = f"HTTP {status}: a redirect to {where}, which is not followed; accepted: a server's own address"
        if status == NO_CREDIT or (status == TOO_MANY and any(code in told for code in NO_CREDIT_CODES)):
            return self._failure(lease, reason, at_once=True)
        if status == TOO_MANY or (status >= 500 and pause):
            slowed = self._dispatcher.limited(lease, pause)
            endpoint.fault = f"{endpoint.config.shown}: {reason}"
            if status == TOO_MANY:
                self._dispatcher.alive(lease)
            elif slowed:
                self._failure(lease, reason)
            return Retry(endpoint.fault, charged=False, pause_s=pause)
        if status in UNUSABLE or status // 100 == 3:
            return self._failure(lease, reason, blames_call=not unproven, at_once=unproven)
        if status in UNKNOWN_FIELD:
            names = refused_fields(optional.keys(), told)
            doubted = set() if names else doubted_fields(optional.keys(), told) - endpoint.taken
            if names or doubted:
                self._leave_out(endpoint, names, reason)
                self._dispatcher.alive(lease)
                return Retry(f"{endpoint.config.shown}: {reason}", charged=False, doubted=doubted)
        if status >= 500:
            return self._failure(lease, reason, blames_call=status not in GATEWAY)
        if status in RETRIED:
            self._dispatcher.alive(lease)
            endpoint.limit(time.monotonic() + pause)
            return Retry(f"{endpoint.config.shown}: {reason}", pause_s=pause)
        self._dispatcher.answered(lease)
        return Rejected(f"{endpoint.config.shown}: {reason}")
