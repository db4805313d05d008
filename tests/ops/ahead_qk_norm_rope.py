"""Specialisations of the query and key norm's kernels that are compiled ahead of time, at Wan's sizes unless said."""

from __future__ import annotations

from typing import Any

from kernel_checks import Compiled

from csrc_triton._channels import SUM_CHANNELS, SUM_ROWS, Tiling, sum_rows_kernel
from csrc_triton.qk_norm_rope.fused import TILINGS, backward_kernel, forward_kernel

STRIDES = ("_batch", "_token", "_row")
SINGLE = {"cos": "*fp32", "sin": "*fp32", "partials": "*fp32", "first_rows": "*i64"}
K = {"k", "weight_k", "k_out"}
ROPE = {"cos", "sin"}
WRITE = {"v", "pool_k", "pool_v", "first_rows"}


def compiled(
    name: str, kernel: Any, dtype: str, tiling: Tiling, dim: int, heads: int, absent: set[str], **constants: Any
) -> Compiled:  # fmt: skip
    """`absent` arguments are None."""
    constants |= {"ROWS": tiling.rows, "DIM": dim, "HEAD_DIM": dim // heads, "CHUNK": tiling.chunk_of(dim)}
    signature = {}
    for argument in kernel.arg_names:
        if argument in absent:
            constants[argument] = None
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in ("length", "page") or argument.endswith(STRIDES):
            signature[argument] = "i32"
        else:
            signature[argument] = "fp32" if argument == "eps" else SINGLE.get(argument, f"*{dtype}")
    aligned = tuple(n for n, t in signature.items() if t.startswith("*") or n.endswith(STRIDES))
    return Compiled(name, kernel, signature, constants, {"num_warps": tiling.warps_of(dim)}, aligned)


def forward(
    name: str, dtype: str = "bf16", dim: int = 1536, heads: int = 12, absent: set[str] | None = None
) -> Compiled:
    return compiled(name, forward_kernel, dtype, TILINGS["forward"], dim, heads, absent or set(), ROPED_POOL=True)


def backward(
    name: str,
    dtype: str = "bf16",
    dim: int = 1536,
    heads: int = 12,
    *,
    sums: bool = False,
    absent: set[str] | None = None,
) -> Compiled:
    tiling = TILINGS["backward_sums" if sums else "backward"]
    nothing = (absent or set()) | (set() if sums else {"partials"})
    stages = tiling.stages_of(2 * dim * (4 if dtype == "fp32" else 2) + 4 * dim // heads)
    return compiled(name, backward_kernel, dtype, tiling, dim, heads, nothing, STEPS=tiling.steps, STAGES=stages)


AHEAD_OF_TIME = [
    forward("forward_bf16", absent=WRITE),
    forward("forward_write_bf16"),
    forward("forward_cross_bf16", absent=WRITE | K | ROPE),
    forward("forward_fp16", "fp16", absent=WRITE),
    forward("forward_fp32", "fp32"),
    forward("forward_14b_bf16", dim=5120, heads=40),
    forward("forward_small_fp32", "fp32", dim=128, heads=4),
    backward("backward_bf16"),
    backward("backward_sums_bf16", sums=True),
    backward("backward_sums_14b_bf16", dim=5120, heads=40, sums=True),
    backward("backward_sums_fp32", "fp32", sums=True),
    backward("backward_sums_small_fp32", "fp32", dim=128, heads=4, sums=True),
    Compiled(
        "sum_rows_bf16",
        sum_rows_kernel,
        {
            "partials": "*fp32",
            "out": "*bf16",
            "count": "i32",
            "DIM": "constexpr",
            "ROWS": "constexpr",
            "BLOCK": "constexpr",
        },
        {"DIM": 1536, "ROWS": SUM_ROWS, "BLOCK": SUM_CHANNELS},
        {"num_warps": 4},
        ("partials", "out"),
    ),
]
