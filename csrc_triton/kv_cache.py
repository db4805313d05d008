"""A KV cache that forks without copying rows.

Per layer there is one pool of rows for K and one for V. A branch is a list of segments (row ranges);
`fork` copies the list and raises reference counts, never rows. Committed rows are immutable. All
layers use the same rows, so one table of segments serves them all.

Positions inside a branch are counted in tokens since its beginning and stay valid when earlier tokens
are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """`length` consecutive tokens of a branch, from token `start`, stored in rows from `row`."""

    start: int
    row: int
    length: int


@dataclass(frozen=True)
class Reservation:
    """Rows set aside for one block of `length` tokens per branch, to be written, then committed."""

    branches: tuple[int, ...]
    first_rows: tuple[int, ...]
    length: int
    rows: Tensor  # [B * length] int64


@dataclass(frozen=True)
class CacheView:
    """What a batch of B branches attends to in one layer.

    k, v [rows, heads, head_dim] are the layer's pools; table [B, S, 2] int32 holds (first row, length)
    of each segment, on the CPU; unused slots have length 0.
    """

    k: Tensor
    v: Tensor
    table: Tensor
    rows: Tensor  # [B, Lc] int64, the table written out; every branch of a view has the same length Lc

    def gather(self) -> tuple[Tensor, Tensor]:
        """The context as plain tensors [B, Lc, heads, head_dim] (a copy)."""
        return self.k[self.rows], self.v[self.rows]


class ForkableKVCache:
    """Pools of K/V rows for `layers` layers of `heads` x `head_dim`.

    `rows` is the first size of the pools; they double when full. Raises ValueError for an unknown or
    released branch (naming it), and for tokens a branch does not hold.
    """

    def __init__(self, layers: int, heads: int, head_dim: int, *, rows: int, dtype: torch.dtype, device: torch.device):
        if min(layers, heads, head_dim, rows) < 1:
            raise ValueError(f"layers, heads, head_dim, rows: found {(layers, heads, head_dim, rows)}; accepted: >= 1")
        shape = (rows, heads, head_dim)
        self._k = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self._v = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self._counts = torch.zeros(rows, dtype=torch.int32)
        self._free: list[tuple[int, int]] = [(0, rows)]  # sorted, disjoint, never adjacent
        self._branches: dict[int, list[Segment]] = {}
        self._reserved: set[int] = set()  # first rows of reservations that are not committed yet
        self._next_branch = 0

    @property
    def rows_total(self) -> int:
        return len(self._counts)

    @property
    def rows_used(self) -> int:
        """Rows that some branch or reservation holds."""
        return self.rows_total - sum(length for _, length in self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of all pools."""
        return sum(pool.numel() * pool.element_size() for pool in (*self._k, *self._v))

    def new_branch(self) -> int:
        """An empty branch."""
        branch = self._next_branch
        self._next_branch += 1
        self._branches[branch] = []
        return branch

    def fork(self, branch: int, n: int) -> list[int]:
        """`n` new branches with the tokens of `branch`, sharing its rows. `branch` stays as it is."""
        segments = self._segments(branch)
        if n < 1:
            raise ValueError(f"n: found {n}; accepted: at least 1 (fork of branch {branch})")
        for segment in segments:
            self._counts[segment.row : segment.row + segment.length] += n
        forks = [self.new_branch() for _ in range(n)]
        for new in forks:
            self._branches[new] = list(segments)
        return forks

    def release(self, branch: int) -> None:
        """Ends a branch; rows that nobody else holds become free."""
        for segment in self._segments(branch):
            self._drop_rows(segment.row, segment.length)
        del self._branches[branch]

    def length(self, branch: int) -> int:
        """Token position after the branch's last token (dropped tokens count)."""
        segments = self._segments(branch)
        return segments[-1].start + segments[-1].length if segments else 0

    def reserve(self, branches: Sequence[int], length: int) -> Reservation:
        """Rows for `length` tokens of each branch. They belong to nobody until `commit` or `replace`."""
        for branch in branches:
            self._segments(branch)
        if length < 1:
            raise ValueError(f"length: found {length}; accepted: at least 1")
        first = tuple(self._allocate(length) for _ in branches)
        self._reserved.update(first)
        rows = (torch.tensor(first)[:, None] + torch.arange(length)).flatten()
        return Reservation(tuple(branches), first, length, rows.to(self._k[0].device))

    def write(self, reservation: Reservation, layer: int, k: Tensor, v: Tensor) -> None:
        """Stores one layer of a reservation; k, v [B, length, heads, head_dim]."""
        expected = (len(reservation.branches), reservation.length, *self._k[layer].shape[1:])
        if k.shape != expected or v.shape != expected:
            raise ValueError(f"k, v: found {tuple(k.shape)}, {tuple(v.shape)}; accepted: {expected}")
        self._k[layer][reservation.rows] = k.detach().flatten(0, 1).to(self._k[layer].dtype)
        self._v[layer][reservation.rows] = v.detach().flatten(0, 1).to(self._v[layer].dtype)

    def commit(self, reservation: Reservation) -> None:
        """Appends the reserved tokens to their branches; from now on the rows are immutable."""
        self._take(reservation)
        for branch, row in zip(reservation.branches, reservation.first_rows, strict=True):
            self._branches[branch].append(Segment(self.length(branch), row, reservation.length))

    def replace(self, reservation: Reservation, start: int) -> None:
        """Puts the reserved tokens in place of tokens [start, start + length) of their branches."""
        stop = start + reservation.length
        for branch in reservation.branches:
            if stop > self.length(branch):
                raise ValueError(f"branch {branch}: tokens [{start}, {stop}) asked, it ends at {self.length(branch)}")
        self._take(reservation)
        for branch, row in zip(reservation.branches, reservation.first_rows, strict=True):
            self.drop(branch, start, stop)
            self._branches[branch].append(Segment(start, row, reservation.length))
            self._branches[branch].sort(key=lambda segment: segment.start)

    def drop(self, branch: int, start: int, stop: int) -> None:
        """Forgets tokens [start, stop) of a branch; positions of the others do not change."""
        kept: list[Segment] = []
        for segment in self._segments(branch):
            low, high = max(segment.start, start), min(segment.start + segment.length, stop)
            if low >= high:
                kept.append(segment)
                continue
            self._drop_rows(segment.row + low - segment.start, high - low)
            if low > segment.start:
                kept.append(Segment(segment.start, segment.row, low - segment.start))
            if high < segment.start + segment.length:
                offset = high - segment.start
                kept.append(Segment(high, segment.row + offset, segment.length - offset))
        self._branches[branch] = kept

    def segments(self, branch: int, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """(first row, length) of the pieces that hold token ranges [start, stop) of a branch, in order."""
        found: list[tuple[int, int]] = []
        for start, stop in ranges:
            position = start
            for segment in self._segments(branch):
                if segment.start <= position < min(segment.start + segment.length, stop):
                    length = min(segment.start + segment.length, stop) - position
                    found.append((segment.row + position - segment.start, length))
                    position += length
            if position != stop:
                raise ValueError(f"branch {branch}: token {position} of range [{start}, {stop}) is not in the cache")
        return found

    def views(self, branches: Sequence[int], ranges: Sequence[tuple[int, int]]) -> list[CacheView]:
        """One view a layer of the same token ranges of several branches."""
        pieces = [self.segments(branch, ranges) for branch in branches]
        slots = max((len(piece) for piece in pieces), default=0)
        table = torch.zeros(len(branches), slots, 2, dtype=torch.int32)
        for i, piece in enumerate(pieces):
            table[i, : len(piece)] = torch.tensor(piece, dtype=torch.int32).reshape(-1, 2)
        length = sum(stop - start for start, stop in ranges)
        rows = torch.empty(len(branches), length, dtype=torch.int64)
        for i, piece in enumerate(pieces):
            rows[i] = torch.cat([torch.arange(row, row + n) for row, n in piece])
        rows = rows.to(self._k[0].device)
        return [CacheView(k, v, table, rows) for k, v in zip(self._k, self._v, strict=True)]

    def _segments(self, branch: int) -> list[Segment]:
        if branch not in self._branches:
            raise ValueError(f"branch {branch}: not in the cache; it was released or never made")
        return self._branches[branch]

    def _take(self, reservation: Reservation) -> None:
        if not self._reserved.issuperset(reservation.first_rows):
            raise ValueError(f"reservation for branches {reservation.branches}: already committed")
        for branch in reservation.branches:
            self._segments(branch)
        self._reserved.difference_update(reservation.first_rows)

    def _allocate(self, length: int) -> int:
        for i, (row, free) in enumerate(self._free):
            if free >= length:
                self._free[i : i + 1] = [(row + length, free - length)] if free > length else []
                self._counts[row : row + length] = 1
                return row
        self._grow(max(self.rows_total, length))
        return self._allocate(length)

    def _grow(self, rows: int) -> None:
        for pools in (self._k, self._v):
            for layer, pool in enumerate(pools):
                pools[layer] = torch.cat([pool, pool.new_empty(rows, *pool.shape[1:])])
        total = self.rows_total
        self._counts = torch.cat([self._counts, torch.zeros(rows, dtype=torch.int32)])
        self._give_back(total, rows)

    def _drop_rows(self, row: int, length: int) -> None:
        counts = self._counts[row : row + length]
        counts -= 1
        freed = (counts == 0).tolist()
        start = 0
        while start < length:
            stop = start
            while stop < length and freed[stop] == freed[start]:
                stop += 1
            if freed[start]:
                self._give_back(row + start, stop - start)
            start = stop

    def _give_back(self, row: int, length: int) -> None:
        merged: list[tuple[int, int]] = []
        for first, free in sorted([*self._free, (row, length)]):
            if merged and merged[-1][0] + merged[-1][1] == first:
                merged[-1] = (merged[-1][0], merged[-1][1] + free)
            else:
                merged.append((first, free))
        self._free = merged
