"""Records of roll-outs on their way to the rank that trains on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tempact.distributed import Ranks
from tempact.types import Transition


def move_records(
    ranks: Ranks, held: Mapping[range, Transition], wanted: Sequence[Sequence[int]], starts: Sequence[int],
    room: Transition,
) -> None:  # fmt: skip
    """Fills `room`, the record of the rows wanted[rank] in that order, from those that the ranks hold.

    held: records of consecutive rows by their numbers. wanted: by rank, the same on all of them. starts: fork of every
    row. A member of a group holds a block of each plan's continuations, which other groups' member of its number work
    on.
    """
    mine = {row: (record, row - own.start) for own, record in held.items() for row in own}
    everyone = ranks.gather(sorted(mine))
    owner = {row: rank for rank in ranks.alike for row in everyone[rank]}
    rows = {row: place for place, row in enumerate(wanted[ranks.rank])}
    room.prefix.zero_()
    arriving: list[tuple[Tensor, Tensor]] = []  # where to, and what has come
    sending: list[dist.P2POp] = []
    for rank in ranks.alike:
        for row in wanted[rank]:
            if ranks.rank not in (rank, owner[row]):
                continue
            parts = _parts(*mine[row], starts[row]) if row in mine else []
            places = _parts(room, rows[row], starts[row]) if row in rows else []
            if parts and places:
                arriving += zip(places, parts, strict=True)
            elif parts:
                sending += [ranks.sent(part.contiguous(), rank) for part in parts]
            else:
                coming = [torch.empty(place.shape) for place in places]
                sending += [ranks.received(each, owner[row]) for each in coming]
                arriving += zip(places, coming, strict=True)
    if any(ranks.gather(bool(sending))):
        with ranks.meeting():
            for work in dist.batch_isend_irecv(sending) if sending else []:
                work.wait()
    for place, value in arriving:
        place.copy_(value)


def _parts(record: Transition, row: int, start: int) -> list[Tensor]:
    """A row's own part of a record."""
    return [record.states[row], record.noises[row], record.prefix[row, :, :start]]
