"""Cutting the last tiles of a Hopper kernel's work into parts, and merging what the parts give.

A persistent kernel of P programs takes the time of ceil(tiles / P) tiles, so where the tiles are few most programs wait
for the last ones. Those are cut along the sequence that they sum over. The parts' sums go to memory in fp32 and are
added here in a fixed order, so equal inputs give equal bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.fork_attention.tiles import Past, multiprocessors, on

TILE = 128  # rows
MERGED_ROWS = 16  # of one program
MOST_PARTS = 8
# In steps over one tile of keys: what a part costs besides its own steps, what the merging costs, and what is not worth
# the memory.
PART_STEPS, MERGE_STEPS, WORTH_STEPS = 3, 4, 6
WINDOW_CHUNKS = 3


@dataclass(frozen=True)
class Split:
    """The first `whole` tiles come whole, the `others` in `parts` parts each (1: none is cut); a grid of `programs`."""

    whole: int
    others: int
    parts: int
    programs: int

    @classmethod
    def of(cls, device: torch.device, tiles: int, steps: int, least: int) -> Split:
        """For `tiles` tiles of about `steps` steps each, certainly `least`."""
        return _split(multiprocessors(device), tiles, steps, least)

    def sums(self, width: int, device: torch.device) -> Tensor:
        """Where the parts' sums go: fp32 [parts * others, TILE, width], part-major; one element if there are none."""
        shape = (self.parts * self.others, TILE, width) if self.parts > 1 else (1,)
        return torch.empty(shape, dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=1024)
def _split(programs: int, tiles: int, steps: int, least: int) -> Split:
    others = tiles % programs
    best, chosen = float(steps - WORTH_STEPS), 1
    for parts in range(2, min(MOST_PARTS, least) + 1):
        rounds = -(-others * parts // programs)
        cost = rounds * (steps / parts + PART_STEPS) + MERGE_STEPS
        if others and cost < best:
            best, chosen = cost, parts
    if chosen == 1:
        return Split(tiles, 0, 1, min(programs, tiles))
    return Split(tiles - others, others, chosen, min(programs, tiles - others + others * chosen))


@triton.jit(do_not_specialize=["heads", "length", "branches", "whole", "others", "parts"])
def merge_kernel(
    sums, tops, out, lse, heads, length, branches, whole, others, parts,
    TILE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Adds the parts of some rows of a tile.

    WEIGHTED: relative to 2 ** top, and to be divided by the sum of totals; tops [.., 2] holds top and total.
    """
    program = tl.program_id(0)
    other, block = program // (TILE // ROWS), program % (TILE // ROWS)
    tiles = tl.cdiv(length, TILE)
    tile = whole + other
    head, branch, first = tile // (branches * tiles), tile // tiles % branches, tile % tiles * TILE + block * ROWS
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)[None, :]
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    if WEIGHTED:
        for part in range(parts):
            top = tl.maximum(top, tl.load(tops + 2 * ((part * others + other) * TILE + block * ROWS + rows)))
    for part in range(parts):
        at = (part * others + other).to(tl.int64) * TILE + block * ROWS + rows
        found = tl.load(sums + at[:, None] * WIDTH + columns)
        if WEIGHTED:
            weights = tl.exp2(tl.load(tops + 2 * at) - top)
            total += tl.load(tops + 2 * at + 1) * weights
            acc += found * weights[:, None]
        else:
            acc += found
    inside = first + rows < length
    if WEIGHTED:
        acc = acc / total[:, None]
        at = (branch.to(tl.int64) * heads + head) * length + first + rows
        tl.store(lse + at, (top + tl.log2(total)) * 0.6931471805599453, mask=inside)
    at = ((branch.to(tl.int64) * length + first + rows) * heads + head)[:, None] * WIDTH + columns
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside[:, None])


def merge(split: Split, sums: Tensor, out: Tensor, tops: Tensor | None = None, lse: Tensor | None = None) -> None:
    """Into the split tiles of out [B, L, heads, head_dim]; with tops, into lse [B, heads, L] too."""
    branches, length, heads, head_dim = out.shape
    with on(out):
        merge_kernel[(split.others * (TILE // MERGED_ROWS),)](
            sums, sums if tops is None else tops, out, sums if lse is None else lse,
            heads, length, branches, split.whole, split.others, split.parts,
            TILE=TILE, ROWS=MERGED_ROWS, WIDTH=head_dim, WEIGHTED=tops is not None,
        )  # fmt: skip


def split_of(q: Tensor, past: Past, keys: int) -> Split:
    """How the tiles of queries are cut along the sequence of their keys."""
    branches, length, heads, _ = q.shape
    own = triton.cdiv(length, keys)
    # how long segments are only the device knows; windows are a few chunks long
    context = (0, triton.cdiv(past.size, keys), WINDOW_CHUNKS * own)[past.kind]
    return Split.of(q.device, heads * branches * triton.cdiv(length, TILE), own + context, own)
