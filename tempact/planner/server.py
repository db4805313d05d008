"""A client of a server that samples responses: OpenAI's completions with token ids, adapters that change while it runs.

vLLM speaks this (docs/planner-server.md). A request is repeated after 408, 409, 425, 429, 5xx, broken connections and
replies that are not as asked for: it names its seed, so that the same request is the same response. A server that
answers nothing for `planner.server_outage_s`, or refuses a request, is lost to the run.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import urlsplit

from transformers import GenerationConfig

from tempact.config import PlannerConfig
from tempact.distributed.watch import moved
from tempact.errors import Aborted
from tempact.planner.decode import Response

T = TypeVar("T")
API_KEY = "TEMPACT_PLANNER_API_KEY"
AT_ONCE = 256  # requests of a process; a server queues what it cannot run
BAD_REPLIES = 4  # to one request
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
AGAIN = {408, 409, 425, 429}  # and 5xx but for BROKEN
BROKEN = 500  # also what vLLM says to an adapter that does not fit
TOP = 20  # log-probs that a server gives beside the sampled token's, unless told otherwise
SHOWN = 200  # characters of what a server says
LOWEST = -9998.0  # vLLM writes -9999 for a token of probability 0
POLL_S = 0.2
CONNECT_S = ONCE_S = 10.0


class ServerLost(Aborted):
    """The planner's server does not answer, or not as it must."""


class Refused(Exception):
    """The server refuses a request, and would refuse it again. The value is what it says."""

    def __init__(self, status: int, said: str):
        super().__init__(f"status {status}: {said}")
        self.status, self.said = status, said


class Unread(Exception):
    """A reply that is not as asked for. The value is what is wrong."""


class _Again(Exception):
    """A request brought no reply; another may, after `pause_s`."""

    def __init__(self, reason: str, pause_s: float = 0.0):
        super().__init__(reason)
        self.pause_s = pause_s


class Served(NamedTuple):
    """A response, and for each of its tokens the log-probs of the likeliest, by token."""

    response: Response
    top: list[dict[int, float]]


class Call(NamedTuple, Generic[T]):
    """A request: a POST of `body` to `path`, or a GET where that is None; `read` makes a result of a reply's body."""

    path: str
    body: dict[str, Any] | None
    read: Callable[[bytes], T]


class Server:
    """The server at `planner.server`; the environment holds its key. Its requests may run on any thread."""

    def __init__(self, config: PlannerConfig):
        parts = urlsplit(config.server)
        self.url = config.server.rstrip("/").removesuffix("/v1")
        self.path, self.host = parts.path.rstrip("/").removesuffix("/v1"), parts.netloc
        self.kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.attempt_s, self.outage_s = config.server_attempt_s, config.server_outage_s
        key = os.environ.get(API_KEY, "")
        self.headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        self.answered = -math.inf  # when it last answered as asked for

    def ask(self, *calls: Call[T]) -> list[T]:
        """The results of calls that are made at once. Raises Refused and ServerLost."""
        return Replies(self, calls).wait()

    def lost(self, why: str) -> ServerLost:
        return ServerLost(f"planner.server: {self.url}: {why}")


class Replies(Generic[T]):
    """Calls on their way to a server, on threads of their own. once: none is repeated, nor waited for long.

    open: connections, and when their attempts are over.
    """

    def __init__(self, server: Server, calls: Sequence[Call[T]], *, once: bool = False):
        self.server, self.over = server, threading.Event()
        self.attempt_s = min(ONCE_S, server.attempt_s) if once else server.attempt_s
        self.outage_s = 0.0 if once else server.outage_s
        self.open: dict[http.client.HTTPConnection, float] = {}
        self.pool = ThreadPoolExecutor(min(AT_ONCE, len(calls)) or 1, "planner-server")
        self.results = [self.pool.submit(self._ask, call) for call in calls]

    def wait(self) -> list[T]:
        """The results, in the order of the calls. Raises Refused and ServerLost; the other calls are then dropped."""
        try:
            left = set(self.results)
            while left:
                done, left = wait(left, POLL_S, FIRST_EXCEPTION)
                for result in done:
                    result.result()
                for connection, deadline in list(self.open.items()):
                    if time.monotonic() > deadline:
                        _hang_up(connection)
            return [result.result() for result in self.results]
        finally:
            self.drop()

    def drop(self) -> None:
        """Ends calls that have no result yet."""
        self.over.set()
        for connection in list(self.open):
            _hang_up(connection)
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, call: Call[T]) -> T:
        server, began, bad, pause_s = self.server, time.monotonic(), 0, FIRST_PAUSE_S
        while not self.over.is_set():
            try:
                result = call.read(self._once(call))
                server.answered = time.monotonic()
                return result
            except (Unread, Refused) as error:
                bad, reason, asked_s = bad + 1, str(error), 0.0
                if isinstance(error, Refused) and (error.status != BROKEN or bad >= BAD_REPLIES):
                    raise
            except _Again as again:
                reason, asked_s = str(again), again.pause_s
            finally:
                moved()
            silent_s = time.monotonic() - max(began, server.answered)
            if bad >= BAD_REPLIES:
                raise server.lost(f"{bad} replies to one request are not as asked for ({reason})")
            if silent_s >= self.outage_s:
                raise server.lost(f"no answer for {silent_s:.0f} s, planner.server_outage_s ({reason})")
            self.over.wait(min(max(pause_s, asked_s), self.outage_s))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        raise CancelledError

    def _once(self, call: Call[T]) -> bytes:
        """The body of a reply of status 200."""
        server, deadline = self.server, time.monotonic() + self.attempt_s
        connection = server.kind(server.host, timeout=min(CONNECT_S, self.attempt_s))
        method, body = ("GET", None) if call.body is None else ("POST", json.dumps(call.body))
        self.open[connection] = deadline
        try:
            connection.connect()
            connection.sock.settimeout(self.attempt_s)
            connection.request(method, server.path + call.path, body, server.headers)
            reply = connection.getresponse()
            status, data, again_s = reply.status, reply.read(), reply.headers.get("retry-after", "")
        except (OSError, http.client.HTTPException) as error:
            late = isinstance(error, TimeoutError) or time.monotonic() > deadline
            slow = f"no reply within planner.server_attempt_s ({self.attempt_s:g} s)"
            raise _Again(slow if late else f"{type(error).__name__}: {error}".rstrip(": ")) from error
        finally:
            del self.open[connection]
            connection.close()
        if status == 200:
            return data
        if status in AGAIN or status > BROKEN:
            raise _Again(f"status {status}: {said(data)}", float(again_s) if again_s.isdigit() else 0.0)
        raise Refused(status, said(data))


def _hang_up(connection: http.client.HTTPConnection) -> None:
    with contextlib.suppress(OSError, AttributeError):  # closed meanwhile
        connection.sock.shutdown(socket.SHUT_RDWR)


def said(data: bytes) -> str:
    """What the body of a refusal says, in a line."""
    text = data.decode("utf-8", "replace")
    with contextlib.suppress(ValueError, TypeError, KeyError):
        body = json.loads(text)
        error = body.get("error", body) if isinstance(body, dict) else body
        text = str(error.get("message") or error.get("detail") or error) if isinstance(error, dict) else str(error)
    return " ".join(text.split())[:SHOWN] or "nothing"


def completion(
    model: str, prompt: Sequence[int], seed: int, settings: GenerationConfig, vocabulary: int, top: int = 0
) -> Call[Served]:
    """A response to `prompt`, token ids, drawn by `model` from `seed` under the settings of `decode.respond`.

    vocabulary: number of tokens. top: log-probs of so many likeliest tokens come with each.
    """
    body = {
        "model": model, "prompt": list(prompt), "seed": seed, "n": 1, "max_tokens": settings.max_new_tokens,
        "temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k or 0, "min_p": 0.0,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        # the end tokens of this planner, whatever those of the server's configuration are
        "ignore_eos": True, "stop_token_ids": list(settings.eos_token_id), "skip_special_tokens": False,
        "logprobs": top, "return_token_ids": True, "return_tokens_as_token_ids": True,
    }  # fmt: skip

    def read(data: bytes) -> Served:
        return read_completion(data, model, prompt, settings, vocabulary)

    return Call("/v1/completions", body, read)


def read_completion(
    data: bytes, model: str, prompt: Sequence[int], settings: GenerationConfig, vocabulary: int
) -> Served:
    """The response in a reply to `completion`. Raises Unread for anything else."""
    try:
        body = json.loads(data)
        (choice,) = body["choices"]
        tokens, log_probs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        top = [_by_token(each) for each in choice["logprobs"].get("top_logprobs") or []]
        asked, by = choice.get("prompt_token_ids", body.get("prompt_token_ids")), body["model"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        found = f"{type(error).__name__}: {error}"[:SHOWN]
        raise Unread(f"no completion with token ids and log-probs, {found}") from error
    if by != model:
        raise Unread(f"the model {by!r} and not {model!r}")
    if asked is not None and list(asked) != list(prompt):
        raise Unread("another prompt than was sent")
    if not isinstance(tokens, list) or not tokens or not all(_is_token(token, vocabulary) for token in tokens):
        raise Unread("token ids that the planner does not have")
    ends = [token in settings.eos_token_id for token in tokens]
    whole = ends[-1] or len(tokens) == settings.max_new_tokens
    if not whole or any(ends[:-1]) or len(tokens) > settings.max_new_tokens:
        raise Unread(f"{len(tokens)} tokens, which neither end once nor are {settings.max_new_tokens}")
    if not isinstance(log_probs, list) or len(log_probs) != len(tokens) or not all(map(_is_log_prob, log_probs)):
        raise Unread("not a finite log-prob for each token")
    return Served(Response(tokens, [float(value) for value in log_probs]), top)


def _by_token(values: dict[str, float]) -> dict[int, float]:
    return {int(name.removeprefix("token_id:")): float(value) for name, value in values.items()}


def _is_token(token: Any, vocabulary: int) -> bool:
    return type(token) is int and 0 <= token < vocabulary


def _is_log_prob(value: Any) -> bool:
    return type(value) in (int, float) and LOWEST < value < 0.01
