"""Fork attention in other shapes: groups of heads, heads of 64, little context, a token at a time, causal chunks."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import OURS, Bench, Contender, Outputs, gradients
from csrc_triton import CacheView, fork_attention
from csrc_triton.fork_attention import naive


@dataclass(frozen=True)
class Inputs:
    """q [B, Lq, heads, head_dim]; own k, v [B, Lk, kv_heads, head_dim]; one context [1, Lp, kv_heads, head_dim]."""

    q: Tensor
    k: Tensor
    v: Tensor
    past: tuple[Tensor, Tensor]
    block: int | None

    @property
    def keys(self) -> int:
        return self.k.shape[1] + self.past[0].shape[1]

    def concatenated(self) -> list[Tensor]:
        """Keys and values of every chunk, context first."""
        return [t.detach().requires_grad_(self.q.requires_grad) for t in naive.concatenate(self.k, self.v, self.past)]

    def mask(self) -> Tensor | None:
        if self.block is None:
            return None
        return naive.visible(self.q.shape[1], self.k.shape[1], self.past[0].shape[1], self.block, self.q.device)


def make_inputs(bench: Bench, name: str, *, requires_grad: bool) -> Inputs:
    chunk, block = bench.size(4680, 24), None
    dtype = torch.bfloat16 if bench.real else torch.float32
    heads, kv_heads, head_dim = bench.size(24, 4), bench.size(6, 1), bench.size(128, 32)
    branches, queries, own, past = bench.size(8, 2), chunk, chunk, 3 * chunk
    if name == "one token":
        queries, own, past = 1, 0, 4 * chunk
    elif name == "causal by chunk":
        branches, queries, own, past, block, kv_heads = bench.size(2, 1), 4 * chunk, 4 * chunk, 0, chunk, heads
    elif name == "heads of 64":
        kv_heads, head_dim = heads, head_dim // 2
    elif name != "4 heads a key":
        if "4 heads a key" not in name:
            heads = kv_heads = heads // 2
        past = chunk // 3 if "short context" in name else 0

    def draw(batch: int, length: int, heads: int) -> Tensor:
        return torch.randn(batch, length, heads, head_dim, device=bench.device, dtype=dtype)

    q = draw(branches, queries, heads)
    k, v = (draw(branches, own, kv_heads) for _ in range(2))
    leaves = (t.requires_grad_(requires_grad) for t in (q, k, v))
    return Inputs(*leaves, (draw(1, past, kv_heads), draw(1, past, kv_heads)), block)


def ours(given: Inputs) -> Tensor:
    past = given.past[0].shape[1]
    view = CacheView.of(given.past[0][0], given.past[1][0], [[(0, past)]]) if past else None
    return fork_attention(given.q, given.k, given.v, view, causal_block=given.block)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    grouped = q.shape[2] != k.shape[2]
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=grouped).transpose(1, 2)


def peers(given: Inputs) -> Iterator[tuple[str, Any, list[Tensor]]]:
    """Name, forward and leaves of each; they get the concatenated keys for free."""
    free, mask = given.concatenated(), given.mask()
    yield "SDPA", lambda: sdpa(given.q, free[0], free[1], mask), [given.q, *free]
    if mask is None and importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute"):
        from flash_attn.cute import flash_attn_func

        def flash_attention_4() -> Tensor:
            out = flash_attn_func(given.q, *free)
            return out[0] if isinstance(out, tuple) else out

        yield "flash-attn-4", flash_attention_4, [given.q, *free]


class Sample:
    """The first head of keys of the last chunk, with its queries."""

    def __init__(self, given: Inputs):
        self.given, self.group = given, given.q.shape[2] // given.k.shape[2]

    def of_queries(self, values: Tensor) -> Tensor:
        return values[-1:, :, : self.group]

    def of_keys(self, values: Tensor) -> Tensor:
        return values[-1:, values.shape[1] - self.given.k.shape[1] :, :1]

    def gradients(self, found: tuple[Tensor, ...]) -> Outputs:
        return {"dq": self.of_queries(found[0]), "dk": self.of_keys(found[1]), "dv": self.of_keys(found[2])}

    def reference(self, grad: Tensor | None, *, exact: bool) -> Outputs:
        """By plain maths in fp64, or by torch in the same precision."""
        given, dtype = self.given, torch.float64 if exact else self.given.q.dtype
        parts = self.of_queries(given.q), self.of_keys(given.k), self.of_keys(given.v)
        q, k, v = (t.detach().to(dtype).requires_grad_(grad is not None) for t in parts)
        past = given.past[0][:, :, :1].to(dtype), given.past[1][:, :, :1].to(dtype)
        if exact:
            out, _ = naive.fork_attention(q, k, v, past, q.shape[-1] ** -0.5, causal_block=given.block)
        else:
            out = sdpa(q, *naive.concatenate(k, v, past), given.mask())
        if grad is None:
            return {"out": out}
        found = torch.autograd.grad(out, (q, k, v), self.of_queries(grad).to(dtype))
        return dict(zip(("dq", "dk", "dv"), found, strict=True))


def case(direction: str, name: str, given: Inputs) -> str:
    batch, queries, heads, head_dim = given.q.shape
    of_keys = f"{given.past[0].shape[1]} shared + {given.k.shape[1]} own"
    return f"{direction}, {name}, B={batch}, {queries} queries, {of_keys}, {heads}/{given.k.shape[2]}x{head_dim}"


@pytest.mark.parametrize("name", ["4 heads a key", "heads of 64", "one token", "causal by chunk"])
def test_forward(bench: Bench, name: str) -> None:
    given = make_inputs(bench, name, requires_grad=False)
    sample = Sample(given)
    work = 4.0 * given.q[..., 0].numel() * given.keys * given.q.shape[3]
    contenders = [
        Contender(who, run, lambda out: {"out": sample.of_queries(out)}, flops=work if given.block is None else None)
        for who, run, _ in [(OURS, lambda: ours(given), []), *peers(given)]
    ]
    exact, same = (sample.reference(None, exact=each) for each in (True, False))
    bench.measure("fork_attention_shapes", case("forward", name, given), contenders, exact, same)


@pytest.mark.parametrize(
    "name", ["4 heads a key", "4 heads a key, short context", "short context", "no context", "causal by chunk"]
)
def test_backward(bench: Bench, name: str) -> None:
    given = make_inputs(bench, name, requires_grad=True)
    sample, grad = Sample(given), torch.randn_like(given.q)
    own = OURS, lambda: ours(given), [given.q, given.k, given.v]
    contenders = [
        Contender(who, gradients(leaves), sample.gradients, lambda run=run: (run(), grad))  # type: ignore[misc]
        for who, run, leaves in [own, *peers(given)]
    ]
    exact, same = (sample.reference(grad, exact=each) for each in (True, False))
    bench.measure("fork_attention_shapes", case("backward", name, given), contenders, exact, same, budget_s=3.0)
