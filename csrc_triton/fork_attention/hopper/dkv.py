"""Gradients of the own chunk's keys and values for Hopper: see backward.py.

Two consumer warpgroups own 64 keys each; queries and the output's gradients stream by. Everything is computed with
keys as rows, so that weights and their gradients go from registers straight into the next product. Nothing is masked:
queries behind the end have weight 0 by their vectors, and what rows of keys behind the end get is not stored.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from csrc_triton.fork_attention.hopper._gluon import (
    LAUNCH,
    UNSPECIALIZED,
    async_load,
    await_full,
    barriers,
    descriptor,
    first_work,
    here,
    is_work,
    matrix,
    next_work,
    piece,
    put_sum,
    release,
    rings_of,
    steps_of,
)
from csrc_triton.fork_attention.hopper.parts import TILE, Split, merge
from csrc_triton.fork_attention.tiles import Call, on

KEYS = gl.constexpr(64)  # of one consumer
QUERIES = gl.constexpr(64)
STAGES = gl.constexpr(3)
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUERIES.value, 16]))


@gluon.jit
def _step(k, v, queries, grads, done, acc_k, acc_v, scale, FIRST: gl.constexpr):
    """One tile of queries. The product for the keys is left running, which the next step waits for."""
    ACC: gl.constexpr = acc_v.type.layout
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)
    zeros = gl.zeros([KEYS, QUERIES], gl.float32, SCORES)
    stage = await_full(queries, done)
    scores = warpgroup_mma(k, matrix(queries[0], stage).permute([1, 0]), zeros, use_acc=False, is_async=True)
    grad_weights = warpgroup_mma(v, matrix(grads[0], stage).permute([1, 0]), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, [scores])
    if not FIRST:
        release(queries, (done - 1) % queries[0].shape[0])
    weights = gl.exp2(scores * scale - queries[3].index(stage).load(COLUMNS)[None, :])
    small = gl.convert_layout(weights.to(k.dtype), OPERAND)
    acc_v = warpgroup_mma(small, matrix(grads[0], stage), acc_v, is_async=True)
    grad_weights = warpgroup_mma_wait(1, [grad_weights])
    grad_scores = weights * (grad_weights - grads[3].index(stage).load(COLUMNS)[None, :])
    small = gl.convert_layout(grad_scores.to(k.dtype), OPERAND)
    acc_k = warpgroup_mma(small, matrix(queries[0], stage), acc_k, is_async=True)
    acc_v = warpgroup_mma_wait(1, [acc_v])
    return done + 1, acc_k, acc_v


@gluon.jit
def _consume(
    grad_k, grad_v, shared, queries, grads, scale, softmax_scale, sizes, split, WHO: gl.constexpr, SPLIT: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """Owns keys [64 WHO, 64 WHO + 64) of each tile of 128."""
    keys, values, outs, kept_k, kept_v, free_k, free_v = shared
    WIDTH: gl.constexpr = keys.shape[4]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    k, v = matrix(keys, WHO), matrix(values, WHO)
    work = first_work(sizes[1])
    done = work * 0
    turn = done
    while is_work(work, sizes, split, 2 * KEYS, SPLIT):
        _head, _branch, _tile, part, parts = piece(work, sizes, split, 2 * KEYS, SPLIT)
        first, last = steps_of(GROUP * gl.cdiv(here(sizes[1]), QUERIES), part, parts, SPLIT)
        mbarrier.wait(kept_k, turn & 1)
        mbarrier.wait(kept_v, turn & 1)
        acc = gl.zeros([KEYS, WIDTH], gl.float32, ACC)
        done, acc_k, acc_v = _step(k, v, queries, grads, done, acc, acc, scale, True)
        for _ in range(first + 1, last):
            done, acc_k, acc_v = _step(k, v, queries, grads, done, acc_k, acc_v, scale, False)
        mbarrier.arrive(free_k, count=1)
        mbarrier.arrive(free_v, count=1)
        turn += 1
        total_k = warpgroup_mma_wait(0, [acc_k])
        release(queries, (done - 1) % queries[0].shape[0])
        put_sum(grad_v, outs, acc_v, work, sizes, split, split[3], WHO, SPLIT)
        put_sum(grad_k, outs, total_k * softmax_scale, work, sizes, split, split[2], WHO, SPLIT)
        work = next_work(work)
    tma.store_wait(0)


@gluon.jit
def _produce(
    own, rows_of, vectors, keeps, ring, kept, kept_free, sizes, split, SECOND: gl.constexpr, SPLIT: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """Loads the keys, and streams queries and their first vector, of one head of the group after the other; or the same
    for values, gradients and deltas."""
    slots, full, free, vector_slots = ring
    STAGE_COUNT: gl.constexpr = slots.shape[0]
    work = first_work(sizes[1])
    done = work * 0
    turn = done
    while is_work(work, sizes, split, 2 * KEYS, SPLIT):
        head, branch, tile, part, parts = piece(work, sizes, split, 2 * KEYS, SPLIT)
        length = here(sizes[1])
        mbarrier.wait(kept_free, turn + 1 & 1)
        turn += 1
        mbarrier.expect(kept, 2 * own.block_type.nbytes)
        for who in gl.static_range(2):
            async_load(own, [branch, head, (2 * tile + who) * KEYS, 0], kept, keeps.index(who))
        padded = gl.cdiv(length, 2 * KEYS) * (2 * KEYS)
        at = ((branch * here(sizes[0]) * GROUP + head * GROUP) * 2 + SECOND) * padded
        tiles = gl.cdiv(length, QUERIES)
        first, last = steps_of(GROUP * tiles, part, parts, SPLIT)
        for place in range(first * QUERIES, last * QUERIES, QUERIES):
            member = place // (tiles * QUERIES) if GROUP > 1 else 0
            row = place - member * (tiles * QUERIES)
            stage = done % STAGE_COUNT
            mbarrier.wait(free.index(stage), done // STAGE_COUNT + 1 & 1)
            mbarrier.expect(full.index(stage), rows_of.block_type.nbytes + vectors.block_type.nbytes)
            async_load(rows_of, [branch, head * GROUP + member, row, 0], full.index(stage), slots.index(stage))
            async_load(vectors, [at + member * 2 * padded + row], full.index(stage), vector_slots.index(stage))
            done += 1
        work = next_work(work)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def key_gradient_kernel(
    k, v, q, grad, vectors, grad_k, grad_v, scale, softmax_scale, heads, length, branches, whole, parts, k_sums,
    v_sums, SPLIT: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """dK and dV of all tiles of keys; heads: of keys, each with GROUP of queries; vectors [B heads 2 padded], of those:
    see backward.py."""
    WIDTH: gl.constexpr = q.block_type.shape[3]
    keys = gl.allocate_shared_memory(k.dtype, [2, 1, 1, KEYS, WIDTH], k.layout)
    values = gl.allocate_shared_memory(k.dtype, [2, 1, 1, KEYS, WIDTH], k.layout)
    outs = gl.allocate_shared_memory(k.dtype, [2, 1, 1, KEYS, WIDTH], k.layout)
    queries, grads = rings_of(q, grad, STAGES)
    lses = gl.allocate_shared_memory(gl.float32, [STAGES, QUERIES], vectors.layout)
    deltas = gl.allocate_shared_memory(gl.float32, [STAGES, QUERIES], vectors.layout)
    queries = (queries[0], queries[1], queries[2], lses)
    grads = (grads[0], grads[1], grads[2], deltas)
    kept_k, kept_v = barriers(1, 1).index(0), barriers(1, 1).index(0)
    free_k, free_v = barriers(1, 2).index(0), barriers(1, 2).index(0)
    fence_async_shared()
    sizes = (heads, length, branches)
    split = (whole, parts, k_sums, v_sums)
    shared = (keys, values, outs, kept_k, kept_v, free_k, free_v)
    gl.warp_specialize(
        [
            (_consume, (grad_k, grad_v, shared, queries, grads, scale, softmax_scale, sizes, split, 0, SPLIT, GROUP)),
            (_consume, (grad_k, grad_v, shared, queries, grads, scale, softmax_scale, sizes, split, 1, SPLIT, GROUP)),
            (_produce, (k, q, vectors, keys, queries, kept_k, free_k, sizes, split, 0, SPLIT, GROUP)),
            (_produce, (v, grad, vectors, values, grads, kept_v, free_v, sizes, split, 1, SPLIT, GROUP)),
        ],
        [4, 2, 2],
        [240, 24, 24],
    )


def key_gradient(call: Call, grad: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of k and v, of their shape; vectors fp32 [B, heads of queries, 2, padded]: see backward.py."""
    q, k, v = call.q, call.k, call.v
    branches, length, heads, head_dim = k.shape
    grad_k, grad_v = (torch.empty(k.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    rows = KEYS.value, QUERIES.value
    steps = call.group * triton.cdiv(length, rows[1])
    split = Split.of(q.device, heads * branches * triton.cdiv(length, TILE), steps, steps)
    k_sums, v_sums = (split.sums(head_dim, q.device) for _ in range(2))
    with on(q):
        key_gradient_kernel[(split.programs,)](
            descriptor(k, rows[0]), descriptor(v, rows[0]), descriptor(q, rows[1]), descriptor(grad, rows[1]),
            _parts(vectors, rows[1]), descriptor(grad_k, rows[0]), descriptor(grad_v, rows[0]),
            call.scale, call.softmax_scale, heads, length, branches, split.whole, split.parts, k_sums, v_sums,
            SPLIT=split.parts > 1, GROUP=call.group, **LAUNCH,
        )  # fmt: skip
    if split.parts > 1:
        merge(split, k_sums, grad_k)
        merge(split, v_sums, grad_v)
    return grad_k, grad_v


def _parts(vectors: Tensor, rows: int) -> Any:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return TensorDescriptor(vectors.view(-1), [vectors.numel()], [1], [rows], layout)
