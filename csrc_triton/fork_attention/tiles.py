"""Shared by the kernels of fork attention: tile sizes, operands, and loading a tile of rows."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from csrc_triton import runtime

LOG2_E = 1.4426950408889634
INTERPRETED = tl.constexpr(runtime.interpreted())


@dataclass(frozen=True)
class Tiling:
    """Tile sizes and launch options of a kernel.

    queries, keys: rows of a tile. descriptors: load tiles through the tensor memory accelerator (sm_90 and newer)
    rather than plain pointers.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    descriptors: bool = False


# (major capability, width, bytes of an element) -> Tiling. Major 0 is the interpreter, 9 is Hopper, 12 the Blackwell of
# sm_120, and 8 serves all other GPUs, and those two where they have no entry. Tiles of 8 and 12 are small enough for
# the registers and for 99 KB of shared memory: compiled ahead, no loop over tiles spills. Plain dictionaries: a tuning
# run replaces entries.
Table = dict[tuple[int, int, int], Tiling]
PLAIN, HOPPER, SM_120 = 8, 9, 12
WIDTHS = (16, 32, 64, 128, 256)  # of a tile: powers of two


def _table(*rows: tuple[int, tuple[int, ...], int, Tiling]) -> Table:
    return {(m, width, size): replace(of) for m, widths, size, of in rows for width in widths}


FORWARD = _table(
    (0, WIDTHS, 2, Tiling(64, 64, 4, 1)),
    (0, WIDTHS, 4, Tiling(64, 64, 4, 1)),
    (8, (16, 32), 2, Tiling(128, 64, 4, 3)),
    (8, (64,), 2, Tiling(128, 64, 8, 3)),
    (8, (128,), 2, Tiling(128, 32, 8, 3)),
    (8, (256,), 2, Tiling(32, 32, 8, 2)),
    (8, (16, 32), 4, Tiling(64, 32, 8, 2)),
    (8, (64,), 4, Tiling(32, 32, 8, 2)),
    (8, (128, 256), 4, Tiling(16, 16, 8, 1)),
    (9, (32, 64, 128), 2, Tiling(128, 128, 8, 3, descriptors=True)),
    (12, (128,), 2, Tiling(128, 16, 8, 3)),
)
QUERY_GRADIENT = _table(
    (0, WIDTHS, 2, Tiling(64, 64, 4, 1)),
    (0, WIDTHS, 4, Tiling(64, 64, 4, 1)),
    (8, (16, 32, 64), 2, Tiling(128, 64, 8, 2)),
    (8, (128,), 2, Tiling(128, 32, 8, 2)),
    (8, (256,), 2, Tiling(16, 32, 8, 2)),
    (8, (16, 32), 4, Tiling(32, 32, 8, 2)),
    (8, (64, 128), 4, Tiling(16, 16, 8, 1)),
    (8, (256,), 4, Tiling(4, 16, 8, 1)),
    (9, (32, 64, 128), 2, Tiling(128, 64, 8, 3, descriptors=True)),
    (12, (64,), 2, Tiling(64, 64, 4, 2)),
    (12, (128,), 2, Tiling(32, 64, 8, 2)),
)
KEY_GRADIENT = _table(
    (0, WIDTHS, 2, Tiling(64, 64, 4, 1)),
    (0, WIDTHS, 4, Tiling(64, 64, 4, 1)),
    (8, (16, 32), 2, Tiling(64, 128, 8, 2)),
    (8, (64,), 2, Tiling(32, 128, 8, 2)),
    (8, (128,), 2, Tiling(16, 128, 8, 2)),
    (8, (256,), 2, Tiling(16, 16, 8, 1)),
    (8, (16, 32), 4, Tiling(32, 32, 8, 2)),
    (8, (64,), 4, Tiling(16, 16, 8, 1)),
    (8, (128,), 4, Tiling(16, 8, 8, 1)),
    (8, (256,), 4, Tiling(16, 4, 8, 1)),
    (9, (32, 64, 128), 2, Tiling(64, 128, 8, 2, descriptors=True)),
    (12, (128,), 2, Tiling(32, 32, 8, 2)),
)


@functools.cache
def _major(device: torch.device) -> int:
    if device.type == "cpu":
        return 0
    major = PLAIN if torch.version.hip is not None else torch.cuda.get_device_capability(device)[0]
    return major if major in (HOPPER, SM_120) else PLAIN


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 0 for the interpreter."""
    return 0 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def width_of(head_dim: int) -> int:
    """Columns of a tile of heads of this size, up to 256: those behind the head are masked."""
    return max(WIDTHS[0], triton.next_power_of_2(head_dim))


def tiling_of(table: Table, major: int, head_dim: int, size: int) -> Tiling:
    """Entry of `table` for a major compute capability, a head size and the bytes of an element."""
    width = width_of(head_dim)
    found = table.get((major, width, size))
    if found is None or (found.descriptors and head_dim != width):
        return table[PLAIN, width, size]
    return found


def tiling(table: Table, q: Tensor, *others: Tensor) -> Tiling:
    """Entry of `table` for q; one without descriptors where a tensor cannot have one (see `describable`)."""
    chosen = tiling_of(table, _major(q.device), q.shape[-1], q.element_size())
    if chosen.descriptors and not describable(q, *others):
        chosen = tiling_of(table, PLAIN, q.shape[-1], q.element_size())
    return chosen


def on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Context in which the current device, on which kernels launch, is the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def describable(*tensors: Tensor) -> bool:
    """Whether the tensor memory accelerator can address these four-dimensional tensors."""
    return all(
        t.data_ptr() % 16 == 0 and all(s > 0 and s * t.element_size() % 16 == 0 for s in t.stride()[:-1])
        for t in tensors
    )


def operand(tensor: Tensor, rows: int, descriptors: bool) -> tuple[Any, int, int, int]:
    """A tensor [B, L, heads, head_dim] as a kernel's arguments: source, and strides of batch, row and head.

    With descriptors, the source is one of [B, heads, L, head_dim] in tiles of `rows` rows: a tile is then a load of
    leading unit dimensions, and rows behind L come as zeros. The strides are not used.
    """
    batch, length, heads, head_dim = tensor.shape
    by_batch, by_row, by_head, _ = tensor.stride()
    if not descriptors:
        return tensor, by_batch, by_row, by_head
    shape, strides = [batch, heads, length, head_dim], [by_batch, by_head, by_row, 1]
    return TensorDescriptor(tensor, shape, strides, [1, 1, rows, head_dim]), 0, 0, 0


def operands(chosen: Tiling, *of: tuple[Tensor, int]) -> tuple[list[Any], list[int]]:
    """Sources and strides of several tensors, each with the rows of its tiles: see `operand`."""
    sources, strides = [], []
    for tensor, rows in of:
        source, *by = operand(tensor, rows, chosen.descriptors)
        sources.append(source)
        strides.extend(by)
    return sources, strides


@dataclass(frozen=True)
class Past:
    """The context as a kernel reads it.

    k, v [P, rows, kv_heads, head_dim]; kind 0: no context, 1: a pair of tensors (P contexts of `size` rows), 2: pools
    (P = 1) with a table [P', S, 2] of `size` = S slots. Each context serves `share` consecutive branches, unless an
    `index` [B] names the context of each branch.
    """

    k: Tensor
    v: Tensor
    table: Tensor
    kind: int
    size: int
    share: int
    index: Tensor | None = None

    @property
    def indices(self) -> Tensor:
        """The index, or what stands in for it as a kernel's argument."""
        return self.table if self.index is None else self.index

    @property
    def slots(self) -> int:
        """Slots to load at once."""
        return triton.next_power_of_2(self.size) if self.kind == 2 else 1

    @classmethod
    def of(
        cls,
        q: Tensor,
        context_k: Tensor | None,
        context_v: Tensor | None,
        table: Tensor | None,
        index: Tensor | None = None,
    ) -> Past:
        """q stands in where there is no context."""
        source = context_k if table is None else table
        if context_k is None or context_v is None or source is None or source.shape[1] == 0:
            return cls(q, q, q, 0, 0, 1)
        kind, share = (1 if table is None else 2), q.shape[0] // source.shape[0]
        if table is None:
            return cls(context_k, context_v, q, kind, source.shape[1], share, index)
        return cls(context_k[None], context_v[None], table, kind, source.shape[1], share, index)


@dataclass(frozen=True)
class Call:
    """One call of fork attention.

    q [B, Lq, heads, head_dim]; own k, v [B, Lk, kv_heads, head_dim]; the context, and a positive softmax scale.
    causal_block: tokens of a block of the own chunk that sees no later block; 0: all of the chunk is seen.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    past: Past
    softmax_scale: float
    causal_block: int = 0

    @property
    def scale(self) -> float:
        """Factor that turns a product of query and key into an exponent of 2."""
        return self.softmax_scale * LOG2_E

    @property
    def own(self) -> int:
        """Keys of the own chunk."""
        return self.k.shape[1]

    @property
    def group(self) -> int:
        """Heads of queries that share a head of keys."""
        return self.q.shape[2] // self.k.shape[2]

    @property
    def sources(self) -> tuple[Tensor, Tensor]:
        """k and v; q stands in for an own chunk without keys."""
        return (self.k, self.v) if self.own else (self.q, self.q)

    @property
    def blind(self) -> bool:
        """Whether there may be queries that see no key at all."""
        return self.own == 0 or (self.causal_block > 0 and self.q.shape[1] > self.own)

    @property
    def block(self) -> int:
        """The causal block as a kernel takes it, which longer than the own chunk means the same."""
        return max(1, min(self.causal_block, self.own))


@triton.jit
def load_tile(
    source, index, head, row, limit, by_index, by_row, by_head,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr, HEAD: tl.constexpr = None,
):  # fmt: skip
    """Rows [row, row + ROWS) of one head; with MASKED, rows from `limit` on are zeros, whatever memory holds there.

    HEAD: columns of the head, if fewer than WIDTH; those behind are zeros.
    """
    rows = tl.arange(0, ROWS)
    if DESCRIPTORS:
        tile = source.load([index, head, row, 0]).reshape(ROWS, WIDTH)
        if MASKED:
            tile = tl.where((row + rows < limit)[:, None], tile, 0.0)
    else:
        # 64 bits: a pool may hold more than 2^31 elements
        first = source + tl.cast(index, tl.int64) * by_index + tl.cast(row, tl.int64) * by_row
        first += tl.cast(head, tl.int64) * by_head
        columns = tl.arange(0, WIDTH)[None, :]
        pointers = first + rows[:, None] * by_row + columns
        if HEAD is None or HEAD == WIDTH:
            tile = tl.load(pointers, mask=(row + rows < limit)[:, None], other=0.0) if MASKED else tl.load(pointers)
        elif MASKED:
            tile = tl.load(pointers, mask=(row + rows < limit)[:, None] & (columns < HEAD), other=0.0)
        else:
            tile = tl.load(pointers, mask=columns < HEAD, other=0.0)
    return tile


@triton.jit
def store_tile(
    out, tile, branch, head, row, length, heads, ROWS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr
):  # fmt: skip
    """Into rows [row, row + ROWS) of one head of out, contiguous [B, length, heads, HEAD], as far as there are any."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    first = out + (tl.cast(branch, tl.int64) * length + row) * heads * HEAD + tl.cast(head, tl.int64) * HEAD
    pointers = first + rows * (heads * HEAD) + columns
    inside = row + rows < length
    if HEAD < WIDTH:
        inside = inside & (columns < HEAD)
    tl.store(pointers, narrow(tile, out.dtype.element_ty), mask=inside)


@triton.jit
def seen(position, block, own):
    """How many of the own keys a query sees in a causal chunk; position: of the query among the keys, from below 0."""
    return tl.where(position >= 0, tl.minimum((position // block + 1) * block, own), 0)


@triton.jit
def dot(a, b, acc=None):
    """a @ b (+ acc) in fp32; fp32 inputs are not rounded to TF32."""
    if INTERPRETED:  # its dot takes the bits of bf16 for integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def product(a, b):
    """a @ b.T of two tiles of rows, in fp32.

    fp32 inputs, which no matrix unit takes unrounded, come in slices of 16 columns side by side: a thread would hold
    whole rows of both in its registers.
    """
    if a.dtype == tl.float32 and a.shape[1] > 64:
        SLICES: tl.constexpr = a.shape[1] // 16
        left = a.reshape(a.shape[0], SLICES, 16).permute(1, 0, 2)
        right = b.reshape(b.shape[0], SLICES, 16).permute(1, 2, 0)
        return tl.sum(dot(left, right), 0)
    else:
        return dot(a, b.T)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 to the kernel's precision, rounded to nearest."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter would cut the lower bits off
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def place(heads, length, branches, ROWS: tl.constexpr):
    """Head, branch and first row of this program: head-major, so that the programs that run together share keys."""
    tiles = tl.cdiv(length, ROWS)
    program = tl.program_id(0)
    return program // (branches * tiles), program // tiles % branches, program % tiles * ROWS


@triton.jit
def context_of(indices, branch, share, INDEXED: tl.constexpr):
    """The context of a branch."""
    if INDEXED:
        return tl.load(indices + branch).to(tl.int32)
    else:
        return branch // share


@triton.jit
def used_slots(table, slots, by_slot, SLOTS: tl.constexpr):
    """How many leading slots of a table row [S, 2] of (start, length) may hold a segment; the rest have length 0."""
    slot = tl.arange(0, SLOTS)
    lengths = tl.load(table + slot * by_slot + 1, mask=slot < slots, other=0)
    return tl.max(tl.where(lengths > 0, slot + 1, 0), 0)
