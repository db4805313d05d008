"""Random histories of the cache against a dictionary of tokens: nothing mixes, nothing leaks."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count, pairwise

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from csrc_triton import ForkableKVCache, PoolFull
from csrc_triton.kv_cache import Reservation

LAYERS, SLOTS = 2, 4
CPU = torch.device("cpu")


@dataclass
class Tokens:
    """A branch as the model has it: the value of every token it holds. No two rows were given the same value."""

    values: dict[int, float] = field(default_factory=dict)
    length: int = 0

    def ranges(self) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for token in sorted(self.values):
            if found and found[-1][1] == token:
                found[-1] = (found[-1][0], token + 1)
            else:
                found.append((token, token + 1))
        return found

    def listed(self) -> list[float]:
        return [self.values[token] for token in sorted(self.values)]


PICK = st.integers(0, 2**16)  # which of the branches or reservations that there are, modulo their number
LENGTH = st.integers(1, 5)
PLACE = st.sampled_from([0.5, 0.2, 0.8, 0.0, 1.0, 0.4, 0.6])  # of a length


class Histories(RuleBasedStateMachine):
    @initialize(
        rows=st.integers(1, 12),
        room=st.none() | st.integers(0, 40),
        grow=st.booleans(),
        page=st.none() | st.integers(1, 3),
    )
    def make(self, rows: int, room: int | None, grow: bool, page: int | None) -> None:
        self.page, self.unit = page, page or 1
        rows = (rows if grow else rows + (room or 30)) * self.unit
        self.limit = None if room is None else rows + room
        self.cache = ForkableKVCache(
            LAYERS, 1, 2, rows=rows, dtype=torch.float64, device=CPU, max_rows=self.limit, grow=grow, page=page
        )
        self.bound = None if grow else self.cache.bind(1, SLOTS)
        self.limit = self.limit if grow else rows
        self.limit = None if self.limit is None else self.limit - self.limit % self.unit
        self.tokens: dict[int, Tokens] = {}
        self.written: dict[Reservation, list[list[float]]] = {}  # of the open reservations; empty if not yet
        self.next_value = count(1)
        self.new_branch()

    def branch(self, pick: int) -> int:
        return list(self.tokens)[pick % len(self.tokens)]

    def pending(self, pick: int) -> Reservation:
        return list(self.written)[pick % len(self.written)]

    @rule()
    def new_branch(self) -> None:
        self.tokens[self.cache.new_branch()] = Tokens()

    @precondition(lambda self: len(self.tokens) < 8)
    @rule(pick=PICK, n=st.integers(1, 3))
    def fork(self, pick: int, n: int) -> None:
        origin = self.branch(pick)
        for fork in self.cache.fork(origin, n):
            self.tokens[fork] = Tokens(dict(self.tokens[origin].values), self.tokens[origin].length)

    @rule(picks=st.lists(PICK, min_size=1, max_size=3), length=LENGTH)
    def reserve(self, picks: list[int], length: int) -> None:
        branches = list(dict.fromkeys(self.branch(pick) for pick in picks))
        length *= self.unit
        before = self.cache.rows_used, self.cache.free_rows
        end = self.cache.rows_total
        try:
            reservation = self.cache.reserve(branches, length)
        except PoolFull as error:
            assert self.limit is not None and (error.asked, error.limit) == (length, self.limit)
            assert f"{length} rows asked" in str(error) and f"limit of {self.limit}" in str(error)
            assert (self.cache.rows_used, self.cache.free_rows) == before
            # what was refused does not fit into the free runs and the room left at the end: whole blocks, or pages
            runs = dict(before[1])
            last = next((row for row, free in runs.items() if row + free == end), end)
            runs[last] = self.limit - last
            if self.page is None:
                assert sum(free // length for free in runs.values()) < len(branches)
            else:
                pages = [(row + free) // self.page - -(-row // self.page) for row, free in runs.items()]
                assert sum(max(n, 0) for n in pages) * self.page < len(branches) * length
            return
        except ValueError as error:
            assert "found rows from rows_of while the pools grow" in str(error) and self.cache.rows_total == end
            assert any(self.written.values()) and (self.cache.rows_used, self.cache.free_rows) == before
            return
        assert self.cache.rows_total == end or not any(self.written.values())
        assert self.cache.rows_used == before[0] + len(branches) * length
        self.written[reservation] = []

    @precondition(lambda self: self.written)
    @rule(pick=PICK)
    def write(self, pick: int) -> None:
        """The first layer through `write`, the second as a kernel does."""
        reservation = self.pending(pick)
        values = [[float(next(self.next_value)) for _ in range(reservation.length)] for _ in reservation.branches]
        block = torch.tensor(values, dtype=torch.float64)[..., None, None].expand(-1, -1, 1, 2)
        self.cache.write(reservation, 0, block, -block)
        rows = self.cache.rows_of(reservation, 1)
        assert rows.first_rows.ndim == (1 if self.page is None else 2)
        rows.k[rows.rows] = block.flatten(0, 1) + 0.5
        rows.v[rows.rows] = -block.flatten(0, 1) - 0.5
        self.written[reservation] = values

    @rule(picks=st.lists(PICK, min_size=1, max_size=3), length=LENGTH)
    def append(self, picks: list[int], length: int) -> None:
        """The common order, all at once."""
        before = list(self.written)
        self.reserve(picks, length)
        if len(self.written) > len(before):
            self.commit(-1)

    def _write_once(self, reservation: Reservation) -> list[list[float]]:
        if not self.written[reservation]:
            self.write(list(self.written).index(reservation))
        return self.written.pop(reservation)

    def _released(self, reservation: Reservation) -> bool:
        """A branch that is gone makes the reservation one that can only be cancelled."""
        gone = [branch for branch in reservation.branches if branch not in self.tokens]
        if gone:
            for end in (self.cache.commit, lambda r: self.cache.replace(r, 0)):
                with pytest.raises(ValueError, match="^branch \\d+: "):
                    end(reservation)
            self.cache.cancel(reservation)
            del self.written[reservation]
        return bool(gone)

    @precondition(lambda self: self.written)
    @rule(pick=PICK)
    def commit(self, pick: int) -> None:
        reservation = self.pending(pick)
        if self._released(reservation):
            return
        for branch, values in zip(reservation.branches, self._write_once(reservation), strict=True):
            tokens = self.tokens[branch]
            tokens.values.update(enumerate(values, tokens.length))
            tokens.length += reservation.length
        self.cache.commit(reservation)

    @precondition(lambda self: self.written)
    @rule(pick=PICK, place=PLACE)
    def replace(self, pick: int, place: float) -> None:
        reservation = self.pending(pick)
        if self._released(reservation):
            return
        shortest = min(self.tokens[branch].length for branch in reservation.branches)
        if shortest < reservation.length:
            with pytest.raises(ValueError, match="^branch \\d+: found tokens"):
                self.cache.replace(reservation, shortest)
            return
        start = round(place * (shortest - reservation.length))
        for branch, values in zip(reservation.branches, self._write_once(reservation), strict=True):
            self.tokens[branch].values.update(enumerate(values, start))
        self.cache.replace(reservation, start)

    @precondition(lambda self: self.written)
    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        reservation = self.pending(pick)
        self.cache.cancel(reservation)
        del self.written[reservation]

    @rule(pick=PICK, bounds=st.tuples(PLACE, PLACE))
    def drop(self, pick: int, bounds: tuple[float, float]) -> None:
        branch = self.branch(pick)
        start, stop = sorted(round(bound * self.tokens[branch].length) for bound in bounds)
        self.cache.drop(branch, start, stop)
        for token in range(start, stop):
            self.tokens[branch].values.pop(token, None)

    @precondition(lambda self: len(self.tokens) > 2)
    @rule(pick=PICK)
    def release(self, pick: int) -> None:
        branch = self.branch(pick)
        own, used = self.cache.memory(branch).own, self.cache.rows_used
        self.cache.release(branch)
        assert (used - self.cache.rows_used) * self.cache.row_nbytes == own
        del self.tokens[branch]

    @invariant()
    def every_branch_holds_what_it_was_given(self) -> None:
        for branch, tokens in self.tokens.items():
            assert self.cache.length(branch) == tokens.length
            ranges, expected = tokens.ranges(), torch.tensor(tokens.listed(), dtype=torch.float64)
            views = [self.cache.views([branch, branch], ranges)]
            if self.bound is not None and len(self.cache.segments(branch, ranges)) <= SLOTS:
                self.bound.update([branch], ranges)
                views.append(self.bound.views)
            for layer, layer_views in enumerate(zip(*views, strict=True)):
                for view in layer_views:
                    k, v = view.gather()
                    assert torch.equal(k[-1, :, 0, 0], expected + layer / 2)
                    assert torch.equal(v[0, :, 0, 1], -expected - layer / 2)

    @invariant()
    def accounts_are_exact(self) -> None:
        values = [value for tokens in self.tokens.values() for value in tokens.values.values()]
        reserved = sum(len(reservation.branches) * reservation.length for reservation in self.written)
        assert self.cache.rows_reserved == reserved
        assert self.cache.rows_used == len(set(values)) + reserved
        for branch, tokens in self.tokens.items():
            alone = sum(values.count(value) == 1 for value in tokens.values.values()) * self.cache.row_nbytes
            assert self.cache.memory(branch) == (alone, len(tokens.values) * self.cache.row_nbytes - alone)

    @invariant()
    def free_rows_are_sorted_disjoint_and_merged(self) -> None:
        free, total = self.cache.free_rows, self.cache.rows_total
        assert sum(length for _, length in free) == total - self.cache.rows_used
        assert all(length > 0 for _, length in free)
        assert all(row + length < after for (row, length), (after, _) in pairwise(free))
        assert not free or (free[0][0] >= 0 and sum(free[-1]) <= total)
        assert self.limit is None or total <= self.limit
        views = self.cache.views([self.branch(0)], [])
        assert all(len(pool) == total for view in views for pool in (view.k, view.v))

    def teardown(self) -> None:
        for reservation in self.written:
            self.cache.cancel(reservation)
        for branch in self.tokens:
            self.cache.release(branch)
        assert self.cache.rows_used == 0 and self.cache.branches == ()
        assert self.cache.free_rows == [(0, self.cache.rows_total)]


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


@pytest.mark.slow
class TestManyHistories(Histories.TestCase):
    settings = settings(max_examples=400, stateful_step_count=40, deadline=None)
