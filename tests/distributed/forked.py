"""Processes that meet as those of a run do, without starting Python anew: forks of the test's own."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

from torch.distributed import TCPStore

PORT_BYTES = 5


def in_ranks(size: int, act: Callable[[], int], deadline_s: float = 100.0) -> list[int]:
    """The exit codes of `act` in so many processes, with torchrun's variables; -n where the signal n ended one.

    As a launcher does, the first that does not end with 0 has the others asked to end.
    """
    shared = {
        "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "GROUP_RANK": "0",
    }  # fmt: skip
    told, telling = os.pipe()
    going = {_fork({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, told, act): rank for rank in range(size)}
    # only now: a fork beside the store's thread, which serves ranks that are there already, can inherit a lock it holds
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(telling, f"{store.port:{PORT_BYTES}}".encode() * size)
    for end in (told, telling):
        os.close(end)
    codes, deadline, asked = [0] * size, time.monotonic() + deadline_s, False
    while going:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended in going:
            codes[going.pop(ended)] = os.waitstatus_to_exitcode(status)
        if any(codes) and not asked:
            asked = True
            _signal(going, signal.SIGTERM)
        if time.monotonic() > deadline:
            _signal(going, signal.SIGKILL)
        time.sleep(0.01)
    return codes


def _signal(processes: dict[int, int], number: int) -> None:
    for process in processes:
        os.kill(process, number)


def _fork(variables: dict[str, str], told: int, act: Callable[[], int]) -> int:
    """told: where the fork reads the store's port."""
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        os.environ.update(variables, MASTER_PORT=os.read(told, PORT_BYTES).decode().strip())
        code = act()
    except BaseException:  # noqa: BLE001  told, and the fork ends below
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
