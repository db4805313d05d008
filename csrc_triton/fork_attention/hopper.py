"""The forward pass of fork attention for Hopper, in Gluon.

Persistent programs of two consumer warpgroups, each owning 64 queries, and two small producer partitions that stream
keys and values through rings in shared memory. The scores of a tile are issued before the weighted values of the tile
before it, so that one warpgroup's exponentials overlap its own matrix products (Shah et al., FlashAttention-3, arXiv
2407.08608). Scores are kept in units of log2. See _gluon.py for the order of the keys.
"""

from __future__ import annotations

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

from csrc_triton.fork_attention._gluon import (
    barrier,
    barriers,
    count,
    descriptor,
    matrix,
    next_partial,
    place,
    put_all,
)
from csrc_triton.fork_attention.tiles import LOG2_E, Past, on

QUERIES = gl.constexpr(64)  # of one consumer
KEYS = gl.constexpr(128)
STAGES = gl.constexpr(2)


@gluon.jit
def _step(
    q, keys, values, k_full, k_free, v_full, v_free, done, weights, acc, top, total, scale, rest, MASKED: gl.constexpr
):
    """Scores of tile `done`, weighted values of the tile before it."""
    STAGE_COUNT: gl.constexpr = keys.shape[0]
    WEIGHTS: gl.constexpr = weights.type.layout
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    stage, before = done % STAGE_COUNT, (done - 1) % STAGE_COUNT
    mbarrier.wait(k_full.index(stage), done // STAGE_COUNT & 1)
    zeros = gl.zeros([QUERIES, KEYS], gl.float32, SCORES)
    scores = warpgroup_mma(q, matrix(keys.index(stage)).permute([1, 0]), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), (done - 1) // STAGE_COUNT & 1)
    acc = warpgroup_mma(weights, matrix(values.index(before)), acc, is_async=True)
    scores = warpgroup_mma_wait(1, [scores])
    mbarrier.arrive(k_free.index(stage), count=1)
    if MASKED:
        inside = gl.arange(0, KEYS, gl.SliceLayout(0, SCORES)) < rest
        scores = gl.where(inside[None, :], scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, 1) * scale)
    decay = gl.exp2(top - new_top)
    exponentials = gl.exp2(scores * scale - new_top[:, None])
    total = total * decay + gl.sum(exponentials, 1)
    new_weights = gl.convert_layout(exponentials.to(q.dtype), WEIGHTS)
    acc, weights = warpgroup_mma_wait(0, [acc, weights])
    mbarrier.arrive(v_free.index(before), count=1)
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, acc.type.layout))[:, None]
    return done + 1, new_weights, acc, new_top, total


@gluon.jit
def _consume(
    out, queries, keys, values, outs, q_full, q_free, k_full, k_free, v_full, v_free, table, lse, scale,
    heads, length, branches, share, size, by_context, by_slot, WHO: gl.constexpr, PAST: gl.constexpr,
):  # fmt: skip
    """Owns queries [64 WHO, 64 WHO + 64) of each tile of 128."""
    WIDTH: gl.constexpr = queries.shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    STAGE_COUNT: gl.constexpr = keys.shape[0]
    q = matrix(queries.index(WHO))
    staged = outs.index(WHO)
    tiles = gl.cdiv(length, 2 * QUERIES)
    done = gl.program_id(0) * 0
    turn = done
    for work in range(gl.program_id(0), heads * branches * tiles, gl.num_programs(0)):
        head, branch, tile = place(work, tiles, branches)
        context = branch // share
        whole, partial = count(length, table, context, size, by_context, by_slot, PAST, KEYS)
        mbarrier.wait(q_full, turn & 1)
        turn += 1
        stage = done % STAGE_COUNT
        mbarrier.wait(k_full.index(stage), done // STAGE_COUNT & 1)
        zeros = gl.zeros([QUERIES, KEYS], gl.float32, SCORES)
        scores = warpgroup_mma(q, matrix(keys.index(stage)).permute([1, 0]), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, [scores])
        mbarrier.arrive(k_free.index(stage), count=1)
        inside = gl.arange(0, KEYS, gl.SliceLayout(0, SCORES)) < (length - 1) % KEYS + 1
        scores = gl.where(inside[None, :], scores, float("-inf"))
        top = gl.max(scores, 1) * scale
        exponentials = gl.exp2(scores * scale - top[:, None])
        total = gl.sum(exponentials, 1)
        weights = gl.convert_layout(exponentials.to(q.dtype), WEIGHTS)
        acc = gl.zeros([QUERIES, WIDTH], gl.float32, ACC)
        done += 1
        for _ in range(whole):
            done, weights, acc, top, total = _step(
                q, keys, values, k_full, k_free, v_full, v_free, done, weights, acc, top, total, scale, 0, False
            )
        if PAST > 0:
            slot = done * 0
            for _ in range(partial):
                rest, slot = next_partial(slot, table, context, size, by_context, by_slot, PAST, KEYS)
                done, weights, acc, top, total = _step(
                    q, keys, values, k_full, k_free, v_full, v_free, done, weights, acc, top, total, scale, rest, True
                )
        mbarrier.arrive(q_free, count=1)
        before = (done - 1) % STAGE_COUNT
        mbarrier.wait(v_full.index(before), (done - 1) // STAGE_COUNT & 1)
        acc = warpgroup_mma(weights, matrix(values.index(before)), acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(v_free.index(before), count=1)
        first = tile * (2 * QUERIES) + WHO * QUERIES
        rows = first + gl.arange(0, QUERIES, gl.SliceLayout(1, SCORES))
        at = (branch.to(gl.int64) * heads + head) * length
        gl.store(lse + at + rows, (top + gl.log2(total)) * 0.6931471805599453, mask=rows < length)
        share_of = gl.convert_layout(1.0 / total, gl.SliceLayout(1, ACC))
        tma.store_wait(0)
        barrier()
        matrix(staged).store((acc * share_of[:, None]).to(q.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [branch, head, first, 0], staged)
    tma.store_wait(0)


@gluon.jit
def _produce(
    q, own, past, queries, ring, q_full, q_free, full, free, landed, table,
    heads, length, branches, share, size, by_context, by_slot, PAST: gl.constexpr, VALUES: gl.constexpr,
):  # fmt: skip
    """Streams values, or keys and the queries that they meet."""
    tiles = gl.cdiv(length, 2 * QUERIES)
    done = gl.program_id(0) * 0
    turn = done
    landings = done
    for work in range(gl.program_id(0), heads * branches * tiles, gl.num_programs(0)):
        head, branch, tile = place(work, tiles, branches)
        if not VALUES:
            mbarrier.wait(q_free, turn + 1 & 1)
            turn += 1
            mbarrier.expect(q_full, 2 * q.block_type.nbytes)
            for who in gl.static_range(2):
                row = (2 * tile + who) * QUERIES
                tma.async_copy_global_to_shared(q, [branch, head, row, 0], q_full, queries.index(who))
        done, landings = put_all(
            own, past, branch, head, length, table, branch // share, size, by_context, by_slot, ring, full, free, done,
            landed, landings, PAST, KEYS, VALUES,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["heads", "length", "branches", "share", "past_size"])
def forward_kernel(
    q, k, v, past_k, past_v, out, table, lse, scale, heads, length, branches, share, past_size,
    table_by_context, table_by_slot, PAST: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out and lse of all tiles of queries; arguments as the portable kernel's."""
    WIDTH: gl.constexpr = q.block_type.shape[3]
    queries = gl.allocate_shared_memory(q.dtype, [2, 1, 1, QUERIES, WIDTH], q.layout)
    outs = gl.allocate_shared_memory(q.dtype, [2, 1, 1, QUERIES, WIDTH], q.layout)
    keys = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, KEYS, WIDTH], k.layout)
    values = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, KEYS, WIDTH], v.layout)
    q_full, landed = barriers(1, 1).index(0), barriers(1, 1).index(0)
    q_free = barriers(1, 2).index(0)
    k_full, v_full = barriers(STAGES, 1), barriers(STAGES, 1)
    k_free, v_free = barriers(STAGES, 2), barriers(STAGES, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                out, queries, keys, values, outs, q_full, q_free, k_full, k_free, v_full, v_free, table, lse, scale,
                heads, length, branches, share, past_size, table_by_context, table_by_slot, 0, PAST,
            )),
            (_consume, (
                out, queries, keys, values, outs, q_full, q_free, k_full, k_free, v_full, v_free, table, lse, scale,
                heads, length, branches, share, past_size, table_by_context, table_by_slot, 1, PAST,
            )),
            (_produce, (
                q, k, past_k, queries, keys, q_full, q_free, k_full, k_free, landed, table,
                heads, length, branches, share, past_size, table_by_context, table_by_slot, PAST, False,
            )),
            (_produce, (
                q, v, past_v, queries, values, q_full, q_free, v_full, v_free, landed, table,
                heads, length, branches, share, past_size, table_by_context, table_by_slot, PAST, True,
            )),
        ],
        [4, 2, 2],
        [232, 40, 40],
    )  # fmt: skip


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context_k: Tensor | None,
    context_v: Tensor | None,
    table: Tensor | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """The output [B, L, heads, head_dim] and the fp32 log-sum-exp [B, heads, L]; arguments as the custom op's."""
    branches, length, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(branches, heads, length, dtype=torch.float32, device=q.device)
    past = Past.of(k, v, context_k, context_v, table)
    return out, lse
