"""Rows rounded to float8_e4m3fn and their matrix product, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 448.0  # of float8_e4m3fn
LEAST = 1e-12  # that a row is divided by in place of a smaller absolute value


def fp8_rows(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """Values float8_e4m3fn [..., K] and scales fp32 [..., 1]; x is their product up to rounding."""
    rows = x.float()
    if gelu:
        rows = F.gelu(rows, approximate="tanh")
    largest = rows.abs().amax(-1, keepdim=True).clamp_min(LEAST)
    # of two tensors: torch multiplies a number's reciprocal, or by it, which rounds once more
    limit = torch.full_like(largest, LARGEST)
    # of a row's largest value the product is at most 448 (1 + 2^-23), which rounds to 448; NaN stays NaN
    return (rows * (limit / largest)).to(torch.float8_e4m3fn), largest / limit


def fp8_linear(
    values: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(values * scales) (weight * weight_scales)^T + bias, summed in fp32 whatever autocast asks for, rounded once."""
    with torch.autocast(values.device.type, enabled=False):
        out = F.linear(values.float() * scales, weight.float() * weight_scales)
        return (out if bias is None else out + bias).to(dtype)
