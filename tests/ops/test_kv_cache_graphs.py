"""Bound tables under fork attention: one captured CUDA graph for every chunk, and a host that never waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from kernel_checks import assert_as_good
from torch import Tensor

from csrc_triton import ForkableKVCache, fork_attention, runtime
from csrc_triton.fork_attention import naive
from csrc_triton.kv_cache import BoundTable, CacheRows

HEADS, LAYERS = 2, 2


class Rolling:
    """`branches` videos a chunk at a time: each chunk attends to its window through bound views and is committed."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, tokens: int, head_dim: int, page: int | None, branches: int = 3
    ):
        self.device, self.tokens, self.branches = device, tokens, branches
        self.cache = ForkableKVCache(
            LAYERS,
            HEADS,
            head_dim,
            rows=5 * branches * tokens,
            dtype=dtype,
            device=device,
            grow=False,
            page=page,
        )
        self.bound: BoundTable = self.cache.bind(branches, slots=4)
        self.places = self.cache.bind_rows(branches, tokens)
        shape = (LAYERS, 3, branches, tokens, HEADS, head_dim)
        self.qkv = torch.zeros(shape, device=device, dtype=dtype)
        self.out = torch.zeros_like(self.qkv[:, 0])

    def step(self) -> None:
        """What a graph captures: attention of every layer, and its K and V written to the reserved rows."""
        for layer in range(LAYERS):
            q, k, v = self.qkv[layer]
            self.out[layer] = fork_attention(q, k, v, self.bound.views[layer])
            self._store(self.places.rows[layer], k, v)

    def _store(self, rows: CacheRows, k: Tensor, v: Tensor) -> None:
        rows.k.index_copy_(0, rows.rows, k.flatten(0, 1))
        rows.v.index_copy_(0, rows.rows, v.flatten(0, 1))

    def roll(self, step: Callable[[], None], chunks: int) -> list[tuple[Tensor, Tensor, list[int]]]:
        """Per chunk: q, k, v; the output; the chunks attended to. The window is the first chunk and the last two."""
        own, tokens = self.cache, self.tokens
        root = own.new_branch()
        branches = own.fork(root, self.branches)
        seen = []
        for chunk in range(chunks):
            if chunk == 3:  # all go on from the first one
                forks = own.fork(branches[0], self.branches)
                for branch in branches:
                    own.release(branch)
                branches = forks
            window = list(range(chunk)) if chunk < 4 else [0, chunk - 2, chunk - 1]
            self.qkv.normal_()
            with own.reserve(branches, tokens) as reservation:
                self.bound.update(branches, [(c * tokens, (c + 1) * tokens) for c in window])
                self.places.update(reservation)
                step()
                own.commit(reservation)
            for branch in branches:
                if chunk > 2:
                    own.drop(branch, tokens, (chunk - 1) * tokens)
            seen.append((self.qkv.clone(), self.out.clone(), window))
        for branch in (root, *branches):
            own.release(branch)
        assert own.rows_used == 0
        return seen

    def check(self, seen: list[tuple[Tensor, Tensor, list[int]]]) -> None:
        """Against attention to the remembered K and V, concatenated."""
        for chunk, (qkv, out, window) in enumerate(seen):
            for layer in range(LAYERS):
                past = []
                for kind in (1, 2):
                    blocks = [seen[c][0][layer, kind] for c in window]
                    if chunk >= 3:  # of chunks before the fork, all have the first branch's
                        blocks = [b[:1].expand_as(b) if c < 3 else b for c, b in zip(window, blocks, strict=True)]
                    past.append(torch.cat(blocks, dim=1) if blocks else qkv[layer, kind, :, :0])
                inputs = [*qkv[layer].unbind(), *past]
                scale = self.qkv.shape[-1] ** -0.5
                exact, _ = naive.fork_attention(*(t.double() for t in inputs[:3]), _pair(inputs, torch.double), scale)
                with runtime.backend("torch"):
                    same = fork_attention(*inputs[:3], _pair(inputs, self.qkv.dtype))
                assert_as_good(f"chunk {chunk}, layer {layer}", out[layer], same, exact)


def _pair(inputs: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return inputs[3].to(dtype), inputs[4].to(dtype)


@pytest.mark.parametrize("page", [None, 2])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bound_views_serve_while_the_cache_fills_and_rolls(
    device: torch.device, backend: str, page: int | None
) -> None:
    with runtime.backend(backend):
        rolling = Rolling(device, torch.float32, tokens=6, head_dim=32, page=page)
        rolling.check(rolling.roll(rolling.step, chunks=6))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any wait of the host for the device inside is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def keep_busy(device: torch.device) -> None:
    """Work that the device is still at while the host goes on."""
    a = torch.ones(8192, 8192, device=device, dtype=torch.bfloat16)
    for _ in range(50):
        a @ a


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "page"), [(torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, 25)])
def test_one_captured_graph_serves_every_chunk(device: torch.device, dtype: torch.dtype, page: int | None) -> None:
    """Without a wait in between, so that the copies of several tables are in flight at once."""
    with runtime.backend("triton"):
        rolling = Rolling(device, dtype, tokens=100, head_dim=64, page=page)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            rolling.step()  # compiles; writes rows 0 to 99, which nobody holds yet
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            rolling.step()
        keep_busy(device)
        with no_waiting():
            seen = rolling.roll(graph.replay, chunks=9)
        rolling.check(seen)


@pytest.mark.gpu
def test_nothing_waits_for_the_device(device: torch.device) -> None:
    block = torch.ones(3, 4, HEADS, 4, device=device)
    keep_busy(device)
    with no_waiting():
        own = ForkableKVCache(LAYERS, HEADS, 4, rows=6, dtype=torch.float32, device=device)
        root = own.new_branch()
        forks = own.fork(root, 3)
        for _ in range(2):  # grows
            with own.reserve(forks, 4) as reservation:
                for layer in range(LAYERS):
                    own.write(reservation, layer, block, -block)
                own.commit(reservation)
        own.cancel(own.reserve(forks, 4))
        with own.reserve(forks, 4) as reservation:
            own.write(reservation, 0, block * 2, block)
            own.rows_of(reservation, 1).first_rows.add(1)
            own.replace(reservation, 3)
        own.drop(forks[0], 0, 2)
        found = own.views(forks, [(2, 5), (6, 8)])[0].gather()
        last = own.reserve(forks, 4)  # before tables are bound, from when on the pools are fixed
        bound, places = own.bind(3, 4), own.bind_rows(3, 4)
        bound.update(forks, [(2, 8)])
        places.update(last)
        again = bound.views[0].gather()
        own.release(forks[0])
        own.memory(forks[1])
    assert found[0][:, :, 0, 0].tolist() == [[1.0, 2.0, 2.0, 2.0, 1.0]] * 3
    assert again[0][:, :, 0, 0].tolist() == [[1.0, 2.0, 2.0, 2.0, 2.0, 1.0]] * 3
