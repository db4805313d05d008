"""The fused kernels as custom ops of torch, so that they work under torch.compile and checkpointing.

Their implementations import Triton when they first run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from csrc_triton._registration import custom_op, differentiable


def _like(of: Tensor, wanted: bool) -> Tensor:
    """To be filled; without elements where not wanted."""
    return of.new_empty(of.shape if wanted else (0,))


@custom_op("adaln")
def norm_op(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The norm and the residual [B, L, dim] (no elements without y), mean and rstd [B, L] in fp32.

    shift, scale, gate [B, F, dim]; or shift, scale [dim], which then stand for bias and weight.
    """
    from csrc_triton.adaln import fused

    return fused.norm(x, y, gate, shift, scale, eps)


@norm_op.register_fake
def _(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return _like(x, True), _like(x, y is not None), mean, rstd


@custom_op("adaln_backward")
def norm_backward_op(
    grad: Tensor,
    grad_residual: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, gate, shift and scale, without elements where `wants` says so.

    x is what was normed. Without a gate y has the gradient of x, and only that of x may be wanted.
    """
    from csrc_triton.adaln import fused

    return fused.norm_backward(grad, grad_residual, x, y, gate, shift, scale, mean, rstd, wants)


@norm_backward_op.register_fake
def _(
    grad: Tensor,
    grad_residual: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dgate = x.new_empty(0) if gate is None else _like(gate, wants[2])
    return _like(x, wants[0]), _like(x, wants[1]), dgate, _like(shift, wants[3]), _like(scale, wants[4])


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, gate, shift, scale, _ = inputs
    _, residual, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.added = y is not None
    # y, as large as x, is needed for the gradient of the gate alone
    kept = y if ctx.needs_input_grad[2] else None
    ctx.save_for_backward(x if y is None else residual, kept, gate, shift, scale, mean, rstd)


def _differentiate_norm(
    ctx: Any, grad: Tensor | None, grad_residual: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, y, gate, shift, scale, mean, rstd = ctx.saved_tensors
    needs_x, needs_y, *needs_vectors = ctx.needs_input_grad[:5]
    gated = gate is not None
    wants = [needs_x or (needs_y and not gated), needs_y and gated, *needs_vectors]
    if grad is None:
        grad = torch.zeros_like(x)
    if not ctx.added:
        grad_residual = None  # of a tensor without elements
    found = norm_backward_op(grad, grad_residual, x, y, gate, shift, scale, mean, rstd, wants)
    dx, dy, *vectors = (gradient if want else None for gradient, want in zip(found, wants, strict=True))
    return dx if needs_x else None, dy if gated else dx if needs_y else None, *vectors, None


differentiable(norm_op, _differentiate_norm, setup_context=_save_norm)


@custom_op("gated_residual")
def gate_op(x: Tensor | None, y: Tensor, factor: Tensor) -> Tensor:
    """x + y factor, or y factor; x, y [B, F * T, dim], factor [B, F, dim]."""
    from csrc_triton.adaln import fused

    return fused.gate(x, y, factor)


@gate_op.register_fake
def _(x: Tensor | None, y: Tensor, factor: Tensor) -> Tensor:
    return _like(y, True)


@custom_op("gated_residual_backward")
def gate_backward_op(grad: Tensor, y: Tensor, factor: Tensor, wants_y: bool) -> tuple[Tensor, Tensor]:
    """Gradients of y (no elements where not wanted) and of factor."""
    from csrc_triton.adaln import fused

    return fused.gate_backward(grad, y, factor, wants_y)


@gate_backward_op.register_fake
def _(grad: Tensor, y: Tensor, factor: Tensor, wants_y: bool) -> tuple[Tensor, Tensor]:
    return _like(y, wants_y), _like(factor, True)


def _save_gate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, y, factor = inputs
    ctx.save_for_backward(y if ctx.needs_input_grad[2] else None, factor)


def _differentiate_gate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, factor = ctx.saved_tensors
    needs_x, needs_y, needs_factor = ctx.needs_input_grad
    dy = dfactor = None
    if needs_factor:
        dy, dfactor = gate_backward_op(grad, y, factor, needs_y)
    elif needs_y:
        dy = gate_op(None, grad, factor)
    return grad if needs_x else None, dy if needs_y else None, dfactor


differentiable(gate_op, _differentiate_gate, setup_context=_save_gate)
