"""The arithmetic of the passes between a decoder's convolutions, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def total(x: Tensor, update: Tensor | None, bias: Tensor | None) -> Tensor:
    """x + update + bias in fp32; fp64 for fp64."""
    out = x if x.dtype.itemsize == 8 else x.float()
    if update is not None:
        out = out + update
    return out if bias is None else out + bias


def norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """SiLU(x / max(||x||, 1e-12) * sqrt(C) * gamma), the norm over the last dimension."""
    return F.silu(F.normalize(x, dim=-1) * gamma.numel() ** 0.5 * gamma)


def enlarge(x: Tensor, parts: int) -> Tensor:
    """Nearest-neighbour x2 of x [n, H, W, parts * C]: [n * parts, 2H, 2W, C]."""
    n, height, width, channels = x.shape
    split = x.view(n, height, 1, width, 1, parts, channels // parts)
    spread = split.expand(n, height, 2, width, 2, parts, channels // parts).permute(0, 5, 1, 2, 3, 4, 6)
    return spread.reshape(n * parts, 2 * height, 2 * width, channels // parts)
