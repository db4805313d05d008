"""Modulated LayerNorm (adaLN) and gated residual add of a diffusion transformer, apart and in one pass."""

from __future__ import annotations

from torch import Tensor

from csrc_triton import runtime
from csrc_triton.adaln import naive, ops
from csrc_triton.runtime import describe

MOST_FRAMES = 65_535  # of a batch row, and batch rows: the kernels' grid


def adaln(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, [B, F * T, dim], with a LayerNorm over dim without parameters.

    The fused path computes in fp32 and rounds once. Gradients reach x, shift and scale.

    Args:
        x: [B, F * T, dim], the tokens of F latent frames.
        shift, scale: [B, F, dim], one vector a frame; slices of a larger tensor are accepted.
        eps: added to the variance.

    Raises:
        ValueError: naming the argument.
    """
    _check_tokens("x", x, x)
    _check_vectors(x, shift=shift, scale=scale)
    _check_eps(eps)
    if _choose("adaln", x, shift, scale) == "triton":
        return ops.norm_op(x, None, None, shift, scale, eps)[0]
    return naive.adaln(x, shift, scale, eps)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y * gate, [B, F * T, dim].

    Args:
        x, y: [B, F * T, dim], one dtype and device.
        gate: [B, F, dim], one vector a frame; a slice of a larger tensor is accepted.

    Raises:
        ValueError: naming the argument.
    """
    _check_tokens("x", x, x)
    _check_tokens("y", y, x)
    _check_vectors(x, gate=gate)
    if _choose("gated_residual", x, gate) == "triton":
        return ops.gate_op(x, y, gate)
    return naive.gated_residual(x, y, gate)


def gated_residual_adaln(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """r = x + y * gate and LayerNorm(r) * (1 + scale) + shift: the end of one sublayer and the start of the next.

    One pass over memory: r is written once and not read again. The norm is that of r rounded to the dtype of x.
    Returns r and its norm, [B, F * T, dim].

    Args:
        x, y: [B, F * T, dim], one dtype and device.
        gate: [B, F, dim]; None for x + y.
        shift, scale: [B, F, dim], as for `adaln`.
        eps: added to the variance.

    Raises:
        ValueError: naming the argument.
    """
    _check_tokens("x", x, x)
    _check_tokens("y", y, x)
    _check_vectors(x, shift=shift, scale=scale, **({} if gate is None else {"gate": gate}))
    _check_eps(eps)
    if _choose("gated_residual_adaln", x, shift, scale, gate) == "triton":
        out, residual, _, _ = ops.norm_op(x, y, gate, shift, scale, eps)
        return residual, out
    residual = naive.gated_residual(x, y, gate)
    return residual, naive.adaln(residual, shift, scale, eps)


def gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """r = x + y * gate and LayerNorm(r) * weight + bias, [B, F * T, dim]: `gated_residual_adaln` for an affine norm.

    Args:
        x, y: [B, F * T, dim], one dtype and device.
        gate: [B, F, dim]; None for x + y.
        weight, bias: [dim], parameters of the LayerNorm.
        eps: added to the variance.

    Raises:
        ValueError: naming the argument.
    """
    _check_tokens("x", x, x)
    _check_tokens("y", y, x)
    if gate is not None:
        _check_vectors(x, gate=gate)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector.shape != x.shape[-1:] or vector.device != x.device or not vector.is_floating_point():
            found, accepted = describe(vector), f"floating point {tuple(x.shape[-1:])} on {x.device}"
            raise ValueError(f"{name}: found {found}; accepted: {accepted}")
        _check_contiguous(name, vector)
    _check_eps(eps)
    if _choose("gated_residual_norm", x, weight, bias, gate) == "triton":
        out, residual, _, _ = ops.norm_op(x, y, gate, bias, weight, eps)
        return residual, out
    residual = naive.gated_residual(x, y, gate)
    return residual, naive.affine_norm(residual, weight, bias, eps)


def _choose(op: str, x: Tensor, *vectors: Tensor | None) -> str:
    unfit = runtime.why_unfit(x, *vectors)
    if unfit is None and (
        max(x.shape[0], *(v.shape[1] for v in vectors if v is not None and v.ndim == 3), 1) > MOST_FRAMES
    ):
        unfit = f"more than {MOST_FRAMES} batch rows or frames"
    return runtime.choose(op, x.device, x.dtype, unfit=unfit)


def _check_eps(eps: float) -> None:
    if not eps >= 0:
        raise ValueError(f"eps: found {eps}; accepted: a number of at least 0")


def _check_tokens(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.ndim != 3 or not tensor.is_floating_point():
        raise ValueError(f"{name}: found {describe(tensor)}; accepted: floating point [B, F * T, dim]")
    if tensor.shape != x.shape or tensor.dtype != x.dtype or tensor.device != x.device:
        raise ValueError(f"{name}: found {describe(tensor)}; accepted: {describe(x)}, as x")
    _check_contiguous(name, tensor)


def _check_vectors(x: Tensor, **vectors: Tensor) -> None:
    batch, length, dim = x.shape
    frames = None
    for name, vector in vectors.items():
        fits = vector.ndim == 3 and vector.shape[0] == batch and vector.shape[2] == dim and vector.shape[1] > 0
        if not fits or vector.device != x.device or not vector.is_floating_point():
            accepted = f"floating point [{batch}, F, {dim}] on {x.device}"
            raise ValueError(f"{name}: found {describe(vector)}; accepted: {accepted}")
        frames = frames or vector.shape[1]
        if vector.shape[1] != frames or length % frames:
            accepted = f"one number of frames for all, that divides the {length} tokens of x"
            raise ValueError(f"{name}: found {vector.shape[1]} frames; accepted: {accepted}")
        _check_contiguous(name, vector)


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name}: found strides {tensor.stride()}; accepted: a contiguous last dimension")
