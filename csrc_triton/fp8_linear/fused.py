"""Rows rounded to float8_e4m3fn in one pass. A program takes a few rows whole, or one wide row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.fp8_linear.naive import LARGEST, LEAST

ELEMENTS = 4096  # of a program's short rows
TWICE_ROOT = 1.5957691216057308  # 2 sqrt(2 / pi), of the GELU's tanh approximation
CUBE = 0.044715


@triton.jit
def rows_kernel(
    x, values, scales, count, largest_value, least, twice_root, cube,
    GELU: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """values = x * (448 / largest) as bytes of float8_e4m3fn and scales = largest / 448, of each row [DIM]."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    channel = tl.arange(0, BLOCK)[None, :]
    keep = (row < count)[:, None] & (channel < DIM)
    at = row[:, None] * DIM + channel
    value = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
    if GELU:
        # x sigmoid(2 u) = x (1 + tanh(u)) / 2; an exponential that overflows gives 0
        value = value / (1.0 + tl.exp(-twice_root * (value + cube * value * value * value)))
    largest = tl.maximum(tl.max(tl.abs(value), axis=1), least)
    # divisions to nearest, as torch's: the same bits
    factor = tl.math.div_rn(tl.zeros_like(largest) + largest_value, largest)
    rounded = (value * factor[:, None]).to(tl.float8e4nv)
    tl.store(values + at, rounded.to(tl.uint8, bitcast=True), mask=keep)
    tl.store(scales + row, tl.math.div_rn(largest, tl.zeros_like(largest) + largest_value), mask=row < count)


def options(dim: int) -> dict[str, int]:
    """BLOCK, ROWS and num_warps for rows of this width."""
    block = triton.next_power_of_2(dim)
    return {"BLOCK": block, "ROWS": max(1, ELEMENTS // block), "num_warps": 8 if block <= ELEMENTS else 16}


def fp8_rows(x: Tensor, gelu: bool, values: Tensor, scales: Tensor) -> None:
    """x [..., K]; values uint8 [..., K]; scales fp32 [..., 1]; all contiguous."""
    dim = x.shape[-1]
    count, own = x.numel() // dim, options(dim)
    rows_kernel[(triton.cdiv(count, own["ROWS"]),)](
        x, values, scales, count, LARGEST, LEAST, TWICE_ROOT, CUBE, GELU=gelu, DIM=dim, **own
    )
