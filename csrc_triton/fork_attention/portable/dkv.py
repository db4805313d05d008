"""Gradients of the own chunk's keys and values: see backward.py. One program owns each tile of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.fork_attention.tiles import KEY_GRADIENT, Call, dot, load_tile, narrow, on, operand, place, tiling


@triton.jit
def _key_step(
    acc_k, acc_v, keys, values, q, grad, lse, delta, branch, head, row, length, scale,
    q_by_branch, q_by_row, q_by_head, grad_by_branch, grad_by_row, grad_by_head,
    QUERIES: tl.constexpr, WIDTH: tl.constexpr, DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of queries; lse, delta: where this head's begin."""
    MASK: tl.constexpr = MASKED and not DESCRIPTORS
    queries = load_tile(
        q, branch, head, row, length, q_by_branch, q_by_row, q_by_head, QUERIES, WIDTH, DESCRIPTORS, MASK
    )
    grads = load_tile(
        grad, branch, head, row, length, grad_by_branch, grad_by_row, grad_by_head, QUERIES, WIDTH, DESCRIPTORS, MASK
    )
    rows = row + tl.arange(0, QUERIES)
    if MASKED:  # weights of rows behind the end are exp2(-inf)
        lses = tl.load(lse + rows, mask=rows < length, other=float("inf"))
        deltas = tl.load(delta + rows, mask=rows < length, other=0.0)
    else:
        lses = tl.load(lse + rows)
        deltas = tl.load(delta + rows)
    scores = dot(keys, queries.T)
    weights = tl.exp2(scores * scale - (lses * 1.4426950408889634)[None, :])
    acc_v = dot(narrow(weights, keys.dtype), grads, acc_v)
    grad_weights = dot(values, grads.T)
    grad_scores = weights * (grad_weights - deltas[None, :])
    acc_k = dot(narrow(grad_scores, keys.dtype), queries, acc_k)
    return acc_k, acc_v


@triton.jit(do_not_specialize=["heads", "length", "branches"])
def key_gradient_kernel(
    k, v, q, grad, lse, delta, grad_k, grad_v, scale, softmax_scale, heads, length, branches,
    k_by_branch, k_by_row, k_by_head, v_by_branch, v_by_row, v_by_head,
    q_by_branch, q_by_row, q_by_head, grad_by_branch, grad_by_row, grad_by_head,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """dK and dV of the own chunk, over its queries."""
    head, branch, first = place(heads, length, branches, KEYS)
    keys = load_tile(
        k, branch, head, first, length, k_by_branch, k_by_row, k_by_head, KEYS, WIDTH, DESCRIPTORS, not DESCRIPTORS
    )
    values = load_tile(
        v, branch, head, first, length, v_by_branch, v_by_row, v_by_head, KEYS, WIDTH, DESCRIPTORS, not DESCRIPTORS
    )
    acc_k = tl.zeros([KEYS, WIDTH], tl.float32)
    acc_v = tl.zeros([KEYS, WIDTH], tl.float32)
    at = (branch.to(tl.int64) * heads + head) * length
    full = length - length % QUERIES
    lse += at
    delta += at
    for row in tl.range(0, full, QUERIES):
        acc_k, acc_v = _key_step(
            acc_k, acc_v, keys, values, q, grad, lse, delta, branch, head, row, length, scale,
            q_by_branch, q_by_row, q_by_head, grad_by_branch, grad_by_row, grad_by_head,
            QUERIES, WIDTH, DESCRIPTORS, False,
        )  # fmt: skip
    if full < length:
        acc_k, acc_v = _key_step(
            acc_k, acc_v, keys, values, q, grad, lse, delta, branch, head, full, length, scale,
            q_by_branch, q_by_row, q_by_head, grad_by_branch, grad_by_row, grad_by_head,
            QUERIES, WIDTH, DESCRIPTORS, True,
        )  # fmt: skip
    inside = (first + tl.arange(0, KEYS) < length)[:, None]
    offsets = (branch.to(tl.int64) * length + first) * heads * WIDTH + head * WIDTH
    offsets += tl.arange(0, KEYS)[:, None] * (heads * WIDTH) + tl.arange(0, WIDTH)[None, :]
    tl.store(grad_k + offsets, narrow(acc_k * softmax_scale, grad_k.dtype.element_ty), mask=inside)
    tl.store(grad_v + offsets, narrow(acc_v, grad_v.dtype.element_ty), mask=inside)


def key_gradient(call: Call, grad: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of k and v [B, L, heads, head_dim]; lse, delta fp32 [B, heads, L]."""
    q, k, v = call.q, call.k, call.v
    branches, length, heads, head_dim = q.shape
    grad_k, grad_v = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    chosen = tiling(KEY_GRADIENT, q, grad, k, v)
    sources, strides = [], []
    for tensor, rows in ((k, chosen.keys), (v, chosen.keys), (q, chosen.queries), (grad, chosen.queries)):
        source, *by = operand(tensor, rows, chosen.descriptors)
        sources.append(source)
        strides.extend(by)
    with on(q):
        key_gradient_kernel[(heads * branches * triton.cdiv(length, chosen.keys),)](
            *sources, lse, delta, grad_k, grad_v, call.scale, call.softmax_scale, heads, length, branches,
            *strides, QUERIES=chosen.queries, KEYS=chosen.keys, WIDTH=head_dim, DESCRIPTORS=chosen.descriptors,
            num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip
    return grad_k, grad_v
