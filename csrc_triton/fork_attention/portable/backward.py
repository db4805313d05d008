"""The backward pass of fork attention in portable Triton.

With P = exp(S - lse) recomputed from the saved log-sum-exp and delta = rowsum(dO * O) - dlse (Dao, FlashAttention-2,
arXiv 2307.08691), dS = P * (dP - delta) with dP = dO V^T. The context is frozen: its keys enter dQ alone, and dK, dV
are sums over the own chunk's queries, of all heads that share a head of keys. One program owns each tile of dQ and one
each tile of dK and dV, so nothing is added atomically and equal inputs give equal bits. The switches are the forward's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.fork_attention.portable.dkv import key_gradient
from csrc_triton.fork_attention.tiles import (
    QUERY_GRADIENT,
    Call,
    context_of,
    describable,
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

DELTA_ROWS = 64


@triton.jit(do_not_specialize=["heads", "length"])
def delta_kernel(
    out, grad, grad_lse, delta, heads, length, grad_by_branch, grad_by_row, grad_by_head,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(grad * out) - grad_lse, fp32 [B, heads, L]."""
    program = tl.program_id(0)
    head, tile = program % heads, program // heads
    branch, first = tile // tl.cdiv(length, ROWS), tile % tl.cdiv(length, ROWS) * ROWS
    o = load_tile(
        out, branch, head, first, length, length.to(tl.int64) * heads * HEAD, heads * HEAD, HEAD,
        ROWS, WIDTH, False, True, HEAD,
    )  # fmt: skip
    g = load_tile(
        grad, branch, head, first, length, grad_by_branch, grad_by_row, grad_by_head, ROWS, WIDTH, False, True, HEAD
    )
    total = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    rows = first + tl.arange(0, ROWS)
    at = (branch.to(tl.int64) * heads + head) * length + rows
    if GRAD_LSE:
        total -= tl.load(grad_lse + at, mask=rows < length, other=0.0)
    tl.store(delta + at, total, mask=rows < length)


@triton.jit
def _query_step(
    acc, q, grad, lse, delta, k, v, index, head, row, end, sees, scale,
    k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    keys = load_tile(k, index, head, row, end, k_by_index, k_by_row, k_by_head, KEYS, WIDTH, DESCRIPTORS, MASKED, HEAD)
    values = load_tile(
        v, index, head, row, end, v_by_index, v_by_row, v_by_head, KEYS, WIDTH, DESCRIPTORS, MASKED, HEAD
    )
    scores = product(q, keys)
    if CAUSAL:
        scores = tl.where((row + tl.arange(0, KEYS))[None, :] < sees[:, None], scores, float("-inf"))
    elif MASKED:  # the rows are zeros, but exp2(0 - lse) may overflow
        scores = tl.where((row + tl.arange(0, KEYS) < end)[None, :], scores, float("-inf"))
    weights = tl.exp2(scores * scale - lse[:, None])
    grad_weights = product(grad, values)
    grad_scores = weights * (grad_weights - delta[:, None])
    return dot(narrow(grad_scores, q.dtype), keys, acc)


@triton.jit
def _query_whole(
    acc, q, grad, lse, delta, k, v, index, head, first, length, scale,
    k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    full = first + length - length % KEYS
    for row in tl.range(first, full, KEYS):
        acc = _query_step(
            acc, q, grad, lse, delta, k, v, index, head, row, full, full, scale,
            k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head,
            KEYS, WIDTH, HEAD, DESCRIPTORS, False, False,
        )  # fmt: skip
    return acc


@triton.jit
def _query_rest(
    acc, q, grad, lse, delta, k, v, index, head, first, length, scale,
    k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    rest = length % KEYS
    end = first + length
    if rest > 0:
        acc = _query_step(
            acc, q, grad, lse, delta, k, v, index, head, end - rest, end, end, scale,
            k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head,
            KEYS, WIDTH, HEAD, DESCRIPTORS, True, False,
        )  # fmt: skip
    return acc


@triton.jit
def _query_own(
    acc, q, grad, lse, delta, k, v, branch, head, first, length, own, block, scale,
    k_by_branch, k_by_row, k_by_head, v_by_branch, v_by_row, v_by_head,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, DESCRIPTORS: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """As the forward's `_own`."""
    none = branch * 0
    if CAUSAL:
        position = first + own - length
        sees = seen(position + tl.arange(0, QUERIES), block, own)
        clear = seen(position, block, own)
        acc = _query_whole(
            acc, q, grad, lse, delta, k, v, branch, head, none, clear, scale,
            k_by_branch, k_by_row, k_by_head, v_by_branch, v_by_row, v_by_head, KEYS, WIDTH, HEAD, DESCRIPTORS,
        )  # fmt: skip
        last = seen(tl.minimum(position + QUERIES, own) - 1, block, own)
        for row in tl.range(clear - clear % KEYS, last, KEYS):
            acc = _query_step(
                acc, q, grad, lse, delta, k, v, branch, head, row, own, sees, scale,
                k_by_branch, k_by_row, k_by_head, v_by_branch, v_by_row, v_by_head,
                KEYS, WIDTH, HEAD, DESCRIPTORS, True, True,
            )  # fmt: skip
    else:
        acc = _query_whole(
            acc, q, grad, lse, delta, k, v, branch, head, none, own, scale,
            k_by_branch, k_by_row, k_by_head, v_by_branch, v_by_row, v_by_head, KEYS, WIDTH, HEAD, DESCRIPTORS,
        )  # fmt: skip
        acc = _query_rest(
            acc, q, grad, lse, delta, k, v, branch, head, none, own, scale,
            k_by_branch, k_by_row, k_by_head, v_by_branch, v_by_row, v_by_head, KEYS, WIDTH, HEAD, DESCRIPTORS,
        )  # fmt: skip
    return acc


@triton.jit
def _query_context(
    acc, q, grad, lse, delta, k, v, table, index, head, size, scale,
    k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head, table_by_context, table_by_slot,
    PAST: tl.constexpr, SLOTS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """As the forward's `_context`."""
    if PAST == 1:
        none = index * 0
        acc = _query_whole(
            acc, q, grad, lse, delta, k, v, index, head, none, size, scale,
            k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head, KEYS, WIDTH, HEAD, DESCRIPTORS,
        )  # fmt: skip
        acc = _query_rest(
            acc, q, grad, lse, delta, k, v, index, head, none, size, scale,
            k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head, KEYS, WIDTH, HEAD, DESCRIPTORS,
        )  # fmt: skip
    elif PAST == 2:
        none = index * 0
        segments = table + index.to(tl.int64) * table_by_context
        slots = used_slots(segments, size, table_by_slot, SLOTS)
        for slot in range(0, slots):
            start = tl.load(segments + slot * table_by_slot)
            length = tl.load(segments + slot * table_by_slot + 1)
            acc = _query_whole(
                acc, q, grad, lse, delta, k, v, none, head, start, length, scale,
                k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head, KEYS, WIDTH, HEAD, DESCRIPTORS,
            )  # fmt: skip
        for slot in range(0, slots):
            start = tl.load(segments + slot * table_by_slot)
            length = tl.load(segments + slot * table_by_slot + 1)
            acc = _query_rest(
                acc, q, grad, lse, delta, k, v, none, head, start, length, scale,
                k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head, KEYS, WIDTH, HEAD, DESCRIPTORS,
            )  # fmt: skip
    return acc


@triton.jit(do_not_specialize=["heads", "length", "own", "branches", "share", "past_size", "block"])
def query_gradient_kernel(
    q, grad, k, v, past_k, past_v, table, indices, lse, delta, grad_q,
    scale, softmax_scale, heads, length, own, branches, share, past_size, block,
    q_by_branch, q_by_row, q_by_head, grad_by_branch, grad_by_row, grad_by_head,
    k_by_branch, k_by_row, k_by_head, v_by_branch, v_by_row, v_by_head,
    past_k_by_index, past_k_by_row, past_k_by_head, past_v_by_index, past_v_by_row, past_v_by_head,
    table_by_context, table_by_slot,
    PAST: tl.constexpr, SLOTS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
    HEAD: tl.constexpr, GROUP: tl.constexpr, INDEXED: tl.constexpr, CAUSAL: tl.constexpr, BLIND: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """dQ over the segments of the context and the own chunk."""
    head, branch, first = place(heads, length, branches, QUERIES)
    queries = load_tile(
        q, branch, head, first, length, q_by_branch, q_by_row, q_by_head, QUERIES, WIDTH, DESCRIPTORS, not DESCRIPTORS,
        HEAD,
    )  # fmt: skip
    grads = load_tile(
        grad, branch, head, first, length, grad_by_branch, grad_by_row, grad_by_head, QUERIES, WIDTH, DESCRIPTORS,
        not DESCRIPTORS, HEAD,
    )  # fmt: skip
    rows = first + tl.arange(0, QUERIES)
    inside = rows < length
    at = (branch.to(tl.int64) * heads + head) * length + rows
    lses = tl.load(lse + at, mask=inside, other=0.0) * 1.4426950408889634
    if BLIND:  # a query without keys: its weights are exp2(-inf - inf), not exp2(-inf + inf)
        lses = tl.where(lses == float("-inf"), float("inf"), lses)
    deltas = tl.load(delta + at, mask=inside, other=0.0)
    acc = tl.zeros([QUERIES, WIDTH], tl.float32)
    acc = _query_own(
        acc, queries, grads, lses, deltas, k, v, branch, head // GROUP, first, length, own, block, scale,
        k_by_branch, k_by_row, k_by_head, v_by_branch, v_by_row, v_by_head,
        QUERIES, KEYS, WIDTH, HEAD, DESCRIPTORS, CAUSAL,
    )  # fmt: skip
    acc = _query_context(
        acc, queries, grads, lses, deltas, past_k, past_v, table, context_of(indices, branch, share, INDEXED),
        head // GROUP, past_size, scale, past_k_by_index, past_k_by_row, past_k_by_head, past_v_by_index,
        past_v_by_row, past_v_by_head, table_by_context, table_by_slot, PAST, SLOTS, KEYS, WIDTH, HEAD, DESCRIPTORS,
    )  # fmt: skip
    store_tile(grad_q, acc * softmax_scale, branch, head, first, length, heads, QUERIES, WIDTH, HEAD)


def backward(
    call: Call, out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None, wants_q: bool, wants_kv: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their shapes; one that is not wanted comes empty."""
    if not describable(grad) or grad.stride(-1) != 1:
        grad = grad.contiguous()
    delta = _delta(out, grad, grad_lse)
    # an op's results must be tensors of their own
    grad_q, grad_k, grad_v = (out.new_empty(0) for _ in range(3))
    if wants_q:
        grad_q = _query_gradient(call, grad, lse, delta)
    if wants_kv:
        grad_k, grad_v = key_gradient(call, grad, lse, delta)
    return grad_q, grad_k, grad_v


def _delta(out: Tensor, grad: Tensor, grad_lse: Tensor | None) -> Tensor:
    branches, length, heads, head_dim = out.shape
    delta = torch.empty(branches, heads, length, dtype=torch.float32, device=out.device)
    grid = (heads * branches * triton.cdiv(length, DELTA_ROWS),)
    with on(out):
        delta_kernel[grid](
            out.contiguous(), grad, delta if grad_lse is None else grad_lse.contiguous(), delta, heads, length,
            *grad.stride()[:3], ROWS=DELTA_ROWS, WIDTH=width_of(head_dim), HEAD=head_dim,
            GRAD_LSE=grad_lse is not None,
        )  # fmt: skip
    return delta


def _query_gradient(call: Call, grad: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    q, (k, v), past = call.q, call.sources, call.past
    branches, length, heads, head_dim = q.shape
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    by = tiling(QUERY_GRADIENT, q, grad, k, v, past.k, past.v)
    of_keys = ((t, by.keys) for t in (k, v, past.k, past.v))
    sources, strides = operands(by, (q, by.queries), (grad, by.queries), *of_keys)
    with on(q):
        query_gradient_kernel[(heads * branches * triton.cdiv(length, by.queries),)](
            *sources, past.table, past.indices, lse, delta, grad_q, call.scale, call.softmax_scale,
            heads, length, call.own, branches, past.share, past.size, call.block, *strides, *past.table.stride()[:2],
            PAST=past.kind, SLOTS=past.slots, QUERIES=by.queries, KEYS=by.keys, WIDTH=width_of(head_dim), HEAD=head_dim,
            GROUP=call.group, INDEXED=past.index is not None, CAUSAL=call.causal_block > 0, BLIND=call.blind,
            DESCRIPTORS=by.descriptors, num_warps=by.warps, num_stages=by.stages,
        )  # fmt: skip
    return grad_q
