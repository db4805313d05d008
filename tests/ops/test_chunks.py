"""The chunk object: what it computes is what views, writes and commits by hand compute, to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from csrc_triton import Chunk, ForkableKVCache, fork_attention, qk_norm_rope, runtime

HEADS, DIM, LAYERS, TOKENS = 2, 32, 3, 4

Layers = list[tuple[Tensor, Tensor, Tensor]]


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with runtime.backend(request.param):
        yield request.param


def made(device: torch.device, rows: int = 32, layers: int = LAYERS) -> ForkableKVCache:
    return ForkableKVCache(layers, HEADS, DIM, rows=rows, dtype=torch.float32, device=device)


def drawn(device: torch.device, batch: int, seed: int, layers: int = LAYERS) -> Layers:
    generator = torch.Generator(device).manual_seed(seed)
    shape = (layers, 3, batch, TOKENS, HEADS, DIM)
    own = torch.randn(shape, generator=generator, device=device)
    return [(q, k, v) for q, k, v in own]


def by_hand(
    cache: ForkableKVCache, branches: Sequence[int], own: Layers, ranges: Sequence[tuple[int, int]] | None = None
) -> list[Tensor]:
    """A chunk attended to and committed without the chunk object."""
    ranges = [(0, cache.length(branches[0]))] if ranges is None else ranges
    views = cache.views(branches, ranges) if cache.length(branches[0]) else None
    out = []
    with cache.reserve(branches, TOKENS) as reservation:
        for layer, (q, k, v) in enumerate(own):
            out.append(fork_attention(q, k, v, None if views is None else views[layer]))
            cache.write(reservation, layer, k, v)
        cache.commit(reservation)
    return out


def keys(cache: ForkableKVCache, branches: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    return [view.gather() for view in cache.views(branches, [(0, cache.length(branches[0]))])]


def equal(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_chunks_have_the_bits_of_views_writes_and_commits(device: torch.device, backend: str) -> None:
    plain, own = made(device), made(device)
    for cache in (plain, own):
        cache.new_branch()
    branches = [0]
    for step in range(3):
        drawing = drawn(device, len(branches), step)
        # the window of the third chunk is the first and half of the second
        attended = [(0, 4), (6, 8)] if step == 2 else None
        expected = by_hand(plain, branches, drawing, attended)
        with own.chunk(branches, TOKENS, attended=attended, commit=True) as chunk:
            assert chunk.start == step * TOKENS and (chunk.views is None) == (step == 0)
            found = [chunk.attend(layer, *drawing[layer]) for layer in (2, 0, 1)]
        assert equal([found[1], found[2], found[0]], expected)
        for one, two in zip(keys(own, branches), keys(plain, branches), strict=True):
            assert equal(one, two)
        if step == 0:
            branches = plain.fork(0, 2)
            assert own.fork(0, 2) == branches
    assert own.rows_used == plain.rows_used == 20 and own.rows_reserved == 0


def test_ops_that_write_themselves_are_not_written_again(device: torch.device, backend: str) -> None:
    cache = made(device)
    branch = cache.new_branch()
    width = HEADS * DIM
    q, k, v = torch.randn(3, 1, TOKENS, width, device=device)
    weight = torch.ones(width, device=device)
    angles = torch.randn(TOKENS, DIM // 2, device=device)
    with cache.chunk([branch], TOKENS, commit=True) as chunk:
        for layer in range(LAYERS):
            turned = qk_norm_rope(
                q, k, weight, weight, (angles.cos(), angles.sin()), heads=HEADS, eps=1e-6, v=v, write=chunk.rows(layer)
            )  # fmt: skip
            own = v.unflatten(-1, (HEADS, DIM))
            chunk.attend(layer, *turned, own + 1)  # other values: would be seen if they were written
            with pytest.raises(ValueError, match=rf"^layer: found {layer}, which is written; accepted .*: each layer"):
                chunk.rows(layer)
    for stored in keys(cache, [branch]):
        assert equal(stored, (turned[1], own))


def test_a_layer_without_keys_is_named_and_nothing_is_appended(device: torch.device) -> None:
    cache = made(device)
    branch = cache.new_branch()
    (q, k, v), *_ = drawn(device, 1, 0)
    with (
        pytest.raises(ValueError, match=r"found layers \[0, 2\] unwritten; accepted: all 3 layers written"),
        cache.chunk([branch], TOKENS, commit=True) as chunk,
    ):
        chunk.attend(1, q, k, v)
    assert (cache.length(branch), cache.rows_used, cache.rows_reserved) == (0, 0, 0)


def test_an_error_inside_cancels_the_reservation(device: torch.device) -> None:
    cache = made(device)
    branch = cache.new_branch()
    own = drawn(device, 1, 0)
    with pytest.raises(RuntimeError, match="stop"), cache.chunk([branch], TOKENS, commit=True) as chunk:
        for layer, tensors in enumerate(own):
            chunk.attend(layer, *tensors)
        assert cache.rows_reserved == TOKENS
        raise RuntimeError("stop")
    assert (cache.length(branch), cache.rows_used, cache.rows_reserved) == (0, 0, 0)


def test_steps_share_a_block_that_keeps_nothing(device: torch.device, backend: str) -> None:
    cache = made(device)
    branch = cache.new_branch()
    by_hand(cache, [branch], drawn(device, 1, 0))
    with cache.chunk([branch, branch], TOKENS) as chunk:
        for seed in (1, 2):
            own = drawn(device, 2, seed)
            views = cache.views([branch, branch], [(0, TOKENS)])
            expected = [fork_attention(*tensors, views[layer]) for layer, tensors in enumerate(own)]
            assert equal([chunk.attend(layer, *tensors) for layer, tensors in enumerate(own)], expected)
    assert (cache.length(branch), cache.rows_used) == (TOKENS, TOKENS)


@pytest.mark.parametrize("commit", [False, True])
def test_gradients_are_those_of_fork_attention(device: torch.device, backend: str, commit: bool) -> None:
    cache = made(device, layers=1)
    branch = cache.new_branch()
    by_hand(cache, [branch], drawn(device, 1, 0, layers=1))
    grad = torch.randn(1, TOKENS, HEADS, DIM, device=device)
    leaves = [t.requires_grad_() for t in drawn(device, 1, 1, layers=1)[0]]
    expected = torch.autograd.grad(fork_attention(*leaves, cache.views([branch], [(0, TOKENS)])[0]), leaves, grad)
    with cache.chunk([branch], TOKENS, commit=commit) as chunk:
        out = chunk.attend(0, *leaves)
    assert equal(torch.autograd.grad(out, leaves, grad), expected)
    assert not any(t.requires_grad for view in keys(cache, [branch]) for t in view)


def test_what_a_chunk_attends_to(device: torch.device) -> None:
    cache = made(device)
    short, long = cache.new_branch(), cache.new_branch()
    by_hand(cache, [short], drawn(device, 1, 0))
    for seed in (1, 2):
        by_hand(cache, [long], drawn(device, 1, seed))
    with pytest.raises(ValueError, match=r"^branches: found \(0, 1\) with \[4, 8\] tokens; accepted: one length"):
        cache.chunk([short, long], TOKENS)
    with cache.chunk([short, long], TOKENS, attended=[(0, 2), (2, 2)]) as chunk:
        assert chunk.views is not None and [len(runs) for runs in chunk.views.table.tolist()] == [1, 1]
        with pytest.raises(ValueError, match="^branches: found .* where `start` is not asked"):
            assert chunk.start
    with cache.chunk([short, long], TOKENS, attended=[]) as chunk:
        assert chunk.views is None
    with pytest.raises(ValueError, match=r"^branch 0: token 4 of range \[2, 5\) is not in the cache"):
        cache.chunk([short], TOKENS, attended=[(2, 5)])


def test_a_chunk_says_what_it_does_not_accept(device: torch.device) -> None:
    cache = made(device)
    branch = cache.new_branch()
    q, k, v = drawn(device, 1, 0)[0]
    with pytest.raises(ValueError, match=r"^tokens: found 0; accepted: at least 1 \(chunk of branches \(0,\)\)"):
        cache.chunk([branch], 0)
    with pytest.raises(ValueError, match="^branches: found none"):
        cache.chunk([], TOKENS)
    with pytest.raises(ValueError, match="^branch 7: not in the cache"):
        cache.chunk([7], TOKENS)
    chunk = cache.chunk([branch], TOKENS)
    assert isinstance(chunk, Chunk)
    with pytest.raises(ValueError, match=r"^chunk of branches \(0,\): found it not entered; accepted: inside its"):
        chunk.attend(0, q, k, v)
    with chunk:
        for layer in (-1, LAYERS):
            with pytest.raises(ValueError, match=f"^layer: found {layer}; accepted: 0 to 2"):
                chunk.attend(layer, q, k, v)
        with pytest.raises(ValueError, match=r"^q: found \(1, 3, 2, 32\); accepted: \[1, 4, heads, head_dim\]"):
            chunk.attend(0, q[:, 1:], k[:, 1:], v[:, 1:])
        with pytest.raises(ValueError, match="^k, v: found"):
            chunk.attend(0, q, k[:, 1:], v)
        with pytest.raises(ValueError, match="^rows: found a chunk with commit=False; accepted: commit=True"):
            chunk.rows(0)
    for late in (lambda: chunk.attend(0, q, k, v), lambda: chunk.rows(0)):
        with pytest.raises(ValueError, match=r"^chunk of branches \(0,\): found it closed"):
            late()
    with pytest.raises(ValueError, match="found it closed; accepted: entered once"):
        chunk.__enter__()
    with cache.chunk([branch], TOKENS, commit=True) as chunk:
        with pytest.raises(ValueError, match="^k, v: found"):
            chunk.attend(0, q, k[:, 1:], v)
        for layer, tensors in enumerate(drawn(device, 1, 0)):  # a call that raised wrote nothing
            chunk.attend(layer, *tensors)
            with pytest.raises(ValueError, match=f"^layer: found {layer} a second time; accepted with commit=True"):
                chunk.attend(layer, *tensors)
    assert cache.length(branch) == TOKENS
    with pytest.raises(ValueError, match="^branch 0: found twice"), cache.chunk([branch, branch], 1, commit=True):
        pass


def test_a_chunk_that_makes_the_pools_grow_reads_the_new_ones(device: torch.device, backend: str) -> None:
    cache, plain = made(device, rows=TOKENS), made(device)
    for each in (cache, plain):
        each.new_branch()
    first, second = (drawn(device, 1, seed) for seed in (0, 1))
    by_hand(plain, [0], first)
    by_hand(cache, [0], first)
    with cache.chunk([0], TOKENS, commit=True) as chunk:
        assert chunk.views is not None and chunk.views.addresses == cache.addresses
        assert equal([chunk.attend(layer, *each) for layer, each in enumerate(second)], by_hand(plain, [0], second))
