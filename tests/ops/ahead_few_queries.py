"""Specialisations of fork attention's kernels for few queries that are compiled ahead of time: see kernel_checks."""

from __future__ import annotations

from typing import Any

from kernel_checks import Compiled

from csrc_triton.fork_attention.portable import few
from csrc_triton.fork_attention.tiles import width_of

SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
KINDS = {"table": "*i32", "indices": "*i64", "lse": "*fp32", "sums": "*fp32", "tops": "*fp32", "scale": "fp32"}
UNALIGNED = (*few.UNSPECIALIZED, "parts", "table_by_slot")


def compiled(name: str, kernel: Any, dtype: str, constants: dict[str, Any], options: dict[str, int]) -> Compiled:
    signature = {
        name: "constexpr"
        if name in constants
        else f"*{dtype}"
        if name in ("q", "k", "v", "past_k", "past_v", "out")
        else KINDS.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = tuple(n for n, kind in signature.items() if kind[0] == "*" or (kind == "i32" and n not in UNALIGNED))
    return Compiled(name, kernel, signature, constants, options, aligned)


def part(dtype: str, head_dim: int, rows: int, past: int = 2, own: bool = False, **more: bool) -> Compiled:
    """As it runs on aligned tensors; rows: queries of a branch times heads that share one of keys."""
    width = width_of(head_dim)
    by = few.tiling_of(rows, width, SIZES[dtype])
    constants = {
        "PAST": past, "SLOTS": 16 if past == 2 else 1, "INDEXED": False, "OWN": own, "ROWS": by.rows,
        "KEYS": by.keys, "LEAST": few.LEAST_KEYS, "WIDTH": width, "HEAD": head_dim, **more,
    }  # fmt: skip
    name = ", ".join(map(str, ("part", dtype, head_dim, f"{rows} rows", f"past {past}", own, *more)))
    return compiled(
        name,
        few.part_kernel,
        dtype,
        constants,
        {"num_warps": by.warps, "num_stages": by.stages, "maxnreg": few.REGISTERS},
    )


def merge(dtype: str, head_dim: int, parts: int) -> Compiled:
    width = width_of(head_dim)
    constants = {"PARTS": parts, "WIDTH": width, "HEAD": head_dim}
    options = {"num_warps": few.merge_warps(parts, width)}
    return compiled(f"merge, {dtype}, {head_dim}, {parts} parts", few.merge_kernel, dtype, constants, options)


AHEAD_OF_TIME = [
    *(part(dtype, size, rows, own=True) for dtype, numbers in (("bf16", (1, 64)), ("fp32", (1,)))
      for size in (128, 16, 32, 64, 80, 256) for rows in numbers),
    *(part(dtype, 96, 4, **each) for dtype in ("fp16", "fp32") for each in (
        {"past": 1}, {"past": 1, "INDEXED": True, "own": True}, {"past": 0, "own": True},
    )),
    *(merge(dtype, size, parts) for dtype in ("bf16", "fp32") for size in (128, 16, 80, 256) for parts in (64, 2, 128)),
]  # fmt: skip
