"""The processes of a run: who they are, what they exchange, how they stop together.

A run of one process is `Ranks()`, with nothing joined, and every method of it returns what it was given: there is one
code path. Several processes are those that torchrun starts, one a GPU. Values go through gloo on the host, gradients
through `reduction`. Before a collective all ranks say in the store that they are there; a rank that stops or fails says
that instead, so that nobody is left in a collective (docs/distributed.md).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tempact.distributed.watch import FAILED, GRACE_S, STOPPED, End, Watch, seconds, stopped, told
from tempact.errors import Stopped, StopRequest, UserError

T = TypeVar("T")
START_S = 600.0  # for all ranks to be there
COLLECTIVE_S = 120.0  # for a collective that all ranks have entered
POLL_S = 0.02


@dataclass
class Ranks:
    """The processes of a run. rank, size: of all machines. local_rank, local_size: of this one. node, nodes: machines.

    members: processes of a group, which share the executor's frozen weights and make the same calls of it: this one is
    number `member` of its group. waited_s: seconds spent waiting for other ranks since the last reading.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0
    nodes: int = 1
    stop: StopRequest = field(default_factory=StopRequest)
    watch: Watch | None = None
    waited_s: float = 0.0
    members: int = 1
    meetings: int = 0
    queues: int = 0
    posts: dict[int, int] = field(default_factory=dict)  # values that each rank has posted, or that were taken from it
    turns: int = 0  # units that this group has asked for
    direct: bool = False  # gradients travel between GPUs
    torn: bool = False  # others may be left in a collective
    _values: Any = None  # the group of values on the host

    @property
    def alone(self) -> bool:
        """No process is joined."""
        return self.watch is None

    def waited(self) -> float:
        """Seconds spent waiting for other ranks since the last reading."""
        waited, self.waited_s = self.waited_s, 0.0
        return waited

    @property
    def first(self) -> bool:
        """Is this the rank that writes the run's folder?"""
        return self.rank == 0

    @property
    def member(self) -> int:
        """The number of this process in its group."""
        return self.rank % self.members

    @property
    def alike(self) -> range:
        """The ranks of this number in their groups."""
        return range(self.member, self.size, self.members)

    @property
    def groups(self) -> int:
        return self.size // self.members

    @classmethod
    @contextmanager
    def joined(cls, stop: StopRequest, stall_s: float, on_gpu: bool, members: int = 1) -> Iterator[Ranks]:
        """The ranks that torchrun has started, this one among them; `Ranks()` in a process that it has not started.

        stop: takes this process' signals. stall_s: as `Watch`. Leaves the others in order, or, after an end that one of
        them has declared, without asking them.
        """
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            yield cls(stop=stop)
            return
        own = {name.lower(): int(os.environ.get(name, default)) for name, default in _VARIABLES.items()}
        ranks = cls(
            own["rank"], own["world_size"], own["local_rank"], own["local_world_size"], own["group_rank"],
            max(1, own["world_size"] // max(1, own["local_world_size"])), stop, members=members,
        )  # fmt: skip
        watch = ranks.watch = ranks._join(stall_s, on_gpu)
        stop.once = True
        watch.start()
        try:
            yield ranks
        finally:
            watch.acknowledged = True
            _State.torn = watch.end is not None
            if watch.end is None:
                with contextlib.suppress(RuntimeError):
                    dist.destroy_process_group()
            watch.close()

    def _join(self, stall_s: float, on_gpu: bool) -> Watch:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])

        def store(main: bool = False) -> Any:
            tcp = dist.TCPStore(
                address, port, is_master=main and not hosted and self.first, timeout=seconds(START_S),
                wait_for_workers=False,
            )  # fmt: skip
            return dist.PrefixStore(f"tempact/{attempt}", tcp)

        own = store(main=True)
        watch = Watch(own, store(), self.rank, self.size, stall_s)
        watch.beat()
        gpus = torch.cuda.device_count() if on_gpu else 0
        backend = "cpu:gloo,cuda:nccl" if gpus >= self.local_size else "gloo"
        if on_gpu:
            torch.cuda.set_device(self.local_rank % gpus)
        # named, NCCL connects here and not within the first collective, while a CUDA graph may be recorded
        device = torch.device("cuda", self.local_rank) if "nccl" in backend else None
        dist.init_process_group(
            backend, store=dist.PrefixStore("group", own), rank=self.rank, world_size=self.size,
            timeout=seconds(COLLECTIVE_S), device_id=device,
        )  # fmt: skip
        self._values = dist.new_group(backend="gloo", timeout=seconds(COLLECTIVE_S))
        self.direct = "nccl" in backend
        return watch

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on each of them."""
        if self.alone:
            return [value]
        data = pickle.dumps(value)  # here, where a value that cannot travel leaves nobody waiting
        found: list[Any] = [None] * self.size
        with self.meeting():
            dist.all_gather_object(found, data, group=self._values)
        return [value if rank == self.rank else pickle.loads(each) for rank, each in enumerate(found)]

    def agreed(self, make: Callable[[], T], *travelling: type[BaseException]) -> list[T]:
        """`gather` of what `make` returns. An exception of these types that one rank raises is raised by all, the
        lowest rank's, with a note of where that was."""
        if self.alone:
            return [make()]
        error: BaseException | None = None
        value: Any = None
        try:
            value = make()
        except travelling as raised:
            error = raised
        found = self.gather((value, error))
        for rank, (_, its) in enumerate(found):
            if its is not None:
                its.add_note(self.where(rank))
                raise its
        return [value for value, _ in found]

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank; a UserError of it is raised by all."""
        return self.agreed(lambda: make() if self.first else None, UserError)[0]  # type: ignore[arg-type, return-value]

    def in_turn(self, act: Callable[[], T]) -> T:
        """`act` on the first rank of each machine, then on the others; a UserError of the first is raised by all."""
        early: list[T] = []
        self.agreed(lambda: None if self.local_rank else early.append(act()), UserError)
        return act() if self.local_rank else early[0]

    def sent(self, value: Tensor, rank: int) -> dist.P2POp:
        """The sending of a host's tensor, for `dist.batch_isend_irecv`."""
        return dist.P2POp(dist.isend, value, rank, group=self._values)

    def received(self, value: Tensor, rank: int) -> dist.P2POp:
        """The other end of `sent`."""
        return dist.P2POp(dist.irecv, value, rank, group=self._values)

    def share(self, count: int) -> range:
        """This rank's part of 0 .. count - 1: consecutive, as even as can be."""
        return share_of(count, self.rank, self.size)

    def take(self, units: Sequence[T], cost: Callable[[T], float]) -> Iterator[T]:
        """The units that fall to this rank's group: the most costly first, each to whoever is free."""
        if self.alone:
            yield from units
            return
        order = sorted(range(len(units)), key=lambda i: (-cost(units[i]), i))
        self.queues += 1
        while (taken := self._taken()) < len(units):
            yield units[order[taken]]

    def _taken(self) -> int:
        """The number of the next unit, which the group's first member takes from the queue and tells the others."""
        assert self.watch is not None
        store, key = self.watch.store, f"group/{self.rank // self.members}"
        self.turns += 1
        if self.member == 0:
            taken = store.add(f"queue/{self.queues}", 1) - 1
            if self.members > 1:
                store.set(f"{key}/{self.turns}", str(taken))
                store.delete_key(f"{key}/{self.turns - 1}")  # the others have done that unit, too
            return taken
        began, self.watch.sign.waiting = time.monotonic(), True
        while not store.check([f"{key}/{self.turns}"]):
            time.sleep(POLL_S / 4)
        self.watch.sign.waiting = False
        self.waited_s += time.monotonic() - began
        return int(store.get(f"{key}/{self.turns}"))

    def post(self, value: object) -> None:
        """Leaves a value for rank 0, which finds it among those `posted`; waits for nobody. Up to 8 MB, pickled."""
        assert self.watch is not None
        with self.stop.held():
            count = self.posts.get(self.rank, 0)
            self.watch.store.set(f"post/{self.rank}/{count}", pickle.dumps(value))
            self.posts[self.rank] = count + 1

    def posted(self, wait: bool = False) -> Iterator[Any]:
        """On rank 0, what the others have posted since; nothing elsewhere. Each one's values come in their order.

        A value whose reader raises comes again. wait: until all others wait for rank 0, which is to `arrive` next.
        """
        over = self.alone or not self.first
        while not over:
            assert self.watch is not None
            store, sign = self.watch.store, self.watch.sign
            over = not wait or store.add(f"meeting/{self.meetings + 1}/count", 0) == self.size - 1
            for rank in range(1, self.size):
                while store.check([key := f"post/{rank}/{self.posts.get(rank, 0)}"]):
                    yield pickle.loads(store.get(key))
                    self.posts[rank] = self.posts.get(rank, 0) + 1
                    store.delete_key(key)
            if not over:
                sign.waiting = True
                try:
                    time.sleep(POLL_S)
                finally:
                    sign.waiting = False
                self.waited_s += POLL_S

    def arrive(self) -> None:
        """Waits until all ranks are here. Raises `Stopped` where one has declared an end instead."""
        if not self.alone:
            with self.meeting():
                pass

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Inside, all ranks are there, and signals are noted but interrupt nothing: what is inside is a collective.

        Whether all go in or none is decided once, in the store, by whoever comes last or declares an end first.
        """
        watch = self.watch
        assert watch is not None
        self.meetings += 1
        key, began = f"meeting/{self.meetings}", time.monotonic()
        watch.sign.waiting = True
        with self.stop.held():
            try:
                self._decide(watch, key)
                watch.sign.waiting = False  # all are here: a collective that does not end is a hang
                yield
            except (Exception, Stopped) as error:
                self.torn = isinstance(error, Exception)  # others may be left in the collective
                raise
            finally:
                watch.sign.waiting = False
                self.waited_s += time.monotonic() - began
                if self.first and self.meetings > 2:
                    for old in ("count", "decision"):
                        watch.store.delete_key(f"meeting/{self.meetings - 2}/{old}")

    def _decide(self, watch: Watch, key: str) -> None:
        go, end = b"go", b"end"
        store, decision = watch.store, f"{key}/decision"
        found, pause, looked = b"", POLL_S / 16, False
        if store.add(f"{key}/count", 1) == self.size:
            found = store.compare_set(decision, "", go.decode())
        while found not in (go, end):
            if self.stop and not looked:  # a launcher's signal follows the loss of a rank, which then never comes
                looked, _ = True, self._lost(watch)
            leaving = watch.end is not None or (self.stop and self.stop.opened)
            if leaving:
                found = store.compare_set(decision, "", end.decode())
                continue
            if store.check([decision]):
                found = store.get(decision)
            else:
                time.sleep(pause)  # the store's own waiting writes lines to the terminal
                pause = min(2 * pause, POLL_S)
        if found == end:
            raise Stopped(self.stop.name or "another process")

    def phase(self, name: str) -> None:
        """What this rank does, for the line that says where it was lost."""
        if self.watch is not None:
            self.watch.sign.phase = name
            self.watch.beat()

    def where(self, rank: int) -> str:
        """Rank, host and phase, in words."""
        assert self.watch is not None
        return self.watch.where(rank)

    def fail(self, line: str, code: int) -> End:
        """Declares that this rank has failed; returns the end that holds."""
        watch = self._leaving()
        end = self._lost(watch) if self.torn and watch.end is None else None
        return end or watch.declare(End(FAILED, line, code, self.rank))

    def stopping(self, name: str) -> End:
        """What ends the run where this rank's main thread was interrupted: the signal `name`, an end that another rank
        has declared, or, where a launcher's signal follows it, the loss of one."""
        if self.alone:
            return stopped(name, 0)
        watch = self._leaving()
        return watch.end or self._lost(watch) or watch.declare(stopped(name, self.rank))

    def _leaving(self) -> Watch:
        """From here on no signal interrupts this process, which is on its way out."""
        assert self.watch is not None
        self.watch.acknowledged = self.stop.last = True
        self.torn |= self.members > 1  # others may wait for its part of a call
        return self.watch

    def _lost(self, watch: Watch) -> End | None:
        """The end that a rank which gives no sign makes; None where all do."""
        lost = watch.lost()
        if not lost:
            return None
        line = f"{watch.where(lost[0])}: was lost (killed, or hangs)"
        return watch.declare(End(FAILED, line, 1, lost[0], lost=True))

    def drain(self) -> None:
        """Waits for the GPU; RuntimeError where it is in a call of a group, and waits for a member that has left."""
        if self.members == 1 or not self.direct:
            return
        event, deadline = torch.cuda.Event(), time.monotonic() + GRACE_S
        event.record()
        while not event.query():
            if time.monotonic() > deadline:
                raise RuntimeError("the GPU waits for a process that has left")
            time.sleep(POLL_S)

    def teller(self, end: End) -> bool:
        """Is it this rank that writes the line? Rank 0 does, or, where it is lost, the one after it. Where the store is
        gone, the first of each machine does: they no longer know of each other."""
        if self.first:
            return True
        assert self.watch is not None
        if not self.torn:  # else rank 0 may wait in the collective for this process' end
            self.watch.wait_for_rank_0()
        return self.local_rank == 0 if self.watch.gone else self.rank == 1 and end.lost and end.rank == 0


def share_of(count: int, part: int, parts: int) -> range:
    """A part of 0 .. count - 1: consecutive, as even as can be."""
    return range(count * part // parts, count * (part + 1) // parts)


__all__ = ["FAILED", "STOPPED", "End", "Ranks", "leave", "share_of", "told"]

_VARIABLES = {
    "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0",
}  # fmt: skip


class _State:
    """torn: the ranks of this process have not parted in order."""

    torn = False


def leave(code: int) -> None:
    """Ends the process where ranks have not parted in order: at the interpreter's end a collective that nobody else is
    in could keep it for ever."""
    if _State.torn:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
