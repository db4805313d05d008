"""The forkable cache: rows are shared, never copied, never leaked, never seen by the wrong branch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_cases import CPU, DIM, HEADS, LAYERS, cache, fill, keys
from torch.utils._python_dispatch import TorchDispatchMode

from csrc_triton import CacheView, ForkableKVCache


def test_a_fork_shares_rows_and_diverges_afterwards() -> None:
    own = cache()
    branch = own.new_branch()
    fill(own, [branch], 3, 1.0)
    used = own.rows_used
    left, right = own.fork(branch, 2)
    assert own.rows_used == used == 3
    fill(own, [left], 1, 5.0)
    fill(own, [right], 1, 7.0)
    k, v = own.views([left, right], [(0, 4)])[1].gather()
    assert k[:, :3].eq(2.0).all() and k[0, 3].eq(6.0).all() and k[1, 3].eq(8.0).all()
    assert v[0, 3].eq(-6.0).all()
    assert own.length(branch) == 3


class Recorder(TorchDispatchMode):
    """Every torch operation that is run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_fork_of_24_branches_takes_under_a_millisecond_and_copies_nothing() -> None:
    """Nine context frames of 1,560 tokens in 30 layers, committed in chunks of three and split by other branches."""
    own = ForkableKVCache(30, 1, 2, rows=16 * 1560, dtype=torch.bfloat16, device=CPU)
    root, other = own.new_branch(), own.new_branch()
    for _ in range(3):
        for branch, tokens in ((root, 3 * 1560), (other, 10)):
            reservation = own.reserve([branch], tokens)
            reservation.mark_written()
            own.commit(reservation)
    assert len(own.segments(root, [(0, 9 * 1560)])) == 3
    used, seconds = own.rows_used, []
    for _ in range(5):
        with Recorder() as recorder:
            began = time.perf_counter()
            forks = own.fork(root, 24)
            seconds.append(time.perf_counter() - began)
        assert recorder.seen == [] and own.rows_used == used
        for fork in forks:
            own.release(fork)
    assert min(seconds) < 1e-3
    own.release(root)
    assert own.rows_used == 30


def test_a_partial_drop_frees_exactly_the_rows_that_nobody_holds() -> None:
    own = cache(rows=10)
    branch = own.new_branch()
    fill(own, [branch], 10, 1.0)
    other = own.fork(branch, 1)[0]
    own.drop(branch, 2, 7)
    assert own.free_rows == []
    own.drop(other, 4, 9)
    assert own.free_rows == [(4, 3)]
    assert own.memory(branch) == (2 * own.row_nbytes, 3 * own.row_nbytes)  # rows 7, 8; rows 0, 1, 9
    assert own.memory(other) == (2 * own.row_nbytes, 3 * own.row_nbytes)  # rows 2, 3; rows 0, 1, 9
    own.release(other)
    assert own.free_rows == [(2, 5)]
    own.drop(branch, 0, 10)
    assert own.free_rows == [(0, 10)] and own.length(branch) == 10
    fill(own, [branch], 2, 3.0)  # the next tokens follow those that were dropped
    assert own.length(branch) == 12 and keys(own, branch, (10, 12)) == [3.0, 3.0]


def test_memory_is_counted_by_row() -> None:
    own = ForkableKVCache(3, 2, 4, rows=6, dtype=torch.bfloat16, device=CPU)
    row = 3 * 2 * 2 * 4 * 2  # layers, K and V, heads, head_dim, bytes
    assert own.row_nbytes == row and own.nbytes == 6 * row
    branch = own.new_branch()
    with own.reserve([branch], 2) as reservation:
        assert (own.rows_used, own.rows_reserved) == (2, 2)
        assert own.memory(branch) == (0, 0)
        reservation.mark_written()
        own.commit(reservation)
    assert (own.rows_used, own.rows_reserved, own.memory(branch)) == (2, 0, (2 * row, 0))
    own.fork(branch, 2)
    assert own.memory(branch) == (0, 2 * row)


def test_blocks_follow_their_branch_where_they_can() -> None:
    own = cache(rows=12)
    one, two = own.new_branch(), own.new_branch()
    fill(own, [one], 2, 1.0)
    fill(own, [one], 2, 2.0)
    fill(own, [two], 2, 3.0)
    assert own.segments(one, [(0, 4)]) == [(0, 4)]  # one segment
    fill(own, [one], 2, 4.0)
    assert own.segments(one, [(0, 6)]) == [(0, 4), (6, 2)]
    own.drop(one, 0, 2)
    fill(own, [two], 2, 5.0)  # rows 6, 7 are taken: the first run that is long enough
    assert own.segments(two, [(0, 4)]) == [(4, 2), (0, 2)]
    own.drop(two, 0, 2)
    fill(own, [one], 2, 6.0)  # rows 8, 9 follow it, though 4, 5 are free
    assert own.segments(one, [(2, 8)]) == [(2, 2), (6, 4)]
    assert keys(own, one, (2, 8)) == [2.0, 2.0, 4.0, 4.0, 6.0, 6.0]


def test_the_table_lists_the_segments() -> None:
    own = cache(rows=16)
    one, two = own.new_branch(), own.new_branch()
    for value in (1.0, 2.0, 3.0):
        fill(own, [one, two], 2, value)
    view = own.views([one, two], [(0, 1), (2, 4), (5, 6)])[1]
    assert view.table.dtype == torch.int32
    assert view.table.tolist() == [[[0, 1], [4, 2], [9, 1]], [[2, 1], [6, 2], [11, 1]]]
    assert view.gather()[0][:, :, 0, 0].tolist() == [[2.0, 3.0, 3.0, 4.0]] * 2
    assert own.views([one], [])[0].table.tolist() == [[[0, 0]]]
    assert own.views([one], [])[0].gather()[0].shape == (1, 0, HEADS, DIM)


def test_replace_rewrites_the_past_of_one_branch_only() -> None:
    own = cache(rows=32)
    branch = own.new_branch()
    fill(own, [branch], 4, 1.0)
    other = own.fork(branch, 1)[0]
    own.drop(branch, 1, 2)
    with own.reserve([branch], 2) as reservation:
        block = torch.full((1, 2, HEADS, DIM), 9.0)
        for layer in range(LAYERS):
            own.write(reservation, layer, block, block)
        own.replace(reservation, 1)
    assert keys(own, branch, (0, 4)) == [1.0, 9.0, 9.0, 1.0]
    assert keys(own, other, (0, 4)) == [1.0] * 4
    assert own.length(branch) == 4 and own.rows_used == 6


def test_what_fails_before_its_commit_leaves_nothing() -> None:
    own = cache()
    branch = own.new_branch()
    fill(own, [branch], 2, 1.0)
    with pytest.raises(RuntimeError, match="stop"), own.reserve([branch], 3) as reservation:
        own.write(reservation, 0, torch.zeros(1, 3, HEADS, DIM), torch.zeros(1, 3, HEADS, DIM))
        raise RuntimeError("stop")
    assert reservation.state == "cancelled"
    assert (own.rows_used, own.rows_reserved, own.length(branch)) == (2, 0, 2)


def test_committed_rows_are_not_written_again() -> None:
    own = cache()
    branch = own.new_branch()
    reservation = own.reserve([branch], 1)
    block = torch.ones(1, 1, HEADS, DIM)
    for layer in range(LAYERS):
        own.write(reservation, layer, block, block)
    own.commit(reservation)
    late: list[Callable[[], Any]] = [
        lambda: own.write(reservation, 0, block * 2, block),
        lambda: own.rows_of(reservation, 0),
        lambda: own.bind_rows(1, 1).update(reservation),
        lambda: own.commit(reservation),
        lambda: own.replace(reservation, 0),
        lambda: own.cancel(reservation),
    ]
    for call in late:
        with pytest.raises(
            ValueError, match=r"branches \(0,\), rows \(0,\) \+ 1: already committed; accepted: an open"
        ):
            call()
    assert keys(own, branch, (0, 1)) == [1.0]
    cancelled = own.reserve([branch], 1)
    own.cancel(cancelled)
    with pytest.raises(ValueError, match="already cancelled"):
        own.commit(cancelled)
    with pytest.raises(ValueError, match="of another cache"):
        cache().commit(own.reserve([branch], 1))


def test_views_of_all_layers_share_one_table() -> None:
    own = cache()
    branch = own.new_branch()
    fill(own, [branch], 4, 1.0)
    views = own.views([branch, branch], [(1, 3)])
    assert len(views) == own.layers == len(list(views)) and views.addresses == own.addresses
    assert all(view.table is views.table for view in views)
    with pytest.raises(IndexError):
        views[own.layers]
    wider = views.with_table(torch.nn.functional.pad(views.table, (0, 0, 0, 3)))
    for view, other in zip(views, wider, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(view.gather(), other.gather(), strict=True))


def test_rows_of_says_where_a_kernel_writes() -> None:
    own = cache()
    one, two = own.new_branch(), own.new_branch()
    fill(own, [one], 2, 1.0)
    reservation = own.reserve([two, one], 2)
    for layer in range(LAYERS):
        rows = own.rows_of(reservation, layer)
        assert rows.first_rows.dtype == torch.int64 and rows.length == 2
        for first, value in zip(rows.first_rows.tolist(), (5.0, 6.0), strict=True):
            rows.k[first : first + rows.length] = value + layer
        rows.v[reservation.rows] = torch.tensor([-5.0, -5.0, -6.0, -6.0])[:, None, None] - layer
    own.commit(reservation)
    assert keys(own, one, (0, 4)) == [1.0, 1.0, 6.0, 6.0]
    assert keys(own, two, (0, 2)) == [5.0, 5.0]
    assert own.views([two], [(0, 2)])[1].gather()[1].eq(-6.0).all()


def test_a_write_does_not_disturb_a_backward_that_waits() -> None:
    own = cache()
    branch = own.new_branch()
    fill(own, [branch], 2, 3.0)
    q = torch.ones(2, HEADS, DIM, requires_grad=True)
    out = q * own.views([branch], [(0, 2)])[0].k[:2]  # autograd saves the pool itself
    fill(own, [branch], 2, 5.0)
    out.sum().backward()
    assert q.grad is not None and q.grad.eq(3.0).all()


def test_bound_tables_stay_where_they_are() -> None:
    own = cache(rows=24)
    bound, places = own.bind(2, 3), own.bind_rows(2, 2)
    address, views, first_rows = bound.table.data_ptr(), list(bound.views), places.rows[0].first_rows.data_ptr()
    assert bound.table.tolist() == [[[0, 0]] * 3] * 2  # nothing is attended to yet
    one, two = own.new_branch(), own.new_branch()
    for value in (1.0, 2.0, 3.0):
        fill(own, [one, two], 2, value)
    bound.update([one, two], [(0, 1), (2, 4)])
    assert bound.table.tolist() == [[[0, 1], [4, 2], [0, 0]], [[2, 1], [6, 2], [0, 0]]]
    assert views[1].gather()[0][1, :, 0, 0].tolist() == [2.0, 3.0, 3.0]
    for branch in (two, one, two):
        fill(own, [branch], 1, 4.0)
    bound.update([one, two], [(0, 6)])
    with pytest.raises(ValueError, match=rf"branch {two}: found 4 segments in rows .* at most 3, the slots"):
        bound.update([two, two], [(0, 8)])
    assert bound.table.tolist() == [[[0, 2], [4, 2], [8, 2]], [[2, 2], [6, 2], [10, 2]]]
    with pytest.raises(ValueError, match="branches: found 1; accepted: 2"):
        bound.update([one], [])
    with own.reserve([two, one], 2) as reservation:
        places.update(reservation)
        assert places.rows[1].first_rows.tolist() == list(reservation.first_rows)
    with pytest.raises(ValueError, match="found 1 branches of 2 tokens; accepted: 2 and 2, as bound"):
        places.update(own.reserve([one], 2))
    bound.update([two, one], [])
    assert bound.table.sum() == 0
    assert (bound.table.data_ptr(), places.rows[0].first_rows.data_ptr()) == (address, first_rows)
    assert all(view.table.data_ptr() == address for view in bound.views)


def test_views_of_foreign_pools() -> None:
    k, v = torch.randn(6, HEADS, DIM), torch.randn(6, HEADS, DIM)
    view = CacheView.of(k, v, [[(4, 2), (1, 1)], [(0, 3)]])
    assert view.table.tolist() == [[[4, 2], [1, 1]], [[0, 3], [0, 0]]]
    for one in (view, CacheView(k, v, view.table)):
        assert torch.equal(one.gather()[0], torch.stack([k[[4, 5, 1]], k[:3]]))
        assert torch.equal(one.gather()[1], torch.stack([v[[4, 5, 1]], v[:3]]))
    for segments in ([[(0, 1)], [(5, 2)]], [[], [(-1, 1)]]):
        with pytest.raises(ValueError, match=r"segments of batch row 1: found .* rows in \[0, 6\)"):
            CacheView.of(k, v, segments)
    with pytest.raises(ValueError, match="segments of batch row 0: found 7 rows from row 0"):
        CacheView(k, v, torch.tensor([[[0, 7]]], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"table: found \(1, 2\) torch.int64"):
        CacheView(k, v, torch.tensor([[0, 7]]))
    with pytest.raises(ValueError, match="table: found strides"):
        CacheView(k, v, torch.zeros(1, 2, 4, dtype=torch.int32)[..., ::2])
    with pytest.raises(ValueError, match="k, v: found .* accepted: two alike"):
        CacheView.of(k, v[:5], [[]])
    endless = torch.empty(2**31, 1, 1, device="meta")
    with pytest.raises(ValueError, match="k, v: found 2147483648 rows; accepted: up to 2147483647"):
        CacheView.of(endless, endless, [[(0, 1)]])
    with pytest.raises(ValueError, match="k, v: found strides"):
        CacheView.of(k.transpose(1, 2), v.transpose(1, 2), [[]])
    with pytest.raises(ValueError, match=r"gather: found contexts of \[1, 2\] tokens; accepted: one length"):
        CacheView.of(k, v, [[(0, 1)], [(0, 2)]]).gather()


def test_errors_name_the_branch() -> None:
    own = cache()
    branch = own.new_branch()
    fill(own, [branch], 2, 1.0)
    with pytest.raises(ValueError, match=f"branch {branch}: token 2 of range \\[0, 3\\) is not in the cache"):
        own.views([branch], [(0, 3)])
    for start, stop in ((1, 3), (-1, 1), (2, 1)):
        with pytest.raises(ValueError, match=rf"branch {branch}: found tokens \[{start}, {stop}\); accepted: within"):
            own.drop(branch, start, stop)
    with pytest.raises(ValueError, match=f"branch {branch}: found twice"):
        own.reserve([branch, own.new_branch(), branch], 1)
    for call in (own.reserve, own.views):
        with pytest.raises(ValueError, match="branches: found none"):
            call([], 1)
    with pytest.raises(ValueError, match="length: found 0"):
        own.reserve([branch], 0)
    pending = own.reserve([branch], 2)
    with pytest.raises(ValueError, match=rf"branch {branch}: found tokens \[1, 3\)"):
        own.replace(pending, 1)
    own.release(branch)
    for name in (branch, 99):
        for act in (own.length, own.release, own.memory, lambda b: own.fork(b, 1), lambda b: own.reserve([b], 1)):
            with pytest.raises(ValueError, match=f"branch {name}: not in the cache"):
                act(name)
    with pytest.raises(ValueError, match=f"branch {branch}: not in the cache"):
        own.commit(pending)
    own.cancel(pending)
    assert own.rows_used == 0
    with pytest.raises(ValueError, match="accepted: at least 1"):
        own.fork(own.new_branch(), 0)


def test_layers_that_were_not_written_are_named() -> None:
    own = cache()
    branch = own.new_branch()
    fill(own, [branch], 2, 1.0)
    block = torch.ones(1, 2, HEADS, DIM)
    reservation = own.reserve([branch], 2)
    for end in (own.commit, lambda r: own.replace(r, 0)):
        with pytest.raises(ValueError, match=r"rows \(2,\) \+ 2: found layers \[0, 1\] unwritten; accepted: all 2"):
            end(reservation)
    with pytest.raises(ValueError, match="k: found"):
        own.write(reservation, 0, block[:, :1], block)
    own.write(reservation, 1, block, block)
    with pytest.raises(ValueError, match=r"found layers \[0\] unwritten"):
        own.commit(reservation)
    assert (own.length(branch), reservation.state) == (2, "open")
    own.rows_of(reservation, 0).k[2:4] = 5.0  # rows that were asked for count as written
    own.commit(reservation)
    assert keys(own, branch, (2, 4)) == [5.0, 5.0]
    for declare in (lambda r: r.mark_written(), own.bind_rows(1, 2).update):  # a graph's writes are not seen
        reservation = own.reserve([branch], 2)
        declare(reservation)
        own.commit(reservation)
    assert own.length(branch) == 8


def test_errors_name_the_argument() -> None:
    own = cache()
    block = torch.zeros(1, 2, HEADS, DIM)
    reservation = own.reserve([own.new_branch()], 2)
    with pytest.raises(ValueError, match=r"k: found \(1, 1, 2, 4\) on cpu; accepted: \(1, 2, 2, 4\) .*branches \(0,\)"):
        own.write(reservation, 0, block[:, :1], block)
    with pytest.raises(ValueError, match=r"v: found .* on meta"):
        own.write(reservation, 0, block, block.to("meta"))
    for layer in (-1, 2):
        with pytest.raises(ValueError, match=f"layer: found {layer}; accepted: 0 to 1"):
            own.write(reservation, layer, block, block)
    with pytest.raises(ValueError, match="layers, heads, head_dim, rows: found"):
        cache(rows=0)
    with pytest.raises(ValueError, match="rows, max_rows: found 8, 7"):
        cache(max_rows=7)
    with pytest.raises(ValueError, match="rows, max_rows: found 8, 2147483648"):
        cache(max_rows=2**31)
    with pytest.raises(ValueError, match="dtype: found torch.int32"):
        ForkableKVCache(1, 1, 1, rows=1, dtype=torch.int32, device=CPU)
    with pytest.raises(ValueError, match="batch, slots: found 0, 1"):
        own.bind(0, 1)
    with pytest.raises(ValueError, match="batch, length: found 1, 0"):
        own.bind_rows(1, 0)
