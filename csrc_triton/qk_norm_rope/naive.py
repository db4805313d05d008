"""The arithmetic of Wan's query and key norms and of its rotary embedding, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from csrc_triton.qk_norm_rope.rope import rotate


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension; fp32 inside, fp64 for fp64."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (F.rms_norm(wide, wide.shape[-1:], eps=eps).to(x.dtype) * weight).to(x.dtype)


def norm_rope(
    x: Tensor, weight: Tensor, rope: tuple[Tensor, Tensor] | None, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """x [B, L, dim] normed over all channels, by heads [B, L, heads, head_dim]: with RoPE, and without."""
    plain = norm(x, weight, eps).unflatten(-1, (heads, -1))
    return plain if rope is None else rotate(plain, *rope), plain
