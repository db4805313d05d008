"""A run goes on with another number of processes, after a lost one by itself, and over two agents of torchrun."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from distributed import faulty
from distributed.processes import LONGEST_S, SMALL, TESTS, differences, ended, launched, left, metrics, trained
from runs.same_run import SHORT_EVALUATION

STALL_S, END_S = 8, 30


@pytest.mark.parametrize("sizes", [(2, 1, 3), pytest.param((4, 2, 1, 3), marks=pytest.mark.slow)])
def test_a_run_goes_on_with_any_number_of_processes(
    sizes: Sequence[int], tmp_path: Path, alone: Callable[..., Path]
) -> None:
    """Each part is stopped within an iteration; the last one finishes."""
    length = ("--trainer.iterations", str(len(sizes)))
    for done, size in enumerate(sizes[:-1]):
        stopped = partial(faulty.plant, "term", size - 1, "rollout", done + 2)
        trained(tmp_path, size, *length, plant=stopped, code=130)
        assert len(metrics(tmp_path)) == done + 1
    assert differences(alone(*length), trained(tmp_path, sizes[-1], *length)) == []


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_that_has_lost_a_process_starts_again_by_itself(
    rank: int, tmp_path: Path, alone: Callable[..., Path]
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    length = ("--trainer.iterations", "3")
    arguments = [*SMALL, *length, "--trainer.checkpoint-every", "1", "--output", str(folder)]
    lost = ("kill", rank, "update", 2)
    assert ended([launched(log, arguments, 2, 1, lost, tmp_path / "planted")]) == [0], log.read_text()
    host = re.escape(socket.gethostname())
    again = rf"warning: rank {rank} on {host} was ended by SIGKILL; all processes start again \(1 of 1\)"
    assert len(re.findall(again, log.read_text())) == 1
    assert left(tmp_path) == []
    assert differences(alone(*length, "--trainer.checkpoint-every", "1"), folder) == []


def agents(folder: Path, log: Path, more: Sequence[str] = ()) -> list[subprocess.Popen[bytes]]:
    """Two of torchrun on this machine, each with a process, in sessions of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend",
        "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test", "--local-addr", "127.0.0.1", "-m",
        "tempact.train", *SMALL, *SHORT_EVALUATION, *more, "--output", str(folder),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    started = []
    for number in range(2):
        with log.with_suffix(f".{number}").open("wb") as file:
            started.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True))
        time.sleep(2)  # the first one keeps the store
    return started


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_agents_of_torchrun_train_with_the_bits_of_one_process(tmp_path: Path) -> None:
    both = agents(tmp_path / "run", tmp_path / "log")
    assert [agent.wait(LONGEST_S) for agent in both] == [0, 0], (tmp_path / "log.0").read_text()[-3000:]
    one = trained(tmp_path / "one", 1, *SHORT_EVALUATION, whole=True)
    assert differences(one, tmp_path / "run") == []


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("machine", [True, False], ids=["with its process", "alone"])
@pytest.mark.parametrize("number", [0, 1])
def test_an_agent_is_killed(number: int, machine: bool, tmp_path: Path) -> None:
    """The other side ends with a line, and a process that is left without its agent ends, too. Of two machines that
    have lost the store each has a line."""
    folder, log = tmp_path / "run", tmp_path / "log"
    both = agents(folder, log, ["--trainer.stall-s", str(STALL_S), "--trainer.iterations", "200"])
    deadline = time.monotonic() + LONGEST_S
    while not (folder / "metrics.jsonl").is_file() or not metrics(folder):
        assert time.monotonic() < deadline and both[0].poll() is None, (tmp_path / "log.0").read_text()[-3000:]
        time.sleep(0.2)
    killed = [both[number].pid, *(children(both[number].pid) if machine else [])]
    began = time.monotonic()
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    try:
        both[1 - number].wait(STALL_S + END_S)
        took = time.monotonic() - began
        while left(folder) and time.monotonic() < began + STALL_S + END_S:
            time.sleep(0.2)
        lines = [
            [line for line in (tmp_path / f"log.{each}").read_text().splitlines() if line.startswith("error: ")]
            for each in (0, 1)
        ]
        sys.stdout.write(f"agent {number}, machine {machine}: {took:.1f} s, {lines}\n")
        assert all(len(own) <= 1 for own in lines) and any(lines) and left(folder) == []
    finally:
        for agent in both:
            for pid in (*(children(agent.pid) if agent.poll() is None else []), agent.pid):
                if agent.poll() is None:
                    os.kill(pid, signal.SIGKILL)
