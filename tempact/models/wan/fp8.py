"""Linears of the transformer in float8, for videos alone: weights and inputs have scales by rows, sums are fp32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from csrc_triton import Fp8Rows, fp8_linear, fp8_rows


class Fp8Linear(nn.Module):
    """A linear without gradients, whose weight is rounded to float8_e4m3fn once and whose input is at every call.

    weight: [N, K]; bias: [N]; dtype: of inputs before they are rounded, and of outputs.
    """

    values: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        rows = fp8_rows(weight.detach())
        self.dtype = dtype
        self.register_buffer("values", rows.values)
        self.register_buffer("scales", rows.scales)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def rounded(self, x: Tensor) -> Fp8Rows:
        """The rows of x [..., K] as `forward` takes them, for several linears of one input."""
        return fp8_rows(x.to(self.dtype))

    def forward(self, x: Tensor | Fp8Rows) -> Tensor:
        """[..., N] of x [..., K] or its rounded rows."""
        rows = x if isinstance(x, Fp8Rows) else self.rounded(x)
        return fp8_linear(rows, Fp8Rows(self.values, self.scales, self.dtype), self.bias)

    def feed_forward(self, up: nn.Module, x: Tensor) -> Tensor:
        """self(gelu(up(x))), tanh approximation; the hidden rows are read once."""
        return self(fp8_rows(up(x), gelu=True))
