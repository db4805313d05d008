"""The pools of K and V rows of all layers, and the books of the rows that are held."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from csrc_triton._rows import MAX_ROWS, Handouts, RowCounts, Run
from csrc_triton._tables import Reservation, staged

Block = tuple[Run, ...]  # rows of a branch's block, by token

GROWTH = 24  # pools grow by one in so many rows, or by more where a block needs it


class PoolFull(ValueError):
    """A block for which the pools have no rows.

    asked: rows of the block. used: rows that branches and open reservations hold. free: most rows that a block can
    have now. limit: most rows that the pools may have.
    """

    def __init__(self, message: str, asked: int, used: int, free: int, limit: int):
        super().__init__(message)
        self.asked, self.used, self.free, self.limit = asked, used, free, limit


class Pools:
    """Two tensors [rows, heads, head_dim] a layer, of K and of V; all layers use the same rows.

    page: blocks take whole pages of so many rows; None: consecutive rows. fixed: the pools do not grow.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        head_dim: int,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
        max_rows: int | None,
        page: int | None,
        fixed: bool,
    ):
        if min(layers, heads, head_dim, rows) < 1:
            raise ValueError(f"layers, heads, head_dim, rows: found {(layers, heads, head_dim, rows)}; accepted: >= 1")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: found {dtype}; accepted: floating point")
        limit = MAX_ROWS if max_rows is None else max_rows
        if not rows <= limit <= MAX_ROWS:
            raise ValueError(f"rows, max_rows: found {rows}, {max_rows}; accepted: rows <= max_rows <= {MAX_ROWS}")
        if page is not None and (page < 1 or rows % page):
            raise ValueError(f"page: found {page}; accepted: a number that divides rows, {rows}, or None")
        shape = (rows, heads, head_dim)
        self.layers = [
            (torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for _ in range(layers)
        ]
        self.counts, self.handouts = RowCounts(rows), Handouts(rows)
        self.page, self.fixed, self._limit = page, fixed, limit

    @property
    def device(self) -> torch.device:
        return self.layers[0][0].device

    @property
    def limit(self) -> int:
        """Most rows, in whole pages."""
        return self.counts.total if self.fixed else self._limit - self._limit % (self.page or 1)

    def check_length(self, length: int) -> None:
        """Raises ValueError for a length that whole pages do not make up."""
        if self.page is not None and length % self.page:
            raise ValueError(f"length: found {length}; accepted: a multiple of {self.page}, the rows of a page")

    def pages_of(self, length: int) -> int | None:
        """Pages of a block; None where blocks are consecutive rows."""
        return None if self.page is None else length // self.page

    def first_rows(self, blocks: Sequence[Block]) -> Tensor:
        """`CacheRows.first_rows` of one block a branch."""
        if self.page is None:
            found = staged([block[0][0] for block in blocks], torch.int64, self.device)
        else:
            rows = [first for block in blocks for row, n in block for first in range(row, row + n, self.page)]
            found = staged(rows, torch.int64, self.device).view(len(blocks), -1)
        return found.to(self.device, non_blocking=True)

    def take(self, branch: int, length: int, near: int | None) -> Block:
        """Holds rows for a block of `branch`, without pages those from `near` on if they are free; the books grow if
        they must.

        Raises:
            PoolFull: where the limit forbids.
        """
        found = self.counts.place(length, near, self.page)
        if found is None:
            total, page = self.counts.total, self.page or 1
            needed = total + length - (self.counts.free_at_the_end() if self.page is None else self._free())
            if needed > self.limit:
                raise self._full(branch, length)
            grown = total + total // GROWTH
            self.counts.resize(min(max(needed, grown - grown % page), self.limit))
            found = self.counts.place(length, near, self.page)
            assert found is not None
        self.hold(found, 1)
        return found

    def hold(self, rows: Iterable[Run], change: int) -> None:
        for row, length in rows:
            self.counts.add(row, length, change)

    def enlarge(self, reservations: Iterable[Reservation]) -> None:
        """To the size in the books, a layer at a time, so that no more than one layer is there twice.

        Raises:
            ValueError: naming one of the open reservations whose rows are being written where they lie.
        """
        total = self.counts.total
        for reservation in reservations if len(self.layers[-1][0]) < total else ():
            if reservation.handed_out:
                accepted = "it committed or cancelled first, or pools that `grow` made large enough before"
                raise ValueError(f"{reservation}: found rows from rows_of while the pools grow; accepted: {accepted}")
        for layer, pools in enumerate(self.layers):
            if len(pools[0]) < total:
                k, v = (_grown(pool, total) for pool in pools)
                self.layers[layer] = k, v
        if self.handouts.total < total:  # views made before read the old pools, which no one writes again
            self.handouts = Handouts(total)

    def _free(self) -> int:
        """Most rows that one block can have."""
        runs = [length for _, length in self.counts.pages(self.page or 1)]
        return max(runs, default=0) if self.page is None else sum(runs)

    def _full(self, branch: int, length: int) -> PoolFull:
        free, limit = self._free(), self.limit
        room = f"the longest free run {free}" if self.page is None else f"{free} free in pages of {self.page}"
        found = f"found {length} rows asked, {self.counts.used} used, {room}"
        why = "the pools are fixed" if self.fixed else "max_rows"
        message = f"branch {branch}: {found}; accepted: up to a limit of {limit} rows ({why})"
        return PoolFull(message, length, self.counts.used, free, limit)


def _grown(pool: Tensor, rows: int) -> Tensor:
    grown = pool.new_empty(rows, *pool.shape[1:])
    grown[: len(pool)] = pool
    return grown
