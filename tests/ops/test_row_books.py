"""The cache's books on the host, number by number."""

from __future__ import annotations

import pytest

from csrc_triton._rows import Handouts, RowCounts, Segment, cut_out, join, laid, locate


def test_segments_that_go_on_in_tokens_and_rows_are_one() -> None:
    assert join([Segment(4, 9, 2), Segment(0, 5, 4)]) == (Segment(0, 5, 6),)
    apart = (Segment(0, 5, 4), Segment(4, 10, 2)), (Segment(0, 5, 4), Segment(6, 9, 2))  # other rows, tokens dropped
    for segments in apart:
        assert join(segments) == segments
    assert join(laid([(5, 2), (7, 1), (3, 2)], 10)) == (Segment(10, 5, 3), Segment(13, 3, 2))


def test_tokens_are_cut_out_of_the_segments_that_hold_them() -> None:
    held = Segment(0, 5, 4), Segment(6, 20, 4)
    assert cut_out(held, 1, 3) == ((Segment(0, 5, 1), Segment(3, 8, 1), held[1]), [(6, 2)])
    assert cut_out(held, 3, 7) == ((Segment(0, 5, 3), Segment(7, 21, 3)), [(8, 1), (20, 1)])
    assert cut_out(held, 0, 10) == ((), [(5, 4), (20, 4)])
    for nothing in ((4, 6), (2, 2), (10, 12)):
        assert cut_out(held, *nothing) == (held, [])


def test_ranges_are_located_in_as_few_runs_as_there_are() -> None:
    held = Segment(0, 5, 4), Segment(4, 20, 2), Segment(8, 22, 2)
    assert locate(held, [(0, 2), (2, 4)]) == [(5, 4)]
    assert locate(held, [(1, 6), (8, 10)]) == [(6, 3), (20, 4)]
    assert locate(held, [(8, 9), (0, 1), (3, 3)]) == [(22, 1), (5, 1)]
    for lost, token in (((5, 9), 6), ((-1, 1), -1), ((9, 11), 10)):
        with pytest.raises(ValueError, match=rf"^token {token} of range \[{lost[0]}, {lost[1]}\) is not in the cache"):
            locate(held, [lost])


def test_counts_are_kept_in_runs_that_never_touch_their_like() -> None:
    books = RowCounts(10)
    for row, length, change in ((2, 6, 1), (4, 2, 2), (0, 2, 1)):
        books.add(row, length, change)
    assert books.runs(1, 8) == [((1, 3), 1), ((4, 2), 3), ((6, 2), 1), ((8, 1), 0)]
    assert books.free() == [(8, 2)] and books.used == 8 and books.free_at_the_end() == 2
    books.add(4, 2, -2)
    assert books.runs(0, 10) == [((0, 8), 1), ((8, 2), 0)]
    books.add(8, 2, 1)
    assert books.free_at_the_end() == 0
    books.resize(13)
    assert books.free() == [(10, 3)]
    books.resize(10)
    assert books.free() == [] and books.used == 10
    books.add(3, 2, -1)
    assert books.free() == [(3, 2)] and books.used == 8
    with pytest.raises(AssertionError, match="row 3 released more often than held"):
        books.add(3, 1, -1)


def test_the_last_hand_out_of_every_row_counts() -> None:
    books = Handouts(10)
    assert books.latest == 0 and books.since([(0, 10)], 0) is None
    books.add([(2, 3), (7, 1)])
    books.add([(4, 2)])
    assert books.latest == 2
    assert books.since([(0, 10)], 0) == (2, 2) and books.since([(0, 2), (5, 4)], 0) == (5, 1)
    assert books.since([(0, 10)], 1) == (4, 2) and books.since([(2, 2), (6, 4)], 1) is None
    books.add([(2, 6)])
    assert books.since([(0, 3)], 2) == (2, 1) and books.since([(0, 2), (8, 2)], 0) is None
    assert books.runs(0, 10) == [((0, 2), 0), ((2, 6), 3), ((8, 2), 0)]
