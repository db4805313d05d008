"""The fused kernels as custom ops of torch, so that they work under torch.compile and checkpointing.

There are two: `forward_op` has a gradient and writes no cache, `write_op` writes the cache and has no gradient. An op
that changes its arguments cannot have one. Their implementations import Triton when they first run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from csrc_triton._registration import custom_op, differentiable


def _like(of: Tensor, shape: tuple[int, ...] | torch.Size | None) -> Tensor:
    """To be filled; without elements where there is no shape."""
    return of.new_empty((0,) if shape is None else shape)


def _by_heads(x: Tensor, heads: int) -> tuple[int, ...]:
    return *x.shape[:2], heads, x.shape[2] // heads


@custom_op("qk_norm_rope")
def forward_op(
    q: Tensor,
    k: Tensor | None,
    weight_q: Tensor,
    weight_k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, L, heads, head_dim]; no elements where k is None."""
    from csrc_triton.qk_norm_rope import fused

    q_out = _like(q, _by_heads(q, heads))
    k_out = _like(q, None) if k is None else _like(k, _by_heads(k, heads))
    to_k = None if k is None else k_out
    head_dim = q.shape[2] // heads
    fused.forward(
        q, k, None, weight_q, weight_k, cos, sin, q_out, to_k, None, None, None, head_dim, eps, write_roped=True
    )
    return q_out, k_out


@forward_op.register_fake
def _(
    q: Tensor,
    k: Tensor | None,
    weight_q: Tensor,
    weight_k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return _like(q, _by_heads(q, heads)), _like(q, None) if k is None else _like(k, _by_heads(k, heads))


@custom_op("qk_norm_rope_write", mutates_args=("pool_k", "pool_v"))
def write_op(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    pool_k: Tensor,
    pool_v: Tensor,
    first_rows: Tensor,
    heads: int,
    eps: float,
    write_roped: bool,
) -> tuple[Tensor, Tensor]:
    """Writes K and V into the pools; returns queries and keys where q is given, else tensors without elements."""
    from csrc_triton.qk_norm_rope import fused

    q_out, k_out = (_like(k, None if q is None else _by_heads(k, heads)) for _ in range(2))
    to_q, to_k = (None, None) if q is None else (q_out, k_out)
    head_dim = k.shape[2] // heads
    fused.forward(
        q, k, v, weight_q, weight_k, cos, sin, to_q, to_k, pool_k, pool_v, first_rows, head_dim, eps, write_roped
    )
    return q_out, k_out


@write_op.register_fake
def _(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    pool_k: Tensor,
    pool_v: Tensor,
    first_rows: Tensor,
    heads: int,
    eps: float,
    write_roped: bool,
) -> tuple[Tensor, Tensor]:
    shape = None if q is None else _by_heads(k, heads)
    return _like(k, shape), _like(k, shape)


@custom_op("qk_norm_rope_backward")
def backward_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    wants_x: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of x (q or k) and of its weight; no elements where not wanted."""
    from csrc_triton.qk_norm_rope import fused

    return fused.backward(grad, x, weight, cos, sin, eps, wants_x, wants_weight)


@backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    wants_x: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    return _like(x, x.shape if wants_x else None), _like(weight, weight.shape if wants_weight else None)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.eps = inputs[-1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6])


def _differentiate(ctx: Any, grad_q: Tensor | None, grad_k: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, weight_q, weight_k, cos, sin = ctx.saved_tensors
    wants_q, wants_k, wants_weight_q, wants_weight_k = ctx.needs_input_grad[:4]
    dq, dweight_q = _side(grad_q, q, weight_q, cos, sin, ctx.eps, wants_q, wants_weight_q)
    dk, dweight_k = _side(grad_k, k, weight_k, cos, sin, ctx.eps, wants_k, wants_weight_k)
    return dq, dk, dweight_q, dweight_k, None, None, None, None


def _side(grad: Tensor | None, *arguments: Any) -> tuple[Tensor | None, Tensor | None]:
    """`backward_op` where a gradient came and one is wanted."""
    wants_x, wants_weight = arguments[-2:]
    if grad is None or not (wants_x or wants_weight):
        return None, None
    dx, dweight = backward_op(grad, *arguments)
    return dx if wants_x else None, dweight if wants_weight else None


differentiable(forward_op, _differentiate, setup_context=_save)
