"""Blocks of whole pages: no free page is out of reach, and rows that lie scattered hold what was written."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from csrc_triton import ForkableKVCache, PoolFull
from csrc_triton._rows import RowCounts, Run
from csrc_triton.kv_cache import Reservation

HEADS, DIM, LAYERS, PAGE = 2, 4, 2, 3
CPU = torch.device("cpu")


def cache(rows: int, **options: Any) -> ForkableKVCache:
    return ForkableKVCache(LAYERS, HEADS, DIM, rows=rows, dtype=torch.float32, device=CPU, page=PAGE, **options)


def fill(own: ForkableKVCache, branches: list[int], pages: int, value: float) -> None:
    """K of token t of batch row b is value + b / 2 + t / 100, in every layer; V its negative."""
    tokens = value + torch.arange(pages * PAGE) / 100
    block = torch.stack([tokens + row / 2 for row in range(len(branches))])[..., None, None].expand(-1, -1, HEADS, DIM)
    with own.reserve(branches, pages * PAGE) as reservation:
        for layer in range(LAYERS):
            own.write(reservation, layer, block, -block)
        own.commit(reservation)


def scattered(**options: Any) -> tuple[ForkableKVCache, int]:
    """Eight pages; a branch holds the even ones, the others are free."""
    own = cache(8 * PAGE, **options)
    branch = own.new_branch()
    fill(own, [branch], 8, 1.0)
    for page in (1, 3, 5, 7):
        own.drop(branch, page * PAGE, (page + 1) * PAGE)
    return own, branch


def test_a_block_takes_pages_wherever_they_lie() -> None:
    own, branch = scattered(grow=False)
    one, two = own.new_branch(), own.new_branch()
    fill(own, [one, two], 2, 5.0)
    assert own.free_rows == []
    assert own.segments(one, [(0, 6)]) == [(3, 3), (9, 3)] and own.segments(two, [(0, 6)]) == [(15, 3), (21, 3)]
    k, v = own.views([one, two], [(0, 6)])[1].gather()
    expected = 5.0 + torch.arange(6) / 100
    assert torch.equal(k[:, :, 0, 0], torch.stack([expected, expected + 0.5])) and torch.equal(v, -k)
    kept = own.views([branch], [(page * PAGE, (page + 1) * PAGE) for page in (0, 2, 4, 6)])[0].gather()[0]
    assert torch.equal(kept[0, :, 0, 0], (1.0 + torch.arange(24) / 100).view(8, 3)[::2].flatten())
    own.release(one)
    own.cancel(own.reserve([two], PAGE))
    assert own.free_rows == [(3, 3), (9, 3)] and own.rows_peak == 8 * PAGE


def test_kernels_are_told_the_first_row_of_every_page() -> None:
    own, _ = scattered()
    one, two = own.new_branch(), own.new_branch()
    reservation = own.reserve([two, one], 2 * PAGE)
    rows = own.rows_of(reservation, 0)
    assert rows.first_rows.tolist() == [[3, 9], [15, 21]] and rows.first_rows.dtype == torch.int64
    assert rows.rows.tolist() == reservation.rows.tolist() == [3, 4, 5, 9, 10, 11, 15, 16, 17, 21, 22, 23]
    assert str(reservation) == "reservation of branches (2, 1), rows (((3, 3), (9, 3)), ((15, 3), (21, 3)))"
    reservation.mark_written()
    own.commit(reservation)
    own.drop(one, 0, PAGE)
    own.drop(two, 0, PAGE)
    bound = own.bind_rows(1, 2 * PAGE)
    with own.reserve([one], 2 * PAGE) as reservation:
        bound.update(reservation)
        assert bound.rows[1].first_rows.tolist() == [[3, 15]]
        rows = bound.rows[1]
        rows.k[rows.rows] = rows.v[rows.rows] = 9.0
        own.replace(reservation, 0)
    assert own.views([one], [(0, 2 * PAGE)])[1].gather()[0].eq(9.0).all()


def test_blocks_are_copied_together_where_they_lie_together() -> None:
    """Whole blocks behind each other are one copy; a part of a block is none with its neighbour."""

    def copies(*blocks: tuple[Run, ...]) -> list[tuple[slice, slice, int]]:
        own = Reservation(tuple(range(len(blocks))), blocks, 4, torch.zeros(len(blocks), 2), lambda _: None, 1)
        return own.copies

    whole, first, last = slice(0, 4), slice(0, 2), slice(2, 4)
    assert copies(((0, 4),), ((4, 4),), ((9, 4),)) == [(slice(0, 2), whole, 0), (slice(2, 3), whole, 9)]
    assert copies(((0, 4),), ((4, 2), (8, 2))) == [
        (slice(0, 1), whole, 0),
        (slice(1, 2), first, 4),
        (slice(1, 2), last, 8),
    ]
    assert copies(((0, 2), (4, 2)), ((6, 4),)) == [
        (slice(0, 1), first, 0),
        (slice(0, 1), last, 4),
        (slice(1, 2), whole, 6),
    ]


@pytest.mark.parametrize(
    ("free", "length", "near", "page", "expected"),
    [
        ([(0, 4), (10, 2)], 2, None, None, ((10, 2),)),  # the shortest that fits
        ([(0, 4), (10, 4)], 2, 10, None, ((10, 2),)),  # what follows the branch, before a shorter one
        ([(0, 4), (10, 2)], 3, 10, None, ((0, 3),)),
        ([(0, 4), (10, 2)], 5, None, None, None),  # without pages in one run
        ([(0, 4), (10, 2)], 4, 10, 2, ((0, 4),)),  # with pages the first ones
        ([(0, 4), (10, 2)], 6, 10, 2, ((0, 4), (10, 2))),
        ([(0, 2), (4, 6), (12, 4)], 8, None, 2, ((0, 2), (4, 6))),
        ([(1, 4), (7, 2)], 2, 7, 2, ((2, 2),)),  # pages begin at multiples of their size
        ([(1, 2), (5, 2), (9, 1)], 2, None, 2, None),
        ([(3, 5)], 4, 3, 2, ((4, 4),)),
    ],
)
def test_where_blocks_lie(
    free: list[tuple[int, int]], length: int, near: int | None, page: int | None, expected: Any
) -> None:
    books = RowCounts(20)
    books.add(0, 20, 1)
    for row, rows in free:
        books.add(row, rows, -1)
    assert books.place(length, near, page) == expected and books.free() == free


def test_rows_do_not_depend_on_the_size_of_the_pools() -> None:
    """A run that resumes, or a process that has seen other videos, must not sum over keys in another order."""
    small, large = cache(4 * PAGE), cache(400 * PAGE)
    branches = small.new_branch(), small.new_branch()
    assert branches == (large.new_branch(), large.new_branch())
    draw = random.Random(0)
    for _ in range(60):
        branch, pages = draw.choice(branches), draw.randint(1, 3)
        first = draw.randint(0, small.length(branch) // PAGE)
        last = min(first + draw.randint(0, 4), small.length(branch) // PAGE)
        for own in (small, large):
            own.drop(branch, first * PAGE, last * PAGE)
            fill(own, [branch], pages, 1.0)
    assert small.rows_total < large.rows_total
    for branch in branches:
        found = [own._branches[branch].segments for own in (small, large)]
        assert found[0] == found[1] and len(found[0]) > 4


def test_a_full_pool_says_how_many_rows_are_free() -> None:
    own, branch = scattered(max_rows=8 * PAGE + 2)
    own.drop(branch, 0, 1)  # no whole page
    found = "found 15 rows asked, 11 used, 12 free in pages of 3; accepted: up to a limit of 24 rows"
    with pytest.raises(PoolFull, match=rf"^branch {branch}: {found} \(max_rows\)$") as full:
        own.reserve([branch], 5 * PAGE)
    assert (full.value.asked, full.value.used, full.value.free, full.value.limit) == (15, 11, 12, 24)
    own.reserve([branch], 4 * PAGE)


def test_pools_grow_by_what_is_short() -> None:
    own, branch = scattered()
    fill(own, [branch], 5, 2.0)
    assert own.rows_total == 9 * PAGE and own.free_rows == [] and own.rows_peak == 9 * PAGE
    own.grow(10 * PAGE - 2)
    assert own.rows_total == 10 * PAGE
    large = cache(32 * PAGE)
    fill(large, [large.new_branch()], 32, 1.0)
    fill(large, [large.new_branch()], 1, 1.0)  # a 24th are 4 rows, of which one page is whole
    assert large.rows_total == 33 * PAGE and large.free_rows == []


def test_sizes_that_pages_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="^page: found 3; accepted: a number that divides rows, 10, or None"):
        cache(10)
    with pytest.raises(ValueError, match="^page: found 0"):
        ForkableKVCache(1, 1, 1, rows=4, dtype=torch.float32, device=CPU, page=0)
    own = cache(6)
    assert own.page == PAGE and own.rows_total == 6
    for call in (lambda: own.reserve([own.new_branch()], 4), lambda: own.bind_rows(1, 4)):
        with pytest.raises(ValueError, match="^length: found 4; accepted: a multiple of 3, the rows of a page"):
            call()
    assert own.rows_used == 0
