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
from csrc_triton._pools import Block, PoolFull, Pools
from csrc_triton._rows import Run, Segments, cut_out, join, laid, locate
from csrc_triton._tables import BoundRows, BoundTable, CacheRows, CacheView, LayerViews, Reservation

__all__ = [
    "BoundRows",
    "BoundTable",
    "BranchMemory",
    "CacheRows",
    "CacheView",
    "Chunk",
    "ForkableKVCache",
    "LayerViews",
    "PoolFull",
    "Reservation",
    "Run",
]


class BranchMemory(NamedTuple):
    """Bytes of a branch over all layers: rows that it alone holds, and rows that it shares."""

    own: int
    shared: int


class _Branch(NamedTuple):
    segments: Segments
    length: int  # tokens since its beginning, dropped ones included


class ForkableKVCache:
    """Pools of K/V rows for `layers` layers of `heads` x `head_dim`, and branches that share rows.

    Without pages a block takes the rows after its branch's last row if they are free, else the shortest free run that
    is long enough: a long block may not fit a nearly full pool whose free rows are scattered, and the pools creep. With
    pages a block takes the first free pages, wherever they lie: no page is lost, and the rows of a block (with them the
    order of sums over its keys) follow from the blocks that are held, whatever the size of the pools.

    Args:
        rows: initial rows of each pool.
        max_rows: most rows of each pool; None: no limit.
        grow: grow the pools when a reservation does not fit, by a 24th or by the rows that it needs, up to max_rows.
            Growth copies the pools to new addresses. Views made before keep the old pools alive, and a captured CUDA
            graph would read them, so `bind` ends growth. It is refused while rows from `rows_of` are in use.
        page: rows of a page, for instance the tokens of a latent frame; divides `rows` and the lengths of blocks. None:
            every block takes consecutive rows.

    Raises:
        ValueError: for an unknown or released branch, tokens that a branch does not hold, rows that are not there
            (`PoolFull`); the message names the branch. A call that raises has changed nothing.
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
        page: int | None = None,
    ):
        self._pools = Pools(layers, heads, head_dim, rows, dtype, device, max_rows, page, not grow)
        self._peak = 0
        self._branches: dict[int, _Branch] = {}
        self._open: set[Reservation] = set()
        self._next_branch = 0

    @property
    def layers(self) -> int:
        return len(self._pools.layers)

    @property
    def branches(self) -> tuple[int, ...]:
        """Branches that were made and not released."""
        return tuple(self._branches)

    @property
    def rows_total(self) -> int:
        return self._pools.counts.total

    @property
    def rows_used(self) -> int:
        """Rows held by branches and open reservations; a shared row counts once."""
        return self._pools.counts.used

    @property
    def rows_peak(self) -> int:
        """Most rows used at once so far."""
        return self._peak

    @property
    def page(self) -> int | None:
        """Rows of a page; None: blocks are consecutive rows."""
        return self._pools.page

    @property
    def rows_reserved(self) -> int:
        """Rows of open reservations."""
        return sum(len(reservation.branches) * reservation.length for reservation in self._open)

    @property
    def free_rows(self) -> list[Run]:
        """(first row, length) of the free runs: sorted, disjoint and never adjacent."""
        return self._pools.counts.free()

    @property
    def nbytes(self) -> int:
        """Bytes of all pools."""
        return sum(pool.nbytes for pools in self._pools.layers for pool in pools)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Addresses of the pools. They change when the pools grow, which invalidates captured CUDA graphs."""
        return tuple(pool.data_ptr() for pools in self._pools.layers for pool in pools)

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row's K and V over all layers."""
        return sum(pool[0].nbytes for pools in self._pools.layers for pool in pools)

    def memory(self, branch: int) -> BranchMemory:
        """Bytes that a branch holds. `release` frees its own bytes."""
        own = shared = 0
        for segment in self._branch(branch).segments:
            for (_, length), count in self._pools.counts.runs(segment.row, segment.length):
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
            self._pools.counts.add(segment.row, segment.length, n)
        return [self._add(origin) for _ in range(n)]

    def release(self, branch: int) -> None:
        """Removes a branch and frees its unshared rows."""
        for segment in self._branch(branch).segments:
            self._pools.counts.add(segment.row, segment.length, -1)
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
        self._pools.check_length(length)
        total, runs = self.rows_total, list[Block]()
        try:
            for branch in branches:
                runs.append(self._pools.take(branch, length, self._after(branch)))
            self._pools.enlarge(self._open)
            on_device = self._pools.first_rows(runs)
        except BaseException:
            for block in runs:
                self._pools.hold(block, -1)
            self._pools.counts.resize(total)
            raise
        self._pools.handouts.add(run for block in runs for run in block)
        self._peak = max(self._peak, self.rows_used)
        reservation = Reservation(tuple(branches), tuple(runs), length, on_device, self.cancel, self.layers)
        self._open.add(reservation)
        return reservation

    def grow(self, rows: int) -> None:
        """Grows smaller pools to `rows` rows, in whole pages, so that reservations of so many need not; they move once.

        Raises:
            ValueError: for more rows than the pools may have, and while rows from `rows_of` are in use.
        """
        total = self.rows_total
        if rows > self._pools.limit:
            raise ValueError(f"rows: found {rows}; accepted: up to {self._pools.limit}")
        if rows <= total:
            return
        self._pools.counts.resize(-(-rows // (self.page or 1)) * (self.page or 1))
        try:
            self._pools.enlarge(self._open)
        except BaseException:
            self._pools.counts.resize(total)
            raise

    def rows_of(self, reservation: Reservation, layer: int) -> CacheRows:
        """Rows of one layer of an open reservation, for kernels that write K and V themselves.

        The layer counts as written. The pools must not move until the reservation is closed: growth is refused.
        """
        rows = self._rows_of(reservation, layer)
        reservation.written.add(layer)
        reservation.handed_out = True
        return rows

    def _rows_of(self, reservation: Reservation, layer: int) -> CacheRows:
        self._check_own(reservation)
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer: found {layer}; accepted: 0 to {self.layers - 1} ({reservation})")
        k, v = self._pools.layers[layer]
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
            for batch, tokens, row in reservation.copies:
                block = own[batch, tokens].detach()
                # .data: autograd refuses a backward whose saved pool was written since; committed rows never change
                target = pool.data[row : row + block.shape[0] * block.shape[1]]
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
        for name, block, (segments, end) in zip(reservation.branches, reservation.runs, branches, strict=True):
            self._branches[name] = _Branch(join((*segments, *laid(block, end))), end + reservation.length)
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
        for name, block in zip(reservation.branches, reservation.runs, strict=True):
            self.drop(name, start, stop)
            segments, length = self._branches[name]
            self._branches[name] = _Branch(join((*segments, *laid(block, start))), length)
        self._close(reservation, "committed")

    def cancel(self, reservation: Reservation) -> None:
        """Frees the rows of an open reservation."""
        self._check_own(reservation)
        for block in reservation.runs:
            self._pools.hold(block, -1)
        self._close(reservation, "cancelled")

    def drop(self, branch: int, start: int, stop: int) -> None:
        """Removes tokens [start, stop) of a branch and frees their unshared rows, also parts of a block.

        Positions of the other tokens do not change. The range may include tokens that were dropped before.
        """
        self._check_tokens(branch, start, stop)
        segments, length = self._branches[branch]
        kept, dropped = cut_out(segments, start, stop)
        self._pools.hold(dropped, -1)
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
        return LayerViews.of(self._pools.layers, found, self._pools.handouts)

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
        self._pools.fixed = True
        return BoundTable(self.segments, batch, slots, self._pools.layers, self._pools.handouts)

    def bind_rows(self, batch: int, length: int) -> BoundRows:
        """Rows at fixed addresses for blocks of `length` tokens of `batch` branches; see `bind`."""
        if min(batch, length) < 1:
            raise ValueError(f"batch, length: found {batch}, {length}; accepted: at least 1")
        self._pools.check_length(length)
        self._pools.fixed = True
        return BoundRows(batch, length, self._pools.pages_of(length), self._pools.layers)

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

    def _after(self, branch: int) -> int | None:
        """The row after those of a branch."""
        segments = self._branches[branch].segments
        return segments[-1].row + segments[-1].length if segments else None


def _check_branches(branches: Sequence[object]) -> None:
    if not len(branches):
        raise ValueError("branches: found none; accepted: at least one")
