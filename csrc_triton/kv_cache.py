"""A KV cache that forks without copying rows.

Per layer there is one pool of rows for K and one for V. A branch is a list of segments (row ranges); `fork` shares the
list and raises the counts of its rows, never copies rows. Committed rows are immutable. All layers use the same rows,
so one table of segments serves them all. Positions inside a branch are counted in tokens since its beginning and stay
valid when tokens are dropped.

Nothing here waits for the device. Everything is ordered by one stream: rows that became free may be written by the
next reservation, which is safe as long as readers and writers share the stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from csrc_triton._rows import RowCounts, Run, Segment, Segments, cut_out, join, locate
from csrc_triton._tables import BoundRows, BoundTable, CacheRows, CacheView, LayerViews, Reservation, staged

__all__ = [
    "BoundRows",
    "BoundTable",
    "BranchMemory",
    "CacheRows",
    "CacheView",
    "ForkableKVCache",
    "LayerViews",
    "Reservation",
    "Run",
]

MAX_ROWS = 2**31 - 1  # segment tables are int32


class BranchMemory(NamedTuple):
    """Bytes of the rows that a branch alone holds, and of those that it shares, over all layers."""

    own: int
    shared: int


class _Branch(NamedTuple):
    segments: Segments
    length: int  # tokens since its beginning, dropped ones included


class ForkableKVCache:
    """Pools of K/V rows for `layers` layers of `heads` x `head_dim`.

    Args:
        rows: first size of the pools.
        max_rows: size that they never exceed; None for no limit.
        grow: whether they grow at all. When a reservation does not fit they grow by an eighth, or by what it needs if
            that is more, up to max_rows. Growth copies them and moves them to new addresses: views made before keep the
            old pools alive, and a captured CUDA graph would read those. `bind` therefore ends growth.

    A block takes consecutive rows: those after its branch's last if they are free, else the first run of free rows
    that is long enough, so a full pool whose free rows are scattered may not serve a long block.

    Raises:
        ValueError: for an unknown or released branch, tokens that a branch does not hold, rows that are not there;
            the message names the branch. A call that raises has changed nothing.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        head_dim: int,
        *,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
        max_rows: int | None = None,
        grow: bool = True,
    ):
        if min(layers, heads, head_dim, rows) < 1:
            raise ValueError(f"layers, heads, head_dim, rows: found {(layers, heads, head_dim, rows)}; accepted: >= 1")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: found {dtype}; accepted: floating point")
        limit = MAX_ROWS if max_rows is None else max_rows
        if not rows <= limit <= MAX_ROWS:
            raise ValueError(f"rows, max_rows: found {rows}, {max_rows}; accepted: rows <= max_rows <= {MAX_ROWS}")
        shape = (rows, heads, head_dim)
        self._pools = [
            (torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for _ in range(layers)
        ]
        self._counts = RowCounts(rows)
        self._limit, self._grow = limit, grow
        self._branches: dict[int, _Branch] = {}
        self._open: set[Reservation] = set()
        self._next_branch = 0

    @property
    def layers(self) -> int:
        return len(self._pools)

    @property
    def branches(self) -> tuple[int, ...]:
        """Those that were made and not released."""
        return tuple(self._branches)

    @property
    def rows_total(self) -> int:
        return self._counts.total

    @property
    def rows_used(self) -> int:
        """Rows that some branch or open reservation holds; a shared row counts once."""
        return self._counts.used

    @property
    def rows_reserved(self) -> int:
        """Rows of open reservations."""
        return sum(len(reservation.branches) * reservation.length for reservation in self._open)

    @property
    def free_rows(self) -> list[Run]:
        """(first row, length) of the runs that nobody holds, sorted, disjoint and never adjacent."""
        return self._counts.free()

    @property
    def nbytes(self) -> int:
        """Bytes of all pools."""
        return sum(pool.nbytes for pools in self._pools for pool in pools)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the pools lie; captured CUDA graphs hold until they move, which is when they grow."""
        return tuple(pool.data_ptr() for pools in self._pools for pool in pools)

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row's K and V over all layers."""
        return sum(pool[0].nbytes for pools in self._pools for pool in pools)

    def memory(self, branch: int) -> BranchMemory:
        """What a branch holds, in bytes. Its own bytes are what its release sets free."""
        own = shared = 0
        for segment in self._branch(branch).segments:
            for (_, length), count in self._counts.runs(segment.row, segment.length):
                own, shared = (own + length, shared) if count == 1 else (own, shared + length)
        return BranchMemory(own * self.row_nbytes, shared * self.row_nbytes)

    def new_branch(self) -> int:
        """An empty branch."""
        return self._add(_Branch((), 0))

    def fork(self, branch: int, n: int) -> list[int]:
        """`n` new branches with the tokens of `branch`, sharing its rows. `branch` stays as it is."""
        origin = self._branch(branch)
        if n < 1:
            raise ValueError(f"n: found {n}; accepted: at least 1 (fork of branch {branch})")
        for segment in origin.segments:
            self._counts.add(segment.row, segment.length, n)
        return [self._add(origin) for _ in range(n)]

    def release(self, branch: int) -> None:
        """Ends a branch; rows that nobody else holds become free."""
        for segment in self._branch(branch).segments:
            self._counts.add(segment.row, segment.length, -1)
        del self._branches[branch]

    def length(self, branch: int) -> int:
        """Token position after the branch's last token (dropped tokens count)."""
        return self._branch(branch).length

    def reserve(self, branches: Sequence[int], length: int) -> Reservation:
        """Rows for `length` tokens of each branch. They belong to nobody until `commit` or `replace`.

        Raises:
            ValueError: for no branch, a branch named twice, and rows beyond the pools' limit.
        """
        _check_branches(branches)
        if len(set(branches)) < len(branches):
            twice = next(branch for branch in branches if list(branches).count(branch) > 1)
            raise ValueError(f"branch {twice}: found twice in a reservation; accepted: once")
        for branch in branches:
            self._branch(branch)
        if length < 1:
            raise ValueError(f"length: found {length}; accepted: at least 1 (branches {tuple(branches)})")
        total, first_rows = self.rows_total, []
        try:
            for branch in branches:
                first_rows.append(self._allocate(branch, length))
            self._grow_pools()
            device = self._pools[0][0].device
            on_device = staged(first_rows, torch.int64, device).to(device, non_blocking=True)
        except BaseException:
            for row in first_rows:
                self._counts.add(row, length, -1)
            self._counts.resize(total)
            raise
        reservation = Reservation(tuple(branches), tuple(first_rows), length, on_device, self.cancel)
        self._open.add(reservation)
        return reservation

    def rows_of(self, reservation: Reservation, layer: int) -> CacheRows:
        """Where one layer of an open reservation is written, for kernels that write K and V themselves."""
        self._check_own(reservation)
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer: found {layer}; accepted: 0 to {self.layers - 1} ({reservation})")
        k, v = self._pools[layer]
        return CacheRows(k, v, reservation.first_rows_on_device, reservation.length)

    def write(self, reservation: Reservation, layer: int, k: Tensor, v: Tensor) -> None:
        """Stores one layer of a reservation; k, v [B, length, heads, head_dim], rounded to the pools' dtype."""
        rows = self.rows_of(reservation, layer)
        expected = (len(reservation.branches), reservation.length, *rows.k.shape[1:])
        for name, own, pool in (("k", k, rows.k), ("v", v, rows.v)):
            if own.shape != expected or own.device != pool.device:
                found, accepted = f"{tuple(own.shape)} on {own.device}", f"{expected} on {pool.device}"
                raise ValueError(f"{name}: found {found}; accepted: {accepted} ({reservation})")
        for own, pool in ((k, rows.k), (v, rows.v)):
            for batch, row in reservation.adjacent:
                block = own[batch].detach()
                # .data: autograd refuses a backward whose saved pool was written since; committed rows never change
                target = pool.data[row : row + len(block) * reservation.length]
                target.unflatten(0, block.shape[:2]).copy_(block)

    def commit(self, reservation: Reservation) -> None:
        """Appends the reserved tokens to their branches; from now on the rows are immutable."""
        self._check_own(reservation)
        branches = [self._branch(branch) for branch in reservation.branches]
        for name, row, (segments, end) in zip(reservation.branches, reservation.first_rows, branches, strict=True):
            block = Segment(end, row, reservation.length)
            self._branches[name] = _Branch(join((*segments, block)), end + reservation.length)
        self._close(reservation, "committed")

    def replace(self, reservation: Reservation, start: int) -> None:
        """Puts the reserved tokens in place of tokens [start, start + length), dropped or not, of their branches."""
        self._check_own(reservation)
        stop = start + reservation.length
        for name in reservation.branches:
            self._check_tokens(name, start, stop)
        for name, row in zip(reservation.branches, reservation.first_rows, strict=True):
            self.drop(name, start, stop)
            segments, length = self._branches[name]
            self._branches[name] = _Branch(join((*segments, Segment(start, row, reservation.length))), length)
        self._close(reservation, "committed")

    def cancel(self, reservation: Reservation) -> None:
        """Gives the rows of an open reservation back."""
        self._check_own(reservation)
        for row in reservation.first_rows:
            self._counts.add(row, reservation.length, -1)
        self._close(reservation, "cancelled")

    def drop(self, branch: int, start: int, stop: int) -> None:
        """Forgets tokens [start, stop) of a branch; positions of the others do not change.

        Rows that nobody else holds become free, also where they are a part of a block. Tokens that were dropped
        before may be among them.
        """
        self._check_tokens(branch, start, stop)
        segments, length = self._branches[branch]
        kept, dropped = cut_out(segments, start, stop)
        for row, rows in dropped:
            self._counts.add(row, rows, -1)
        self._branches[branch] = _Branch(kept, length)

    def segments(self, branch: int, ranges: Iterable[tuple[int, int]]) -> list[Run]:
        """(first row, length) of the pieces that hold token ranges [start, stop) of a branch, in their order.

        Pieces that follow each other in rows are one.
        """
        held = self._branch(branch).segments
        try:
            return locate(held, ranges)
        except ValueError as error:
            raise ValueError(f"branch {branch}: {error}") from None

    def views(self, branches: Sequence[int], ranges: Sequence[tuple[int, int]]) -> LayerViews:
        """One view a layer of the same token ranges [start, stop) of several branches, one a batch row."""
        return self.joined_views([[(branch, ranges)] for branch in branches])

    def joined_views(self, batch: Sequence[Sequence[tuple[int, Sequence[tuple[int, int]]]]]) -> LayerViews:
        """One view a layer; batch row b reads the pieces batch[b] in their order, each of them token ranges
        [start, stop) of a branch."""
        _check_branches(batch)
        found = [[run for branch, ranges in pieces for run in self.segments(branch, ranges)] for pieces in batch]
        return LayerViews.of(self._pools, found)

    def bind(self, batch: int, slots: int) -> BoundTable:
        """Views of `batch` branches with room for `slots` segments each, at addresses that stay.

        One CUDA graph captured over them serves every chunk, also while the cache still fills. From now on the pools
        do not grow.
        """
        if min(batch, slots) < 1:
            raise ValueError(f"batch, slots: found {batch}, {slots}; accepted: at least 1")
        self._grow = False
        return BoundTable(self.segments, batch, slots, self._pools)

    def bind_rows(self, batch: int, length: int) -> BoundRows:
        """Where blocks of `length` tokens of `batch` branches are written, at addresses that stay; see `bind`."""
        if min(batch, length) < 1:
            raise ValueError(f"batch, length: found {batch}, {length}; accepted: at least 1")
        self._grow = False
        return BoundRows(batch, length, self._pools)

    def _add(self, branch: _Branch) -> int:
        name = self._next_branch
        self._next_branch += 1
        self._branches[name] = branch
        return name

    def _branch(self, branch: int) -> _Branch:
        if branch not in self._branches:
            raise ValueError(f"branch {branch}: not in the cache; it was released or never made")
        return self._branches[branch]

    def _check_tokens(self, branch: int, start: int, stop: int) -> None:
        length = self._branch(branch).length
        if not 0 <= start <= stop <= length:
            raise ValueError(f"branch {branch}: found tokens [{start}, {stop}); accepted: within [0, {length})")

    def _check_own(self, reservation: Reservation) -> None:
        reservation.check_open()
        if reservation not in self._open:
            raise ValueError(f"{reservation}: found one of another cache; accepted: one of this cache")

    def _close(self, reservation: Reservation, state: str) -> None:
        reservation.state = state
        self._open.remove(reservation)

    def _allocate(self, branch: int, length: int) -> int:
        """First of `length` rows that are held from now on; the books grow if they must, the pools do not yet."""
        segments = self._branches[branch].segments
        near = segments[-1].row + segments[-1].length if segments else None
        row = self._counts.find(length, near)
        if row is None:
            total = self.rows_total
            needed = total - self._counts.free_at_the_end() + length
            limit = self._limit if self._grow else total
            if needed > limit:
                why = "max_rows" if self._grow else "the pools are fixed"
                longest = max((free for _, free in self._counts.free()), default=0)
                found = f"found {length} rows asked, {self.rows_used} used, the longest free run {longest}"
                raise ValueError(f"branch {branch}: {found}; accepted: up to a limit of {limit} rows ({why})")
            self._counts.resize(min(max(needed, total + total // 8), limit))
            row = self._counts.find(length, near)
            assert row is not None
        self._counts.add(row, length, 1)
        return row

    def _grow_pools(self) -> None:
        """To the size in the books, a layer at a time, so that no more than one layer is there twice."""
        for layer, pools in enumerate(self._pools):
            if len(pools[0]) < self.rows_total:
                k, v = (_grown(pool, self.rows_total) for pool in pools)
                self._pools[layer] = k, v


def _check_branches(branches: Sequence[object]) -> None:
    if not len(branches):
        raise ValueError("branches: found none; accepted: at least one")


def _grown(pool: Tensor, rows: int) -> Tensor:
    grown = pool.new_empty(rows, *pool.shape[1:])
    grown[: len(pool)] = pool
    return grown
