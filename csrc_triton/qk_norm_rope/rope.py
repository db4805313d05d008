"""Rotary position embedding in the interleaved layout of Wan: adjacent channels form a pair."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates adjacent channel pairs (2i, 2i + 1) of x by the angle of their token and pair.

    The arithmetic is in fp32 (fp64 where x is), rounded once to the dtype of x.

    Args:
        x: [B, L, heads, head_dim].
        cos, sin: [L, head_dim / 2], of the angles; the same in every batch row and head.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)
