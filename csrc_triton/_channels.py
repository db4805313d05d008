"""Shared by the kernels over rows of channels: splitting a row into chunks held in registers, and sums over rows.

A row of `dim` channels is a tuple of chunks [ROWS, CHUNK], CHUNK a power of two: 1536 channels are 3 chunks of 512,
with no lane idle, where a block of 2048 would idle every fourth. All warps of a program lie along the channels, so that
a thread holds the same channels of each of its rows and a per-channel vector is loaded once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_CHUNKS = 6
ENOUGH_PROGRAMS = 512  # several for every multiprocessor of a large GPU, and all of them at once
PIPELINE_BYTES = 64 * 1024  # of shared memory, which GPUs have at least 99 KiB of for a program
SUM_ROWS, SUM_CHANNELS = 128, 16  # of one step of `sum_rows_kernel`


@dataclass(frozen=True)
class Tiling:
    """Tile and pipeline sizes of a kernel over rows.

    rows: rows that a program holds at once.
    steps: most groups of `rows` that a program processes in turn; more than one only for sums over rows.
    stages: stages of the software pipeline over the steps; with 1, a step's loads wait for the end of the step before.
    chunk: channels of a chunk; None: chosen from the number of channels.
    lane: channels of a chunk that a thread holds; 8 are one load of 16 bytes in the 16-bit dtypes.
    most: most channels of a row that a thread holds; a longer row is shared by more warps.
    """

    rows: int = 1
    steps: int = 1
    stages: int = 1
    chunk: int | None = None
    lane: int = 8
    most: int = 48

    def steps_of(self, tokens: int) -> int:
        """A power of two, such that about ENOUGH_PROGRAMS programs or more share the tokens."""
        wanted = min(tokens // (self.rows * ENOUGH_PROGRAMS), self.steps)
        return 1 << max(wanted.bit_length() - 1, 0)

    def stages_of(self, row_bytes: int) -> int:
        """Such that the rows in flight fit PIPELINE_BYTES; row_bytes: of what is loaded for one row."""
        return min(self.stages, 1 + PIPELINE_BYTES // (self.rows * row_bytes))

    def chunk_of(self, dim: int) -> int:
        return self.chunk or best_chunk(dim)

    def warps_of(self, dim: int) -> int:
        chunk = self.chunk_of(dim)
        lane = self.lane if triton.cdiv(dim, chunk) * self.lane <= self.most else self.lane // 2
        return min(max(chunk // (32 * lane), 1), 16)


def best_chunk(dim: int) -> int:
    """The power of two that idles fewest lanes in at most MOST_CHUNKS chunks; of equals that nearest to 3 chunks."""
    largest = max(triton.next_power_of_2(dim), 2)
    sizes = [1 << power for power in range(min(largest, 256).bit_length() - 1, largest.bit_length())]
    fitting = [size for size in sizes if triton.cdiv(dim, size) <= MOST_CHUNKS]
    return min(fitting, key=lambda size: (triton.cdiv(dim, size) * size, abs(triton.cdiv(dim, size) - 3), size))


@triton.jit
def append(row, chunk):
    return row + (chunk,)  # noqa: RUF005 - Triton unpacks no tuples


@triton.jit
def load_row(at, keep, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """The chunks, as stored, of rows that begin at `at` [ROWS, 1]; 0 outside of `keep` [ROWS, 1] and past the end."""
    row = ()
    for i in tl.static_range(0, DIM, CHUNK):
        channel = i + tl.arange(0, CHUNK)[None, :]
        if i + CHUNK <= DIM:
            row = append(row, tl.load(at + channel, mask=keep, other=0.0))
        else:
            row = append(row, tl.load(at + channel, mask=keep & (channel < DIM), other=0.0))
    return row


@triton.jit
def load_vector(vector, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """The chunks [1, CHUNK], as stored, of a per-channel vector; 0 past its end."""
    chunks = ()
    for i in tl.static_range(0, DIM, CHUNK):
        channel = i + tl.arange(0, CHUNK)[None, :]
        if i + CHUNK <= DIM:
            chunks = append(chunks, tl.load(vector + channel))
        else:
            chunks = append(chunks, tl.load(vector + channel, mask=channel < DIM, other=0.0))
    return chunks


@triton.jit
def store_chunk(at, value, keep, start: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """Rounds one chunk to the type it is stored in."""
    channel = start + tl.arange(0, CHUNK)[None, :]
    if start + CHUNK <= DIM:
        tl.store(at + channel, value.to(at.dtype.element_ty), mask=keep)
    else:
        tl.store(at + channel, value.to(at.dtype.element_ty), mask=keep & (channel < DIM))


@triton.jit
def no_sums(partials, ROWS: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """Chunks of zeros to add rows to; nothing where partials is None."""
    sums = ()
    if partials is not None:
        for _ in tl.static_range(0, DIM, CHUNK):
            sums = append(sums, tl.zeros([ROWS, CHUNK], tl.float32))
    return sums


@triton.jit
def store_sums(partials, program, sums, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """Adds up what each of the program's rows has gathered, and stores the sums in partials [programs, DIM]."""
    if partials is not None:
        for i in tl.static_range(0, DIM, CHUNK):
            channel = i + tl.arange(0, CHUNK)
            at = partials + program * DIM + channel
            tl.store(at, tl.sum(sums[i // CHUNK], axis=0), mask=channel < DIM)


@triton.jit
def sum_both(a, b):
    """The sums [ROWS] over the channels of a and of b [ROWS, CHUNK], with one exchange between warps, not two."""
    return tl.split(tl.sum(tl.join(a, b), axis=1))


@triton.jit
def sum_rows_kernel(partials, out, count, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out[g] = the sum of partials[g] [count, DIM], always in the same order."""
    group = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < DIM
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        at = partials + (group * count + row)[:, None] * DIM + channel[None, :]
        sums += tl.load(at, mask=(row < count)[:, None] & inside[None, :], other=0.0)
    tl.store(out + group * DIM + channel, tl.sum(sums, axis=0).to(out.dtype.element_ty), mask=inside)


def sum_rows(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """[G, DIM] in `dtype` of fp32 partial sums [G, count, DIM]."""
    groups, count, dim = partials.shape
    out = torch.empty(groups, dim, dtype=dtype, device=partials.device)
    grid = groups, triton.cdiv(dim, SUM_CHANNELS)
    sum_rows_kernel[grid](partials, out, count, DIM=dim, ROWS=SUM_ROWS, BLOCK=SUM_CHANNELS, num_warps=4)
    return out


def as_rows(tensor: Tensor) -> Tensor:
    """[B, L, dim] of [B, L, dim] or [B, L, heads, head_dim], its last dimension contiguous; a copy only if it must."""
    rows = tensor.flatten(2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()
