"""How the processes of a run learn of each other's life, without collectives: a store of keys, and a thread that beats.

Every rank's thread writes a sign of life twice a second: how far the main thread is, and in which phase. It reads those
of the ranks after it, and the one key `end`, which the first rank writes that must stop or has failed. A rank that
finds `end` interrupts its main thread by a signal of its own. So nobody waits in a collective for a rank that will not
come.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from tempact.errors import EXIT_STOPPED

BEAT_S = 0.5
WATCHED = 8  # ranks after one's own whose signs are read; all of a machine are watched by others
LOST_S = 60.0  # without a sign of life, even where `stall_s` is longer
SURE_S = 3.0  # for a sign of every rank, where a signal may be that of a launcher which has lost a rank
GRACE_S = 15.0  # for a main thread to notice the end
OTHERS_S = 25.0  # for rank 0 to save what there is; a launcher kills 30 s after its SIGTERM
STOPPED, FAILED = "stopped", "failed"
TOLD = "TEMPACT_LAUNCH"  # folder of the launcher, in which a file says that the one line has been written


@dataclass(frozen=True)
class End:
    """Why a run ends. kind: stopped or failed. line: the signal's name, or rank, host, phase and cause in a line.
    code: of the processes' exit. rank: the one that said so, or that was lost. lost: that rank no longer answers."""

    kind: str
    line: str
    code: int
    rank: int
    lost: bool = False


@dataclass
class Sign:
    """A rank's sign of life. tick: of the thread. moved: of the main thread. waiting: for other ranks."""

    tick: int = 0
    moved: int = 0
    waiting: bool = False
    phase: str = "starting"
    host: str = ""
    process: int = 0
    left: bool = False


class Heart:
    """Counts what the main thread does; one for the process."""

    moved = 0


def moved() -> None:
    """The process is getting on: called for every denoiser call, token, micro-batch and request to a judge."""
    Heart.moved += 1


class Watch:
    """The store of a run and this rank's thread.

    store: for the main thread; `mine` another connection, for the thread. stall_s: seconds without movement of a rank
    that nothing waits for, after which the run ends.
    """

    def __init__(self, store: Any, mine: Any, rank: int, size: int, stall_s: float):
        self.store, self.mine, self.rank, self.size, self.stall_s = store, mine, rank, size, stall_s
        self.sign = Sign(host=socket.gethostname(), process=os.getpid())
        self.end: End | None = None
        self.acknowledged = False  # the main thread is on its way out
        self.gone = False  # nothing can be said to the others, nor learned of them
        self._parent = os.getppid()
        self._ended_at = 0.0
        self._seen: dict[int, tuple[Sign, float, float]] = {}  # sign, when it last changed, when it last moved
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="tempact-watch", daemon=True)

    def beat(self) -> None:
        """A sign at once; every rank has given one before any is read."""
        self._beat(self.store)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """The rank leaves in order: nobody will miss it."""
        self._over.set()
        self._thread.join(2 * BEAT_S)
        self.sign.left = True
        with contextlib.suppress(RuntimeError, OSError):  # a store that is gone has no readers
            self._beat(self.store)

    def declare(self, end: End) -> End:
        """Ends the run for all ranks; returns the end that holds, which is the first one declared."""
        with self._lock:
            try:
                self.end = self.end or _end(self.store.compare_set("end", "", json.dumps(asdict(end))))
            except (RuntimeError, OSError) as error:
                self.end = self._alone(error)
        return self.end

    def _alone(self, error: Exception) -> End:
        """The end where the store is gone, and with it whoever started the ranks."""
        self.gone = True
        return End(FAILED, f"{self.where(self.rank)}: the store is gone ({error})", 1, self.rank)

    def lost(self) -> list[int]:
        """Ranks that give no sign for SURE_S."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        before, deadline = self._signs(self.store, others), time.monotonic() + SURE_S
        silent = [rank for rank in others if not before[rank].left]
        while silent and time.monotonic() < deadline:
            time.sleep(BEAT_S / 2)
            now = self._signs(self.store, silent)
            silent = [rank for rank in silent if now[rank].tick == before[rank].tick and not now[rank].left]
        return silent

    def where(self, rank: int) -> str:
        """A rank in words: number, host, phase."""
        sign = self.sign if rank == self.rank else self._signs(self.store, [rank])[rank]
        return f"rank {rank} on {sign.host}, {sign.phase}"

    def wait_for_rank_0(self) -> None:
        """Until it has left, is lost, or OTHERS_S have passed."""
        deadline = time.monotonic() + OTHERS_S
        while self.rank and time.monotonic() < deadline:
            sign = self._signs(self.store, [0])[0]
            if sign.left or (self.end is not None and self.end.lost and self.end.rank == 0):
                return
            time.sleep(BEAT_S / 2)

    def _run(self) -> None:
        try:
            while not self._over.wait(BEAT_S):
                self.sign.moved = Heart.moved
                self._beat(self.mine)
                self._look_for_end()
                if self.end is None and os.getppid() != self._parent:
                    end = End(FAILED, f"{self.where(self.rank)}: what started it was killed", 1, self.rank)
                    self._ended(_end(self.mine.compare_set("end", "", json.dumps(asdict(end)))))
                if self.end is None:
                    self._look_at_others()
                elif not self.acknowledged and time.monotonic() > self._ended_at + GRACE_S:
                    self._give_up(self.end)
        except (RuntimeError, OSError) as error:
            self._ended(self._alone(error))

    def _give_up(self, end: End) -> None:
        """The main thread sits in a call that nothing ends, a collective on GPUs for one."""
        if self.rank == (1 if end.lost and end.rank == 0 else 0):
            told()
            kept = "what is not in a checkpoint is lost; the same command goes on from there"
            sys.stderr.write(f"error: {end.line}; {kept}\n")
        os._exit(end.code)

    def _beat(self, store: Any) -> None:
        self.sign.tick += 1
        store.set(f"sign/{self.rank}", json.dumps(asdict(self.sign)))

    def _look_for_end(self) -> None:
        if self.end is None and self.mine.check(["end"]):
            self._ended(_end(self.mine.get("end")))

    def _ended(self, end: End) -> None:
        with self._lock:
            if self.end is not None:
                return
            self.end = end
        self._ended_at = time.monotonic()
        os.kill(os.getpid(), signal.SIGUSR1)  # as any request to stop: the main thread knows what to do

    def _look_at_others(self) -> None:
        now = time.monotonic()
        after = [(self.rank + i) % self.size for i in range(1, min(WATCHED + 1, self.size))]
        for rank, sign in self._signs(self.mine, after).items():
            last, lives, moves = self._seen.get(rank, (None, now, now))
            alive = last is None or last.tick != sign.tick
            still = last is not None and last.moved == sign.moved and last.phase == sign.phase
            lives, moves = now if alive else lives, now if not still or (sign.waiting and alive) else moves
            self._seen[rank] = (sign, lives, moves)
        quiet = {rank for rank in after if now - self._seen[rank][1] > SURE_S and not self._seen[rank][0].left}
        for rank in after:
            sign, lives, moves = self._seen[rank]
            silent = now - lives > min(self.stall_s, LOST_S)
            # who does not move may wait, within a call, for one who gives no sign
            if not sign.left and (silent or (now - moves > self.stall_s and not quiet - {rank})):
                cause = f"gave no sign for {now - lives:.0f} s" if silent else f"did not move for {now - moves:.0f} s"
                line = f"rank {rank} on {sign.host}, {sign.phase}: {cause}"
                lost = End(FAILED, line, 1, rank, lost=True)
                end = _end(self.mine.compare_set("end", "", json.dumps(asdict(lost))))
                self._ended(end)
                if end == lost:
                    self._finish_off(sign)
                return

    def _finish_off(self, sign: Sign) -> None:
        """Ends a process of this machine that hangs: whoever waits for its part of a collective then learns of it."""
        if sign.host == self.sign.host:
            with contextlib.suppress(OSError):
                os.kill(sign.process, signal.SIGKILL)

    def _signs(self, store: Any, ranks: Iterable[int]) -> dict[int, Sign]:
        """Where the store is gone, all have left."""
        ranks = list(ranks)
        try:
            found = store.multi_get([f"sign/{rank}" for rank in ranks]) if ranks else []
        except (RuntimeError, OSError):
            self.gone = True
            return dict.fromkeys(ranks, Sign(left=True))
        return {rank: Sign(**json.loads(each)) for rank, each in zip(ranks, found, strict=True)}


def told() -> None:
    """Lets the launcher know that the line which ends the run has been written."""
    if folder := os.environ.get(TOLD):
        with contextlib.suppress(OSError):
            (Path(folder) / "told").touch()


def stopped(name: str, rank: int) -> End:
    """The end that a signal asks for."""
    return End(STOPPED, name, EXIT_STOPPED, rank)


def _end(found: bytes) -> End:
    return End(**json.loads(found))


def seconds(count: float) -> timedelta:
    return timedelta(seconds=count)
