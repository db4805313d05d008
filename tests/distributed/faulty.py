"""`python faulty.py KIND RANK PHASE ITERATION ARGUMENTS`: a training run in which something happens to one rank.

Run by torchrun or by the launcher. KIND is a key of FAULTS. PHASE: plan, rollout, rewards, update or step, as they
begin; "meeting" is inside the first collective of the update, "save" within a checkpoint's saving.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable

import torch

from tempact import train
from tempact.distributed import Ranks
from tempact.rewards.judges import JudgeOutage
from tempact.runs import run


def end(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def exception() -> None:
    raise ValueError("planted")


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB (planted)")


def outage() -> None:
    raise JudgeOutage("judge step_following: silent for 300 s (planted)")


def disk_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def hang() -> None:
    time.sleep(3600)


FAULTS: dict[str, Callable[[], None]] = {
    "kill": end(signal.SIGKILL), "stop": end(signal.SIGSTOP), "term": end(signal.SIGTERM), "int": end(signal.SIGINT),
    "exception": exception, "memory": out_of_memory, "outage": outage, "disk": disk_full, "hang": hang,
    "none": lambda: None,
}  # fmt: skip


def plant(kind: str, rank: int, phase: str, iteration: int) -> None:
    """Lets it happen once, as the phase of the iteration begins on the rank."""
    if int(os.environ.get("RANK", "0")) != rank:
        return
    real_phase, real_fill = Ranks.phase, run.save
    real_decide = Ranks._decide
    state = {"phase": "", "done": False}

    def happens() -> None:
        if not state["done"]:
            state["done"] = True
            FAULTS[kind]()

    def told(self: Ranks, name: str) -> None:
        real_phase(self, name)
        state["phase"] = name
        if name == f"iteration {iteration}, {phase}":
            happens()

    def decided(self: Ranks, *given: object) -> None:
        real_decide(self, *given)
        if phase == "meeting" and state["phase"] == f"iteration {iteration}, update":
            happens()

    def saved(*given: object) -> object:
        if phase == "save" and given[1] == iteration:
            happens()
        return real_fill(*given)

    Ranks.phase, Ranks._decide, run.save = told, decided, saved  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    plant(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    sys.exit(train.main(sys.argv[5:]))
