"""Short runs of one process or several, each forked from a process that has imported everything already.

Without evaluation and report.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from distributed import faulty
from runs.same_run import FAST, equal
from safetensors.torch import load_file
from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from tempact import train
from tempact.distributed.launch import HOST, launch
from tempact.runs import run

TESTS = Path(__file__).parents[1]
LONGEST_S = 240
BRIEF = ("--device", "cpu", "--threads", "1", "--trainer.iterations", "2", *FAST)
SMALL = ("shapeworld-smoke", *BRIEF)
OWN = ("time_s", "timing_s/", "memory/", "ranks/")  # metrics that are those of the processes, not of the training


def process(act: Callable[..., Any], *given: Any) -> BaseProcess:
    """`act(*given)` in a new process, whose exit code is what it returns."""
    context = get_context("forkserver")
    path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS), path])
    context.set_forkserver_preload(["distributed.processes"])
    started = context.Process(target=_act, args=(act, given))
    started.start()
    os.environ["PYTHONPATH"] = path
    return started


def _act(act: Callable[..., Any], given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    sys.exit(act(*given))


def ended(processes: Sequence[BaseProcess], longest_s: float = LONGEST_S) -> list[int | None]:
    """Their exit codes, None where one had to be killed."""
    deadline = time.monotonic() + longest_s
    codes = []
    for each in processes:
        each.join(max(0.0, deadline - time.monotonic()))
        codes.append(each.exitcode)
        if each.exitcode is None:
            each.kill()
            each.join()
    return codes


def joined(size: int, longest_s: float, act: Callable[..., Any], *given: Any) -> list[int | None]:
    """Exit codes of `act(*given)` in processes with torchrun's variables; they meet in a store of this one."""
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": HOST, "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "GROUP_RANK": "0",
    }  # fmt: skip
    ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    return ended([process(_with_variables, variables, act, *given) for variables in ranks], longest_s)


def _with_variables(variables: dict[str, str], act: Callable[..., Any], *given: Any) -> int | None:
    os.environ.update(variables)
    return act(*given)


def short(arguments: Sequence[str]) -> int:
    """A training run in this process."""
    run.Run.finish = lambda self, stop: None  # type: ignore[method-assign, assignment]
    run.leave_report = lambda folder: []  # type: ignore[assignment]
    return train.main([*arguments])


def trained(
    folder: Path, size: int, *more: str, plant: Callable[[], None] | None = None, preset: str = "shapeworld-smoke",
    whole: bool = False, longest_s: float = LONGEST_S, code: int = 0,
) -> Path:  # fmt: skip
    """The folder of a run of `size` processes that has ended so. plant: what is done in each of them before; whole:
    with its evaluation."""
    given = plant, [preset, *BRIEF, *more, "--output", str(folder)], whole
    codes = ended([process(_planted, *given)], longest_s) if size == 1 else joined(size, longest_s, _planted, *given)
    assert codes == [code] * size, codes
    return folder


def _planted(plant: Callable[[], None] | None, arguments: list[str], whole: bool) -> int:
    if plant is not None:
        plant()
    return train.main(arguments) if whole else short(arguments)


def launched(
    log: Path, arguments: Sequence[str], size: int, restarts: int, fault: Sequence[object], planted: Path
) -> BaseProcess:
    """The launcher's process, with the fault of `faulty.py`; what it and the run's processes say goes to `log`."""
    return process(_launched, log, [*arguments], size, restarts, tuple(map(str, fault)), planted)


def _launched(log: Path, arguments: list[str], size: int, restarts: int, fault: tuple[str, ...], planted: Path) -> int:
    os.environ["PLANTED_AT"] = str(planted)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.setsid()
    SubprocessHandler._popen = lambda self, words, environment: Forked([*map(str, words)], environment)  # type: ignore
    return launch(arguments, size, restarts, (faulty.__file__, *fault))


class Forked:
    """In place of a `subprocess.Popen` of `python faulty.py ...`: the same without the seconds of imports."""

    def __init__(self, words: list[str], environment: dict[str, str]):
        self.args, self.returncode = words, None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                os.environ.update(environment)
                for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                    signal.signal(number, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                faulty.plant(words[2], int(words[3]), words[4], int(words[5]))
                code = short(words[6:])
            except BaseException:  # noqa: BLE001  as the interpreter does
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def poll(self) -> int | None:
        return self._reaped(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int | None:
        deadline = time.monotonic() + (timeout or LONGEST_S)
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.returncode

    def _reaped(self, how: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def left(folder: Path) -> list[int]:
    """Processes that still have the folder among their arguments or hold its lock."""
    own, found = str(folder).encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = [os.readlink(link) for link in (process / "fd").iterdir()]
            if any(link.encode().startswith(own) for link in links):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def metrics(folder: Path) -> list[dict[str, float]]:
    """Rows of the metrics that do not tell of the processes, NaN as text."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: str(value) for key, value in row.items() if not key.startswith(OWN)} for row in rows]


def differences(one: Path, two: Path) -> list[str]:
    """What of two runs differs: metrics, samples with their pictures, weights, averages and optimisers."""
    found = [f"metrics of {a['step']}: {sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))}"
             for a, b in zip(metrics(one), metrics(two), strict=True) if a != b]  # fmt: skip
    for name in ("samples", "videos"):
        files = [{f.relative_to(folder): f.read_bytes() for f in (folder / name).rglob("*") if f.is_file()}
                 for folder in (one, two)]  # fmt: skip
        found += sorted(str(n) for n in files[0].keys() | files[1].keys() if files[0].get(n) != files[1].get(n))
    last = max((one / "checkpoints").glob("step-*[0-9]")).relative_to(one)
    for policy in ("planner", "executor"):
        file = last / policy / "adapter_model.safetensors"
        if not equal(load_file(one / file), load_file(two / file)):
            found.append(policy)
    states = [torch.load(folder / last / "state" / "state.pt", weights_only=True) for folder in (one, two)]
    return found + [key for key in states[0] if not equal(states[0][key], states[1].get(key))]
