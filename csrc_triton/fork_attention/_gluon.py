"""What the Hopper kernels share: rings of tiles in shared memory, walks over the keys, and Gluon's versions.

A kernel has one producer partition for each operand that it streams and two consumer partitions of one warpgroup
each. Producers and consumers walk the same sequence of key tiles: the own chunk's last tile (the only one of it that
may be partial), its other tiles, the whole tiles of the context's segments, the partial tiles of those. Consumers need
only its length and, for partial tiles, how many keys they hold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.7 renamed it
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

SWIZZLE = 128  # bytes
CLEARED = 16  # rows that a producer clears at once: what its registers hold


def descriptor(tensor: Tensor, rows: int) -> Any:
    """A tensor [B, L, heads, head_dim] as tiles of `rows` rows; rows behind L come as zeros and are not stored."""
    batch, length, heads, head_dim = tensor.shape
    by_batch, by_row, by_head, _ = tensor.stride()
    layout = gl.NVMMASharedLayout(swizzle_byte_width=SWIZZLE, element_bitwidth=16, rank=4)
    shape, strides = [batch, heads, length, head_dim], [by_batch, by_head, by_row, 1]
    return TensorDescriptor(tensor, shape, strides, [1, 1, rows, head_dim], layout)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers that each wait for ARRIVALS arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def matrix(tile):
    """A tile [1, 1, rows, width] in shared memory as [rows, width]."""
    return tile.reshape([tile.shape[2], tile.shape[3]])


@gluon.jit
def place(work, tiles, branches):
    """Head, branch and tile of one piece of work: head-major, so that programs that run together share keys."""
    return work // (branches * tiles), work // tiles % branches, work % tiles


@gluon.jit
def count(length, table, context, size, by_context, by_slot, PAST: gl.constexpr, KEYS: gl.constexpr):
    """How many whole tiles follow the own chunk's last tile, and how many partial tiles follow those."""
    whole = (length - 1) // KEYS
    partial = whole * 0
    if PAST == 1:
        whole += size // KEYS
        partial += (size % KEYS + KEYS - 1) // KEYS
    elif PAST == 2:
        lengths = table + context.to(gl.int64) * by_context + 1
        for slot in range(size):
            keys = gl.load(lengths + slot * by_slot)
            whole += keys // KEYS
            partial += (keys % KEYS + KEYS - 1) // KEYS
    return whole, partial


@gluon.jit
def next_partial(slot, table, context, size, by_context, by_slot, PAST: gl.constexpr, KEYS: gl.constexpr):
    """The keys of the first partial tile of segments `slot` and later, and the slot after its own."""
    if PAST == 1:
        rest = size % KEYS
    else:
        lengths = table + context.to(gl.int64) * by_context + 1
        rest = gl.load(lengths + slot * by_slot) % KEYS
        slot += 1
        while rest == 0:
            rest = gl.load(lengths + slot * by_slot) % KEYS
            slot += 1
    return rest, slot


@gluon.jit
def put(source, index, head, row, ring, full, free, done):
    """Starts the load of one tile into the ring once its slot is free; `done` tiles went before it."""
    STAGES: gl.constexpr = ring.shape[0]
    stage = done % STAGES
    mbarrier.wait(free.index(stage), done // STAGES + 1 & 1)
    mbarrier.expect(full.index(stage), source.block_type.nbytes)
    tma.async_copy_global_to_shared(source, [index, head, row, 0], full.index(stage), ring.index(stage))
    return done + 1


@gluon.jit
def put_cleared(source, index, head, row, keys, ring, full, free, done, landed, turn):
    """As `put`, with rows from `keys` on made zeros: they belong to others, and 0 x NaN is NaN."""
    STAGES: gl.constexpr = ring.shape[0]
    ROWS: gl.constexpr = ring.shape[3]
    WIDTH: gl.constexpr = ring.shape[4]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [gl.num_warps(), 1], [1, 0])
    stage = done % STAGES
    mbarrier.wait(free.index(stage), done // STAGES + 1 & 1)
    mbarrier.expect(landed, source.block_type.nbytes)
    tma.async_copy_global_to_shared(source, [index, head, row, 0], landed, ring.index(stage))
    mbarrier.wait(landed, turn & 1)
    tile = matrix(ring.index(stage))
    rows = gl.arange(0, CLEARED, gl.SliceLayout(1, LAYOUT))
    for first in gl.static_range(0, ROWS, CLEARED):
        if first + CLEARED > keys:
            some = tile.slice(first, CLEARED)
            found = some.load(LAYOUT)
            some.store(gl.where((first + rows < keys)[:, None], found, gl.zeros_like(found)))
    fence_async_shared()
    barrier()
    mbarrier.arrive(full.index(stage), count=1)
    return done + 1


@gluon.jit
def put_all(
    own, past, branch, head, length, table, context, size, by_context, by_slot, ring, full, free, done, landed, turn,
    PAST: gl.constexpr, KEYS: gl.constexpr, CLEAR: gl.constexpr,
):  # fmt: skip
    """Loads the sequence of key tiles of one branch and head. CLEAR: see `put_cleared`."""
    last = (length - 1) // KEYS * KEYS
    done = put(own, branch, head, last, ring, full, free, done)
    for row in range(0, last, KEYS):
        done = put(own, branch, head, row, ring, full, free, done)
    if PAST == 1:
        for row in range(0, size, KEYS):  # rows behind the end come as zeros
            done = put(past, context, head, row, ring, full, free, done)
    elif PAST == 2:
        segments = table + context.to(gl.int64) * by_context
        for slot in range(size):
            start = gl.load(segments + slot * by_slot)
            keys = gl.load(segments + slot * by_slot + 1)
            for row in range(start, start + keys // KEYS * KEYS, KEYS):
                done = put(past, 0, head, row, ring, full, free, done)
        for slot in range(size):
            start = gl.load(segments + slot * by_slot)
            keys = gl.load(segments + slot * by_slot + 1)
            rest = keys % KEYS
            if rest > 0:
                if CLEAR:
                    done = put_cleared(
                        past, 0, head, start + keys - rest, rest, ring, full, free, done, landed, turn
                    )  # fmt: skip
                    turn += 1
                else:
                    done = put(past, 0, head, start + keys - rest, ring, full, free, done)
    return done, turn
