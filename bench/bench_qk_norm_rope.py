"""Norms of q and k, RoPE, and the write of k and v into the cache, of 8 chunks of Wan-1.3B."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.harness import OURS, Bench, Contender, Outputs, gradients
from csrc_triton import ForkableKVCache
from csrc_triton.kv_cache import CacheRows
from csrc_triton.qk_norm_rope import naive, qk_norm_rope, rope_tables
from csrc_triton.runtime import backend

EPS = 1e-6
BRANCHES, FRAMES = 8, 3


class Inputs:
    """q, k, v [B, L, dim] of one chunk a branch, norms' weights, angles, and the rows of a cache to write to."""

    def __init__(self, bench: Bench, dtype: torch.dtype, *, requires_grad: bool = False):
        rows, columns = bench.size(30, 2), bench.size(52, 3)
        self.heads, head_dim = bench.size(12, 2), bench.size(128, 32)
        self.length, dim = FRAMES * rows * columns, self.heads * head_dim

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device=bench.device, dtype=dtype).requires_grad_(requires_grad)

        self.q, self.k, self.v = (draw(BRANCHES, self.length, dim) for _ in range(3))
        self.weight_q, self.weight_k = draw(dim), draw(dim)
        cos, sin = rope_tables(head_dim, torch.arange(FRAMES, device=bench.device), rows, columns)
        self.rope = cos, sin
        cache = ForkableKVCache(
            1, self.heads, head_dim, rows=BRANCHES * self.length, dtype=dtype, device=bench.device
        )  # fmt: skip
        self.reservation = cache.reserve([cache.new_branch() for _ in range(BRANCHES)], self.length)
        self.write: CacheRows = cache.rows_of(self.reservation, 0)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.weight_q, self.weight_k]

    def ours(self, *, write: bool) -> tuple[Tensor, Tensor]:
        cached: dict[str, Any] = {"v": self.v.detach(), "write": self.write} if write else {}
        return qk_norm_rope(*self.leaves, self.rope, heads=self.heads, eps=EPS, **cached)

    def eager(self, *, write: bool) -> tuple[Tensor, Tensor]:
        with backend("torch"):
            return self.ours(write=write)

    def plain(self, *, write: bool) -> tuple[Tensor, Tensor]:
        """What torch.compile gets: the reference's maths, and an index for the rows."""
        q, _ = naive.norm_rope(self.q, self.weight_q, self.rope, self.heads, EPS)
        k, _ = naive.norm_rope(self.k, self.weight_k, self.rope, self.heads, EPS)
        if write:
            self.write.k[self.reservation.rows] = k.flatten(0, 1)
            self.write.v[self.reservation.rows] = self.v.view(k.shape).flatten(0, 1)
        return q, k

    def written(self) -> Outputs:
        """What the cache holds now."""
        rows, shape = self.reservation.rows, (BRANCHES, self.length, self.heads, -1)
        return {"cached k": self.write.k[rows].view(shape), "cached v": self.write.v[rows].view(shape)}

    def reference(self, dtype: torch.dtype, grads: tuple[Tensor, Tensor] | None) -> Outputs:
        """Outputs and what the cache is to hold, or with `grads` the gradients, by plain maths in `dtype`."""
        leaves = [t.detach().to(dtype).requires_grad_(grads is not None) for t in self.leaves]
        q, k, weight_q, weight_k = leaves
        rope = self.rope if dtype != torch.float64 else (self.rope[0].double(), self.rope[1].double())
        q_out, k_out = (
            naive.norm_rope(x, weight, rope, self.heads, EPS)[0] for x, weight in ((q, weight_q), (k, weight_k))
        )
        if grads is None:
            return {"q": q_out, "k": k_out, "cached k": k_out, "cached v": self.v.to(dtype).view(k_out.shape)}
        return named(torch.autograd.grad((q_out, k_out), leaves, [grad.to(dtype) for grad in grads]))


def named(found: tuple[Tensor, ...]) -> Outputs:
    return dict(zip(("dq", "dk", "dweight_q", "dweight_k"), found, strict=True))


def implementations(inputs: Inputs, *, write: bool) -> dict[str, Any]:
    compiled = torch.compile(inputs.plain, dynamic=False)
    return {
        OURS: lambda: inputs.ours(write=write),
        "torch eager": lambda: inputs.eager(write=write),
        "torch.compile": lambda: compiled(write=write),
    }


@torch.no_grad()
def test_forward_with_cache_write(bench: Bench) -> None:
    inputs = Inputs(bench, torch.bfloat16 if bench.real else torch.float32)

    def outputs(found: tuple[Tensor, Tensor]) -> Outputs:
        written = inputs.written()
        inputs.write.k.fill_(float("nan"))  # nothing is left for the next one
        inputs.write.v.fill_(float("nan"))
        return {"q": found[0], "k": found[1], **written}

    contenders = [
        Contender(name, run, outputs, nbytes=7.0 * inputs.q.nbytes, compiled=name == "torch.compile")
        for name, run in implementations(inputs, write=True).items()
    ]
    exact, same = (inputs.reference(dtype, None) for dtype in (torch.float64, inputs.q.dtype))
    bench.measure("qk_norm_rope", case("forward and cache write", inputs), contenders, exact, same)


def test_backward(bench: Bench) -> None:
    """Gradients of q, k and the norms' weights."""
    inputs = Inputs(bench, torch.bfloat16 if bench.real else torch.float32, requires_grad=True)
    shape = (BRANCHES, inputs.length, inputs.heads, inputs.q.shape[-1] // inputs.heads)
    grads = tuple(torch.randn(shape, device=bench.device, dtype=inputs.q.dtype) for _ in range(2))
    contenders = [
        Contender(
            name, gradients(inputs.leaves), named, lambda run=run: (run(), grads),
            nbytes=6.0 * inputs.q.nbytes, compiled=name == "torch.compile",  # reads q, k, dq, dk and writes two
        )
        for name, run in implementations(inputs, write=False).items()
    ]  # fmt: skip
    exact, same = (inputs.reference(dtype, (grads[0], grads[1])) for dtype in (torch.float64, inputs.q.dtype))
    bench.measure("qk_norm_rope", case("backward", inputs), contenders, exact, same)


def case(what: str, inputs: Inputs) -> str:
    dtype = str(inputs.q.dtype).removeprefix("torch.")
    return f"{what}, {BRANCHES} x {inputs.length} x {inputs.q.shape[-1]}, {inputs.heads} heads, {dtype}"
