"""Fork attention on kernels as custom ops of torch, so that it works under torch.compile and checkpointing.

Their implementations import Triton when they first run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from csrc_triton._registration import custom_op, differentiable


@custom_op("fork_attention")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context_k: Tensor | None,
    context_v: Tensor | None,
    table: Tensor | None,
    softmax_scale: float,
    index: Tensor | None = None,
    causal_block: int = 0,
) -> tuple[Tensor, Tensor]:
    """The output [B, Lq, heads, head_dim] and its fp32 log-sum-exp [B, heads, Lq].

    context_k, context_v: pools [rows, kv_heads, head_dim] with a table [P, S, 2], or, without a table, tensors
    [P, Lp, kv_heads, head_dim]. softmax_scale is positive. index [B]: the context of each batch row, for tensors
    without a table. causal_block: 0 for a whole own chunk.
    """
    from csrc_triton.fork_attention import selection
    from csrc_triton.fork_attention.tiles import Call, Past

    call = Call(q, k, v, Past.of(q, context_k, context_v, table, index), softmax_scale, causal_block)
    if selection.few_queries(call):
        from csrc_triton.fork_attention.portable import few

        return few.forward(call)
    if selection.hopper_serves(q, k, v, context_k, context_v, unfit=selection.why_not_shapes(call)):
        from csrc_triton.fork_attention.hopper import forward as hopper

        return hopper.forward(call)
    from csrc_triton.fork_attention.portable import forward as portable

    return portable.forward(call)


@forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context_k: Tensor | None,
    context_v: Tensor | None,
    table: Tensor | None,
    softmax_scale: float,
    index: Tensor | None = None,
    causal_block: int = 0,
) -> tuple[Tensor, Tensor]:
    branches, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((branches, heads, length), dtype=torch.float32)


@custom_op("fork_attention_backward")
def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context_k: Tensor | None,
    context_v: Tensor | None,
    table: Tensor | None,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    wants_q: bool,
    wants_kv: bool,
    index: Tensor | None = None,
    causal_block: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from those of the output and (None: zero) of the log-sum-exp; empty where not wanted."""
    from csrc_triton.fork_attention import selection
    from csrc_triton.fork_attention.tiles import Call, Past

    call = Call(q, k, v, Past.of(q, context_k, context_v, table, index), softmax_scale, causal_block)
    if selection.hopper_serves(q, k, v, context_k, context_v, unfit=selection.why_not_shapes(call)):
        from csrc_triton.fork_attention.hopper import backward as hopper

        return hopper.backward(call, out, lse, grad, grad_lse, wants_q, wants_kv)
    from csrc_triton.fork_attention.portable import backward as portable

    return portable.backward(call, out, lse, grad, grad_lse, wants_q, wants_kv)


@backward.register_fake
def _(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context_k: Tensor | None,
    context_v: Tensor | None,
    table: Tensor | None,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    wants_q: bool,
    wants_kv: bool,
    index: Tensor | None = None,
    causal_block: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = q.shape if wants_q else (0,), k.shape if wants_kv else (0,)
    return q.new_empty(sizes[0]), q.new_empty(sizes[1]), q.new_empty(sizes[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, context_k, context_v, table, ctx.softmax_scale, index, ctx.causal_block = inputs
    ctx.set_materialize_grads(False)
    # Contexts are kept outside of autograd's version check, which counts writes to any row of their storage: others go
    # on writing their own rows of it. The table and the index must not change before the backward pass.
    ctx.context = context_k, context_v
    ctx.save_for_backward(q, k, v, table, index, *output)


def _differentiate(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, table, index, out, lse = ctx.saved_tensors
    wants_q, wants_kv = ctx.needs_input_grad[0], ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    if grad is None:
        grad = torch.zeros_like(out)
    grad_q, grad_k, grad_v = backward(
        grad, grad_lse, q, k, v, *ctx.context, table, out, lse, ctx.softmax_scale, wants_q, wants_kv,
        index, ctx.causal_block,
    )  # fmt: skip
    found = grad_q if wants_q else None, grad_k if wants_kv else None, grad_v if wants_kv else None
    return *found, *[None] * 6


differentiable(forward, _differentiate, setup_context=_save)
