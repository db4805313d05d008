"""The forward pass of fork attention for Hopper, in Gluon.

Persistent programs of two consumer warpgroups, each owning 64 queries, and two small producer partitions that stream
keys and values through rings in shared memory. The scores of a tile are issued before the weighted values of the tile
before it, so that a warpgroup's exponentials overlap its own matrix products (Shah et al., FlashAttention-3, arXiv
2407.08608). Scores are kept in units of log2. See _gluon.py for the order of the keys.
"""

from __future__ import annotations

import torch
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

from csrc_triton.fork_attention.hopper._gluon import (
    LAUNCH,
    UNSPECIALIZED,
    async_load,
    await_full,
    barriers,
    computed,
    context_of,
    count_tiles,
    descriptor,
    first_keys,
    first_work,
    give_turn,
    here,
    is_work,
    matrix,
    next_partial,
    next_work,
    numbers,
    piece,
    put_all,
    put_part,
    put_tile,
    release,
    ring_of,
    steps_of,
    take_turn,
)
from csrc_triton.fork_attention.hopper.exponent import assembly, powers
from csrc_triton.fork_attention.hopper.parts import merge, split_of
from csrc_triton.fork_attention.tiles import Call, on

QUERIES = gl.constexpr(64)  # of one consumer
KEYS = gl.constexpr(128)
STAGES = {64: 3, 128: 2}  # of the rings, by the size of a head
# at heads of 64 a share of the exponentials is left to the fp32 pipes: see exponent.py
ASSEMBLY = {64: assembly(share=1), 128: ""}
TURNS = True  # the consumers take turns in issuing products, so that one computes exponentials while the other's run
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS.value, 16]))


@gluon.jit
def _scores(q, keys, done):
    """Issues q k^T for tile `done`; also its slot."""
    stage = await_full(keys, done)
    zeros = gl.zeros([QUERIES, KEYS], gl.float32, SCORES)
    return warpgroup_mma(q, matrix(keys[0], stage).permute([1, 0]), zeros, use_acc=False, is_async=True), stage


@gluon.jit
def _sums(x):
    """Sums of rows over the columns that a thread holds, [rows, 4]: what threads hold is added at the end."""
    parts = gl.sum(x.reshape([QUERIES, KEYS // 8, 4, 2]), 3)
    return gl.sum(parts, 1)


@gluon.jit
def _step(
    q, keys, values, columns, done, state, scale, rest, MASKED: gl.constexpr, WHO: gl.constexpr,
    TURNS: gl.constexpr, ASSEMBLY: gl.constexpr,
):  # fmt: skip
    """Scores and weights of tile `done`, weighted values of the tile before it.

    state: exponentials of the scores, sum of weighted values, largest score so far, sums of exponentials. The
    exponentials are rounded only when the next scores are under way, and not before the wait for them.
    """
    before_exponentials, acc, top, total = state
    if TURNS:
        take_turn(done, WHO)
    scores, stage = _scores(q, keys, done)
    weights = gl.convert_layout(before_exponentials.to(q.dtype), gl.DotOperandLayout(0, acc.type.layout, 2))
    before = await_full(values, done - 1)
    acc = warpgroup_mma(weights, matrix(values[0], before), acc, is_async=True)
    if TURNS:
        give_turn(done, WHO)
    scores = warpgroup_mma_wait(1, [scores])
    release(keys, stage)
    if MASKED:
        scores = gl.where((columns.load(gl.SliceLayout(0, SCORES)) < rest)[None, :], scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, 1) * scale)
    decay = gl.exp2(top - new_top)
    exponentials = powers(scores * scale - new_top[:, None], ASSEMBLY)
    total = total * gl.convert_layout(decay, gl.SliceLayout(1, total.type.layout))[:, None] + _sums(exponentials)
    total = computed(total)
    acc = warpgroup_mma_wait(0, [acc])
    release(values, before)
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, acc.type.layout))[:, None]
    return done + 1, (exponentials, acc, new_top, total)


@gluon.jit
def _consume(
    out, shared, keys, values, lse, scale, sizes, context, split, WHO: gl.constexpr, PAST: gl.constexpr,
    SPLIT: gl.constexpr, TURNS: gl.constexpr, ASSEMBLY: gl.constexpr,
):  # fmt: skip
    """Owns queries [64 WHO, 64 WHO + 64) of each tile of 128."""
    queries, outs, columns, q_full, q_free = shared
    WIDTH: gl.constexpr = queries.shape[4]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    q = matrix(queries, WHO)
    work = first_work(sizes[1])
    done = work * 0
    turn = done
    if TURNS and WHO == 1:
        give_turn(done, WHO)
    while is_work(work, sizes, split, 2 * QUERIES, SPLIT):
        _head, branch, _tile, part, parts = piece(work, sizes, split, 2 * QUERIES, SPLIT)
        length = here(sizes[1])
        its = context_of(branch, context)
        whole, partial = count_tiles(length, its, PAST, KEYS)
        first, last = steps_of(1 + whole + partial, part, parts, SPLIT)
        rest, slot = first_keys(first, whole, length, its, PAST, KEYS, SPLIT)
        mbarrier.wait(q_full, turn & 1)
        scores, stage = _scores(q, keys, done)
        scores = warpgroup_mma_wait(0, [scores])
        release(keys, stage)
        scores = gl.where((columns.load(gl.SliceLayout(0, SCORES)) < rest)[None, :], scores, float("-inf"))
        top = gl.max(scores, 1) * scale
        exponentials = powers(scores * scale - top[:, None], ASSEMBLY)
        state = (exponentials, gl.zeros([QUERIES, WIDTH], gl.float32, ACC), top, _sums(exponentials))
        done += 1
        for _ in range(first, gl.minimum(whole, last - 1)):
            done, state = _step(q, keys, values, columns, done, state, scale, 0, False, WHO, TURNS, ASSEMBLY)
        if PAST > 0:
            for _ in range(gl.maximum(first, whole) + 1, last):
                rest, slot = next_partial(slot, its, PAST, KEYS)
                done, state = _step(q, keys, values, columns, done, state, scale, rest, True, WHO, TURNS, ASSEMBLY)
        mbarrier.arrive(q_free, count=1)
        turn += 1
        exponentials, acc, top, totals = state
        total = gl.convert_layout(gl.sum(totals, 1), top.type.layout)
        weights = gl.convert_layout(exponentials.to(q.dtype), WEIGHTS)
        before = await_full(values, done - 1)
        acc = warpgroup_mma(weights, matrix(values[0], before), acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])
        release(values, before)
        _put_out(out, outs, lse, acc, top, total, work, sizes, split, WHO, SPLIT)
        work = next_work(work)
    tma.store_wait(0)
    if TURNS and WHO == 0:
        take_turn(done, WHO)


@gluon.jit
def _put_out(out, outs, lse, acc, top, total, work, sizes, split, WHO: gl.constexpr, SPLIT: gl.constexpr):
    """Stores output and log-sum-exp, or for a part the sums and largest scores that they come from."""
    ACC: gl.constexpr = acc.type.layout
    # anew: the loops over tiles have no registers for it
    head, branch, tile, _part, parts = piece(work, sizes, split, 2 * QUERIES, SPLIT)
    rows = gl.arange(0, QUERIES, gl.SliceLayout(1, SCORES))
    if SPLIT:  # noqa: SIM102 - it is known when the kernel is compiled
        if parts > 1:
            number = work - here(split[0])
            put_part(split[2], acc, number, WHO)
            at = split[3] + 2 * ((2 * number + WHO) * QUERIES + rows)
            gl.store(at, top)
            gl.store(at + 1, total)
    if parts == 1:
        acc = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, ACC))[:, None]
        put_tile(out, outs, acc, branch, head, tile, WHO)
        length = here(sizes[1])
        rows += (2 * tile + WHO) * QUERIES
        at = (branch.to(gl.int64) * here(sizes[0]) + head) * length
        gl.store(lse + at + rows, (top + gl.log2(total)) * 0.6931471805599453, mask=rows < length)


@gluon.jit
def _produce(
    q, own, past, ring, queries, signals, sizes, context, split, PAST: gl.constexpr,
    VALUES: gl.constexpr, SPLIT: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Streams values, or keys and the queries that they meet."""
    q_full, q_free, landed = signals
    work = first_work(sizes[1])
    done = work * 0
    turn = done
    landings = done
    while is_work(work, sizes, split, 2 * QUERIES, SPLIT):
        head, branch, tile, part, parts = piece(work, sizes, split, 2 * QUERIES, SPLIT)
        if not VALUES:
            mbarrier.wait(q_free, turn + 1 & 1)
            turn += 1
            mbarrier.expect(q_full, 2 * q.block_type.nbytes)
            for who in gl.static_range(2):
                row = (2 * tile + who) * QUERIES
                async_load(q, [branch, head, row, 0], q_full, queries.index(who))
        its = context_of(branch, context)
        done, landings = put_all(
            own, past, branch, head // GROUP, here(sizes[1]), its, ring, done, landed, landings, part, parts,
            PAST, KEYS, VALUES, SPLIT,
        )  # fmt: skip
        work = next_work(work)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    q, k, v, past_k, past_v, out, table, lse, scale, heads, length, branches, share, past_size,
    table_by_context, table_by_slot, whole, parts, sums, tops, PAST: gl.constexpr,
    SPLIT: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, ASSEMBLY: gl.constexpr,
):  # fmt: skip
    """out and lse of all tiles of queries; arguments as the portable kernel's, and see `split` in parts.py.

    GROUP: heads of queries to one of keys. ASSEMBLY: see exponent.py.
    """
    WIDTH: gl.constexpr = q.block_type.shape[3]
    queries = gl.allocate_shared_memory(q.dtype, [2, 1, 1, QUERIES, WIDTH], q.layout)
    outs = gl.allocate_shared_memory(q.dtype, [2, 1, 1, QUERIES, WIDTH], q.layout)
    keys, values = ring_of(k, STAGES, 2), ring_of(v, STAGES, 2)
    columns = numbers(KEYS)
    q_full, q_free, landed = (barriers(1, 1).index(0), barriers(1, 2).index(0), barriers(1, 1).index(0))
    fence_async_shared()
    shared = (queries, outs, columns, q_full, q_free)
    signals = (q_full, q_free, landed)
    sizes = (heads, length, branches)
    context = (table, past_size, share, table_by_context, table_by_slot)
    split = (whole, parts, sums, tops)
    gl.warp_specialize(
        [
            (_consume, (out, shared, keys, values, lse, scale, sizes, context, split, 0, PAST, SPLIT, TURNS, ASSEMBLY)),
            (_consume, (out, shared, keys, values, lse, scale, sizes, context, split, 1, PAST, SPLIT, TURNS, ASSEMBLY)),
            (_produce, (q, k, past_k, keys, queries, signals, sizes, context, split, PAST, False, SPLIT, GROUP)),
            (_produce, (q, v, past_v, values, queries, signals, sizes, context, split, PAST, True, SPLIT, GROUP)),
        ],
        [4, 2, 2],
        [240, 24, 24],
    )


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """The output [B, L, heads, head_dim] and the fp32 log-sum-exp [B, heads, L]."""
    q, k, v, past = call.q, call.k, call.v, call.past
    branches, length, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(branches, heads, length, dtype=torch.float32, device=q.device)
    rows = QUERIES.value, KEYS.value
    split = split_of(q, past, rows[1])
    sums, tops = split.sums(head_dim, q.device), split.sums(2, q.device)
    sources = [descriptor(t, rows[1]) for t in (k, v, past.k, past.v)]
    strides = past.table.stride()[:2] if past.kind == 2 else (0, 0)
    with on(q):
        forward_kernel[(split.programs,)](
            descriptor(q, rows[0]), *sources, descriptor(out, rows[0]), past.table, lse, call.scale,
            heads, length, branches, past.share, past.size, *strides, split.whole, split.parts, sums, tops,
            PAST=past.kind, SPLIT=split.parts > 1, GROUP=call.group, STAGES=STAGES[head_dim], TURNS=TURNS,
            ASSEMBLY=ASSEMBLY[head_dim], **LAUNCH,
        )  # fmt: skip
    if split.parts > 1:
        merge(split, sums, out, tops, lse)
    return out, lse
