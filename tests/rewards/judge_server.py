"""A server of OpenAI's chat completions that tells the three rubrics apart and answers as it is told, at its rate."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = {
    "plan": {"faithfulness": 1, "coverage": 1, "temporal": 1, "hallucination": 0},
    "video": {
        "frame_scores": [9] * 6, "temporal_order": 9, "physical": 9, "consistency": 9, "alignment": 9, "final": 9,
    },
    "part": {"subject": 8, "scene": 8, "action": 8, "appearance": 8, "final": 8},
}  # fmt: skip
TASKS = {"Judge this plan.": "plan", "Judge this video.": "video", "Judge this part of a video.": "part"}


class Bucket:
    """A token bucket: `rate` requests a second, and up to `burst` at once. Requests that it refuses take nothing."""

    def __init__(self, rate: float, burst: float = 1.0):
        self.rate, self.burst, self._tokens, self._seen = rate, burst, burst, time.monotonic()
        self._lock = threading.Lock()

    def grants(self) -> bool:
        with self._lock:
            now = time.monotonic()
            self._tokens = min(self.burst, self._tokens + (now - self._seen) * self.rate)
            self._seen = now
            granted = self._tokens >= 1
            self._tokens -= granted
            return granted


class Server:
    """Answers chat completions with a status and what `says` says to the kind of a question, and lists models.

    says    from the kind, or the whole text of a question of another kind: 200 and the content of a message, or the
            message itself; another status and what is wrong
    bucket  what is beyond its rate has the answer of `says` to "", which is status 429 or 503
    headers of every answer but those of status 200
    whole   is what `says` says a whole body?
    """

    def __init__(
        self,
        says: Callable[[str], tuple[int, Any]],
        models: tuple[int, Any] = (200, []),
        bucket: Bucket | None = None,
        headers: Callable[[], Mapping[str, str]] = dict,
        whole: Callable[[Any], bool] = lambda reply: False,
    ):
        self.requests: list[dict] = []
        self.heads: list[dict[str, str]] = []
        self.statuses: Counter[int] = Counter()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
                server.requests.append(asked)
                server.heads.append({name.lower(): value for name, value in self.headers.items()})
                content = asked["messages"][1]["content"]
                text = content if isinstance(content, str) else content[0]["text"]
                granted = bucket is None or bucket.grants()
                status, reply = says(TASKS.get(text.partition("\n")[0], text) if granted else "")
                message = reply if isinstance(reply, dict) else {"role": "assistant", "content": reply}
                body = reply if whole(reply) else {"choices": [{"index": 0, "message": message}]}
                server.statuses[status] += 1
                error = reply if isinstance(reply, dict) else {"message": reply}
                self.answer(status, body if status == 200 else {"error": error})

            def do_GET(self) -> None:
                assert self.path == "/v1/models"
                server.heads.append({name.lower(): value for name, value in self.headers.items()})
                status, names = models
                self.answer(status, {"data": [{"id": name} for name in names]} if status == 200 else {"error": names})

            def answer(self, status: int, body: dict) -> None:
                sent = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(sent)))
                for name, value in headers().items() if status != 200 else ():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *arguments: object) -> None:
                pass

        class Listening(ThreadingHTTPServer):
            request_queue_size = 1024

        self._http = Listening(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
