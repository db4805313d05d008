"""The fused kernel as a custom op of torch. Its implementation imports Triton when it first runs."""

from __future__ import annotations

import torch
from torch import Tensor

from csrc_triton._registration import custom_op


@custom_op("fp8_rows")
def fp8_rows_op(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """As `fp8_linear.fp8_rows`, with the values as bytes: few functions of torch know float8."""
    from csrc_triton.fp8_linear import fused

    values, scales = _rows(x)
    fused.fp8_rows(x.contiguous(), gelu, values, scales)
    return values, scales


@fp8_rows_op.register_fake
def _(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    return _rows(x)


def _rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
