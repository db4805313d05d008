"""A server of OpenAI's chat completions that tells the three rubrics apart and answers as it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
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


class Server:
    """Answers chat completions with a status and what `says` says to the kind of a question, and lists models."""

    def __init__(self, says: Callable[[str], tuple[int, str]], models: tuple[int, Any]):
        self.requests: list[dict] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
                server.requests.append(asked)
                content = asked["messages"][1]["content"]
                text = content if isinstance(content, str) else content[0]["text"]
                status, reply = says(TASKS[text.partition("\n")[0]])
                body = {"choices": [{"index": 0, "message": {"role": "assistant", "content": reply}}]}
                self.answer(status, body if status == 200 else {"error": {"message": reply}})

            def do_GET(self) -> None:
                assert self.path == "/v1/models"
                status, names = models
                self.answer(status, {"data": [{"id": name} for name in names]} if status == 200 else {"error": names})

            def answer(self, status: int, body: dict) -> None:
                sent = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *arguments: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
