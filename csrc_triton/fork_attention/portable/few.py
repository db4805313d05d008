"""The forward pass of fork attention for few queries, such as a token at a time, with the keys cut into parts.

A program owns one part of the keys of one head of keys, and the rows of a tile are what attends to them: all heads of
queries that share the head of keys, all queries, and all branches that share the context. A second launch merges the
parts by their log-sum-exps (flash-decoding, https://pytorch.org/blog/flash-decoding). Own keys differ from branch to
branch and are parts by themselves.

How many rows a tile has and how many parts there are follows from the queries and heads of one branch and from the
number of multiprocessors, where a part begins from the number of keys. So the bits of a branch do not depend on the
branches beside it, nor on whether they share its context.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.fork_attention.portable.forward import step
from csrc_triton.fork_attention.tiles import Call, multiprocessors, narrow, on, seen, width_of

MOST_QUERIES = 16  # of a branch
MOST_ROWS = 128  # queries of a branch times heads that share a head of keys: a tile of the kernel for many queries
MOST_PARTS = 64  # of a context, and of an own chunk
LEAST_KEYS = 128  # of a part
REGISTERS = 255  # of a thread, as many as there are: with fewer a bound of a loop is kept on the stack
TILE_BYTES = 16384  # of keys in one step: three steps of keys and values fit into the 99 KB of sm_86 to sm_120


class Tiling(NamedTuple):
    """Rows of a tile of queries, keys of a step, warps, and steps that are under way at once."""

    rows: int
    keys: int
    warps: int
    stages: int


class Parts(NamedTuple):
    """Of each context and of each own chunk; 0 where a call has none."""

    past: int
    own: int


def serves(call: Call) -> bool:
    """Whether the queries are few, by the shapes of one branch; never in the interpreter, without multiprocessors."""
    length = call.q.shape[1]
    return length <= MOST_QUERIES and length * call.group <= MOST_ROWS and multiprocessors(call.q.device) > 0


def tiling_of(rows: int, width: int, size: int) -> Tiling:
    """rows: of one branch and head of keys. width: of a tile, in elements of `size` bytes."""
    # with more keys, narrow heads keep a bound of a loop on the stack, and fp32 spills its products
    keys = 32 if width <= 32 else 16 if size == 4 else 64
    keys = max(16, min(keys, TILE_BYTES // (width * size)))
    if size == 4:
        return Tiling(16, keys, 4, 2) if width <= 32 else Tiling(16, keys, 8, 3)
    if rows > 32 and width <= 128:
        return Tiling(64, keys, 8, 3)
    return Tiling(32, keys, 4, 3)


def parts_of(call: Call, by: Tiling) -> Parts:
    """So many that about all programs of one branch run at once, two of 4 warps or one of 8 a multiprocessor."""
    length, kv_heads = call.q.shape[1], call.q.shape[2] // call.group
    programs = kv_heads * triton.cdiv(length * call.group, by.rows)
    most = min(MOST_PARTS, triton.cdiv(multiprocessors(call.q.device) * 8 // by.warps, programs))
    return Parts(most if call.past.kind else 0, min(most, triton.cdiv(call.own, LEAST_KEYS)))


@triton.jit
def _keys_of(part, parts, keys, KEYS: tl.constexpr, LEAST: tl.constexpr):
    """First and last (exclusive) key of a part: whole tiles, but where the keys end. The last parts may have none."""
    each = tl.maximum(tl.cdiv(tl.cdiv(keys, parts), KEYS) * KEYS, LEAST)
    first = tl.minimum(part * each, keys)
    return first, tl.minimum(first + each, keys)


@triton.jit
def _walk(
    q, acc, top, total, k, v, index, head, first, last, scale,
    k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Keys [first, last), which all rows see."""
    for row in tl.range(first, last, KEYS):
        acc, top, total = step(
            q, acc, top, total, k, v, index, head, row, last, last, scale,
            k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head,
            KEYS, WIDTH, HEAD, False, False, True, False, False,
        )  # fmt: skip
    return acc, top, total


@triton.jit
def _context(
    q, acc, top, total, k, v, table, index, head, part, parts, size, scale,
    k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head, table_by_context, table_by_slot,
    PAST: tl.constexpr, SLOTS: tl.constexpr, KEYS: tl.constexpr, LEAST: tl.constexpr, WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
):  # fmt: skip
    """A part of context `index` of a pair of tensors (PAST 1) or of a segment table (PAST 2); parts 0: nothing."""
    if PAST == 1:
        first, last = _keys_of(part, tl.maximum(parts, 1), tl.where(parts > 0, size, 0), KEYS, LEAST)
        acc, top, total = _walk(
            q, acc, top, total, k, v, index, head, first, last, scale,
            k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head, KEYS, WIDTH, HEAD,
        )  # fmt: skip
    elif PAST == 2:
        none = index * 0
        segments = table + index.to(tl.int64) * table_by_context
        slot = tl.arange(0, SLOTS)
        lengths = tl.load(segments + slot * table_by_slot + 1, mask=slot < size, other=0)
        slots = tl.max(tl.where(lengths > 0, slot + 1, 0), 0)
        keys = tl.where(parts > 0, tl.sum(lengths, 0), 0)
        first, last = _keys_of(part, tl.maximum(parts, 1), keys, KEYS, LEAST)
        for at in range(0, slots):
            start = tl.load(segments + at * table_by_slot)
            length = tl.load(segments + at * table_by_slot + 1)
            # an end before its begin is no loop of 0 steps: on an H200 (Triton 3.6) keys of later segments were lost
            begin = tl.minimum(tl.maximum(first, 0), length)
            end = tl.maximum(tl.minimum(last, length), begin)
            acc, top, total = _walk(
                q, acc, top, total, k, v, none, head, start + begin, start + end,
                scale, k_by_index, k_by_row, k_by_head, v_by_index, v_by_row, v_by_head, KEYS, WIDTH, HEAD,
            )  # fmt: skip
            first -= length  # numbers of keys from the next segment's first on
            last -= length
    return acc, top, total


@triton.jit
def _own(
    q, acc, top, total, k, v, branch, head, query, part, parts, length, own, block, scale,
    k_by_branch, k_by_row, k_by_head, v_by_branch, v_by_row, v_by_head,
    KEYS: tl.constexpr, LEAST: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """A part of the own chunk; query: of each row; block 0: all see all of it. parts 0: nothing."""
    first, last = _keys_of(part, tl.maximum(parts, 1), tl.where(parts > 0, own, 0), KEYS, LEAST)
    sees = tl.where(block > 0, seen(query + own - length, tl.maximum(block, 1), own), own)
    for row in tl.range(first, last, KEYS):
        acc, top, total = step(
            q, acc, top, total, k, v, branch, head, row, last, sees, scale,
            k_by_branch, k_by_row, k_by_head, v_by_branch, v_by_row, v_by_head,
            KEYS, WIDTH, HEAD, False, False, True, True, True,
        )  # fmt: skip
    return acc, top, total


@triton.jit
def _place(key_heads, rows, share, past_parts, own_parts, past_programs, ROWS: tl.constexpr):
    """Of this program: whether it has a context rather than an own chunk, which one, how many branches see it, its head
    of keys, its part, their number, and its first row of theirs. Programs that run together share keys.
    """
    program = tl.program_id(0)
    of_past = program < past_programs
    number = tl.where(of_past, program, program - past_programs)
    branches = tl.where(of_past, share, 1)
    parts = tl.where(of_past, past_parts, own_parts)
    tiles = tl.cdiv(branches * rows, ROWS)
    part, key_head = number // tiles % parts, number // (tiles * parts) % key_heads
    unit = number // (tiles * parts * key_heads)
    return of_past, unit, branches, key_head, part, parts, number % tiles * ROWS


UNSPECIALIZED = (
    "batch", "heads", "group", "length", "own", "share", "past_size", "block", "past_parts", "own_parts",
    "past_programs",
)  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def part_kernel(
    q, k, v, past_k, past_v, table, indices, sums, tops, scale, batch,
    heads, group, length, own, share, past_size, block, past_parts, own_parts, past_programs,
    q_by_branch, q_by_row, q_by_head, k_by_branch, k_by_row, k_by_head, v_by_branch, v_by_row, v_by_head,
    past_k_by_index, past_k_by_row, past_k_by_head, past_v_by_index, past_v_by_row, past_v_by_head,
    table_by_context, table_by_slot,
    PAST: tl.constexpr, SLOTS: tl.constexpr, INDEXED: tl.constexpr, OWN: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, LEAST: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """One part of the keys for one tile of rows: fp32 sums [parts, key heads, B, length, group, HEAD] of values whose
    weights are relative to 2 ** top, and tops [.., 2] of top and total. A part without keys has a total of 0 and no
    sums. The first `past_programs` programs have the contexts, each of `share` branches, the others the own chunks.
    """
    of_past, unit, branches, key_head, part, parts, first = _place(
        heads // group, length * group, share, past_parts, own_parts, past_programs, ROWS
    )
    row = first + tl.arange(0, ROWS)
    there = row < branches * length * group
    # [parts, key heads, B, length, group]: rows of a tile lie side by side
    rows = key_head.to(tl.int64) * batch + unit * branches
    base = (tl.where(of_past, part, past_parts + part) * heads.to(tl.int64) * batch + rows * group) * length + first
    branch = (unit * branches + row // (length * group)).to(tl.int64)
    query = row // group % length
    head = key_head * group + row % group
    column = tl.arange(0, WIDTH)[None, :]
    inside = there[:, None] & (column < HEAD)
    at = branch * q_by_branch + query.to(tl.int64) * q_by_row + head.to(tl.int64) * q_by_head
    queries = tl.load(q + at[:, None] + column, mask=inside, other=0.0)

    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if PAST > 0:
        index = tl.where(of_past, unit, 0)
        if INDEXED:
            index = tl.load(indices + index).to(tl.int32)
        acc, top, total = _context(
            queries, acc, top, total, past_k, past_v, table, index, key_head, part, tl.where(of_past, parts, 0),
            past_size, scale, past_k_by_index, past_k_by_row, past_k_by_head, past_v_by_index, past_v_by_row,
            past_v_by_head, table_by_context, table_by_slot, PAST, SLOTS, KEYS, LEAST, WIDTH, HEAD,
        )  # fmt: skip
    if OWN:
        acc, top, total = _own(
            queries, acc, top, total, k, v, unit, key_head, query, part, tl.where(of_past, 0, parts),
            length, own, block, scale, k_by_branch, k_by_row, k_by_head, v_by_branch, v_by_row, v_by_head,
            KEYS, LEAST, WIDTH, HEAD,
        )  # fmt: skip

    to = base + tl.arange(0, ROWS)
    tl.store(tops + 2 * to, top, mask=there)
    tl.store(tops + 2 * to + 1, total, mask=there)
    tl.store(sums + to[:, None] * HEAD + column, acc, mask=inside & (total != 0)[:, None])


@triton.jit(do_not_specialize=["batch", "heads", "group", "length", "parts"])
def merge_kernel(
    sums, tops, out, lse, batch, heads, group, length, parts,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """One row of out and lse from its parts, all at once: PARTS is a power of 2, at least `parts`."""
    row = tl.program_id(0)
    part, column = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    at = part.to(tl.int64) * (batch * length * heads) + row
    tops_of = tl.load(tops + 2 * at, mask=part < parts, other=float("-inf"))
    totals = tl.load(tops + 2 * at + 1, mask=part < parts, other=0.0)
    top = tl.max(tops_of, 0)
    made = totals != 0
    weights = tl.where(made, tl.exp2(tops_of - tl.where(top == float("-inf"), 0.0, top)), 0.0)
    total = tl.sum(totals * weights, 0)
    inside = made[:, None] & (column < HEAD)[None, :]
    found = tl.load(sums + at[:, None] * HEAD + column[None, :], mask=inside, other=0.0)
    result = tl.sum(found * weights[:, None], 0) / tl.where(total != 0, total, 1.0)
    head = row // (batch * length * group) * group + row % group
    query, branch = row // group % length, (row // (length * group) % batch).to(tl.int64)
    to = (branch * length + query) * heads + head
    tl.store(out + to * HEAD + column, narrow(result, out.dtype.element_ty), mask=column < HEAD)
    tl.store(lse + (branch * heads + head) * length + query, (top + tl.log2(total)) * 0.6931471805599453)


def merge_warps(parts: int, width: int) -> int:
    """For 64 numbers a thread or fewer, up to 8 warps."""
    return 4 if parts * width <= 8192 else 8


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """The output [B, Lq, heads, head_dim] and the fp32 log-sum-exp [B, heads, Lq]."""
    q, (k, v), past = call.q, call.sources, call.past
    branches, length, heads, head_dim = q.shape
    rows, width = branches * length * heads, width_of(head_dim)
    by = tiling_of(length * call.group, width, q.element_size())
    parts = parts_of(call, by)
    count = sum(parts)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(branches, heads, length, dtype=torch.float32, device=q.device)
    if count == 0:  # no keys at all
        return out.zero_(), lse.fill_(-torch.inf)
    sums, tops = (torch.empty(count, rows, each, dtype=torch.float32, device=q.device) for each in (head_dim, 2))
    share = past.share if past.index is None else 1
    strides = [stride for tensor in (q, k, v, past.k, past.v) for stride in tensor.stride()[:3]]

    def programs(parts: int, share: int) -> int:
        tiles = triton.cdiv(share * length * call.group, by.rows)
        return parts * tiles * (heads // call.group) * (branches // share)

    of_past = programs(parts.past, share)
    most = triton.next_power_of_2(count)
    with on(q):
        part_kernel[(of_past + programs(parts.own, 1),)](
            q, k, v, past.k, past.v, past.table, past.indices, sums, tops, call.scale, branches,
            heads, call.group, length, call.own, share, past.size, call.block if call.causal_block else 0,
            *parts, of_past, *strides, *past.table.stride()[:2],
            PAST=past.kind, SLOTS=past.slots, INDEXED=past.index is not None, OWN=parts.own > 0, ROWS=by.rows,
            KEYS=by.keys, LEAST=max(LEAST_KEYS, by.keys), WIDTH=width, HEAD=head_dim,
            num_warps=by.warps, num_stages=by.stages, maxnreg=REGISTERS,
        )  # fmt: skip
        merge_kernel[(rows,)](
            sums, tops, out, lse, branches, heads, call.group, length, count,
            PARTS=most, WIDTH=width, HEAD=head_dim, num_warps=merge_warps(most, width),
        )  # fmt: skip
    return out, lse
