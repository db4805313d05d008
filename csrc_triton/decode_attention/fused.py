"""Attention of new tokens in two launches (flash-decoding, https://pytorch.org/blog/flash-decoding).

A program takes SPLIT keys of one key head with all of its heads; the second launch joins the parts by their sums of
exponentials. Parts lie at fixed keys, so that a sequence's bits depend on its own length alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.fork_attention.tiles import dot, narrow

SPLIT = 256  # keys of a program
STEP_BYTES = 16384  # of keys in one step of it: three steps of keys and values fit into the 99 KB of sm_86 to sm_120
LEAST_HEADS = 16  # rows of the smallest matrix product
WARPS, STAGES = 4, 3
LOG2E = 1.4426950408889634


@triton.jit
def part_kernel(
    q, k, v, lengths, out, sums, q_batch, q_head, k_batch, k_head, k_row, v_batch, v_head, v_row, keys, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [B, heads, parts, DIM] fp32: the softmax over the part's keys times v; sums [B, heads, parts]: log2 of its
    sum of exponentials. scale: in powers of 2. Parts beyond the length are left alone.
    """
    part, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.minimum(tl.load(lengths + batch), keys).to(tl.int32)
    first = part * SPLIT
    if first < length:
        row, channel, key = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, BLOCK)
        own = row < GROUP
        at = q + batch * q_batch + (head * GROUP + row[:, None]) * q_head + channel[None, :]
        query = tl.load(at, mask=own[:, None], other=0.0)
        k += batch * k_batch + head * k_head.to(tl.int64)
        v += batch * v_batch + head * v_head.to(tl.int64)
        most = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        value = tl.zeros([ROWS, DIM], tl.float32)
        for start in range(first, tl.minimum(first + SPLIT, length), BLOCK):
            there = start + key < length
            place = (start + key).to(tl.int64)[:, None]
            keyed = tl.load(k + place * k_row + channel[None, :], mask=there[:, None], other=0.0)
            score = dot(query, tl.trans(keyed)) * scale
            score = tl.where(there[None, :], score, float("-inf"))
            larger = tl.maximum(most, tl.max(score, axis=1))
            shrink = tl.exp2(most - larger)
            weight = tl.exp2(score - larger[:, None])
            total = total * shrink + tl.sum(weight, axis=1)
            valued = tl.load(v + place * v_row + channel[None, :], mask=there[:, None], other=0.0)
            value = value * shrink[:, None] + dot(narrow(weight, valued.dtype), valued)
            most = larger
        parts = tl.num_programs(0)
        to = (batch * tl.num_programs(1) * GROUP + head * GROUP + row) * parts + part
        tl.store(out + to[:, None] * DIM + channel[None, :], value / total[:, None], mask=own[:, None])
        tl.store(sums + to, most + tl.log2(total), mask=own)


@triton.jit
def join_kernel(
    part_out, sums, lengths, out, keys, PARTS: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """out [B, heads, DIM] from the parts of each head; zeros for length 0. BLOCK: a power of 2, at least PARTS."""
    head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.minimum(tl.load(lengths + batch), keys).to(tl.int32)
    part, channel = tl.arange(0, BLOCK), tl.arange(0, DIM)
    row = batch * tl.num_programs(0) + head
    made = part * SPLIT < length
    size = tl.load(sums + row * PARTS + part, mask=made, other=float("-inf"))
    most = tl.max(size, axis=0)
    weight = tl.where(made, tl.exp2(size - tl.where(length > 0, most, 0.0)), 0.0)
    at = part_out + (row * PARTS + part)[:, None] * DIM + channel[None, :]
    value = tl.sum(tl.load(at, mask=made[:, None], other=0.0) * weight[:, None], axis=0)
    value = value / tl.where(length > 0, tl.sum(weight, axis=0), 1.0)
    tl.store(out + row * DIM + channel, value)


def block_of(dim: int, size: int) -> int:
    """Keys of one step, for heads of `dim` channels of `size` bytes."""
    return max(16, min(64, STEP_BYTES // (dim * size)))


def decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """As the public function; `scale` given."""
    batch, heads, dim = q.shape
    key_heads, keys = k.shape[1], k.shape[2]
    q = q if q.stride(2) == 1 else q.contiguous()
    group, parts = heads // key_heads, max(1, triton.cdiv(keys, SPLIT))
    part_out = torch.empty(batch, heads, parts, dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(batch, heads, parts, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, heads, dim, dtype=q.dtype, device=q.device)
    part_kernel[parts, key_heads, batch](
        q, k, v, lengths, part_out, sums, *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], keys, scale * LOG2E,
        GROUP=group, ROWS=max(LEAST_HEADS, triton.next_power_of_2(group)), DIM=dim, SPLIT=SPLIT,
        BLOCK=block_of(dim, k.element_size()), num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    join_kernel[heads, batch](
        part_out, sums, lengths, out, keys,
        PARTS=parts, BLOCK=triton.next_power_of_2(parts), DIM=dim, SPLIT=SPLIT, num_warps=WARPS,
    )  # fmt: skip
    return out
