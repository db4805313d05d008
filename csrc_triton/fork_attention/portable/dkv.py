"""Gradients of the own chunk's keys and values: see backward.py. One program owns each tile of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.fork_attention.tiles import (
    KEY_GRADIENT,
    Call,
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
    width_of,
)


@triton.jit
def _key_step(
    acc_k, acc_v, keys, values, q, grad, lse, delta, branch, head, row, length, first, own, block, scale,
    q_by_branch, q_by_row, q_by_head, grad_by_branch, grad_by_row, grad_by_head,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, DESCRIPTORS: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """One tile of queries; lse, delta: where this head's begin; first: of the keys."""
    MASK: tl.constexpr = MASKED and not DESCRIPTORS
    queries = load_tile(
        q, branch, head, row, length, q_by_branch, q_by_row, q_by_head, QUERIES, WIDTH, DESCRIPTORS, MASK, HEAD
    )
    grads = load_tile(
        grad, branch, head, row, length, grad_by_branch, grad_by_row, grad_by_head, QUERIES, WIDTH, DESCRIPTORS, MASK,
        HEAD,
    )  # fmt: skip
    rows = row + tl.arange(0, QUERIES)
    if MASKED:  # weights of rows behind the end are exp2(-inf)
        lses = tl.load(lse + rows, mask=rows < length, other=float("inf"))
        deltas = tl.load(delta + rows, mask=rows < length, other=0.0)
    else:
        lses = tl.load(lse + rows)
        deltas = tl.load(delta + rows)
    scores = product(keys, queries)
    if CAUSAL:
        sees = seen(rows + (own - length), block, own)
        scores = tl.where((first + tl.arange(0, KEYS))[:, None] < sees[None, :], scores, float("-inf"))
    weights = tl.exp2(scores * scale - (lses * 1.4426950408889634)[None, :])
    acc_v = dot(narrow(weights, keys.dtype), grads, acc_v)
    grad_weights = product(values, grads)
    grad_scores = weights * (grad_weights - deltas[None, :])
    acc_k = dot(narrow(grad_scores, keys.dtype), queries, acc_k)
    return acc_k, acc_v


@triton.jit
def _key_head(
    acc_k, acc_v, keys, values, q, grad, lse, delta, branch, head, heads, length, first, own, block, scale,
    q_by_branch, q_by_row, q_by_head, grad_by_branch, grad_by_row, grad_by_head,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, DESCRIPTORS: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """All queries of one head that see the keys: in a causal chunk, each of them sees at least one."""
    at = (branch.to(tl.int64) * heads + head) * length
    lse += at
    delta += at
    begin = branch * 0
    if CAUSAL:
        before = own - length  # position of the first query among the keys, from below 0
        edge = tl.maximum(first // block * block - before, 0)  # the first query that sees any of these keys
        clear = (tl.minimum(first + KEYS, own) - 1) // block * block - before  # the first that sees all of them
        begin = edge + tl.cdiv(tl.maximum(tl.minimum(clear, length) - edge, 0), QUERIES) * QUERIES
        for row in tl.range(edge, tl.minimum(begin, length), QUERIES):
            acc_k, acc_v = _key_step(
                acc_k, acc_v, keys, values, q, grad, lse, delta, branch, head, row, length, first, own, block, scale,
                q_by_branch, q_by_row, q_by_head, grad_by_branch, grad_by_row, grad_by_head,
                QUERIES, KEYS, WIDTH, HEAD, DESCRIPTORS, True, True,
            )  # fmt: skip
        begin = tl.minimum(begin, length)
    full = length - (length - begin) % QUERIES
    for row in tl.range(begin, full, QUERIES):
        acc_k, acc_v = _key_step(
            acc_k, acc_v, keys, values, q, grad, lse, delta, branch, head, row, length, first, own, block, scale,
            q_by_branch, q_by_row, q_by_head, grad_by_branch, grad_by_row, grad_by_head,
            QUERIES, KEYS, WIDTH, HEAD, DESCRIPTORS, False, False,
        )  # fmt: skip
    if full < length:
        acc_k, acc_v = _key_step(
            acc_k, acc_v, keys, values, q, grad, lse, delta, branch, head, full, length, first, own, block, scale,
            q_by_branch, q_by_row, q_by_head, grad_by_branch, grad_by_row, grad_by_head,
            QUERIES, KEYS, WIDTH, HEAD, DESCRIPTORS, True, False,
        )  # fmt: skip
    return acc_k, acc_v


@triton.jit(do_not_specialize=["heads", "length", "own", "branches", "block"])
def key_gradient_kernel(
    k, v, q, grad, lse, delta, grad_k, grad_v, scale, softmax_scale, heads, length, own, branches, block,
    k_by_branch, k_by_row, k_by_head, v_by_branch, v_by_row, v_by_head,
    q_by_branch, q_by_row, q_by_head, grad_by_branch, grad_by_row, grad_by_head,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """dK and dV of the own chunk, over its queries of all heads that share the head of keys."""
    head, branch, first = place(heads // GROUP, own, branches, KEYS)
    keys = load_tile(
        k, branch, head, first, own, k_by_branch, k_by_row, k_by_head, KEYS, WIDTH, DESCRIPTORS, not DESCRIPTORS, HEAD
    )
    values = load_tile(
        v, branch, head, first, own, v_by_branch, v_by_row, v_by_head, KEYS, WIDTH, DESCRIPTORS, not DESCRIPTORS, HEAD
    )
    acc_k = tl.zeros([KEYS, WIDTH], tl.float32)
    acc_v = tl.zeros([KEYS, WIDTH], tl.float32)
    if GROUP == 1:
        acc_k, acc_v = _key_head(
            acc_k, acc_v, keys, values, q, grad, lse, delta, branch, head, heads, length, first, own, block, scale,
            q_by_branch, q_by_row, q_by_head, grad_by_branch, grad_by_row, grad_by_head,
            QUERIES, KEYS, WIDTH, HEAD, DESCRIPTORS, CAUSAL,
        )  # fmt: skip
    else:
        for member in range(0, GROUP):
            acc_k, acc_v = _key_head(
                acc_k, acc_v, keys, values, q, grad, lse, delta, branch, head * GROUP + member, heads, length, first,
                own, block, scale, q_by_branch, q_by_row, q_by_head, grad_by_branch, grad_by_row, grad_by_head,
                QUERIES, KEYS, WIDTH, HEAD, DESCRIPTORS, CAUSAL,
            )  # fmt: skip
    store_tile(grad_k, acc_k * softmax_scale, branch, head, first, own, heads // GROUP, KEYS, WIDTH, HEAD)
    store_tile(grad_v, acc_v, branch, head, first, own, heads // GROUP, KEYS, WIDTH, HEAD)


def key_gradient(call: Call, grad: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of k and v [B, Lk, kv_heads, head_dim]; lse, delta fp32 [B, heads, Lq]."""
    q, k, v = call.q, call.k, call.v
    branches, length, heads, head_dim = q.shape
    grad_k, grad_v = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    if not call.own:
        return grad_k, grad_v
    by = tiling(KEY_GRADIENT, q, grad, k, v)
    sources, strides = operands(by, (k, by.keys), (v, by.keys), (q, by.queries), (grad, by.queries))
    with on(q):
        key_gradient_kernel[(k.shape[2] * branches * triton.cdiv(call.own, by.keys),)](
            *sources, lse, delta, grad_k, grad_v, call.scale, call.softmax_scale,
            heads, length, call.own, branches, call.block, *strides,
            QUERIES=by.queries, KEYS=by.keys, WIDTH=width_of(head_dim), HEAD=head_dim, GROUP=call.group,
            CAUSAL=call.causal_block > 0, DESCRIPTORS=by.descriptors,
            num_warps=by.warps, num_stages=by.stages,
        )  # fmt: skip
    return grad_k, grad_v
