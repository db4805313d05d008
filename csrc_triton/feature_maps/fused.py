"""One pass over feature maps whose channels lie together: sums, the norm over channels, SiLU, nearest-neighbour x2.

A program takes a few positions with all of their channels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

NORM_ELEMENTS, ENLARGE_ELEMENTS = 4096, 2048  # of one program
EPS = 1e-12  # the least length that a position is divided by
WARPS = 8


@triton.jit
def norm_silu_kernel(
    x, update, bias, gamma, total, out, x_batch, update_batch, total_batch, out_batch, positions, root, eps,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """total = x + update + bias and out = SiLU(norm(that)), zero in channels DIM to WIDTH of out.

    None: update and bias where there are none, gamma for no norm, total where it is not wanted.
    """
    batch = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    there = row < positions
    keep = there & (channel < DIM)
    at = row * DIM + channel
    value = tl.load(x + batch * x_batch + at, mask=keep, other=0.0).to(tl.float32)
    if update is not None:
        value += tl.load(update + batch * update_batch + at, mask=keep, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + channel, mask=channel < DIM, other=0.0).to(tl.float32)
    if total is not None:
        tl.store(total + batch * total_batch + at, value, mask=keep)
    if gamma is not None:
        length = tl.sqrt(tl.sum(value * value, axis=1))[:, None]
        factor = tl.load(gamma + channel, mask=channel < DIM, other=0.0).to(tl.float32)
        value = value / tl.maximum(length, eps) * root * factor
        value = value / (1.0 + tl.exp(-value))
    tl.store(out + batch * out_batch + row * WIDTH + channel, value, mask=there & (channel < WIDTH))


@triton.jit
def enlarge_kernel(
    x, update, bias, out, positions, height, width,
    PARTS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out [n * PARTS, 2H, 2W, DIM]: each position of x + update + bias [n, H, W, PARTS * DIM] four times."""
    part = tl.program_id(1)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    keep = (row < positions) & (channel < DIM)
    at = (row * PARTS + part) * DIM + channel
    value = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
    if update is not None:
        value += tl.load(update + at, mask=keep, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + part * DIM + channel, mask=channel < DIM, other=0.0).to(tl.float32)
    value = value.to(out.dtype.element_ty)
    column, line = row % width, row // width
    frame, line = line // height, line % height
    first = ((frame * PARTS + part) * (2 * height) + 2 * line) * (2 * width) + 2 * column
    for i in tl.static_range(2):
        for j in tl.static_range(2):
            tl.store(out + (first + i * (2 * width) + j) * DIM + channel, value, mask=keep)


def norm_silu(
    x: Tensor, update: Tensor | None, bias: Tensor | None, gamma: Tensor | None, total: Tensor | None, out: Tensor
) -> None:
    """x, update, total [b, positions, C]; out [b, positions, at least C]."""
    batch, positions, dim = x.shape
    width = out.shape[-1]
    block = triton.next_power_of_2(width)
    rows = max(1, NORM_ELEMENTS // block)
    strides = (0 if tensor is None else tensor.stride(0) for tensor in (x, update, total, out))
    norm_silu_kernel[triton.cdiv(positions, rows), batch](
        x, update, bias, gamma, total, out, *strides, positions, dim**0.5, EPS,
        DIM=dim, WIDTH=width, BLOCK=block, ROWS=rows, num_warps=WARPS,
    )  # fmt: skip


def enlarge(x: Tensor, update: Tensor | None, bias: Tensor | None, parts: int, out: Tensor) -> None:
    """x, update [n, H, W, parts * C], out [n * parts, 2H, 2W, C], all contiguous."""
    n, height, width, channels = x.shape
    block = triton.next_power_of_2(channels // parts)
    rows = max(1, ENLARGE_ELEMENTS // block)
    positions = n * height * width
    enlarge_kernel[triton.cdiv(positions, rows), parts](
        x, update, bias, out, positions, height, width,
        PARTS=parts, DIM=channels // parts, BLOCK=block, ROWS=rows, num_warps=WARPS,
    )  # fmt: skip
