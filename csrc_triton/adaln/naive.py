"""The arithmetic of Wan's modulated norms and gates, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def normalise(x: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension without parameters; fp32 inside, rounded to the dtype of x."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift; x [B, F * T, dim], shift and scale [B, F, dim] of each frame."""
    frames = x.unflatten(1, (shift.shape[1], -1))
    return (frames * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2).to(x.dtype)


def gate(y: Tensor, factor: Tensor) -> Tensor:
    """y times its frame's gate [B, F, dim]."""
    return (y.unflatten(1, (factor.shape[1], -1)) * factor[:, :, None]).flatten(1, 2)


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return modulate(normalise(x, eps), shift, scale)


def gated_residual(x: Tensor, y: Tensor, factor: Tensor | None) -> Tensor:
    return (x + (y if factor is None else gate(y, factor))).to(x.dtype)


def affine_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm with the weights of the norm before cross-attention."""
    if weight.dtype == bias.dtype == x.dtype:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(x.dtype)  # autocast would leave fp32
    return (normalise(x, eps) * weight + bias).to(x.dtype)
