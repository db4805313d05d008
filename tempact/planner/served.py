"""Plans that a server samples: the trained adapter under a new name for each iteration, and the proof that it is used.

Under one name a server may go on with keys and values of earlier weights. After a new adapter is loaded, a canary asks
the server for a few tokens with the log-probs of the likeliest, which the trainer computes, too: with the adapter, with
one that served before, with that of the start and with none. Log-probs that are nearer to another's than to the
adapter's end the run.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from transformers import GenerationConfig

from tempact.distributed import Ranks
from tempact.errors import Aborted
from tempact.planner.canary import EARLIER, Told, told, weights_of
from tempact.planner.decode import Response
from tempact.planner.planner import Planner
from tempact.planner.server import TOP, Call, Refused, Replies, Served, Server, ServerLost, completion
from tempact.planner.sleep import fall_asleep, leave, release, wake_up
from tempact.types import PlanBatch, Prompt

log = logging.getLogger(__name__)

CANARY_TOKENS = 16
COMMAND = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora"
NO_FILES = ("No adapter found", "No such file", "Permission denied", "does not exist")


class Ready(NamedTuple):
    """Plans of iteration `number` that have been asked for, and metrics of the change of adapters before."""

    number: int
    metrics: dict[str, float]
    replies: Replies[Served]


class ServedSampler:
    """Samples the responses of `planner` on the server of its configuration. One rank loads adapters; all ask.

    name: of the adapter that is loaded; nothing before the first. ready: what is asked for ahead. earlier: weights of
    the last adapter that the canary has told from its forerunner, on the host. awake: this process has woken a server
    that is to sleep.
    """

    def __init__(self, planner: Planner, folder: Path, ranks: Ranks):
        """folder: for adapters; trainer and server see it under the same path."""
        self.planner, self.ranks, self.folder = planner, ranks, folder.absolute()
        self.server = Server(planner.config)
        self.run, self.count, self.name = uuid.uuid4().hex[:12], 0, ""
        self.ready: Ready | None = None
        self.loaded: list[str] = []  # adapters that the server may hold
        self.earlier: dict[str, Tensor] = {}
        self.awake = False

    def sample(
        self, number: int, prompts: list[Prompt], plans_per_prompt: int, seed: int
    ) -> tuple[PlanBatch, dict[str, float]]:
        """As `Planner.sample`, the plans of iteration `number`; with metrics of the change of adapters.

        Waits for what `ahead` has asked for, or asks here. A server that is to sleep is awake meanwhile alone. Raises
        ServerLost.
        """
        ready = self.ready
        if ready is None or ready.number != number:
            self.forget()
            metrics = self.publish(prompts[0].text)
            ready = self._asked(number, metrics, prompts, plans_per_prompt, seed)
        try:
            plans = self.planner.sample(
                prompts, plans_per_prompt, seed, ranks=self.ranks, respond=lambda *own: self.responses(ready.replies)
            )
        finally:
            self.ready = None
            ready.replies.drop()
        return plans, ready.metrics | self._rest()

    def ahead(self, number: int, prompts: list[Prompt], plans_per_prompt: int, seed: int) -> None:
        """Asks for the plans of iteration `number`, whose weights the planner has already; `sample` waits for them.

        Where the server does not take the adapter, `sample` tries again, and raises.
        """
        try:
            metrics = self.publish(prompts[0].text)
        except Aborted:  # told where it ends the run
            if self.ranks.first:
                log.info("plans of iteration %d are not asked for ahead: the server does not take the adapter", number)
            return
        self.ready = self._asked(number, metrics, prompts, plans_per_prompt, seed)

    def forget(self) -> None:
        """Drops what has been asked for ahead."""
        if self.ready is not None:
            self.ready.replies.drop()
        self.ready = None

    def publish(self, instruction: str) -> dict[str, float]:
        """From here on the server samples with the planner's present weights.

        Returns metrics of the change. Raises ServerLost where the server does not take the adapter or does not use it.
        """
        self.count += 1
        name = f"tempact-{self.run}-{self.count}"
        if self.planner.config.server_sleep:  # it may be on the GPU of any process
            self.ranks.agreed(lambda: release(self.planner.device))
        changed = self.ranks.agreed(lambda: self._change(name, instruction) if self.ranks.first else None, Aborted)[0]
        assert changed is not None
        self.name, metrics = changed
        return metrics

    def close(self) -> None:
        """Unloads what is loaded and removes its folders; a server that is to sleep and was woken is put to sleep."""
        self.forget()
        self._unload(self.loaded)
        if self.awake:
            leave(self.server)

    def begin(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Replies[Served]:
        """Asks for a response to each prompt, token ids, drawn from its seed; returns at once."""
        settings, size = self.planner.generation, self.planner.vocabulary
        each = zip(prompts, seeds, strict=True)
        return Replies(self.server, [completion(self.name, prompt, seed, settings, size) for prompt, seed in each])

    def responses(self, replies: Replies[Served]) -> list[Response]:
        """What `begin` has asked for. Raises ServerLost."""
        try:
            return [served.response for served in replies.wait()]
        except Refused as error:
            raise self.server.lost(f"refuses a plan ({error})") from error

    def _asked(
        self, number: int, metrics: dict[str, float], prompts: list[Prompt], plans_per_prompt: int, seed: int
    ) -> Ready:
        """This rank's share of an iteration's plans, asked for."""
        asked, seeds = self.planner.requests(prompts, plans_per_prompt, seed)
        own = self.ranks.share(len(asked))
        return Ready(number, metrics, self.begin(asked[own.start : own.stop], seeds[own.start : own.stop]))

    def _change(self, name: str, instruction: str) -> tuple[str, dict[str, float]]:
        self.awake = self.planner.config.server_sleep
        woken = {"planner/server_wake_s": wake_up(self.server)} if self.awake else {}
        began, folder = time.monotonic(), self.folder / name
        self.loaded.append(name)
        try:
            self.planner.save_adapter(folder)
        except OSError as error:
            raise ServerLost(f"planner.server_folder: {folder}: not writable ({error.strerror or error})") from error
        self._load(name, folder)
        swap_s = time.monotonic() - began
        found = self._canary(name, instruction)
        self._unload(self.loaded[:-1])
        return name, found | {"planner/server_swap_s": swap_s} | woken

    def _rest(self) -> dict[str, float]:
        """All plans are here: the server sleeps, if so configured, before any process goes on. Returns metrics."""
        if not self.planner.config.server_sleep:
            return {}
        slept_s = self.ranks.agreed(lambda: fall_asleep(self.server) if self.ranks.first else 0.0, Aborted)[0]
        self.awake = False
        return {"planner/server_sleep_s": slept_s}

    def _load(self, name: str, folder: Path) -> None:
        try:
            self.server.ask(Call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, bytes))
        except Refused as error:
            if self._listed(name):  # by an earlier request, whose reply was lost
                return
            if error.status == 404 and error.said == "Not Found":
                raise self.server.lost(f"takes no adapters while it runs; accepted: {COMMAND}") from error
            if any(words in error.said for words in NO_FILES):
                shared = "accepted: a planner.server_folder that trainer and server see under the same path"
                raise self.server.lost(f"cannot read {folder} ({error.said}); {shared}") from error
            config = self.planner.config
            accepted = f"a server of {config.weights} with --enable-lora --max-lora-rank {config.lora.rank} or more"
            raise self.server.lost(f"refuses the adapter ({error}); accepted: {accepted}") from error

    def _listed(self, name: str) -> bool:
        with suppress(Refused):
            (models,) = self.server.ask(Call("/v1/models", None, bytes))
            return f'"{name}"'.encode() in models
        return False

    def _unload(self, names: Sequence[str]) -> None:
        """Of adapters that nobody needs any more: it is tried once."""
        calls = [Call("/v1/unload_lora_adapter", {"lora_name": name}, bytes) for name in names]
        try:
            Replies(self.server, calls, once=True).wait()
        except (Refused, ServerLost) as error:
            log.info("%s: %s: not unloaded (%s)", self.server.url, ", ".join(names), error)
        for name in names:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self.loaded = [name for name in self.loaded if name not in names]

    def _canary(self, name: str, instruction: str) -> dict[str, float]:
        """Metrics of the canary. Raises ServerLost where the server does not sample with the planner's weights."""
        planner, own = self.planner, self.planner.generation
        settings = GenerationConfig(
            do_sample=True, temperature=1.0, top_p=1.0, top_k=0, eos_token_id=own.eos_token_id,
            max_new_tokens=min(CANARY_TOKENS, own.max_new_tokens),
        )  # fmt: skip
        prompt = planner.prompt_ids(instruction)
        try:
            (served,) = self.server.ask(completion(name, prompt, 0, settings, planner.vocabulary, TOP))
        except Refused as error:
            raise self.server.lost(f"refuses the canary ({error})") from error
        found = told(planner, prompt, served, self.earlier)
        self._check(found)
        if not self.earlier or found.telling(EARLIER)[0]:
            self.earlier = weights_of(planner)
        told_apart = [found.apart(other) for other in found.others if found.telling(other)[0]]
        return {"planner/server_canary": found.off, "planner/server_canary/others": min(told_apart, default=math.nan)}

    def _check(self, found: Told) -> None:
        nearer = [other for other in found.others if found.telling(other) == (True, True)]
        if nearer:
            other = min(nearer, key=found.off_from)
            why = f"{found.off_from(other):.3g} nats from it and {found.off:.3g} from the trained adapter"
            raise self.server.lost(f"samples with {other}: the canary's log-probs are {why}")
        limit = self.planner.config.max_sampling_gap
        if not found.gap <= limit:
            differ = f"the canary's log-probs are {found.gap:.3g} nats from the trainer's"
            why = f"computes another model: {differ}; accepted: at most planner.max_sampling_gap ({limit:g})"
            raise self.server.lost(why)
