"""Specialisations of the rounding to float8 that are compiled ahead of time, at the widths of Wan."""

from __future__ import annotations

from kernel_checks import Compiled

from csrc_triton.fp8_linear import MOST_WIDTH, fused

OLDEST = 89  # before it there is no float8_e4m3fn


def rows(dtype: str, dim: int, gelu: bool) -> Compiled:
    own = fused.options(dim)
    constants = {"GELU": gelu, "DIM": dim, "BLOCK": own["BLOCK"], "ROWS": own["ROWS"]}
    kinds = {"x": f"*{dtype}", "values": "*u8", "scales": "*fp32", "count": "i32"}
    names = fused.rows_kernel.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, "fp32") for name in names}
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    options = {"num_warps": own["num_warps"]}
    return Compiled(f"rows_{dtype}_{dim}", fused.rows_kernel, signature, constants, options, aligned, OLDEST)


AHEAD_OF_TIME = [
    rows("bf16", 1536, False), rows("bf16", 8960, True), rows("bf16", 5120, False), rows("bf16", 13_824, True),
    rows("fp32", 1536, False), rows("fp16", 64, True), rows("fp32", MOST_WIDTH, True),
]  # fmt: skip
