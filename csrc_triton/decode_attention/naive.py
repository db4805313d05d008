"""Attention of new tokens in plain PyTorch, fp64 for fp64 inputs and else fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """As `csrc_triton.decode_attention`."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.unflatten(1, (k.shape[1], -1)).to(dtype)
    counted = torch.arange(k.shape[2], device=q.device) < lengths[:, None]
    scores = (grouped @ k.to(dtype).mT * scale).masked_fill(~counted[:, None, None], -torch.inf)
    weights = scores.softmax(-1).masked_fill((lengths == 0)[:, None, None, None], 0.0)
    return (weights @ v.to(dtype)).flatten(1, 2).to(q.dtype)
