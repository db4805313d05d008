"""The forward pass of fork attention in portable Triton: one online softmax over segments and the own chunk.

A program owns one tile of queries of one head and one branch and walks the keys of its own chunk, then those of the
context's segments. The loops see whole tiles only; a last, partial tile has its own copy of the step.
Scores are kept in units of log2, so that exponentials are `exp2` (Dao, FlashAttention-2, arXiv 2307.08691).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.fork_attention.tiles import (
    FORWARD,
    Call,
    dot,
    load_tile,
    narrow,
    on,
    operand,
    place,
    tiling,
    used_slots,
)


@triton.jit
def _step(
    q, acc, top, total, k, v, index, head, row, end, scale,
    k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, DESCRIPTORS: tl.constexpr, ZEROS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys. Values behind the end are zeroed too: they belong to others, and 0 x NaN is NaN.

    Both loads come before the first product: with the second one between the products, an H200 is a seventh slower.
    """
    keys = load_tile(
        k, index, head, row, end, k_by_index, k_by_row, k_by_head, KEYS, WIDTH, DESCRIPTORS, MASKED and not DESCRIPTORS
    )
    values = load_tile(
        v, index, head, row, end, v_by_index, v_by_row, v_by_head, KEYS, WIDTH, DESCRIPTORS, MASKED and not ZEROS
    )
    scores = dot(q, keys.T)
    if MASKED:
        scores = tl.where((row + tl.arange(0, KEYS) < end)[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_top[:, None])
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(weights, 1)
    acc = dot(narrow(weights, q.dtype), values, acc * decay[:, None])
    return acc, new_top, total


@triton.jit
def _whole(
    q, acc, top, total, k, v, index, head, first, length, scale,
    k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The whole tiles of keys [first, first + length)."""
    full = first + length - length % KEYS
    for row in tl.range(first, full, KEYS):
        acc, top, total = _step(
            q, acc, top, total, k, v, index, head, row, full, scale,
            k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head,
            KEYS, WIDTH, DESCRIPTORS, False, False,
        )  # fmt: skip
    return acc, top, total


@triton.jit
def _rest(
    q, acc, top, total, k, v, index, head, first, length, scale,
    k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, DESCRIPTORS: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """The last, partial tile of keys [first, first + length). ZEROS: rows behind the end are zeros without a mask."""
    rest = length % KEYS
    if rest > 0:
        acc, top, total = _step(
            q, acc, top, total, k, v, index, head, first + length - rest, first + length, scale,
            k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head,
            KEYS, WIDTH, DESCRIPTORS, ZEROS, True,
        )  # fmt: skip
    return acc, top, total


@triton.jit
def _context(
    q, acc, top, total, k, v, table, index, head, size, scale,
    k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head, table_by_context, table_by_slot,
    PAST: tl.constexpr, SLOTS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Context `index` of a pair of tensors (PAST 1) or of a segment table (PAST 2), partial tiles last."""
    none = index * 0
    if PAST == 1:
        acc, top, total = _whole(
            q, acc, top, total, k, v, index, head, none, size, scale,
            k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head, KEYS, WIDTH, DESCRIPTORS,
        )  # fmt: skip
        acc, top, total = _rest(
            q, acc, top, total, k, v, index, head, none, size, scale,
            k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head, KEYS, WIDTH, DESCRIPTORS, DESCRIPTORS,
        )  # fmt: skip
    elif PAST == 2:
        segments = table + index.to(tl.int64) * table_by_context
        slots = used_slots(segments, size, table_by_slot, SLOTS)
        for slot in range(0, slots):
            start = tl.load(segments + slot * table_by_slot)
            length = tl.load(segments + slot * table_by_slot + 1)
            acc, top, total = _whole(
                q, acc, top, total, k, v, none, head, start, length, scale,
                k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head, KEYS, WIDTH, DESCRIPTORS,
            )  # fmt: skip
        for slot in range(0, slots):
            start = tl.load(segments + slot * table_by_slot)
            length = tl.load(segments + slot * table_by_slot + 1)
            acc, top, total = _rest(
                q, acc, top, total, k, v, none, head, start, length, scale,
                k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head, KEYS, WIDTH, DESCRIPTORS, False,
            )  # fmt: skip
    return acc, top, total


@triton.jit(do_not_specialize=["heads", "length", "branches", "share", "past_size"])
def forward_kernel(
    q, k, v, past_k, past_v, table, out, lse, scale, heads, length, branches, share, past_size,
    q_by_branch, q_by_row, q_by_head, k_by_branch, k_by_row, k_by_head, v_by_branch, v_by_row, v_by_head,
    past_k_by_index, past_k_by_row, past_k_by_head, past_v_by_index, past_v_by_row, past_v_by_head,
    table_by_context, table_by_slot,
    PAST: tl.constexpr, SLOTS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """out and lse of one tile of queries.

    The own chunk comes first: a sum that may still be its initial zeros where a loop ends makes ptxas wait for every
    matrix product.
    """
    head, branch, first = place(heads, length, branches, QUERIES)
    queries = load_tile(
        q, branch, head, first, length, q_by_branch, q_by_row, q_by_head, QUERIES, WIDTH, DESCRIPTORS, not DESCRIPTORS
    )
    acc = tl.zeros([QUERIES, WIDTH], tl.float32)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    none = branch * 0
    acc, top, total = _whole(
        queries, acc, top, total, k, v, branch, head, none, length, scale,
        k_by_branch, k_by_row, k_by_head, v_by_branch, v_by_row, v_by_head, KEYS, WIDTH, DESCRIPTORS,
    )  # fmt: skip
    acc, top, total = _rest(
        queries, acc, top, total, k, v, branch, head, none, length, scale,
        k_by_branch, k_by_row, k_by_head, v_by_branch, v_by_row, v_by_head, KEYS, WIDTH, DESCRIPTORS, DESCRIPTORS,
    )  # fmt: skip
    acc, top, total = _context(
        queries, acc, top, total, past_k, past_v, table, branch // share, head, past_size, scale,
        past_k_by_index, past_k_by_row, past_k_by_head, past_v_by_index, past_v_by_row, past_v_by_head,
        table_by_context, table_by_slot, PAST, SLOTS, KEYS, WIDTH, DESCRIPTORS,
    )  # fmt: skip
    rows = first + tl.arange(0, QUERIES)
    inside = rows < length
    at = (branch.to(tl.int64) * heads + head) * length + rows
    tl.store(lse + at, (top + tl.log2(total)) * 0.6931471805599453, mask=inside)
    pointers = out + (branch.to(tl.int64) * length + first) * heads * WIDTH + head * WIDTH
    pointers += tl.arange(0, QUERIES)[:, None] * (heads * WIDTH) + tl.arange(0, WIDTH)[None, :]
    tl.store(pointers, narrow(acc / total[:, None], out.dtype.element_ty), mask=inside[:, None])


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """The output [B, L, heads, head_dim] and the fp32 log-sum-exp [B, heads, L]."""
    q, k, v, past = call.q, call.k, call.v, call.past
    branches, length, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(branches, heads, length, dtype=torch.float32, device=q.device)
    chosen = tiling(FORWARD, q, k, v, past.k, past.v)
    sources, strides = [], []
    for tensor, rows in ((q, chosen.queries), *((t, chosen.keys) for t in (k, v, past.k, past.v))):
        source, *by = operand(tensor, rows, chosen.descriptors)
        sources.append(source)
        strides.extend(by)
    grid = (heads * branches * triton.cdiv(length, chosen.queries),)
    with on(q):
        forward_kernel[grid](
            *sources, past.table, out, lse, call.scale, heads, length, branches, past.share, past.size,
            *strides, *past.table.stride()[:2],
            PAST=past.kind, SLOTS=past.slots, QUERIES=chosen.queries, KEYS=chosen.keys, WIDTH=head_dim,
            DESCRIPTORS=chosen.descriptors, num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip
    return out, lse
