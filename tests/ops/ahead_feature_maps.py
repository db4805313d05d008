"""Specialisations of the decoder passes that are compiled ahead of time, at the sizes of Wan's VAE."""

from __future__ import annotations

from typing import Any

from kernel_checks import Compiled

from csrc_triton.feature_maps import fused

SIZES = {"positions", "height", "width"}
NUMBERS = {"root", "eps"}


def compiled(name: str, kernel: Any, dtype: str, absent: set[str] | None = None, **constants: Any) -> Compiled:
    """`absent` arguments are None."""
    width = constants.get("WIDTH", constants["DIM"])
    block = 1 << (width - 1).bit_length()
    elements = fused.NORM_ELEMENTS if kernel is fused.norm_silu_kernel else fused.ENLARGE_ELEMENTS
    constants |= {"BLOCK": block, "ROWS": elements // block} | dict.fromkeys(absent or ())
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in SIZES or argument.endswith("_batch"):
            signature[argument] = "i32"
        else:
            signature[argument] = "fp32" if argument in NUMBERS else f"*{dtype}"
    aligned = tuple(n for n, t in signature.items() if t.startswith("*") or n.endswith("_batch"))
    return Compiled(name, kernel, signature, constants, {"num_warps": fused.WARPS}, aligned)


AHEAD_OF_TIME = [
    compiled("norm_silu_96_bf16", fused.norm_silu_kernel, "bf16", DIM=96, WIDTH=128),
    compiled("norm_silu_384_bf16", fused.norm_silu_kernel, "bf16", {"update", "total"}, DIM=384, WIDTH=384),
    compiled("sum_192_fp16", fused.norm_silu_kernel, "fp16", {"gamma", "total"}, DIM=192, WIDTH=192),
    compiled("norm_silu_384_fp32", fused.norm_silu_kernel, "fp32", DIM=384, WIDTH=384),
    compiled("enlarge_384_bf16", fused.enlarge_kernel, "bf16", PARTS=2, DIM=384),
    compiled("enlarge_192_fp32", fused.enlarge_kernel, "fp32", {"update"}, PARTS=1, DIM=192),
]
