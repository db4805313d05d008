"""The forward pass of fork attention in portable Triton: one online softmax over segments and the own chunk.

A program owns one tile of queries of one head and one branch and walks the keys of its own chunk, then those of the
context's segments. The loops see whole tiles only; a last, partial tile has its own copy of the step, and so has the
edge of a causal chunk. What a call does not need (a head narrower than its tile, groups of heads, an index of contexts,
a causal chunk, queries without keys) is switched off when the kernel is compiled.
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
    context_of,
    dot,
    load_tile,
    narrow,
    on,
    operands,
    place,
    product,
    seen,
    store_tile,
    tiling,
    used_slots,
    width_of,
)


@triton.jit
def step(
    q, acc, top, total, k, v, index, head, row, end, sees, scale,
    k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, DESCRIPTORS: tl.constexpr, ZEROS: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, BLIND: tl.constexpr,
):  # fmt: skip
    """One tile of keys. Values behind the end are zeroed too: they belong to others, and 0 x NaN is NaN.

    CAUSAL: each query sees the keys before its number in `sees`. BLIND: some may not have seen any yet. Both loads come
    before the first product: with the second one between the products, an H200 is a seventh slower.
    """
    keys = load_tile(
        k, index, head, row, end, k_by_index, k_by_row, k_by_head, KEYS, WIDTH, DESCRIPTORS, MASKED and not DESCRIPTORS,
        HEAD,
    )  # fmt: skip
    values = load_tile(
        v, index, head, row, end, v_by_index, v_by_row, v_by_head, KEYS, WIDTH, DESCRIPTORS, MASKED and not ZEROS, HEAD
    )
    scores = product(q, keys)
    if CAUSAL:
        scores = tl.where((row + tl.arange(0, KEYS))[None, :] < sees[:, None], scores, float("-inf"))
    elif MASKED:
        scores = tl.where((row + tl.arange(0, KEYS) < end)[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    base = tl.where(new_top == float("-inf"), 0.0, new_top) if BLIND else new_top
    weights = tl.exp2(scores * scale - base[:, None])
    decay = tl.exp2(top - base)
    total = total * decay + tl.sum(weights, 1)
    acc = dot(narrow(weights, q.dtype), values, acc * decay[:, None])
    return acc, new_top, total


@triton.jit
def _whole(
    q, acc, top, total, k, v, index, head, first, length, scale,
    k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The whole tiles of keys [first, first + length)."""
    full = first + length - length % KEYS
    for row in tl.range(first, full, KEYS):
        acc, top, total = step(
            q, acc, top, total, k, v, index, head, row, full, full, scale,
            k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head,
            KEYS, WIDTH, HEAD, DESCRIPTORS, False, False, False, False,
        )  # fmt: skip
    return acc, top, total


@triton.jit
def _rest(
    q, acc, top, total, k, v, index, head, first, length, scale,
    k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, DESCRIPTORS: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """The last, partial tile of keys [first, first + length). ZEROS: rows behind the end are zeros without a mask."""
    rest = length % KEYS
    end = first + length
    if rest > 0:
        acc, top, total = step(
            q, acc, top, total, k, v, index, head, end - rest, end, end, scale,
            k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head,
            KEYS, WIDTH, HEAD, DESCRIPTORS, ZEROS, True, False, False,
        )  # fmt: skip
    return acc, top, total


@triton.jit
def _own(
    q, acc, top, total, k, v, branch, head, first, length, own, block, scale,
    k_by_branch, k_by_row, k_by_head, v_by_branch, v_by_row, v_by_head,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, DESCRIPTORS: tl.constexpr,
    CAUSAL: tl.constexpr, BLIND: tl.constexpr,
):  # fmt: skip
    """The own chunk, for queries [first, first + QUERIES)."""
    none = branch * 0
    if CAUSAL:
        position = first + own - length
        sees = seen(position + tl.arange(0, QUERIES), block, own)
        clear = seen(position, block, own)  # keys that all of the tile's queries see
        acc, top, total = _whole(
            q, acc, top, total, k, v, branch, head, none, clear, scale,
            k_by_branch, k_by_row, k_by_head, v_by_branch, v_by_row, v_by_head, KEYS, WIDTH, HEAD, DESCRIPTORS,
        )  # fmt: skip
        last = seen(tl.minimum(position + QUERIES, own) - 1, block, own)
        for row in tl.range(clear - clear % KEYS, last, KEYS):
            acc, top, total = step(
                q, acc, top, total, k, v, branch, head, row, own, sees, scale,
                k_by_branch, k_by_row, k_by_head, v_by_branch, v_by_row, v_by_head,
                KEYS, WIDTH, HEAD, DESCRIPTORS, DESCRIPTORS, True, True, BLIND,
            )  # fmt: skip
    else:
        acc, top, total = _whole(
            q, acc, top, total, k, v, branch, head, none, own, scale,
            k_by_branch, k_by_row, k_by_head, v_by_branch, v_by_row, v_by_head, KEYS, WIDTH, HEAD, DESCRIPTORS,
        )  # fmt: skip
        acc, top, total = _rest(
            q, acc, top, total, k, v, branch, head, none, own, scale,
            k_by_branch, k_by_row, k_by_head, v_by_branch, v_by_row, v_by_head, KEYS, WIDTH, HEAD, DESCRIPTORS,
            DESCRIPTORS,
        )  # fmt: skip
    return acc, top, total


@triton.jit
def _context(
    q, acc, top, total, k, v, table, index, head, size, scale,
    k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head, table_by_context, table_by_slot,
    PAST: tl.constexpr, SLOTS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Context `index` of a pair of tensors (PAST 1) or of a segment table (PAST 2), partial tiles last."""
    if PAST == 1:
        none = index * 0
        acc, top, total = _whole(
            q, acc, top, total, k, v, index, head, none, size, scale,
            k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head, KEYS, WIDTH, HEAD, DESCRIPTORS,
        )  # fmt: skip
        acc, top, total = _rest(
            q, acc, top, total, k, v, index, head, none, size, scale,
            k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head, KEYS, WIDTH, HEAD, DESCRIPTORS,
            DESCRIPTORS,
        )  # fmt: skip
    elif PAST == 2:
        none = index * 0
        segments = table + index.to(tl.int64) * table_by_context
        slots = used_slots(segments, size, table_by_slot, SLOTS)
        for slot in range(0, slots):
            start = tl.load(segments + slot * table_by_slot)
            length = tl.load(segments + slot * table_by_slot + 1)
            acc, top, total = _whole(
                q, acc, top, total, k, v, none, head, start, length, scale,
                k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head, KEYS, WIDTH, HEAD, DESCRIPTORS,
            )  # fmt: skip
        for slot in range(0, slots):
            start = tl.load(segments + slot * table_by_slot)
            length = tl.load(segments + slot * table_by_slot + 1)
            acc, top, total = _rest(
                q, acc, top, total, k, v, none, head, start, length, scale,
                k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head, KEYS, WIDTH, HEAD, DESCRIPTORS, False,
            )  # fmt: skip
    return acc, top, total


@triton.jit(do_not_specialize=["heads", "length", "own", "branches", "share", "past_size", "block"])
def forward_kernel(
    q, k, v, past_k, past_v, table, indices, out, lse, scale, heads, length, own, branches, share, past_size, block,
    q_by_branch, q_by_row, q_by_head, k_by_branch, k_by_row, k_by_head, v_by_branch, v_by_row, v_by_head,
    past_k_by_index, past_k_by_row, past_k_by_head, past_v_by_index, past_v_by_row, past_v_by_head,
    table_by_context, table_by_slot,
    PAST: tl.constexpr, SLOTS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
    HEAD: tl.constexpr, GROUP: tl.constexpr, INDEXED: tl.constexpr, CAUSAL: tl.constexpr, BLIND: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """out and lse of one tile of queries.

    The own chunk comes first: a sum that may still be its initial zeros where a loop ends makes ptxas wait for every
    matrix product.
    """
    head, branch, first = place(heads, length, branches, QUERIES)
    queries = load_tile(
        q, branch, head, first, length, q_by_branch, q_by_row, q_by_head, QUERIES, WIDTH, DESCRIPTORS, not DESCRIPTORS,
        HEAD,
    )  # fmt: skip
    acc = tl.zeros([QUERIES, WIDTH], tl.float32)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc, top, total = _own(
        queries, acc, top, total, k, v, branch, head // GROUP, first, length, own, block, scale,
        k_by_branch, k_by_row, k_by_head, v_by_branch, v_by_row, v_by_head,
        QUERIES, KEYS, WIDTH, HEAD, DESCRIPTORS, CAUSAL, BLIND,
    )  # fmt: skip
    acc, top, total = _context(
        queries, acc, top, total, past_k, past_v, table, context_of(indices, branch, share, INDEXED), head // GROUP,
        past_size, scale, past_k_by_index, past_k_by_row, past_k_by_head, past_v_by_index, past_v_by_row,
        past_v_by_head, table_by_context, table_by_slot, PAST, SLOTS, KEYS, WIDTH, HEAD, DESCRIPTORS,
    )  # fmt: skip
    rows = first + tl.arange(0, QUERIES)
    at = (branch.to(tl.int64) * heads + head) * length + rows
    tl.store(lse + at, (top + tl.log2(total)) * 0.6931471805599453, mask=rows < length)
    acc = acc / (tl.where(total > 0, total, 1.0) if BLIND else total)[:, None]
    store_tile(out, acc, branch, head, first, length, heads, QUERIES, WIDTH, HEAD)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """The output [B, Lq, heads, head_dim] and the fp32 log-sum-exp [B, heads, Lq]."""
    q, (k, v), past = call.q, call.sources, call.past
    branches, length, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(branches, heads, length, dtype=torch.float32, device=q.device)
    by = tiling(FORWARD, q, k, v, past.k, past.v)
    sources, strides = operands(by, (q, by.queries), *((t, by.keys) for t in (k, v, past.k, past.v)))
    with on(q):
        forward_kernel[(heads * branches * triton.cdiv(length, by.queries),)](
            *sources, past.table, past.indices, out, lse, call.scale,
            heads, length, call.own, branches, past.share, past.size, call.block, *strides, *past.table.stride()[:2],
            PAST=past.kind, SLOTS=past.slots, QUERIES=by.queries, KEYS=by.keys, WIDTH=width_of(head_dim), HEAD=head_dim,
            GROUP=call.group, INDEXED=past.index is not None, CAUSAL=call.causal_block > 0, BLIND=call.blind,
            DESCRIPTORS=by.descriptors, num_warps=by.warps, num_stages=by.stages,
        )  # fmt: skip
    return out, lse
