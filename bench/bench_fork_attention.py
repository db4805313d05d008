"""Attention of B chunks to a context they share in a cache, and each to itself (480x832: 4,680 tokens a chunk)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.attention_peers import Inputs, Peer, peers, sdpa
from bench.harness import OURS, Bench, Contender, Outputs, gradients
from csrc_triton import ForkableKVCache, fork_attention
from csrc_triton.fork_attention import naive
from csrc_triton.runtime import backend

CHECKED_HEADS = 4  # (chunk, head) pairs whose rows are all compared: heads do not mix, so a sample is exact
FULL_BACKWARD = 2.5  # work of a backward with all gradients, in forwards


def make_inputs(bench: Bench, branches: int, chunks: int = 3, *, requires_grad: bool = False) -> Inputs:
    """Random q, k, v of `branches` chunks, and a context of `chunks` chunks that all of them share in a cache."""
    own, heads, head_dim = bench.size(4680, 24), bench.size(12, 2), bench.size(128, 32)
    dtype = torch.bfloat16 if bench.real else torch.float32

    def draw(batch: int, length: int) -> Tensor:
        return torch.randn(batch, length, heads, head_dim, device=bench.device, dtype=dtype)

    past_k, past_v = draw(1, chunks * own), draw(1, chunks * own)
    cache = ForkableKVCache(1, heads, head_dim, rows=chunks * own, dtype=dtype, device=bench.device)
    root = cache.new_branch()
    for k, v in zip(past_k.split(own, dim=1), past_v.split(own, dim=1), strict=True):
        reservation = cache.reserve([root], own)
        cache.write(reservation, 0, k, v)
        cache.commit(reservation)
    view = cache.views(cache.fork(root, branches), [(0, chunks * own)])[0]
    q, k, v = (draw(branches, own).requires_grad_(requires_grad) for _ in range(3))
    return Inputs(q, k, v, past_k, past_v, view)


class Sample:
    """The chunks and heads that are compared, of tensors [B, L, heads, head_dim]."""

    def __init__(self, inputs: Inputs):
        batch, _, heads, _ = inputs.q.shape
        pairs = list(itertools.product(range(batch), range(heads)))
        chosen = torch.randperm(len(pairs))[:CHECKED_HEADS].tolist()
        self.inputs, self.pairs = inputs, [pairs[i] for i in chosen]

    def __call__(self, values: Tensor) -> Tensor:
        own = values[:, -self.inputs.q.shape[1] :]  # of keys that hold the context first, the own ones
        return torch.stack([own[b, :, h] for b, h in self.pairs])

    def outputs(self, grad: Tensor | None, *, exact: bool) -> Outputs:
        """The output, or with a `grad` the gradients: by plain maths in fp64, or by torch in the same precision."""
        parts = [self._pair(b, h, grad, exact=exact) for b, h in self.pairs]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _pair(self, b: int, h: int, grad: Tensor | None, *, exact: bool) -> Outputs:
        given = self.inputs
        dtype = torch.float64 if exact else given.q.dtype
        q, k, v = (t[b : b + 1, :, h : h + 1].detach().to(dtype) for t in (given.q, given.k, given.v))
        past = tuple(t[:, :, h : h + 1].to(dtype) for t in (given.past_k, given.past_v))
        leaves = [t.requires_grad_(grad is not None) for t in (q, k, v)]
        if exact:
            out, _ = naive.fork_attention(q, k, v, past, q.shape[-1] ** -0.5)
        else:
            out = sdpa(q, *naive.concatenate(k, v, past), None)
        if grad is None:
            return {"out": out[:, :, 0]}
        found = torch.autograd.grad(out, leaves, grad[b : b + 1, :, h : h + 1].to(dtype))
        return {name: value[:, :, 0] for name, value in zip(("dq", "dk", "dv"), found, strict=True)}


def forward_flops(inputs: Inputs) -> float:
    batch, own, heads, head_dim = inputs.q.shape
    return 4.0 * batch * heads * own * (inputs.past_k.shape[1] + own) * head_dim


def backward_flops(inputs: Inputs) -> float:
    """What gradients of q, k and v need: three matmuls over the context, five over the own chunk."""
    batch, own, heads, head_dim = inputs.q.shape
    return 2.0 * batch * heads * own * (3 * inputs.past_k.shape[1] + 5 * own) * head_dim


def all_of(inputs: Inputs, *, backward: bool) -> Iterator[Peer]:
    own = inputs.q, inputs.k, inputs.v

    def eager() -> Tensor:
        with backend("torch"):
            return fork_attention(*own, inputs.view)

    yield Peer(OURS, lambda: fork_attention(*own, inputs.view), own)
    yield Peer("torch eager", eager, own)
    yield from peers(inputs, backward=backward)


@pytest.mark.parametrize(("branches", "chunks"), [(1, 3), (8, 3), (8, 6)])
def test_forward(bench: Bench, branches: int, chunks: int) -> None:
    inputs = make_inputs(bench, branches, chunks)
    sample, flops = Sample(inputs), forward_flops(inputs)
    contenders = [
        Contender(p.name, p.forward, lambda out: {"out": sample(out)}, flops=flops, compiled=p.compiled)
        for p in all_of(inputs, backward=False)
    ]
    exact, same = sample.outputs(None, exact=True), sample.outputs(None, exact=False)
    bench.measure("fork_attention", case("forward", inputs), contenders, exact, same)


@pytest.mark.parametrize("branches", [1, 8])
def test_backward(bench: Bench, branches: int) -> None:
    inputs = make_inputs(bench, branches, requires_grad=True)
    sample, grad = Sample(inputs), torch.randn_like(inputs.q)
    contenders = [_backward(p, inputs, sample, grad) for p in all_of(inputs, backward=True)]
    exact, same = sample.outputs(grad, exact=True), sample.outputs(grad, exact=False)
    bench.measure("fork_attention", case("backward", inputs), contenders, exact, same, budget_s=3.0)


def _backward(peer: Peer, inputs: Inputs, sample: Sample, grad: Tensor) -> Contender:
    def outputs(found: tuple[Tensor, ...]) -> Outputs:
        return {name: sample(value) for name, value in zip(("dq", "dk", "dv"), found, strict=True)}

    def setup() -> tuple[Any, ...]:
        made = peer.forward()
        return (made, grad) if peer.backward is None else (*made, grad)

    run = gradients(peer.leaves) if peer.backward is None else peer.backward
    flops = backward_flops(inputs) if peer.name == OURS else FULL_BACKWARD * forward_flops(inputs)
    return Contender(peer.name, run, outputs, setup, flops=flops, compiled=peer.compiled)


def case(direction: str, inputs: Inputs) -> str:
    batch, own, heads, head_dim = inputs.q.shape
    dtype = str(inputs.q.dtype).removeprefix("torch.")
    return f"{direction}, B={batch}, {inputs.past_k.shape[1]} shared + {own} own, {heads}x{head_dim}, {dtype}"
