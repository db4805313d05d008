"""`python faulty.py KIND RANK PHASE ITERATION ARGUMENTS`: a training run in which something happens to one rank.

Run by torchrun or by the launcher. KIND is a key of FAULTS. PHASE: plan, rollout, rewards, update or step, as they
begin; "meeting" is inside the first collective of the update, "save" within a checkpoint's saving, whose files are
written and not yet in place, "metrics" within the writing of a row.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import torch

from tempact import train
from tempact.distributed import Ranks
from tempact.rewards.judges import JudgeOutage
from tempact.runs import checkpoint, logs, run


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
    """Lets it happen once, as the phase of the iteration begins on the rank. PLANTED_AT names a file that then holds
    the time."""
    if int(os.environ.get("RANK", "0")) != rank or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    real_phase, real_save, real_sync, real_log = Ranks.phase, run.save, checkpoint.sync, logs.MetricsLogger.log
    real_decide = Ranks._decide
    state = {"phase": "", "done": False, "saving": False}

    def happens(*_: object) -> None:
        if not state["done"]:
            state["done"] = True
            if file := os.environ.get("PLANTED_AT"):
                Path(file).write_text(str(time.time()))
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
        state["saving"] = phase == "save" and given[1] == iteration
        return real_save(*given)

    def synced(path: Path) -> None:
        if state["saving"]:
            happens()
        real_sync(path)

    def logged(self: logs.MetricsLogger, step: int, metrics: Mapping[str, float]) -> None:
        if phase == "metrics" and step == iteration:
            self._file = SimpleNamespace(write=happens, close=self._file.close)  # type: ignore[assignment]
        real_log(self, step, metrics)

    Ranks.phase, Ranks._decide = told, decided  # type: ignore[method-assign]
    run.save, checkpoint.sync, logs.MetricsLogger.log = saved, synced, logged  # type: ignore


if __name__ == "__main__":
    plant(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    sys.exit(train.main(sys.argv[5:]))
