"""Pools that grow, up to a limit or not at all, and what is refused then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_cases import DIM, HEADS, cache, fill, keys
from torch import Tensor

from csrc_triton import PoolFull


def test_pools_grow_by_a_24th_or_as_needed_up_to_their_limit() -> None:
    large = cache(rows=96)
    fill(large, [large.new_branch()], 97, 1.0)
    assert large.rows_total == 100
    own = cache(rows=8, max_rows=12)
    branch = own.new_branch()
    fill(own, [branch], 4, 1.0)
    fill(own, [branch], 1, 2.0)
    assert own.rows_total == 8
    fill(own, [branch], 5, 3.0)
    assert own.rows_total == 10
    fill(own, [branch], 2, 4.0)
    assert own.rows_total == 12 and own.nbytes == 12 * own.row_nbytes
    assert keys(own, branch, (0, 12)) == [1.0] * 4 + [2.0] + [3.0] * 5 + [4.0] * 2
    own.drop(branch, 0, 1)
    own.drop(branch, 2, 3)
    found = r"found 2 rows asked, 10 used, the longest free run 1; accepted: up to a limit of 12 rows \(max_rows\)"
    with pytest.raises(PoolFull, match=f"branch {branch}: {found}") as full:
        own.reserve([branch], 2)
    assert (full.value.asked, full.value.used, full.value.free, full.value.limit) == (2, 10, 1, 12)
    assert isinstance(full.value, ValueError) and own.rows_peak == 12


def test_pools_do_not_move_while_rows_are_handed_out() -> None:
    """A kernel that writes later would write into the old pools."""
    own = cache(rows=4)
    one, two = own.new_branch(), own.new_branch()
    block = torch.ones(1, 2, HEADS, DIM)
    reservation = own.reserve([one], 2)
    own.write(reservation, 1, block, block)
    fill(own, [two], 3, 3.0)  # grows: what `write` stored goes along
    rows = own.rows_of(reservation, 0)
    before = own.free_rows, own.rows_total, own.addresses
    for act in (lambda: own.reserve([two], 9), lambda: own.grow(9)):
        with pytest.raises(
            ValueError, match=r"^reservation of branches \(0,\), rows \(0,\) \+ 2: found rows from rows_of"
        ):
            act()
        assert (own.free_rows, own.rows_total, own.addresses) == before
    rows.k[rows.rows] = 1.0
    own.commit(reservation)
    fill(own, [two], 9, 4.0)
    assert keys(own, one, (0, 2)) == [1.0, 1.0] and own.views([one], [(0, 2)])[1].gather()[0].eq(1.0).all()


def test_pools_grow_when_they_are_told_and_keep_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    own = cache(rows=4, max_rows=20)
    branch = own.new_branch()
    fill(own, [branch], 3, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            own.grow(12)
    assert own.rows_total == 4 and own.free_rows == [(3, 1)]
    own.grow(12)
    places = own.addresses
    fill(own, [branch], 9, 2.0)
    own.grow(6)  # they are larger
    assert own.addresses == places and own.nbytes == 12 * own.row_nbytes
    assert keys(own, branch, (2, 4)) == [1.0, 2.0]
    with pytest.raises(ValueError, match="rows: found 21; accepted: up to 20"):
        own.grow(21)
    own.bind(1, 1)
    with pytest.raises(ValueError, match="rows: found 13; accepted: up to 12"):
        own.grow(13)


@pytest.mark.parametrize("bound", [False, True])
def test_fixed_pools_refuse_what_does_not_fit_and_change_nothing(bound: bool) -> None:
    own = cache(rows=8, grow=bound)
    if bound:
        own.bind(2, 3)
    one, two = own.new_branch(), own.new_branch()
    fill(own, [one, two], 2, 1.0)
    before = own.free_rows
    with pytest.raises(ValueError, match=rf"branch {two}: found 3 rows asked, 7 used, .* limit of 8 .*are fixed"):
        own.reserve([one, two], 3)
    assert own.free_rows == before == [(4, 4)] and own.rows_reserved == 0


def test_growth_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    own = cache(rows=4)
    branch = own.new_branch()
    fill(own, [branch], 3, 1.0)

    def full(*_: Any, **__: Any) -> Tensor:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", full)
        with pytest.raises(MemoryError):
            own.reserve([branch], 9)
    assert own.rows_total == 4 and own.free_rows == [(3, 1)]
    fill(own, [branch], 9, 2.0)
    assert keys(own, branch, (2, 4)) == [1.0, 2.0]
