"""`--gpus N` of a command: starts the processes of a run on this machine and ends as they do, in one line.

The processes are those of torch's `elastic.multiprocessing`, with the environment that torchrun gives, and meet in a
store of this process, which outlives each of them. torchrun's agent above it is left out: it forgets the exit codes of
processes that a signal ends, kills them 30 s after it, and starts again what was stopped or cannot work.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from tempact.errors import EXIT_STOPPED, EXIT_USER_ERROR, Stopped, StopRequest, UserError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing import ProcessFailure

HOST = "127.0.0.1"
FOLDER, TOLD = "TEMPACT_LAUNCH", "told"  # a process that has written the error's line makes this file in the folder
STOP_S = 300  # for processes to save after a signal
POLL_S = 0.05
IMPATIENT = 3  # signals: the last one ends the processes at once
FINAL = (EXIT_USER_ERROR, 3, EXIT_STOPPED)  # bad input, a run that could not go on, stopped: not started again


class Requests(StopRequest):
    """Counts requests to stop; up to the last they are the processes' to obey, and interrupt nothing here."""

    count = 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count, self.name = self.count + 1, signal.Signals(number).name
        if self.count == IMPATIENT:
            raise Stopped(self.name)


def launched(module: str, arguments: list[str], device: str, processes: int, max_restarts: int = 0) -> int | None:
    """The exit code of `python -m MODULE ARGUMENTS` in so many processes, without the options --gpus and
    --max-restarts; None where one is asked for, which is this one.

    UserError in a process that torchrun has started, and for restarts of this one.
    """
    ranks = os.environ.get("WORLD_SIZE", "1")
    if processes and ranks != "1":
        found = f"--gpus: found {processes} in one of {ranks} processes, as torchrun starts them"
        raise UserError(f"{found}; accepted: nothing under torchrun, which has started them already")
    if max_restarts and not processes:
        found = f"--max_restarts: found {max_restarts} without --gpus"
        raise UserError(f"{found}; accepted: with --gpus N; torchrun has an option of its own")
    if processes <= 1 and not max_restarts:
        return None
    warn_of_few_gpus(device, processes)
    return launch(without(arguments, "gpus", "max_restarts"), processes, max_restarts, ("-m", module))


def without(arguments: list[str], *names: str) -> list[str]:
    """A command line without the options of these names and the word after each."""
    kept, named = [], False
    for argument in arguments:
        name, equals, _ = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name.replace("-", "_") in names:
            named = not equals
        elif named:
            named = False
        else:
            kept.append(argument)
    return kept


def warn_of_few_gpus(device: str, processes: int) -> None:
    """A line where several processes have to share a GPU. device: as configured."""
    import torch

    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if 0 < gpus < processes:
        _tell(f"warning: --gpus: {processes} processes share {gpus} GPU{'s' * (gpus > 1)}, and exchange through gloo")


def launch(arguments: list[str], processes: int, max_restarts: int, entry: tuple[str, ...]) -> int:
    """Runs `python ENTRY ARGUMENTS` in so many processes, whose output passes through; returns the exit code.

    It is that of the process that failed first, 128 + n where the signal n ended it. A failure that no process has told
    of (`TOLD`) is told here, in a line. Signals that ask to stop become a SIGTERM to every process, and the code is 130
    unless one then fails. After a failure that may pass all processes start again, `max_restarts` times.
    """
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ""  # they are taken here
    with tempfile.TemporaryDirectory(prefix="tempact-") as folder, Requests().listening() as stop:
        told, left = Path(folder) / TOLD, max_restarts
        while True:
            given = {FOLDER: folder, "TORCHELASTIC_RESTART_COUNT": str(max_restarts - left)}
            ended = _run((*entry, *arguments), processes, given, stop)
            failed = [each for each in ended if each.exitcode not in (EXIT_STOPPED, -signal.SIGTERM)]
            if not failed:
                return EXIT_STOPPED if ended else 0
            # the others follow from the first; of the same second, none follows before one that was killed
            first = min(failed, key=lambda each: (each.timestamp, each.exitcode != -signal.SIGKILL))
            if stop or not left or first.exitcode in FINAL:
                if not told.exists():
                    _tell(f"error: {_how(first)}")
                return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
            left -= 1
            told.unlink(missing_ok=True)
            _tell(f"warning: {_how(first)}; all processes start again ({max_restarts - left} of {max_restarts})")


def _run(command: tuple[str, ...], processes: int, given: dict[str, str], stop: StopRequest) -> list[ProcessFailure]:
    """Those of the processes that did not end with 0. As soon as one has, the others have 30 s to end."""
    from torch.distributed import TCPStore
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)  # a free port
    shared = {
        "MASTER_ADDR": HOST, "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }  # fmt: skip
    own = {rank: {**shared, **given, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)}
    context = start_processes(
        "", sys.executable, dict.fromkeys(own, command), own, DefaultLogsSpecs(log_dir=os.devnull)
    )  # fmt: skip
    try:
        while (result := context.wait(0)) is None and not stop:
            time.sleep(POLL_S)
        if stop:
            context.close(signal.SIGTERM, STOP_S)
            result = context.wait(0)
        return [] if result is None else [*result.failures.values()]
    finally:
        context.close(signal.SIGKILL)


def _how(failure: ProcessFailure) -> str:
    """How a process ended, in words."""
    code = failure.exitcode
    name = next((each.name for each in signal.Signals if each == -code), f"signal {-code}")
    ended = f"ended with exit code {code}" if code > 0 else f"was ended by {name}"
    return f"rank {failure.local_rank} on {socket.gethostname()} {ended}"


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
