"""The sleep of the planner's server, for a GPU that it shares with the trainer: its weights wait on the host meanwhile.

vLLM has it with --enable-sleep-mode, and offers it over HTTP with VLLM_SERVER_DEV_MODE=1. At level 1 keys and values
are dropped; adapters are kept with the weights. A server that sleeps answers no completion until it is woken, and must
get no adapter: the buffers are not there.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from functools import partial

import torch

from tempact.config import PlannerConfig
from tempact.planner.server import Call, Refused, Replies, Server, ServerLost, Unread

SLEEP, WAKE, STATE = "/sleep?level=1", "/wake_up", "/is_sleeping"
COMMAND = (
    "VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --host 127.0.0.1 --enable-sleep-mode "
    "--enable-lora"
)


def fall_asleep(server: Server) -> float:
    """Puts the server to sleep, which drops what it is asked for; the seconds that this took. Raises ServerLost."""
    return _turned(server, SLEEP, True)


def wake_up(server: Server) -> float:
    """Wakes the server, which needs its memory again; the seconds that this took. Raises ServerLost."""
    return _turned(server, WAKE, False)


def leave(server: Server) -> None:
    """Puts a server to sleep that answers at once; a run that has failed does not wait for another."""
    with suppress(Refused, ServerLost):
        Replies(server, [Call(SLEEP, {}, bytes)], once=True).wait()


def begin(config: PlannerConfig) -> None:
    """Before a run loads weights: its server sleeps, or is awake if the run never lets it sleep.

    Raises ServerLost where the server is to sleep and cannot.
    """
    server = Server(config)
    if config.server_sleep:
        fall_asleep(server)
        return
    with suppress(Refused, ServerLost):  # which the first plans tell
        (asleep,) = Replies(server, [Call(STATE, None, _asleep)], once=True).wait()
        if asleep:
            wake_up(server)


def release(device: torch.device) -> None:
    """Gives memory of the GPU that no tensor holds back to it: a server that wakes up takes it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _turned(server: Server, path: str, asleep: bool) -> float:
    began = time.monotonic()
    try:
        server.ask(Call(path, {}, bytes))
        server.ask(Call(STATE, None, partial(_turned_to, asleep)))
    except Refused as error:
        if error.status == 404:
            accepted = f"{COMMAND}, or planner.server_sleep false"
            raise server.lost(f"has no sleep mode ({error}); accepted: {accepted}") from error
        raise server.lost(f"does not {'fall asleep' if asleep else 'wake up'} ({error})") from error
    return time.monotonic() - began


def _asleep(data: bytes) -> bool:
    """Does the server sleep, by the body of its reply?"""
    with suppress(ValueError, TypeError, KeyError):
        found = json.loads(data)["is_sleeping"]
        if isinstance(found, bool):
            return found
    raise Unread("not whether it sleeps")


def _turned_to(asleep: bool, data: bytes) -> None:
    if _asleep(data) != asleep:
        raise Unread("it is still awake" if asleep else "it is still asleep")
