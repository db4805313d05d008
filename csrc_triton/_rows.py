"""Bookkeeping of the cache on the host: counts and hand-outs of the pools' rows, and segments of branches."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

Run = tuple[int, int]  # (first row, length) of consecutive rows
Segments = tuple["Segment", ...]  # a branch's, by token

MAX_ROWS = 2**31 - 1  # of pools: segment tables are int32


@dataclass(frozen=True, slots=True)
class Segment:
    """`length` consecutive tokens of a branch, from token `start`, stored in rows from `row`."""

    start: int
    row: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length


class _RowNumbers:
    """A number for each of `total` rows, 0 at first, stored as runs of equal numbers."""

    def __init__(self, total: int):
        self.total = total
        self._starts = [0]  # run i covers rows [starts[i], starts[i + 1])
        self._numbers = [0]

    def runs(self, row: int, length: int) -> list[tuple[Run, int]]:
        """The runs that make up `length` rows from `row`, with their numbers."""
        stop, found = row + length, []
        i = bisect_right(self._starts, row) - 1
        while row < stop:
            end = min(self._end(i), stop)
            found.append(((row, end - row), self._numbers[i]))
            row, i = end, i + 1
        return found

    def _end(self, i: int) -> int:
        return self._starts[i + 1] if i + 1 < len(self._starts) else self.total

    def _cut(self, row: int) -> int:
        """Index of the run that starts at `row`, made if there is none."""
        i = bisect_left(self._starts, row)
        if row < self.total and (i == len(self._starts) or self._starts[i] != row):
            self._starts.insert(i, row)
            self._numbers.insert(i, self._numbers[i - 1])
        return i

    def _merge(self, first: int, last: int) -> None:
        """Joins runs of equal numbers where run i, first <= i <= last, begins."""
        for i in range(min(last, len(self._starts) - 1), max(first, 1) - 1, -1):
            if self._numbers[i] == self._numbers[i - 1]:
                del self._starts[i], self._numbers[i]


class RowCounts(_RowNumbers):
    """Reference counts of rows.

    A drop inside a block splits its run, and equal neighbours are merged, so that the runs of free rows (count 0) are
    always sorted, disjoint and never adjacent. A fork updates one entry for each segment.
    """

    @property
    def used(self) -> int:
        return self.total - sum(length for _, length in self.free())

    def free(self) -> list[Run]:
        """Runs of free rows (count 0), by row."""
        return [(row, self._end(i) - row) for i, row in enumerate(self._starts) if not self._numbers[i]]

    def add(self, row: int, length: int, change: int) -> None:
        """Adds `change` to the counts of `length` rows from `row`."""
        first, last = self._cut(row), self._cut(row + length)
        for i in range(first, last):
            self._numbers[i] += change
            assert self._numbers[i] >= 0, f"row {self._starts[i]} released more often than held"
        self._merge(first, last)

    def pages(self, page: int) -> list[Run]:
        """Runs of free whole pages, by row; pages begin at multiples of their size."""
        inner = [(-(-row // page) * page, (row + length) // page * page) for row, length in self.free()]
        return [(row, stop - row) for row, stop in inner if row < stop]

    def place(self, length: int, near: int | None, page: int | None) -> tuple[Run, ...] | None:
        """Free rows for a block of `length` tokens; None where they do not fit.

        Without pages: the rows from `near` on if they are free, else the shortest run that is long enough. With pages:
        the first free ones, in as many runs as that makes, so that no more rows are ever used than blocks have held at
        once, and so that which rows a block gets (and with them the order of sums over its keys) follows from the
        blocks held alone, whatever the size of the pools.
        """
        if page is None:
            fits = [run for run in self.free() if run[1] >= length]
            following = [run for run in fits if run[0] == near]
            return (((following or sorted(fits, key=_length))[0][0], length),) if fits else None
        found = list[Run]()
        for row, rows in self.pages(page):
            found.append((row, min(length, rows)))
            length -= found[-1][1]
            if not length:
                return tuple(found)
        return None

    def free_at_the_end(self) -> int:
        return self.total - self._starts[-1] if not self._numbers[-1] else 0

    def resize(self, total: int) -> None:
        """Changes the number of rows; added rows are free, and removed ones must be."""
        if total > self.total and self._numbers[-1]:
            self._starts.append(self.total)
            self._numbers.append(0)
        elif total <= self._starts[-1] and len(self._starts) > 1:
            assert not self._numbers[-1], f"row {self._starts[-1]} is held"
            del self._starts[-1], self._numbers[-1]
        self.total = total


class Handouts(_RowNumbers):
    """The last time that each row of the pools was handed out for writing, counted in hand-outs: `latest` so far."""

    def __init__(self, total: int):
        super().__init__(total)
        self.latest = 0

    def add(self, runs: Iterable[Run]) -> None:
        """Hands out these rows, all at once."""
        self.latest += 1
        for row, length in runs:
            first, last = self._cut(row), self._cut(row + length)
            self._numbers[first:last] = [self.latest] * (last - first)
            self._merge(first, last)

    def since(self, runs: Iterable[Run], moment: int) -> Run | None:
        """The first of these rows that were handed out after the hand-out numbered `moment`."""
        return next((run for row, length in runs for run, last in self.runs(row, length) if last > moment), None)


def _length(run: Run) -> int:
    return run[1]


def join(segments: Iterable[Segment]) -> Segments:
    """Segments sorted by token; segments that continue each other in tokens and rows are merged."""
    joined: list[Segment] = []
    for segment in sorted(segments, key=lambda segment: segment.start):
        last = joined[-1] if joined else None
        if last and last.stop == segment.start and last.row + last.length == segment.row:
            joined[-1] = Segment(last.start, last.row, last.length + segment.length)
        else:
            joined.append(segment)
    return tuple(joined)


def laid(runs: Iterable[Run], start: int) -> list[Segment]:
    """Segments of a block in these rows, whose first token is `start`."""
    found: list[Segment] = []
    for row, length in runs:
        found.append(Segment(start, row, length))
        start += length
    return found


def cut_out(segments: Segments, start: int, stop: int) -> tuple[Segments, list[Run]]:
    """The segments without tokens [start, stop), and the rows of the removed tokens."""
    kept: list[Segment] = []
    dropped: list[Run] = []
    for segment in segments:
        low, high = max(segment.start, start), min(segment.stop, stop)
        if low >= high:
            kept.append(segment)
            continue
        dropped.append((segment.row + low - segment.start, high - low))
        if low > segment.start:
            kept.append(Segment(segment.start, segment.row, low - segment.start))
        if high < segment.stop:
            kept.append(Segment(high, segment.row + high - segment.start, segment.stop - high))
    return tuple(kept), dropped


def locate(segments: Segments, ranges: Iterable[tuple[int, int]]) -> list[Run]:
    """Rows of token ranges [start, stop), in the order of the ranges; adjacent runs are merged.

    Raises:
        ValueError: for a token that no segment holds.
    """
    found: list[Run] = []
    for start, stop in ranges:
        position = start
        for segment in segments:
            if segment.start <= position < min(segment.stop, stop):
                row, length = segment.row + position - segment.start, min(segment.stop, stop) - position
                if found and sum(found[-1]) == row:
                    found[-1] = (found[-1][0], found[-1][1] + length)
                else:
                    found.append((row, length))
                position += length
        if position != stop:
            raise ValueError(f"token {position} of range [{start}, {stop}) is not in the cache")
    return found
