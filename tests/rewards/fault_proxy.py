"""A server that fails in every way a judge's server can, in front of a real one or of a fake judge.

Raw asyncio streams, because an HTTP library will not send half a body or a reset. Faults are drawn from a seed, or
named for the next requests. The fake judge's score is a function of the number in the call's text, so that a reply
that went to the wrong call shows.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

MALFORMED = {  # what the judge says
    "truncated": '{"score": 0.',
    "prose": "I would say 0.5.",
    "wrong_fields": '{"points": 0.5}',
    "missing_field": '{"reason": "good"}',
    "nan": '{"score": NaN, "reason": ""}',
    "infinite": '{"score": 1e999, "reason": ""}',
    "out_of_range": '{"score": 7.5, "reason": ""}',
    "text_number": '{"score": "0.5", "reason": ""}',
    "two_objects": '{"score": 0.5, "reason": ""} {"score": 1.0, "reason": ""}',
    "cut_thinking": "<think>let me see",
    "empty": "",
}
STATUSES = {"408": 408, "409": 409, "429": 429, "500": 500, "502": 502, "503": 503}
BROKEN = ("reset", "closed", "half_body", "not_json", "not_a_completion", "refusal")
SLOW = ("slow_first_byte", "stalled", "drip")
FAULTS = (*MALFORMED, *STATUSES, *BROKEN, *SLOW)


def score_of(text: str) -> float:
    """The fake judge's score of a text with a number in it."""
    return (int(re.findall(r"\d+", text)[-1]) * 37 % 101) / 100


def verdict_of(content: str | list) -> dict[str, object]:
    """What any of the rewards' rubrics asks for, drawn from what is asked: no two plans or videos score the same."""
    draw = random.Random(json.dumps(content))
    plan = ("faithfulness", "coverage", "temporal", "hallucination")
    video = ("temporal_order", "physical", "consistency", "alignment", "subject", "scene", "action", "appearance",
             "final")  # fmt: skip
    shares: dict[str, object] = {name: draw.uniform(0, 1) for name in plan}
    marks = {name: draw.uniform(0, 10) for name in video}
    pictures = 0 if isinstance(content, str) else len(content) - 1
    return shares | marks | {"frame_scores": [draw.uniform(0, 10) for _ in range(pictures)]}


@dataclass
class Behaviour:
    """`share` of the requests fail, in one of `faults`; the others take `delay_s` in one of `slots`."""

    share: float = 0.0
    faults: tuple[str, ...] = FAULTS
    delay_s: float = 0.0
    slots: int = 1_000_000
    slow_s: float = 0.3  # before the first byte of slow_first_byte
    retry_after: str = "1"
    seed: int = 0
    verdicts: bool = False  # the fake judge answers the rewards' rubrics in the place of `judge_cases.RUBRIC`
    upstream: int = 0  # port of a real server on this machine; 0: the fake judge answers


@dataclass
class FaultProxy:
    """Listens on 127.0.0.1. `script` holds faults, or "" for none, of the next requests, before any that are drawn."""

    behaviour: Behaviour
    port: int = 0
    script: deque[str] = field(default_factory=deque)
    seen: Counter[str] = field(default_factory=Counter)  # requests by fault, "" for none
    headers: list[bytes] = field(default_factory=list)  # of the first requests
    in_flight: int = 0
    most_in_flight: int = 0

    async def start(self) -> None:
        self._random = random.Random(self.behaviour.seed)
        self._slots = asyncio.Semaphore(self.behaviour.slots)
        self._open: set[asyncio.Task[None]] = set()
        await self.listen()

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def die(self) -> None:
        """Every connection breaks and new ones are refused."""
        self._server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            while await self._request(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            self._open.discard(task)
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; False if the connection is not to be used again."""
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
        body = await reader.readexactly(int(length[1])) if length else b""
        if len(self.headers) < 8:
            self.headers.append(head)
        drawn = self._random.random() < self.behaviour.share
        fault = self._random.choice(self.behaviour.faults) if drawn else ""
        if self.script:
            fault = self.script.popleft()
        self.seen[fault] += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._answer(fault, head, body, writer)
        finally:
            self.in_flight -= 1

    async def _answer(self, fault: str, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> bool:
        if fault == "slow_first_byte":
            await asyncio.sleep(self.behaviour.slow_s)
        if fault == "reset":
            option = struct.pack("ii", 1, 0)  # close() sends a reset
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
            writer.transport.abort()
            return False
        if fault == "closed":
            return False
        status, reply = STATUSES.get(fault, 200), await self._reply(fault, head, body)
        more = f"retry-after: {self.behaviour.retry_after}\r\n" if fault in ("429", "503") else ""
        kind = "text/html" if fault == "not_json" else "application/json"
        start = f"HTTP/1.1 {status} x\r\ncontent-type: {kind}\r\n{more}content-length: {len(reply)}\r\n\r\n"
        if fault in ("half_body", "stalled"):
            writer.write(start.encode() + reply[: len(reply) // 2])
            await writer.drain()
            if fault == "stalled":
                await asyncio.sleep(3600)
            return False
        if fault == "drip":  # a byte at a time, so that no read takes long
            for byte in start.encode() + reply:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.1)
            return False
        writer.write(start.encode() + reply)
        await writer.drain()
        return True

    async def _reply(self, fault: str, head: bytes, body: bytes) -> bytes:
        if fault in STATUSES:
            return json.dumps({"error": {"message": f"no: {head.decode(errors='replace')}"}}).encode()  # with the key
        if fault == "not_json":
            return b"<html>welcome to the wireless network</html>"
        if fault == "not_a_completion":
            return b'{"choices": []}'
        if fault == "refusal":
            return completion(None, refusal="I would rather not.")
        if self.behaviour.upstream and fault not in MALFORMED:
            return await self._forward(head, body)
        async with self._slots:
            await asyncio.sleep(self.behaviour.delay_s)
        if fault in MALFORMED:
            return completion(MALFORMED[fault])
        content = json.loads(body)["messages"][-1]["content"]
        if self.behaviour.verdicts:
            return completion(json.dumps(verdict_of(content)))
        text = content if isinstance(content, str) else content[0]["text"]
        return completion(json.dumps({"score": score_of(text), "reason": "as it should be"}))

    async def _forward(self, head: bytes, body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.behaviour.upstream)
        head = re.sub(rb"\r\nconnection: [^\r]*", b"", head, flags=re.IGNORECASE)
        writer.write(head[:-2] + b"connection: close\r\n\r\n" + body)
        answer = await reader.read()
        writer.close()
        return answer.partition(b"\r\n\r\n")[2]


def completion(content: str | None, **more: object) -> bytes:
    """The body of a chat completion."""
    message = {"role": "assistant", "content": content, **more}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode()


class Running:
    """A proxy on a thread of its own."""

    def __init__(self, proxy: FaultProxy):
        self.proxy = proxy
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._call(proxy.start())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.proxy.port}/v1"

    def die(self) -> None:
        self._call(self.proxy.die())

    def revive(self) -> None:
        self._call(self.proxy.listen())

    def stop(self) -> None:
        self.die()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def _call(self, coroutine) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)


@contextmanager
def running(behaviour: Behaviour | None = None, script: tuple[str, ...] = ()) -> Iterator[Running]:
    """A proxy that listens while the block runs."""
    server = Running(FaultProxy(behaviour or Behaviour(), script=deque(script)))
    try:
        yield server
    finally:
        server.stop()


class Apart:
    """A proxy in a process of its own, which leaves the client its processor."""

    def __init__(self, behaviour: Behaviour):
        command = [sys.executable, __file__, json.dumps(asdict(behaviour))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.url = f"http://127.0.0.1:{self._read()}/v1"

    def seen(self) -> Counter[str]:
        """Requests by fault so far."""
        return Counter(self._tell("seen"))

    def die(self) -> None:
        self._tell("die")

    def revive(self) -> None:
        self._tell("revive")

    def stop(self) -> None:
        self._process.communicate()

    def _tell(self, order: str):
        assert self._process.stdin is not None
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self):
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


def main() -> None:
    """Serves the behaviour of the command line; answers orders on stdin until that ends."""
    arguments = json.loads(sys.argv[1])
    server = Running(FaultProxy(Behaviour(**arguments | {"faults": tuple(arguments["faults"])})))
    sys.stdout.write(f"{server.proxy.port}\n")
    sys.stdout.flush()
    for order in sys.stdin:
        if order.strip() == "die":
            server.die()
        elif order.strip() == "revive":
            server.revive()
        sys.stdout.write(json.dumps(server.proxy.seen) + "\n")
        sys.stdout.flush()
    server.stop()


if __name__ == "__main__":
    main()
