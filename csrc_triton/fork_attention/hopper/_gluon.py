"""What the Hopper kernels share: rings of tiles in shared memory, walks over the keys, and Gluon's versions.

A kernel has a producer partition for each operand that it streams and two consumer partitions of one warpgroup each.
All walk the same sequence of key tiles: the own chunk's last tile, the only one of it that may be partial; its other
tiles; the whole tiles of the context's segments; the partial tiles of those. Consumers need to know how many there
are, and how many keys the partial ones hold.

Tuples stand for what belongs together: a ring is (slots [STAGES, 1, 1, rows, width], barriers that say a slot is full,
barriers that say it is free), a context is (table, number, size, stride of contexts, stride of slots).
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from csrc_triton.fork_attention.selection import minor

# Triton 3.7 has renamed the first; 3.8 the others, whose older names 3.9 refuses
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
async_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

# ptxas 13 assembles for Hopper from Triton 3.9 on, which holds it to a level of register allocation at which producers
# and consumers spill; level 4 is the assembler's own, and nothing spills
ASSEMBLER = {"ptx_options": "--regAllocOptLevel=4"} if minor(triton.__version__) >= (3, 9) else {}
LAUNCH: dict[str, Any] = {"num_warps": 4, **ASSEMBLER}

UNSPECIALIZED = ["heads", "length", "branches", "share", "past_size", "table_by_context", "table_by_slot"]
SWIZZLE = 128  # bytes
CLEARED = gl.constexpr(8)  # rows that a producer clears at once: its registers hold no more


def descriptor(tensor: Tensor, rows: int) -> Any:
    """A tensor [B, L, heads, head_dim] as tiles of `rows` rows; rows behind L come as zeros and are not stored."""
    batch, length, heads, head_dim = tensor.shape
    by_batch, by_row, by_head, _ = tensor.stride()
    layout = gl.NVMMASharedLayout(swizzle_byte_width=SWIZZLE, element_bitwidth=16, rank=4)
    shape, strides = [batch, heads, length, head_dim], [by_batch, by_head, by_row, 1]
    return TensorDescriptor(tensor, shape, strides, [1, 1, rows, head_dim], layout)


@gluon.jit
def here(x):
    """An int32 argument of the kernel as it is, read again at this place.

    What is derived from it is then computed there as well. The compiler would move it to the kernel's beginning, and
    keep it from there on in registers that neither a producer nor a loop over tiles has.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def first_work(x):
    """The program's number; x: any int32. See `here`."""
    return gl.inline_asm_elementwise("mov.u32 $0, %ctaid.x;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def next_work(work):
    """The work of the same program after this one."""
    count = gl.inline_asm_elementwise("mov.u32 $0, %nctaid.x;", "=r,r", [work], dtype=gl.int32, is_pure=False, pack=1)
    return work + count


@gluon.jit
def is_work(work, sizes, split, ROWS: gl.constexpr, SPLIT: gl.constexpr):
    """Is there a piece of work of this number? See `piece`."""
    pieces = here(sizes[0]) * here(sizes[2]) * gl.cdiv(here(sizes[1]), ROWS)
    if SPLIT:
        whole = here(split[0])
        pieces = whole + (pieces - whole) * here(split[1])
    return work < pieces


@gluon.jit
def piece(work, sizes, split, ROWS: gl.constexpr, SPLIT: gl.constexpr):
    """Head, branch, tile, part and number of parts of a piece of work.

    sizes: heads, length, branches. Tiles of ROWS rows are numbered head-major, so that programs that run together
    share keys. split: how many tiles come whole, and into how many parts the others are cut, parts 0 of all first.
    """
    tiles = gl.cdiv(here(sizes[1]), ROWS)
    branches = here(sizes[2])
    part = work * 0
    parts = part + 1
    if SPLIT:
        whole = here(split[0])
        if work >= whole:
            others = here(sizes[0]) * branches * tiles - whole
            part = (work - whole) // others
            parts = here(split[1])
            work = whole + (work - whole) % others
    return work // (branches * tiles), work // tiles % branches, work % tiles, part, parts


@gluon.jit
def steps_of(steps, part, parts, SPLIT: gl.constexpr):
    """The first step of a part, and that of the next part."""
    if SPLIT:
        return steps * part // parts, steps * (part + 1) // parts
    else:
        return steps * 0, steps


@gluon.jit
def context_of(branch, context):
    """One branch's context, of the kernel's arguments (table, size, share, stride of contexts, stride of slots)."""
    number = branch // here(context[2])
    return context[0], number, here(context[1]), here(context[3]), here(context[4])


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers that each wait for ARRIVALS arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def ring_of(source, STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    """A ring of a descriptor's tiles, each read by ARRIVALS consumers."""
    SHAPE: gl.constexpr = source.block_type.shape
    slots = gl.allocate_shared_memory(source.dtype, [STAGES, 1, 1, SHAPE[2], SHAPE[3]], source.layout)
    return slots, barriers(STAGES, 1), barriers(STAGES, ARRIVALS)


@gluon.jit
def rings_of(first, second, STAGES: gl.constexpr):
    """Two rings, each with its producer, whose tiles both consumers take and give back together."""
    SHAPE: gl.constexpr = first.block_type.shape
    one = gl.allocate_shared_memory(first.dtype, [STAGES, 1, 1, SHAPE[2], SHAPE[3]], first.layout)
    other = gl.allocate_shared_memory(first.dtype, [STAGES, 1, 1, SHAPE[2], SHAPE[3]], first.layout)
    full, free = barriers(STAGES, 2), barriers(STAGES, 2)
    return (one, full, free), (other, full, free)


@gluon.jit
def numbers(COUNT: gl.constexpr):
    """[0, COUNT) in shared memory: `gl.arange` in a loop is computed before it, and then takes registers there."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    made = gl.allocate_shared_memory(gl.int32, [COUNT], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    made.store(gl.arange(0, COUNT, LAYOUT))
    return made


@gluon.jit
def matrix(slots, i):
    """Slot i of [STAGES, 1, 1, rows, width] as [rows, width]."""
    return slots.index(i).reshape([slots.shape[3], slots.shape[4]])


@gluon.jit
def await_full(ring, done):
    """Waits for tile `done` and returns the number of its slot."""
    STAGES: gl.constexpr = ring[0].shape[0]
    stage = done % STAGES
    mbarrier.wait(ring[1].index(stage), done // STAGES & 1)
    return stage


@gluon.jit
def release(ring, stage):
    mbarrier.arrive(ring[2].index(stage), count=1)


@gluon.jit
def count_tiles(length, context, PAST: gl.constexpr, KEYS: gl.constexpr):
    """How many whole tiles follow the own chunk's last tile, and how many partial tiles follow those."""
    table, number, size, by_context, by_slot = context
    whole = (length - 1) // KEYS
    partial = whole * 0
    if PAST == 1:
        whole += size // KEYS
        partial += (size % KEYS + KEYS - 1) // KEYS
    elif PAST == 2:
        lengths = table + number.to(gl.int64) * by_context + 1
        for slot in range(size):
            keys = gl.load(lengths + slot * by_slot)
            whole += keys // KEYS
            partial += (keys % KEYS + KEYS - 1) // KEYS
    # a loop that is known to run at most once makes ptxas wait for every matrix product
    return whole, here(partial)


@gluon.jit
def next_partial(slot, context, PAST: gl.constexpr, KEYS: gl.constexpr):
    """The keys of the first partial tile of slot `slot` and later ones, and the slot after its own."""
    table, number, size, by_context, by_slot = context
    if PAST == 1:
        rest = size % KEYS
    else:
        lengths = table + number.to(gl.int64) * by_context + 1
        rest = gl.load(lengths + slot * by_slot) % KEYS
        slot += 1
        while rest == 0:
            rest = gl.load(lengths + slot * by_slot) % KEYS
            slot += 1
    return rest, slot


@gluon.jit
def first_keys(first, whole, length, context, PAST: gl.constexpr, KEYS: gl.constexpr, SPLIT: gl.constexpr):
    """How many keys the tile of step `first` holds, and the slot after its own if it is a segment's partial one."""
    rest = (length - 1) % KEYS + 1
    slot = first * 0
    if SPLIT:
        if first > 0:
            rest = KEYS + slot
        if PAST > 0:
            for _ in range(whole, first):
                rest, slot = next_partial(slot, context, PAST, KEYS)
    return rest, slot


@gluon.jit
def put(source, index, head, row, ring, done):
    """Starts the load of one tile into the ring once its slot is free; `done` tiles went before it."""
    slots, full, free = ring
    STAGES: gl.constexpr = slots.shape[0]
    stage = done % STAGES
    mbarrier.wait(free.index(stage), done // STAGES + 1 & 1)
    mbarrier.expect(full.index(stage), source.block_type.nbytes)
    async_load(source, [index, head, row, 0], full.index(stage), slots.index(stage))
    return done + 1


@gluon.jit
def put_cleared(source, head, row, keys, ring, done, landed, turn):
    """As `put`, with rows from `keys` on made zeros: they belong to others, and 0 x NaN is NaN.

    landed: a barrier of the producer's own, in phase `turn`.
    """
    slots, full, free = ring
    STAGES: gl.constexpr = slots.shape[0]
    ROWS: gl.constexpr = slots.shape[3]
    WIDTH: gl.constexpr = slots.shape[4]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [gl.num_warps(), 1], [1, 0])
    stage = done % STAGES
    mbarrier.wait(free.index(stage), done // STAGES + 1 & 1)
    mbarrier.expect(landed, source.block_type.nbytes)
    async_load(source, [0, head, row, 0], landed, slots.index(stage))
    mbarrier.wait(landed, turn & 1)
    tile = matrix(slots, stage)
    rows = gl.arange(0, CLEARED, gl.SliceLayout(1, LAYOUT))
    for first in gl.static_range(0, ROWS, CLEARED):
        if first + CLEARED > keys:
            some = tile.slice(first, CLEARED)
            found = some.load(LAYOUT)
            some.store(gl.where((first + rows < keys)[:, None], found, gl.zeros_like(found)))
    fence_async_shared()
    barrier()
    mbarrier.arrive(full.index(stage), count=1)
    return done + 1, turn + 1


@gluon.jit
def put_all(
    own, past, branch, head, length, context, ring, done, landed, turn, part, parts,
    PAST: gl.constexpr, KEYS: gl.constexpr, CLEAR: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Loads the sequence of key tiles of one branch and head, or a part of it.

    CLEAR: partial tiles of segments come by `put_cleared`.
    """
    table, number, size, by_context, by_slot = context
    first = part
    last = part + 0x7FFFFFFF
    if SPLIT:
        whole, partial = count_tiles(length, context, PAST, KEYS)
        first, last = steps_of(1 + whole + partial, part, parts, SPLIT)
    step = part * 0 + 1  # of the tile that follows
    end = (length - 1) // KEYS
    if first == 0:
        done = put(own, branch, head, end * KEYS, ring, done)
    for i in range(gl.maximum(first, step), gl.minimum(last, step + end)):
        done = put(own, branch, head, (i - step) * KEYS, ring, done)
    step += end
    if PAST == 1:
        for i in range(gl.maximum(first, step), gl.minimum(last, step + gl.cdiv(size, KEYS))):
            done = put(past, number, head, (i - step) * KEYS, ring, done)  # rows behind the end come as zeros
    elif PAST == 2:
        segments = table + number.to(gl.int64) * by_context
        for slot in range(size):
            start = gl.load(segments + slot * by_slot)
            tiles = gl.load(segments + slot * by_slot + 1) // KEYS
            for i in range(gl.maximum(first, step), gl.minimum(last, step + tiles)):
                done = put(past, 0, head, start + (i - step) * KEYS, ring, done)
            step += tiles
        for slot in range(size):
            start = gl.load(segments + slot * by_slot)
            keys = gl.load(segments + slot * by_slot + 1)
            rest = keys % KEYS
            if rest > 0:
                if (step >= first) & (step < last):
                    if CLEAR:
                        done, turn = put_cleared(past, head, start + keys - rest, rest, ring, done, landed, turn)
                    else:
                        done = put(past, 0, head, start + keys - rest, ring, done)
                step += 1
    return done, turn


@gluon.jit
def computed(x):
    """x >= 0, fp32, as it is, but computed before the wait for matrix products that follows.

    ptxas moves arithmetic behind such a wait, where no product is left that it could overlap. An instruction with an
    effect stays where it is, and this one, which needs x and is never executed, is the cheapest.
    """
    NEVER: gl.constexpr = "{ .reg .pred p; setp.lt.f32 p, $1, 0f00000000; @p pmevent 1; mov.b32 $0, $1; }"
    return gl.inline_asm_elementwise(NEVER, "=r,r", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def take_turn(x, WHO: gl.constexpr):
    """Waits until the other consumer has given the turn. x: any int32. Triton's own barriers have lower numbers."""
    if WHO == 0:
        gl.inline_asm_elementwise("bar.sync 8, 256; mov.b32 $0, $1;", "=r,r", [x], gl.int32, False, 1)
    else:
        gl.inline_asm_elementwise("bar.sync 9, 256; mov.b32 $0, $1;", "=r,r", [x], gl.int32, False, 1)


@gluon.jit
def give_turn(x, WHO: gl.constexpr):
    """Lets the other consumer go on."""
    if WHO == 0:
        gl.inline_asm_elementwise("bar.arrive 9, 256; mov.b32 $0, $1;", "=r,r", [x], gl.int32, False, 1)
    else:
        gl.inline_asm_elementwise("bar.arrive 8, 256; mov.b32 $0, $1;", "=r,r", [x], gl.int32, False, 1)


@gluon.jit
def put_part(sums, acc, number, WHO: gl.constexpr):
    """Stores a consumer's sum [rows, width] of a part, fp32 [parts, 2 rows, width]."""
    ROWS: gl.constexpr = acc.shape[0]
    WIDTH: gl.constexpr = acc.shape[1]
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, acc.type.layout))
    columns = gl.arange(0, WIDTH, gl.SliceLayout(0, acc.type.layout))
    at = sums + (number.to(gl.int64) * 2 + WHO) * (ROWS * WIDTH)
    # as `here`: a thread's place in `sums` would be kept in two registers over the loops over tiles
    at = gl.inline_asm_elementwise("mov.b64 $0, $1;", "=l,l", [at.to(gl.int64)], gl.int64, False, 1).to(sums.dtype)
    gl.store(at + rows[:, None] * WIDTH + columns[None, :], acc)


@gluon.jit
def put_tile(target, outs, acc, branch, head, tile, WHO: gl.constexpr):
    """Stores a consumer's rows of a tile, rounded, through its own shared memory; rows behind the end stay away."""
    tma.store_wait(0)
    barrier()
    matrix(outs, WHO).store(acc.to(target.dtype))
    fence_async_shared()
    async_store(target, [branch, head, (2 * tile + WHO) * acc.shape[0], 0], outs.index(WHO))


@gluon.jit
def put_sum(target, outs, acc, work, sizes, split, sums, WHO: gl.constexpr, SPLIT: gl.constexpr):
    """Stores a consumer's sum, into `sums` if it is one of a part."""
    head, branch, tile, _part, parts = piece(work, sizes, split, 2 * acc.shape[0], SPLIT)
    if SPLIT:  # noqa: SIM102 - it is known when the kernel is compiled
        if parts > 1:
            put_part(sums, acc, work - here(split[0]), WHO)
    if parts == 1:
        put_tile(target, outs, acc, branch, head, tile, WHO)
