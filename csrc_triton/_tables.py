"""Arguments of kernels that use the cache: views of the pools with segment tables, and the rows to write.

Tables go to the device through pinned memory that is fresh each time: torch's host allocator hands a pinned block out
again only when the copies from it are done, so nothing waits and no copy in flight is overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import TracebackType

import torch
from torch import Tensor

from csrc_triton._rows import MAX_ROWS, Handouts, Run


@dataclass(frozen=True, eq=False)
class CacheView:
    """Context of a batch of B branches in one layer: pools of K and V, and the segments of rows to attend to.

    A view is valid while its branches hold the tokens, until the backward pass of attention over it has run. Attention
    over a view of a cache, and the backward pass of such a call, raise ValueError where rows of the view were handed
    out for writing since, or its bound table was updated since; the host's books are asked, not the device. There is no
    such check for views of plain tensors (`CacheView.of`, `CacheView` from a table alone, `LayerViews.with_table`),
    inside a graph of torch.compile, and in a replayed CUDA graph.

    k, v: the layer's pools, [rows, heads, head_dim].
    table: (first row, length) of each segment in order, [B, S, 2] int32 on the pools' device; unused slots have
        length 0.

    Raises:
        ValueError: for tensors that do not fit, and for segments outside the pools where the table is on the CPU.
    """

    k: Tensor
    v: Tensor
    table: Tensor
    segments: SegmentTable | None = field(default=None, repr=False)  # the cache's own views share it

    def __post_init__(self) -> None:
        if self.segments is None:
            _check_pools(self.k, self.v)
            _check_table(self.table, self.k)

    @classmethod
    def of(cls, k: Tensor, v: Tensor, segments: Sequence[Sequence[Run]]) -> CacheView:
        """A view of plain tensors used as pools; segments[b] lists (first row, length) for batch row b.

        A cache that is one tensor [B, T, heads, head_dim] for K and one for V, written in place, is such a pool when
        its first two dimensions are flattened: token t of batch row b is row b * T + t. A window of `sink` first and
        `recent` latest of `filled` tokens, without a copy:

            runs = [[(b * T, sink), (b * T + filled - recent, recent)] for b in range(B)]
            view = CacheView.of(k_cache.flatten(0, 1), v_cache.flatten(0, 1), runs)
            out = fork_attention(q, k, v, view)

        Other rows of the cache may be written before the backward pass; rows of the view must not.

        Raises:
            ValueError: for pools that do not fit, and for segments outside them.
        """
        _check_pools(k, v)
        for branch, runs in enumerate(segments):
            for row, length in runs:
                _check_segment(branch, row, length, k.shape[0])
        table = SegmentTable(len(segments), max([1, *map(len, segments)]), k.device)
        table.set(segments)
        return cls(k, v, table.table, table)

    def gather(self) -> tuple[Tensor, Tensor]:
        """Copies the context into plain tensors K and V, [B, Lc, heads, head_dim].

        Synchronises with the device only if the view was made from a table alone.

        Raises:
            ValueError: where the batch rows have contexts of different lengths.
        """
        rows = (self.segments or SegmentTable.read(self.table)).rows()
        k, v = (pool.index_select(0, rows.flatten()).unflatten(0, rows.shape) for pool in (self.k, self.v))
        return k, v

    def gather_each(self) -> list[tuple[Tensor, Tensor]]:
        """As `gather`, for contexts of any lengths: K and V [1, Lc, heads, head_dim] of each batch row by itself."""
        table = self.segments or SegmentTable.read(self.table)
        each = (table.rows_of(batch) for batch in range(len(table.lengths)))
        return [(self.k.index_select(0, rows)[None], self.v.index_select(0, rows)[None]) for rows in each]

    @property
    def ragged(self) -> bool:
        """Whether the batch rows have contexts of different lengths; synchronises as `gather`."""
        return (self.segments or SegmentTable.read(self.table)).ragged

    def check_held(self) -> None:
        """Raises ValueError where rows of the view were handed out for writing since it was made or updated."""
        if self.segments is not None and not torch.compiler.is_compiling():
            self.segments.seen.check()

    def guard(self, *outputs: Tensor) -> None:
        """Makes the backward pass of attention over this view raise ValueError where its rows are others by then."""
        if self.segments is None or torch.compiler.is_compiling():
            return
        for node in {output.grad_fn for output in outputs}:
            if node is not None:
                node.register_prehook(partial(_check_unchanged, self.segments, self.segments.seen))


@dataclass(frozen=True, eq=False)
class LayerViews:
    """The context of a batch of B branches in every layer: one segment table over each layer's pools.

    `views[layer]` is the layer's `CacheView`. pools holds k, v [rows, heads, head_dim] of each layer; table is that of
    `CacheView`.
    """

    pools: tuple[tuple[Tensor, Tensor], ...]
    table: Tensor
    segments: SegmentTable | None = field(default=None, repr=False)  # of which `table` is the device's part

    @classmethod
    def of(
        cls,
        pools: Sequence[tuple[Tensor, Tensor]],
        segments: Sequence[Sequence[Run]],
        handouts: Handouts | None = None,
    ) -> LayerViews:
        """segments[b] are the (first row, length) of batch row b; they are not checked against the pools.

        handouts: the pools' books of rows handed out for writing; None: rows are not checked later.
        """
        table = SegmentTable(len(segments), max([1, *map(len, segments)]), pools[0][0].device, handouts)
        table.set(segments)
        return cls(tuple(pools), table.table, table)

    def __len__(self) -> int:
        return len(self.pools)

    def __getitem__(self, layer: int) -> CacheView:
        return CacheView(*self.pools[layer], self.table, self.segments)

    def __iter__(self) -> Iterator[CacheView]:
        return (self[layer] for layer in range(len(self)))

    @property
    def addresses(self) -> tuple[int, ...]:
        """Data pointers of the pools, as `ForkableKVCache.addresses`."""
        return tuple(pool.data_ptr() for pools in self.pools for pool in pools)

    def with_table(self, table: Tensor) -> LayerViews:
        """The same pools read through another table on their device."""
        return LayerViews(self.pools, table)


@dataclass(frozen=True, eq=False)
class CacheRows:
    """Destination of one layer of a reservation: rows for `length` tokens of each branch.

    k, v: the layer's pools, [rows, heads, head_dim].
    first_rows: int64 on the pools' device; [B], the first of `length` consecutive rows of each branch, or, from a cache
        with pages, [B, S]: the first row of each of the S pages of length / S tokens that make up a branch's block.
    """

    k: Tensor
    v: Tensor
    first_rows: Tensor
    length: int

    @property
    def rows(self) -> Tensor:
        """Row number of every token, branch by branch, [B * length] int64 on the pools' device."""
        return _row_numbers(self.first_rows, self.length)


@dataclass(eq=False)
class Reservation:
    """Rows reserved for one block of `length` tokens of each branch, to be written and then committed.

    `commit`, `replace` or `cancel` of the cache closes a reservation. Used as a context manager, it is cancelled at
    the end of the block if it is still open, so that an exception leaks no rows.
    """

    branches: tuple[int, ...]
    runs: tuple[tuple[Run, ...], ...]  # rows of each branch's block, by token
    length: int
    first_rows_on_device: Tensor = field(repr=False)  # int64, as `CacheRows.first_rows`
    cancel: Callable[[Reservation], None] = field(repr=False)
    layers: int  # of the cache
    state: str = "open"  # or "committed", "cancelled"
    written: set[int] = field(default_factory=set, repr=False)  # layers, by `write` or through `rows_of`
    handed_out: bool = False  # by `rows_of`: the pools must stay where they are

    @property
    def first_rows(self) -> tuple[int, ...]:
        """First row of each branch."""
        return tuple(block[0][0] for block in self.runs)

    @cached_property
    def rows(self) -> Tensor:
        """Row numbers, branch by branch, [B * length] int64 on the pools' device."""
        return _row_numbers(self.first_rows_on_device, self.length)

    @cached_property
    def copies(self) -> list[tuple[slice, slice, int]]:
        """Batch rows and tokens that lie in consecutive rows, with the first of these."""
        found: list[tuple[slice, slice, int]] = []
        last = None  # row after the last one, where whole blocks go on
        for i, block in enumerate(self.runs):
            token = 0
            for row, rows in block:
                if rows == self.length and row == last:
                    batch, tokens, first = found[-1]
                    found[-1] = slice(batch.start, i + 1), tokens, first
                else:
                    found.append((slice(i, i + 1), slice(token, token + rows), row))
                last = row + rows if rows == self.length else None
                token += rows
        return found

    def mark_written(self) -> None:
        """Declares every layer written: for writes that the cache does not see, as those of a replayed CUDA graph."""
        self.written.update(range(self.layers))

    def check_written(self) -> None:
        if len(self.written) < self.layers:
            missing = [layer for layer in range(self.layers) if layer not in self.written]
            raise ValueError(f"{self}: found layers {missing} unwritten; accepted: all {self.layers} layers written")

    def check_open(self) -> None:
        if self.state != "open":
            raise ValueError(f"{self}: already {self.state}; accepted: an open reservation")

    def __str__(self) -> str:
        whole = all(len(block) == 1 for block in self.runs)
        rows = f"{self.first_rows} + {self.length}" if whole else f"{self.runs}"
        return f"reservation of branches {self.branches}, rows {rows}"

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        if self.state == "open":
            self.cancel(self)


class Read:
    """Rows that a segment table names since it was filled."""

    def __init__(self, runs: Iterable[Run], handouts: Handouts | None):
        self._runs, self._handouts = frozenset(runs), handouts
        self._since = self._checked = 0 if handouts is None else handouts.latest

    def check(self) -> None:
        """Raises ValueError where some were handed out for writing since."""
        if self._handouts is None or self._checked == self._handouts.latest:
            return
        taken = self._handouts.since(self._runs, self._since)
        if taken is not None:
            found = f"rows {taken[0]} to {sum(taken) - 1} handed out for writing since the view was made"
            accepted = "a view whose branches hold its tokens, until the backward pass of attention over it"
            raise ValueError(f"context: found {found}; accepted: {accepted}")
        self._checked = self._handouts.latest


def _check_unchanged(segments: SegmentTable, read: Read, *_: object) -> None:
    if segments.seen is not read:
        accepted = "`update` after the backward pass of attention over the bound table"
        raise ValueError(f"context: found its bound table updated since the call; accepted: {accepted}")
    read.check()


class SegmentTable:
    """Segments of a batch on the device, [batch, slots, 2] int32, filled by the host; all layers' views share it.

    handouts: the books of the pools; None: `seen` says nothing of rows that were handed out since.
    """

    def __init__(self, batch: int, slots: int, device: torch.device, handouts: Handouts | None = None):
        self.table = torch.zeros(batch, slots, 2, dtype=torch.int32, device=device)
        self._handouts = handouts
        self.seen = Read((), handouts)
        self._set_lengths([0] * batch)

    @classmethod
    def read(cls, table: Tensor) -> SegmentTable:
        """A segment table around a tensor on a device; synchronises to read the lengths."""
        own = cls.__new__(cls)
        own.table, own._handouts = table, None
        own._set_lengths(table[..., 1].sum(1).tolist())
        return own

    def set(self, segments: Sequence[Sequence[Run]]) -> None:
        """Refills the table in place, by one copy in the order of the current stream."""
        batch, slots, _ = self.table.shape
        numbers = [n for runs in segments for run in [*runs, *[(0, 0)] * (slots - len(runs))] for n in run]
        self.table.copy_(staged(numbers, torch.int32, self.table.device).view(batch, slots, 2), non_blocking=True)
        self._set_lengths([sum(length for _, length in runs) for runs in segments])
        self.seen = Read((run for runs in segments for run in runs), self._handouts)

    @property
    def ragged(self) -> bool:
        return self._ragged is not None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each batch row's context."""
        return (self._length,) * self.table.shape[0] if self._ragged is None else tuple(self._ragged)

    def rows_of(self, batch: int) -> Tensor:
        """Row number of every token of one batch row's context, [Lc] int64 on the device."""
        first, lengths = self.table[batch].long().unbind(-1)
        stops = lengths.cumsum(0)
        tokens = torch.arange(self.lengths[batch], device=self.table.device)
        return (first - stops + lengths)[torch.searchsorted(stops, tokens, right=True)] + tokens

    def _set_lengths(self, lengths: list[int]) -> None:
        # a number of its own: torch.compile would compile anew for each element of a list
        self._length, self._ragged = lengths[0], lengths if len(set(lengths)) > 1 else None
        self._rows: Tensor | None = None

    def rows(self) -> Tensor:
        """Row number of every token of the context, [B, Lc] int64 on the device."""
        if self._rows is None:
            if self._ragged is not None:
                raise ValueError(f"gather: found contexts of {self._ragged} tokens; accepted: one length")
            first, lengths = self.table.long().unbind(-1)
            stops = lengths.cumsum(1)
            tokens = torch.arange(self._length, device=self.table.device).expand(self.table.shape[0], -1)
            slot = torch.searchsorted(stops, tokens.contiguous(), right=True)
            self._rows = (first - stops + lengths).gather(1, slot) + tokens
        return self._rows


class BoundTable:
    """Views at fixed addresses for a captured CUDA graph; `update` changes the tokens that they refer to.

    Call `update` on the stream that the graph runs on, after the backward pass of attention over the old table.
    `gather` of these views must not be captured: a replay would repeat the rows of the capture.

    views: one for each layer; empty contexts before the first `update`.
    """

    def __init__(
        self,
        locate: Callable[[int, Sequence[tuple[int, int]]], list[Run]],
        batch: int,
        slots: int,
        pools: Sequence[tuple[Tensor, Tensor]],
        handouts: Handouts,
    ):
        self._locate = locate
        self._segments = SegmentTable(batch, slots, pools[0][0].device, handouts)
        self.views = [CacheView(k, v, self._segments.table, self._segments) for k, v in pools]

    @property
    def table(self) -> Tensor:
        """[batch, slots, 2] int32 on the device."""
        return self._segments.table

    def update(self, branches: Sequence[int], ranges: Sequence[tuple[int, int]]) -> None:
        """Makes the views refer to token ranges [start, stop) of `branches`, one branch a batch row.

        Raises:
            ValueError: for another number of branches, tokens that a branch does not hold, and a branch that needs
                more slots than there are. The table is unchanged then.
        """
        batch, slots, _ = self.table.shape
        if len(branches) != batch:
            raise ValueError(f"branches: found {len(branches)}; accepted: {batch}, one a row of the bound table")
        found = [self._locate(branch, ranges) for branch in branches]
        for branch, runs in zip(branches, found, strict=True):
            if len(runs) > slots:
                accepted = f"at most {slots}, the slots of the bound table"
                raise ValueError(f"branch {branch}: found {len(runs)} segments in rows {runs}; accepted: {accepted}")
        self._segments.set(found)


class BoundRows:
    """`CacheRows` at fixed addresses for a captured CUDA graph; `rows` has one for each layer."""

    def __init__(self, batch: int, length: int, pages: int | None, pools: Sequence[tuple[Tensor, Tensor]]):
        shape = (batch,) if pages is None else (batch, pages)
        self._first_rows = torch.zeros(shape, dtype=torch.int64, device=pools[0][0].device)
        self._length = length
        self.rows = [CacheRows(k, v, self._first_rows, length) for k, v in pools]

    def update(self, reservation: Reservation) -> None:
        """Makes `rows` refer to an open reservation with the bound numbers of branches and tokens.

        The reservation counts as written in every layer, since the host does not see what a replayed graph writes.

        Raises:
            ValueError: for a reservation that is closed or of other sizes.
        """
        reservation.check_open()
        found = len(reservation.branches), reservation.length
        if found != (len(self._first_rows), self._length):
            accepted = f"{len(self._first_rows)} and {self._length}, as bound"
            raise ValueError(f"{reservation}: found {found[0]} branches of {found[1]} tokens; accepted: {accepted}")
        self._first_rows.copy_(reservation.first_rows_on_device, non_blocking=True)
        reservation.mark_written()


def _row_numbers(first_rows: Tensor, length: int) -> Tensor:
    page = length // (first_rows.shape[1] if first_rows.ndim == 2 else 1)
    return (first_rows[..., None] + torch.arange(page, device=first_rows.device)).flatten()


def staged(numbers: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers in host memory, pinned where a non-blocking copy to `device` needs it."""
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")


def _check_pools(k: Tensor, v: Tensor) -> None:
    if k.ndim != 3 or k.shape != v.shape or k.dtype != v.dtype or k.device != v.device:
        found = f"{tuple(k.shape)} {k.dtype} on {k.device}, {tuple(v.shape)} {v.dtype} on {v.device}"
        raise ValueError(f"k, v: found {found}; accepted: two alike [rows, heads, head_dim]")
    if k.shape[0] > MAX_ROWS:
        raise ValueError(f"k, v: found {k.shape[0]} rows; accepted: up to {MAX_ROWS}, since tables are int32")
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        raise ValueError(f"k, v: found strides {k.stride()}, {v.stride()}; accepted: a contiguous last dimension")


def _check_table(table: Tensor, pool: Tensor) -> None:
    if table.ndim != 3 or table.shape[-1] != 2 or table.dtype != torch.int32 or table.device != pool.device:
        found = f"{tuple(table.shape)} {table.dtype} on {table.device}"
        raise ValueError(f"table: found {found}; accepted: [B, S, 2] int32 on {pool.device}")
    if not table.is_contiguous():
        raise ValueError(f"table: found strides {table.stride()}; accepted: a contiguous tensor")
    if table.device.type == "cpu":
        for branch, runs in enumerate(table.tolist()):
            for row, length in runs:
                _check_segment(branch, row, length, pool.shape[0])


def _check_segment(branch: int, row: int, length: int, rows: int) -> None:
    if row < 0 or length < 0 or row + length > rows:
        found = f"found {length} rows from row {row}"
        raise ValueError(f"segments of batch row {branch}: {found}; accepted: rows in [0, {rows})")
