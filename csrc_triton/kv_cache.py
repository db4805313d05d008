"""A KV cache that forks without copying rows.

Each layer has one pool of rows for K and one for V. A branch is a list of segments (ranges of rows); `fork` copies the
list and raises the rows' reference counts. Committed rows are immutable. All layers use the same rows, so one segment
table serves all of them. Positions in a branch are counted in tokens from its beginning and do not change when tokens
are dropped.

No method synchronises with the device. Freed rows may be overwritten by the next reservation, which is safe as long as
all reads and writes are on one stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from csrc_triton._chunks import Chunk
from csrc_triton._rows import Handouts, RowCounts, Run, Segment, Segments, cut_out, join, locate
from csrc_triton._tables import BoundRows, BoundTable, CacheRows, CacheView, LayerViews, Reservation, staged

__all__ = [
    "BoundRows",
    "BoundTable",
    "BranchMemory",
    "CacheRows",
    "CacheView",
    "Chunk",
    "ForkableKVCache",
    "LayerViews",
    "Reservation",
    "Run",
]

MAX_ROWS = 2**31 - 1  # segment tables are int32


class BranchMemory(NamedTuple):
    """Bytes of a branch over all layers: rows that it alone holds, and rows that it shares."""

    own: int
    shared: int


class _Branch(NamedTuple):
    segments: Segments
    length: int  # tokens since its beginning, dropped ones included


class ForkableKVCache:
    """Pools of K/V rows for `layers` layers of `heads` x `head_dim`, and branches that share rows.

    A block takes consecutive rows: the rows after its branch's last row if they are free, else the first free run that
    is long enough. A long block may therefore not fit a nearly full pool whose free rows are scattered.

    Args:
        rows: initial rows of each pool.
        max_rows: most rows of each pool; None: no limit.
        grow: grow the pools when a reservation does not fit, by an eighth or by the rows that it needs, up to max_rows.
            Growth copies the pools to new addresses. Views made before keep the old pools alive, and a captured CUDA
            graph would read them, so `bind` ends growth.

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
        self._counts, self._handouts = RowCounts(rows), Handouts(rows)
        self._limit, self._grow = limit, grow
        self._branches: dict[int, _Branch] = {}
        self._open: set[Reservation] = set()
        self._next_branch = 0

    @property
    def layers(self) -> int:
        return len(self._pools)

    @property
    def branches(self) -> tuple[int, ...]:
        """Branches that were made and not released."""
        return tuple(self._branches)

    @property
    def rows_total(self) -> int:
        return self._counts.total

    @property
    def rows_used(self) -> int:
        """Rows held by branches and open reservations; a shared row counts once."""
        return self._counts.used

    @property
    def rows_reserved(self) -> int:
        """Rows of open reservations."""
        return sum(len(reservation.branches) * reservation.length for reservation in self._open)

    @property
    def free_rows(self) -> list[Run]:
        """(first row, length) of the free runs: sorted, disjoint and never adjacent."""
        return self._counts.free()

    @property
    def nbytes(self) -> int:
        """Bytes of all pools."""
        return sum(pool.nbytes for pools in self._pools for pool in pools)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Addresses of the pools. They change when the pools grow, which invalidates captured CUDA graphs."""
        return tuple(pool.data_ptr() for pools in self._pools for pool in pools)

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row's K and V over all layers."""
        return sum(pool[0].nbytes for pools in self._pools for pool in pools)

    def memory(self, branch: int) -> BranchMemory:
        """Bytes that a branch holds. `release` frees its own bytes."""
        own = shared = 0
        for segment in self._branch(branch).segments:
            for (_, length), count in self._counts.runs(segment.row, segment.length):
                own, shared = (own + length, shared) if count == 1 else (own, shared + length)
        return BranchMemory(own * self.row_nbytes, shared * self.row_nbytes)

    def new_branch(self) -> int:
        """An empty branch."""
        return self._add(_Branch((), 0))

    def fork(self, branch: int, n: int) -> list[int]:
        """Makes `n` branches that share the rows of `branch`; `branch` is unchanged."""
        origin = self._branch(branch)
        if n < 1:
            raise ValueError(f"n: found {n}; accepted: at least 1 (fork of branch {branch})")
        for segment in origin.segments:
            self._counts.add(segment.row, segment.length, n)
        return [self._add(origin) for _ in range(n)]

    def release(self, branch: int) -> None:
        """Removes a branch and frees its unshared rows."""
        for segment in self._branch(branch).segments:
            self._counts.add(segment.row, segment.length, -1)
        del self._branches[branch]

    def length(self, branch: int) -> int:
        """Token position after the branch's last token (dropped tokens count)."""
        return self._branch(branch).length

    def reserve(self, branches: Sequence[int], length: int) -> Reservation:
        """Reserves rows for `length` tokens of each branch; `commit` or `replace` gives them to the branches.

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
        self._handouts.add((row, length) for row in first_rows)
        reservation = Reservation(tuple(branches), tuple(first_rows), length, on_device, self.cancel, self.layers)
        self._open.add(reservation)
        return reservation

    def grow(self, rows: int) -> None:
        """Grows smaller pools to `rows` rows now, so that reservations of so many need not; they move once.

        Raises:
            ValueError: for more rows than the pools may have.
        """
        total = self.rows_total
        limit = self._limit if self._grow else total
        if rows > limit:
            raise ValueError(f"rows: found {rows}; accepted: up to {limit}")
        if rows <= total:
            return
        self._counts.resize(rows)
        try:
            self._grow_pools()
        except BaseException:
            self._counts.resize(total)
            raise

    def rows_of(self, reservation: Reservation, layer: int) -> CacheRows:
        """Rows of one layer of an open reservation, for kernels that write K and V themselves.

        The layer counts as written.
        """
        rows = self._rows_of(reservation, layer)
        reservation.written.add(layer)
        return rows

    def _rows_of(self, reservation: Reservation, layer: int) -> CacheRows:
        self._check_own(reservation)
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer: found {layer}; accepted: 0 to {self.layers - 1} ({reservation})")
        k, v = self._pools[layer]
        return CacheRows(k, v, reservation.first_rows_on_device, reservation.length)

    def write(self, reservation: Reservation, layer: int, k: Tensor, v: Tensor) -> None:
        """Stores one layer of a reservation; k, v [B, length, heads, head_dim], rounded to the pools' dtype."""
        rows = self._rows_of(reservation, layer)
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
        reservation.written.add(layer)

    def commit(self, reservation: Reservation) -> None:
        """Appends the reserved tokens to their branches; from now on the rows are immutable.

        Raises:
            ValueError: naming layers that were not written. `Reservation.mark_written` is for writes that the cache
                does not see.
        """
        self._check_own(reservation)
        branches = [self._branch(branch) for branch in reservation.branches]
        reservation.check_written()
        for name, row, (segments, end) in zip(reservation.branches, reservation.first_rows, branches, strict=True):
            block = Segment(end, row, reservation.length)
            self._branches[name] = _Branch(join((*segments, block)), end + reservation.length)
        self._close(reservation, "committed")

    def replace(self, reservation: Reservation, start: int) -> None:
        """Replaces tokens [start, start + length) of the branches, dropped or not, by the reserved tokens.

        Raises:
            ValueError: as `commit`.
        """
        self._check_own(reservation)
        stop = start + reservation.length
        for name in reservation.branches:
            self._check_tokens(name, start, stop)
        reservation.check_written()
        for name, row in zip(reservation.branches, reservation.first_rows, strict=True):
            self.drop(name, start, stop)
            segments, length = self._branches[name]
            self._branches[name] = _Branch(join((*segments, Segment(start, row, reservation.length))), length)
        self._close(reservation, "committed")

    def cancel(self, reservation: Reservation) -> None:
        """Frees the rows of an open reservation."""
        self._check_own(reservation)
        for row in reservation.first_rows:
            self._counts.add(row, reservation.length, -1)
        self._close(reservation, "cancelled")

    def drop(self, branch: int, start: int, stop: int) -> None:
        """Removes tokens [start, stop) of a branch and frees their unshared rows, also parts of a block.

        Positions of the other tokens do not change. The range may include tokens that were dropped before.
        """
        self._check_tokens(branch, start, stop)
        segments, length = self._branches[branch]
        kept, dropped = cut_out(segments, start, stop)
        for row, rows in dropped:
            self._counts.add(row, rows, -1)
        self._branches[branch] = _Branch(kept, length)

    def segments(self, branch: int, ranges: Iterable[tuple[int, int]]) -> list[Run]:
        """(first row, length) of token ranges [start, stop) of a branch, in order; adjacent rows are merged."""
        held = self._branch(branch).segments
        try:
            return locate(held, ranges)
        except ValueError as error:
            raise ValueError(f"branch {branch}: {error}") from None

    def views(self, branches: Sequence[int], ranges: Sequence[tuple[int, int]]) -> LayerViews:
        """Views of the same token ranges [start, stop) of several branches: one branch a batch row, a view a layer."""
        return self.joined_views([[(branch, ranges)] for branch in branches])

    def joined_views(self, batch: Sequence[Sequence[tuple[int, Sequence[tuple[int, int]]]]]) -> LayerViews:
        """Views of contexts joined from several branches, one view a layer.

        batch[b] lists the pieces of batch row b in order: a branch and its token ranges [start, stop).
        """
        _check_branches(batch)
        found = [[run for branch, ranges in pieces for run in self.segments(branch, ranges)] for pieces in batch]
        return LayerViews.of(self._pools, found, self._handouts)

    def chunk(
        self,
        branches: Sequence[int],
        tokens: int,
        *,
        attended: Sequence[tuple[int, int]] | None = None,
        commit: bool = False,
    ) -> Chunk:
        """The next chunk of a model's call: its context, and with commit=True the rows that it is appended to.

            with cache.chunk(branches, tokens, commit=True) as chunk:
                out = chunk.attend(layer, q, k, v)  # in every layer

        With commit=True rows are reserved when the block is entered, and its tokens are appended to the branches at
        the end of the block; an exception inside cancels the reservation. Otherwise nothing is kept.

        Args:
            branches: one a batch row, all of one length unless `attended` is given.
            tokens: L, tokens of the chunk in each batch row.
            attended: token ranges [start, stop) of the branches that the chunk attends to; None: all of their tokens.
            commit: append the chunk's K and V to the branches.

        Raises:
            ValueError: for branches of different lengths, tokens that a branch does not hold, and, when the block is
                entered, as `reserve`; at the end of the block as `commit`: then nothing is appended.
        """
        return Chunk(self, branches, tokens, attended, commit)

    def bind(self, batch: int, slots: int) -> BoundTable:
        """Views at fixed addresses of `batch` branches with at most `slots` segments each.

        One CUDA graph captured over them serves every chunk, also while the cache fills. Ends growth of the pools.
        """
        if min(batch, slots) < 1:
            raise ValueError(f"batch, slots: found {batch}, {slots}; accepted: at least 1")
        self._grow = False
        return BoundTable(self.segments, batch, slots, self._pools, self._handouts)

    def bind_rows(self, batch: int, length: int) -> BoundRows:
        """Rows at fixed addresses for blocks of `length` tokens of `batch` branches; see `bind`."""
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
        """Marks `length` rows as held and returns the first; counts grow if they must, the pools do so later."""
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
        if self._handouts.total < self.rows_total:  # views made before read the old pools, which no one writes again
            self._handouts = Handouts(self.rows_total)


def _check_branches(branches: Sequence[object]) -> None:
    if not len(branches):
        raise ValueError("branches: found none; accepted: at least one")


def _grown(pool: Tensor, rows: int) -> Tensor:
    grown = pool.new_empty(rows, *pool.shape[1:])
    grown[: len(pool)] = pool
    return grown
