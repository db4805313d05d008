"""A backward pass whose context was overwritten meanwhile is an error, with kernels as with torch; no other is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from csrc_triton import CacheView, ForkableKVCache, fork_attention, runtime

HEADS, DIM, TOKENS = 1, 32, 4
TAKEN = r"^context: found rows 0 to 3 handed out for writing since the view was made; accepted: a view whose branches"


@pytest.fixture(params=["torch", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with runtime.backend(request.param):
        yield request.param


def made(device: torch.device, rows: int = 12) -> tuple[ForkableKVCache, int]:
    """A cache and its branch of `TOKENS` tokens, in the first rows."""
    cache = ForkableKVCache(1, HEADS, DIM, rows=rows, dtype=torch.float32, device=device)
    branch = cache.new_branch()
    append(cache, branch)
    return cache, branch


def append(cache: ForkableKVCache, branch: int, tokens: int = TOKENS) -> None:
    block = torch.randn(1, tokens, HEADS, DIM, device=cache.views([branch], [])[0].k.device)
    with cache.reserve([branch], tokens) as reservation:
        cache.write(reservation, 0, block, block)
        cache.commit(reservation)


def leaves(device: torch.device) -> list[Tensor]:
    return [torch.randn(1, 3, HEADS, DIM, device=device, requires_grad=True) for _ in range(3)]


def seen(cache: ForkableKVCache, branch: int) -> CacheView:
    return cache.views([branch], [(0, TOKENS)])[0]


def released(cache: ForkableKVCache, branch: int) -> None:
    cache.release(branch)


def dropped(cache: ForkableKVCache, branch: int) -> None:
    cache.drop(branch, 0, TOKENS)


def replaced(cache: ForkableKVCache, branch: int) -> None:
    with cache.reserve([branch], TOKENS) as reservation:
        reservation.mark_written()
        cache.replace(reservation, 0)


@pytest.mark.parametrize("give_up", [released, dropped, replaced])
def test_rows_that_others_took_are_an_error(
    device: torch.device, give_up: Callable[[ForkableKVCache, int], None]
) -> None:
    cache, branch = made(device)
    view, own = seen(cache, branch), leaves(device)
    out = fork_attention(*own, view)
    expected = torch.autograd.grad(out.sum(), own, retain_graph=True)
    give_up(cache, branch)
    other = cache.new_branch()
    kept = torch.autograd.grad(out.sum(), own, retain_graph=True)  # the rows are free, and hold what they held
    assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))
    append(cache, other)  # takes them
    with pytest.raises(ValueError, match=TAKEN):
        out.sum().backward()
    assert own[0].grad is None
    with torch.no_grad(), pytest.raises(ValueError, match=TAKEN):
        fork_attention(*own, view)


def test_rows_that_others_reserved_and_gave_back_count_as_written(device: torch.device) -> None:
    cache, branch = made(device)
    out = fork_attention(*leaves(device), seen(cache, branch))
    cache.release(branch)
    cache.cancel(cache.reserve([cache.new_branch()], TOKENS))
    with pytest.raises(ValueError, match=TAKEN):
        out.sum().backward()


@pytest.mark.parametrize("of", ["output", "lse"])
def test_the_log_sum_exp_is_guarded_too(device: torch.device, of: str) -> None:
    cache, branch = made(device)
    out, lse = fork_attention(*leaves(device), seen(cache, branch), return_lse=True)
    cache.release(branch)
    append(cache, cache.new_branch())
    with pytest.raises(ValueError, match=TAKEN):
        (out if of == "output" else lse).sum().backward()


def test_rows_of_others_disturb_nobody(device: torch.device) -> None:
    """Other branches append, fork, drop and reuse what they freed; a share of a released branch stays."""
    cache, branch = made(device)
    fork, other = *cache.fork(branch, 1), cache.new_branch()
    own = leaves(device)
    out = fork_attention(*own, seen(cache, branch))
    expected = torch.autograd.grad(out.sum(), own, retain_graph=True)
    cache.release(branch)  # its fork holds the rows
    for _ in range(3):
        append(cache, other)
        append(cache, fork, 1)
        cache.drop(other, 0, cache.length(other))
    found = torch.autograd.grad(out.sum(), own)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_pools_that_grew_leave_the_old_ones_to_their_views(device: torch.device) -> None:
    cache, branch = made(device, rows=TOKENS)
    own = leaves(device)
    out = fork_attention(*own, seen(cache, branch))
    expected = torch.autograd.grad(out.sum(), own, retain_graph=True)
    cache.grow(2 * TOKENS)
    cache.release(branch)
    append(cache, cache.new_branch(), 2 * TOKENS)
    found = torch.autograd.grad(out.sum(), own)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_updated_table_is_an_error(device: torch.device) -> None:
    cache, branch = made(device)
    bound, own = cache.bind(1, 2), leaves(device)
    bound.update([branch], [(0, TOKENS)])
    out = fork_attention(*own, bound.views[0])
    out.sum().backward(retain_graph=True)
    bound.update([branch], [(0, TOKENS)])
    with pytest.raises(ValueError, match="^context: found its bound table updated since the call; accepted: `update`"):
        out.sum().backward()
    out = fork_attention(*own, bound.views[0])
    cache.release(branch)
    append(cache, cache.new_branch())
    with pytest.raises(ValueError, match=TAKEN):
        out.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_are_recomputed_and_checked(device: torch.device, reentrant: bool) -> None:
    cache, branch = made(device)
    own, view = leaves(device), seen(cache, branch)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fork_attention(q, k, v, view).sin()

    expected = torch.autograd.grad(call(*own).sum(), own)
    for taken in (False, True):
        out = checkpoint(call, *own, use_reentrant=reentrant)
        append(cache, cache.new_branch())
        if taken:
            cache.release(branch)
            append(cache, cache.new_branch())
            with pytest.raises(ValueError, match=TAKEN):
                out.sum().backward()
        else:
            out.sum().backward()
            assert all(torch.equal(t.grad, b) for t, b in zip(own, expected, strict=True))


def test_calls_without_gradients_and_views_of_plain_tensors_carry_no_check(device: torch.device) -> None:
    cache, branch = made(device)
    own = leaves(device)
    view = seen(cache, branch)
    with torch.no_grad():
        assert fork_attention(*own, view).grad_fn is None
    pools = view.k, view.v
    for plain in (CacheView.of(*pools, [[(0, TOKENS)]]), CacheView(*pools, view.table)):
        out = fork_attention(*own, plain)
        cache.reserve([cache.new_branch()], 1)
        out.sum().backward()


def test_models_compile_with_views_and_not_again_for_other_rows_or_lengths(device: torch.device) -> None:
    cache, branch = made(device, rows=64)
    own, graphs = leaves(device), []

    def counted(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    call = torch.compile(lambda *given: fork_attention(*given[:3], given[3]), backend=counted, fullgraph=True)
    for length in (4, 4, 6, 8, 10):
        append(cache, cache.new_branch(), 1)
        if length > cache.length(branch):
            append(cache, branch, length - cache.length(branch))
        view = cache.views([branch], [(0, length)])[0]
        found = torch.autograd.grad(call(*own, view).sum(), own)
        expected = torch.autograd.grad(fork_attention(*own, view).sum(), own)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(graphs) <= 3  # the first length, the first number of segments, and then any
