"""The backward pass of fork attention for Hopper, in Gluon: see portable/backward.py for the maths.

The gradient of the queries, here, runs over the context and the own chunk (three matrix products a tile); those of the
keys and values, in dkv.py, over the own chunk (four). No sum is atomic, so equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
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
    context_of,
    count_tiles,
    descriptor,
    first_keys,
    first_work,
    here,
    is_work,
    matrix,
    next_partial,
    next_work,
    numbers,
    piece,
    put_all,
    put_sum,
    release,
    rings_of,
    steps_of,
)
from csrc_triton.fork_attention.hopper.dkv import key_gradient
from csrc_triton.fork_attention.hopper.parts import merge, split_of
from csrc_triton.fork_attention.tiles import Call, describable, load_tile, on

QUERIES = gl.constexpr(64)  # of one consumer
KEYS = gl.constexpr(64)
STAGES = gl.constexpr(3)
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS.value, 16]))
PADDED = 128  # rows of the vectors below come in multiples of it


@triton.jit(do_not_specialize=["heads", "length", "padded"])
def vectors_kernel(
    out, grad, lse, grad_lse, vectors, heads, length, padded, grad_by_branch, grad_by_row, grad_by_head,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """vectors [B, heads, 2, padded]: lse in units of log2 and delta = rowsum(grad * out) - grad_lse.

    Behind the length they are infinity and 0: the weights of those rows come out as 0.
    """
    program = tl.program_id(0)
    head, tile = program % heads, program // heads
    branch, first = tile // (padded // ROWS), tile % (padded // ROWS) * ROWS
    o = load_tile(
        out, branch, head, first, length, length.to(tl.int64) * heads * WIDTH, heads * WIDTH, WIDTH,
        ROWS, WIDTH, False, True,
    )  # fmt: skip
    g = load_tile(
        grad, branch, head, first, length, grad_by_branch, grad_by_row, grad_by_head, ROWS, WIDTH, False, True
    )
    total = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    rows = first + tl.arange(0, ROWS)
    at = branch.to(tl.int64) * heads + head
    if GRAD_LSE:
        total -= tl.load(grad_lse + at * length + rows, mask=rows < length, other=0.0)
    scaled = tl.load(lse + at * length + rows, mask=rows < length, other=float("inf")) * 1.4426950408889634
    tl.store(vectors + at * 2 * padded + rows, scaled)
    tl.store(vectors + at * 2 * padded + padded + rows, total)


@gluon.jit
def _step(
    q, grad, keys, values, columns, q_full, turn, done, acc, lse, delta, scale, rest, MASKED: gl.constexpr,
    FIRST: gl.constexpr,
):  # fmt: skip
    """One tile of keys. Its product with them is left running: the next step, or who comes last, waits for it."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, acc.type.tensor_type.layout if not FIRST else acc.type.layout, 2)
    zeros = gl.zeros([QUERIES, KEYS], gl.float32, SCORES)
    stage = await_full(keys, done)
    scores = warpgroup_mma(q, matrix(keys[0], stage).permute([1, 0]), zeros, use_acc=False, is_async=True)
    grads = warpgroup_mma(grad, matrix(values[0], stage).permute([1, 0]), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, [scores])
    if not FIRST:
        release(keys, (done - 1) % keys[0].shape[0])
    weights = gl.exp2(scores * scale - lse[:, None])
    mbarrier.wait(q_full, turn & 1)  # keeps the exponentials before the next wait: see forward.py
    grads = warpgroup_mma_wait(0, [grads])
    grads = weights * (grads - delta[:, None])
    if MASKED:
        grads = gl.where((columns.load(gl.SliceLayout(0, SCORES)) < rest)[None, :], grads, 0.0)
    grads = gl.convert_layout(grads.to(q.dtype), OPERAND)
    return done + 1, warpgroup_mma(grads, matrix(keys[0], stage), acc, is_async=True)


@gluon.jit
def _consume(
    grad_q, shared, keys, values, vectors, scale, softmax_scale, sizes, context, split, WHO: gl.constexpr,
    PAST: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Owns queries [64 WHO, 64 WHO + 64) of each tile of 128."""
    queries, grads, outs, columns, q_full, q_free = shared
    WIDTH: gl.constexpr = queries.shape[4]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    q, grad = matrix(queries, WHO), matrix(grads, WHO)
    work = first_work(sizes[1])
    done = work * 0
    turn = done
    while is_work(work, sizes, split, 2 * QUERIES, SPLIT):
        head, branch, tile, part, parts = piece(work, sizes, split, 2 * QUERIES, SPLIT)
        length = here(sizes[1])
        padded = gl.cdiv(length, 2 * QUERIES) * (2 * QUERIES)
        rows = (2 * tile + WHO) * QUERIES + gl.arange(0, QUERIES, gl.SliceLayout(1, SCORES))
        at = (branch.to(gl.int64) * here(sizes[0]) + head) * 2 * padded
        lse = gl.load(vectors + at + rows)
        delta = gl.load(vectors + at + padded + rows)
        its = context_of(branch, context)
        whole, partial = count_tiles(length, its, PAST, KEYS)
        first, last = steps_of(1 + whole + partial, part, parts, SPLIT)
        rest, slot = first_keys(first, whole, length, its, PAST, KEYS, SPLIT)
        mbarrier.wait(q_full, turn & 1)
        acc = gl.zeros([QUERIES, WIDTH], gl.float32, ACC)
        done, acc = _step(
            q, grad, keys, values, columns, q_full, turn, done, acc, lse, delta, scale, rest, True, True
        )  # fmt: skip
        for _ in range(first, gl.minimum(whole, last - 1)):
            done, acc = _step(
                q, grad, keys, values, columns, q_full, turn, done, acc, lse, delta, scale, 0, False, False
            )  # fmt: skip
        if PAST > 0:
            for _ in range(gl.maximum(first, whole) + 1, last):
                rest, slot = next_partial(slot, its, PAST, KEYS)
                done, acc = _step(
                    q, grad, keys, values, columns, q_full, turn, done, acc, lse, delta, scale, rest, True, False
                )  # fmt: skip
        mbarrier.arrive(q_free, count=1)
        turn += 1
        total = warpgroup_mma_wait(0, [acc])
        release(keys, (done - 1) % keys[0].shape[0])
        put_sum(grad_q, outs, total * softmax_scale, work, sizes, split, split[2], WHO, SPLIT)
        work = next_work(work)
    tma.store_wait(0)


@gluon.jit
def _produce(
    own, past, ring, queries, keeps, signals, sizes, context, split, PAST: gl.constexpr,
    KEYS_TOO: gl.constexpr, SPLIT: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Streams keys, with the queries and gradients that they meet, or values."""
    q_full, q_free, landed = signals
    work = first_work(sizes[1])
    done = work * 0
    turn = done
    landings = done
    while is_work(work, sizes, split, 2 * QUERIES, SPLIT):
        head, branch, tile, part, parts = piece(work, sizes, split, 2 * QUERIES, SPLIT)
        if KEYS_TOO:
            mbarrier.wait(q_free, turn + 1 & 1)
            turn += 1
            mbarrier.expect(q_full, 4 * queries[0].block_type.nbytes)
            for who in gl.static_range(2):
                at = [branch, head, (2 * tile + who) * QUERIES, 0]
                async_load(queries[0], at, q_full, keeps[0].index(who))
                async_load(queries[1], at, q_full, keeps[1].index(who))
        its = context_of(branch, context)
        done, landings = put_all(
            own, past, branch, head // GROUP, here(sizes[1]), its, ring, done, landed, landings, part, parts,
            PAST, KEYS, KEYS_TOO, SPLIT,
        )  # fmt: skip
        work = next_work(work)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def query_gradient_kernel(
    q, grad, k, v, past_k, past_v, grad_q, table, vectors, scale, softmax_scale, heads, length, branches, share,
    past_size, table_by_context, table_by_slot, whole, parts, sums, PAST: gl.constexpr, SPLIT: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """dQ of all tiles of queries; vectors: see vectors_kernel; whole, parts, sums: see parts.py; GROUP: heads of
    queries to one of keys."""
    WIDTH: gl.constexpr = q.block_type.shape[3]
    queries = gl.allocate_shared_memory(q.dtype, [2, 1, 1, QUERIES, WIDTH], q.layout)
    grads = gl.allocate_shared_memory(q.dtype, [2, 1, 1, QUERIES, WIDTH], q.layout)
    outs = gl.allocate_shared_memory(q.dtype, [2, 1, 1, QUERIES, WIDTH], q.layout)
    keys, values = rings_of(k, v, STAGES)
    columns = numbers(KEYS)
    q_full, q_free, landed = barriers(1, 1).index(0), barriers(1, 2).index(0), barriers(1, 1).index(0)
    fence_async_shared()
    shared = (queries, grads, outs, columns, q_full, q_free)
    sizes = (heads, length, branches)
    context = (table, past_size, share, table_by_context, table_by_slot)
    split = (whole, parts, sums)
    gives = (q, grad)
    keeps = (queries, grads)
    signals = (q_full, q_free, landed)
    gl.warp_specialize(
        [
            (
                _consume,
                (grad_q, shared, keys, values, vectors, scale, softmax_scale, sizes, context, split, 0, PAST, SPLIT),
            ),
            (
                _consume,
                (grad_q, shared, keys, values, vectors, scale, softmax_scale, sizes, context, split, 1, PAST, SPLIT),
            ),
            (_produce, (k, past_k, keys, gives, keeps, signals, sizes, context, split, PAST, True, SPLIT, GROUP)),
            (_produce, (v, past_v, values, gives, keeps, signals, sizes, context, split, PAST, False, SPLIT, GROUP)),
        ],
        [4, 2, 2],
        [240, 24, 24],
    )


def backward(
    call: Call, out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None, wants_q: bool, wants_kv: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, of their shapes; one that is not wanted comes empty."""
    if not describable(grad) or grad.stride(-1) != 1:
        grad = grad.contiguous()
    vectors = _vectors(out, grad, lse, grad_lse)
    # an op's results must be tensors of their own
    grad_q, grad_k, grad_v = (out.new_empty(0) for _ in range(3))
    if wants_q:
        grad_q = _query_gradient(call, grad, vectors)
    if wants_kv:
        grad_k, grad_v = key_gradient(call, grad, vectors)
    return grad_q, grad_k, grad_v


def _vectors(out: Tensor, grad: Tensor, lse: Tensor, grad_lse: Tensor | None) -> Tensor:
    branches, length, heads, head_dim = out.shape
    padded = triton.cdiv(length, PADDED) * PADDED
    vectors = torch.empty(branches, heads, 2, padded, dtype=torch.float32, device=out.device)
    rows = PADDED // 2
    with on(out):
        vectors_kernel[(heads * branches * (padded // rows),)](
            out.contiguous(), grad, lse, lse if grad_lse is None else grad_lse.contiguous(), vectors,
            heads, length, padded, *grad.stride()[:3], ROWS=rows, WIDTH=head_dim, GRAD_LSE=grad_lse is not None,
        )  # fmt: skip
    return vectors


def _query_gradient(call: Call, grad: Tensor, vectors: Tensor) -> Tensor:
    q, k, v, past = call.q, call.k, call.v, call.past
    branches, length, heads, head_dim = q.shape
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows = QUERIES.value, KEYS.value
    split = split_of(q, past, rows[1])
    sums = split.sums(head_dim, q.device)
    sources = [descriptor(t, rows[1]) for t in (k, v, past.k, past.v)]
    strides = past.table.stride()[:2] if past.kind == 2 else (0, 0)
    with on(q):
        query_gradient_kernel[(split.programs,)](
            descriptor(q, rows[0]), descriptor(grad, rows[0]), *sources, descriptor(grad_q, rows[0]), past.table,
            vectors, call.scale, call.softmax_scale, heads, length, branches, past.share, past.size, *strides,
            split.whole, split.parts, sums, PAST=past.kind, SPLIT=split.parts > 1, GROUP=call.group, **LAUNCH,
        )  # fmt: skip
    if split.parts > 1:
        merge(split, sums, grad_q)
    return grad_q
