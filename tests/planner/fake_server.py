"""A server of completions, in this process, that computes with a planner of its own: vLLM's part of `served`.

Refusals read as vLLM 0.32's do.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig

from tempact.models.adapters import PEFT_FILES
from tempact.planner import decode
from tempact.planner.planner import Planner

Fault = Callable[[str, dict, int], tuple[int, bytes] | None]  # of path, body, how many came before on that path


class FakeServer:
    """Loads PEFT folders and answers completions with the draws of the planner's own sampler.

    twin     a planner of its own
    fault    what it does in place of an answer; None: it answers
    stale    every adapter is answered with the weights of the first, or of none
    requests path and body of each
    sleeping whether it sleeps; None: it has no sleep mode
    """

    def __init__(self, twin: Planner, runtime: bool = True):
        self.twin, self.runtime = twin, runtime
        self.fault: Fault = lambda path, body, number: None
        self.stale: Callable[[str], str | None] = lambda name: name
        self.adapters: dict[str, dict[str, Tensor]] = {}
        self.ever: dict[str, dict[str, Tensor]] = {}
        self.requests: list[tuple[str, dict]] = []
        self.sleeping: bool | None = None
        self.counts: Counter[str] = Counter()
        self.together = self.most_together = 0
        self._made: dict[str, dict] = {}  # choices, by what was asked for
        self._lock, self._model = threading.Lock(), threading.Lock()
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.handle(self, {})

            def do_POST(self) -> None:
                owner.handle(self, json.loads(self.rfile.read(int(self.headers["content-length"]))))

            def log_message(self, *given: Any) -> None:
                pass

        class Listening(ThreadingHTTPServer):
            request_queue_size = 256
            daemon_threads = False  # so that `server_close` waits for them

            def handle_error(self, *given: Any) -> None:
                pass  # clients that hang up

        self.http = Listening(("127.0.0.1", self.port), Handler)
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuses connections from here on, as a process that is gone, and forgets the adapters.

        Requests in hand are waited for: they compute with the twin, which the next server may share.
        """
        self.http.shutdown()
        self.http.server_close()
        self.adapters.clear()

    def sent(self, path: str) -> list[dict]:
        return [body for at, body in self.requests if at == path]

    def handle(self, handler: BaseHTTPRequestHandler, body: dict) -> None:
        with self._lock:
            path, number = handler.path, self.counts[handler.path]
            self.counts[path] += 1
            self.requests.append((path, body))
            self.together += 1
            self.most_together = max(self.most_together, self.together)
        try:
            status, data = self.fault(path, body, number) or self.answer(path, body)
        finally:
            with self._lock:
                self.together -= 1
        handler.send_response(status)
        handler.send_header("content-length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def answer(self, path: str, body: dict) -> tuple[int, bytes]:
        if path in ("/sleep?level=1", "/wake_up", "/is_sleeping"):
            return self.turn(path)
        if self.sleeping and path in ("/v1/completions", "/v1/load_lora_adapter"):
            return error(400, "the engine is dead: it was asleep")  # vLLM's would wait for ever, or die
        if path == "/v1/models":
            cards = [{"id": "base", "root": "base", "parent": None}]
            cards += [{"id": name, "root": name, "parent": "base"} for name in self.adapters]
            return 200, json.dumps({"data": cards}).encode()
        if path == "/v1/completions":
            return self.complete(body)
        name = body.get("lora_name", "")
        if not self.runtime:
            return 404, b'{"detail":"Not Found"}'
        if path == "/v1/unload_lora_adapter":
            if self.adapters.pop(name, None) is None:
                return error(404, f"The lora adapter '{name}' cannot be found.")
            return 200, b"Success"
        if name in self.adapters:
            return error(400, f"The lora adapter '{name}' has already been loaded.")
        files = [Path(body["lora_path"]) / own for own in (*PEFT_FILES, "adapter_config.json")]
        if not (files[0].is_file() and files[-1].is_file()):
            return error(404, f"Loading lora {name} failed: No adapter found for {body['lora_path']}")
        state = load_file(files[0])
        own = {key.replace(".default.", "."): value for key, value in self.twin.parameters().items()}
        wrong = [key for key, value in state.items() if key not in own or own[key].shape != value.shape]
        if wrong:
            return error(500, f"Call to add_lora method failed: {wrong[0]} does not fit")
        self.adapters[name] = self.ever[name] = state
        return 200, f"Success: LoRA adapter '{name}' added successfully.".encode()

    def turn(self, path: str) -> tuple[int, bytes]:
        if self.sleeping is None:
            return 404, b'{"detail":"Not Found"}'
        if path == "/is_sleeping":
            return 200, json.dumps({"is_sleeping": self.sleeping}).encode()
        self.sleeping = path != "/wake_up"
        return 200, b""

    @torch.no_grad()
    def complete(self, body: dict) -> tuple[int, bytes]:
        model = body["model"]
        if model not in self.adapters:
            return error(404, f"The model `{model}` does not exist.")
        prompt, top, used = body["prompt"], body["logprobs"], self.stale(model)
        asked = json.dumps([used, {**body, "model": ""}])
        with self._model:
            if asked not in self._made:
                self._made[asked] = self._complete(prompt, top, used, body)
            choice = self._made[asked]
        return 200, json.dumps({"model": model, "choices": [choice]}).encode()

    def _complete(self, prompt: list[int], top: int, used: str | None, body: dict) -> dict:
        for key, value in self.twin.parameters().items():
            value.copy_(self.ever[used][key.replace(".default.", ".")] if used else torch.zeros_like(value))
        settings = GenerationConfig(
            do_sample=True, temperature=body["temperature"], top_p=body["top_p"], top_k=body["top_k"],
            max_new_tokens=body["max_tokens"], eos_token_id=body["stop_token_ids"], pad_token_id=0,
        )  # fmt: skip
        base = self.twin.peft.get_base_model()
        (made,) = decode.respond(base, settings, [prompt], [body["seed"]], rows=1, stepwise=self.twin.stepwise)
        found = self.twin.next_log_probs(prompt, made.tokens)
        likeliest = found.topk(top).indices
        tops = [
            {f"token_id:{i}": found[row, i].item() for i in [made.tokens[row], *likeliest[row].tolist()]}
            for row in range(len(made.tokens) if top else 0)
        ]
        log_probs = {"token_logprobs": made.log_probs, "top_logprobs": tops}
        choice = {"index": 0, "text": "", "token_ids": made.tokens, "prompt_token_ids": prompt, "logprobs": log_probs}
        return choice


def error(status: int, message: str) -> tuple[int, bytes]:
    return status, json.dumps({"error": {"message": message, "type": "x", "code": status}}).encode()
