"""Specialisations of decode attention that are compiled ahead of time, at the sizes of Qwen3 and of small models."""

from __future__ import annotations

from kernel_checks import Compiled

from csrc_triton.decode_attention import fused

STRIDES = {name for name in fused.part_kernel.arg_names if name.endswith(("_batch", "_head", "_row"))}


def part(dtype: str, dim: int, group: int) -> Compiled:
    block = fused.block_of(dim, 4 if dtype == "fp32" else 2)
    constants = {"GROUP": group, "ROWS": fused.LEAST_HEADS, "DIM": dim, "SPLIT": fused.SPLIT, "BLOCK": block}
    kinds = {"lengths": "*i64", "out": "*fp32", "sums": "*fp32", "keys": "i32", "scale": "fp32"}
    signature = {
        name: "constexpr" if name in constants else "i32" if name in STRIDES else kinds.get(name, f"*{dtype}")
        for name in fused.part_kernel.arg_names
    }
    options = {"num_warps": fused.WARPS, "num_stages": fused.STAGES}
    aligned = tuple(n for n, kind in signature.items() if kind.startswith("*") or n in STRIDES)
    return Compiled(f"part_{dtype}_{dim}", fused.part_kernel, signature, constants, options, aligned)


def join(dtype: str, dim: int, parts: int) -> Compiled:
    constants = {"PARTS": parts, "BLOCK": 1 << (parts - 1).bit_length(), "DIM": dim, "SPLIT": fused.SPLIT}
    kinds = {"lengths": "*i64", "out": f"*{dtype}", "keys": "i32"}
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, "*fp32") for name in fused.join_kernel.arg_names
    }
    aligned = tuple(n for n, kind in signature.items() if kind.startswith("*"))
    return Compiled(f"join_{dtype}_{dim}", fused.join_kernel, signature, constants, {"num_warps": fused.WARPS}, aligned)


AHEAD_OF_TIME = [
    part("bf16", 128, 2), part("bf16", 64, 7), part("fp16", 256, 4), part("fp32", 128, 1), part("fp32", 32, 2),
    part("fp32", 256, 1),
    join("bf16", 128, 10), join("fp32", 256, 3),
]  # fmt: skip
