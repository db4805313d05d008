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
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tempact import train
from tempact.distributed import Ranks
from tempact.distributed.reduction import UpdateSum
from tempact.distributed.shards import block_of
from tempact.executor.executor import Executor
from tempact.planner import planner
from tempact.rewards.judges import JudgeOutage
from tempact.runs import checkpoint, logs, run
from tempact.types import Plan, Step
from tempact.updates import ExecutorUpdates


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


def patchy(prompts: list[str], plans: list[Plan], frames: torch.Tensor, spans: object) -> torch.Tensor:
    """A reward that some plans and some videos do not have."""
    scores = frames.float().mean((2, 3, 4, 5)) / 255
    for row, plan in zip(scores, plans, strict=True):
        row[: [len(row), 1, 0, 0][zlib.crc32(plan.response.encode()) % 4]] = float("nan")
    return scores


def sparse(prompts: list[str], plans: list[Plan], frames: torch.Tensor, spans: object) -> torch.Tensor:
    """As `patchy`, whichever videos of a plan come together."""
    scores = frames.float().mean((2, 3, 4, 5)) / 255
    for row, videos, plan in zip(scores, frames, plans, strict=True):
        every = zlib.crc32(plan.response.encode()) % 4 == 0
        missing = [every or zlib.crc32(video.cpu().numpy().tobytes()) % 2 == 0 for video in videos]
        row[torch.tensor(missing)] = float("nan")
    return scores


def one_step_plans() -> None:
    """Some plans have a single step."""
    real = planner.parse_plan

    def parsed(text: str, *given: Any) -> Plan:
        plan = real(text, *given)
        return plan if zlib.crc32(text.encode()) % 4 else replace(plan, steps=(Step(0, plan.frames, text),))

    planner.parse_plan = parsed  # type: ignore[attr-defined]


def broken_gradients() -> None:
    """In the second iteration the gradient of the last unit is NaN, for either policy."""
    real_add, real_init = UpdateSum.add, UpdateSum.__init__
    made: list[UpdateSum] = []

    def init(self: UpdateSum, *given: Any) -> None:
        real_init(self, *given)
        made.append(self)

    def add(self: UpdateSum, metrics: Mapping[str, Any]) -> None:
        if self in made[2:4] and self._next == self.leaves - 1:
            self.gradient.parameters[0].grad.fill_(float("nan"))
        real_add(self, metrics)

    UpdateSum.__init__, UpdateSum.add = init, add  # type: ignore[method-assign]


def members_in_turn(members: int = 2) -> None:
    """One process does for itself what the members of a group do of an executor's update: it adds their gradients, of a
    block of continuations each, member after member."""
    real = Executor.units

    def units(
        self: Executor, plans: list[int], starts: Sequence[int], mask: torch.Tensor, *more: int
    ) -> list[list[int]]:
        return real(self, plans, starts, mask.any(1, keepdim=True).expand(-1, mask.shape[1] // members), *more)

    def update(self: ExecutorUpdates, number: int) -> dict[str, float]:
        own, old, batch = self.own[number], self.old[number], self.batch
        total = UpdateSum(self.policy.gradient, members * len(own), self.terms[number])
        kept = SimpleNamespace(terms=total.terms, add=total.add, finish=dict)
        for member in range(members):
            block = block_of(batch.execution_mask.shape[1], member, members)
            states, noises = batch.transition.states[:, block], batch.transition.noises[:, block]
            part = replace(
                batch, execution_advantage=batch.execution_advantage[:, block],
                execution_mask=batch.execution_mask[:, block],
                transition=replace(batch.transition, states=states, noises=noises),
            )  # fmt: skip
            given = part, [*chain(*own)], None if old is None else old[:, block]
            self.executor.update(*given, kept, own)  # type: ignore[arg-type]
        return total.finish() if own else {}

    Executor.units, ExecutorUpdates.update = units, update  # type: ignore[method-assign]


if __name__ == "__main__":
    plant(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    sys.exit(train.main(sys.argv[5:]))
