"""What the processes of `test_ranks.py` and `test_reduction.py` do together, and what each of them finds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tempact.distributed import Ranks
from tempact.distributed.records import move_records
from tempact.distributed.reduction import Gradient, UpdateSum
from tempact.errors import Stopped, StopRequest, UserError
from tempact.types import Transition

MOST_UNITS, PLANS = 13, 7
SHAPES = ((3, 5), (1,), (7,))
STARTS = [6, 3, 9, 6, 12, 3, 9]


def everything(folder: Path) -> None:
    """Saves in a file of the rank what all of this has given."""
    with StopRequest().listening() as stop, Ranks.joined(stop, 30.0, False) as ranks:
        found = {act.__name__: act(ranks) for act in (exchanged, refused, turns, taken, sums, moved, an_end)}
        torch.save(found, folder / str(ranks.rank))


def leaf(unit: int) -> list[Tensor]:
    """Gradients of a unit, whose sums depend on their order."""
    generator = torch.Generator().manual_seed(unit)
    scale = 2.0 ** torch.randint(-20, 20, (), generator=generator)
    return [torch.randn(shape, generator=generator) * scale for shape in SHAPES]


def sums(ranks: Ranks) -> list[tuple[list[Tensor], dict[str, float]]]:
    """Gradient and metrics of updates of 0 to MOST_UNITS units."""
    gradient = Gradient([nn.Parameter(torch.zeros(shape)) for shape in SHAPES], ranks)
    found = []
    for units in range(MOST_UNITS + 1):
        gradient.clear()
        total = UpdateSum(gradient, units, units)
        for unit in total.own:
            for parameter, value in zip(gradient.parameters, leaf(unit), strict=True):
                parameter.grad = value.clone() if unit % 2 else parameter.grad.add_(value)
            total.add({"loss": torch.tensor(0.1) * unit, "pi": math.pi} if unit % 3 else {"loss": 0.1 * unit, "pi": 1})
        metrics = total.finish()
        found.append(([parameter.grad.clone() for parameter in gradient.parameters], metrics))
    return found


def exchanged(ranks: Ranks) -> dict[str, Any]:
    """Values of all ranks, of the first, and the shares of 0 to MOST_UNITS."""
    own = [ranks.rank]
    everyone = ranks.gather((ranks.rank, torch.full((2,), ranks.rank)))
    return {
        "gather": [(rank, values.tolist()) for rank, values in everyone],
        "first": ranks.from_first(lambda: f"of {ranks.rank}"),
        "agreed": ranks.agreed(lambda: -ranks.rank, UserError),
        "shares": [ranks.gather(list(ranks.share(count))) for count in range(MOST_UNITS + 1)],
        "own": ranks.gather(own)[ranks.rank] is own,
    }


def refused(ranks: Ranks) -> list[tuple[str, list[str]]]:
    """Errors of one rank, of several and of the first, each with its notes; then all still meet."""
    last = ranks.size - 1

    def wrong_on(*of: int) -> Callable[[], None]:
        def act() -> None:
            if ranks.rank in of:
                raise UserError(f"rank {ranks.rank}")

        return act

    ranks.phase("looking")
    found = []
    for act in (
        lambda: ranks.agreed(wrong_on(last), UserError),
        lambda: ranks.agreed(wrong_on(*range(1, ranks.size)), UserError),
        lambda: ranks.from_first(wrong_on(0)),
        lambda: ranks.from_first(wrong_on(last)),
        lambda: ranks.in_turn(wrong_on(0)),
        lambda: ranks.agreed(lambda: ranks.in_turn(wrong_on(0)), UserError),
    ):
        try:
            act()
            found.append(("", []))
        except UserError as error:
            found.append((str(error), getattr(error, "__notes__", [])))
    assert ranks.gather(ranks.rank) == list(range(ranks.size))
    return found


def turns(ranks: Ranks) -> list[tuple[float, float]]:
    """When each rank's turn began and ended."""

    def act() -> tuple[float, float]:
        began = time.monotonic()
        time.sleep(0.05)
        return began, time.monotonic()

    return ranks.gather(ranks.in_turn(act))


def taken(ranks: Ranks) -> list[list[int]]:
    """The units that each rank takes from a queue, of two queues; the last rank is slow in the first."""
    found = []
    for slow in (True, False):
        own = []
        for unit in ranks.take([3, 1, 4, 1, 5, 9, 2, 6], lambda unit: unit):
            own.append(unit)
            time.sleep(0.4 if slow and ranks.rank == ranks.size - 1 else 0.01)
        found += ranks.gather(own)
    return found


def record(plans: list[int]) -> Transition:
    """Of plans, each of its own numbers."""
    longest = max((STARTS[plan] for plan in plans), default=0)
    states, noises, prefix = torch.zeros(len(plans), 2, 4, 3), torch.zeros(len(plans), 2, 3, 3), []
    for row, plan in enumerate(plans):
        generator = torch.Generator().manual_seed(plan)
        states[row], noises[row] = (torch.randn(2, n, 3, generator=generator) for n in (4, 3))
        prefix.append(torch.zeros(3, longest, 2, 2))
        prefix[row][:, : STARTS[plan]] = torch.randn(3, STARTS[plan], 2, 2, generator=generator)
    starts = torch.tensor([STARTS[plan] for plan in plans])
    clean = torch.stack(prefix) if plans else torch.zeros(0, 3, 0, 2, 2)
    return Transition(states, noises, starts, clean, [[str(plan)] for plan in plans])


def owners(ranks: Ranks, how: int) -> tuple[dict[range, Transition], list[list[int]]]:
    """What this rank holds, in pieces of consecutive plans, and what each wants."""
    generator = torch.Generator().manual_seed(how)
    cuts = [0, *sorted(torch.randperm(PLANS - 1, generator=generator)[:3].add(1).tolist()), PLANS]
    holder = torch.randint(ranks.size, (len(cuts),), generator=generator).tolist()
    pieces = [range(a, b) for (a, b), rank in zip(pairwise(cuts), holder, strict=False) if rank == ranks.rank]
    wanter = torch.randint(ranks.size, (PLANS,), generator=generator)
    wanter[:] = {0: wanter, 1: torch.tensor(ranks.size - 1), 2: torch.tensor(0)}.get(how, wanter)
    order = torch.randperm(PLANS, generator=generator).tolist()
    wanted = [[plan for plan in order if wanter[plan] == rank] for rank in range(ranks.size)]
    return {piece: record(list(piece)) for piece in pieces}, wanted


def moved(ranks: Ranks) -> list[bool]:
    """For six ways to hold and to want plans, and where each is where it is wanted: is every record whole?"""
    found = []
    for how in range(7):
        held, wanted = owners(ranks, how)
        if how == 6:
            wanted = ranks.gather([plan for piece in held for plan in piece])
        whole = record(wanted[ranks.rank])
        filler = torch.full_like
        room = Transition(
            filler(whole.states, 7), filler(whole.noises, 7), whole.start, filler(whole.prefix, 7), whole.prompts
        )  # fmt: skip
        move_records(ranks, held, wanted, STARTS, room)
        same = (torch.equal(getattr(room, name), getattr(whole, name)) for name in ("states", "noises", "prefix"))
        found.append(all(same))
    return found


@contextmanager
def left_in(limit_s: float) -> Iterator[list[float]]:
    seconds: list[float] = []
    began = time.monotonic()
    yield seconds
    seconds.append(time.monotonic() - began)
    assert seconds[0] < limit_s


def an_end(ranks: Ranks) -> tuple[str, int]:
    """The line and the code where the last rank fails and the others are in a meeting already, or about to be."""
    if ranks.alone:
        return "", 0
    ranks.phase("leaving")
    if ranks.rank == ranks.size - 1:
        time.sleep(0.3)
        end = ranks.fail(f"{ranks.where(ranks.rank)}: gave up", 7)
        return end.line, end.code
    with left_in(5.0):
        time.sleep(0.3 * (ranks.rank % 2) + 0.2 * ranks.rank // 2)
        try:
            ranks.gather(0)
        except Stopped:
            ranks.stop.handled()
            end = ranks.stopping("SIGUSR1")
            return end.line, end.code
    raise AssertionError("all have met")
