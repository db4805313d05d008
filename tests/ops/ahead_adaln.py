"""Specialisations of the modulated norm's kernels that are compiled ahead of time, at Wan's sizes unless said."""

from __future__ import annotations

from typing import Any

from kernel_checks import Compiled

from csrc_triton._channels import Tiling
from csrc_triton.adaln import fused

STRIDES = ("_batch", "_token", "_frame")
SINGLE = {"mean", "rstd", "dgates", "dshifts", "dscales"}
SUMS = {"dgates", "dshifts", "dscales"}
RESIDUAL = {"y", "gate", "residual", "grad_residual", "dy", "dgates"}


def compiled(
    name: str, kernel: Any, tiling: Tiling, dtype: str = "bf16", dim: int = 1536, absent: set[str] | None = None,
    plus_one: bool = True,
) -> Compiled:  # fmt: skip
    """`absent` arguments are None."""
    loaded = len({"grad", "grad_residual", "x", "y"} & set(kernel.arg_names) - (absent or set()))
    stages = tiling.stages_of(loaded * dim * (4 if dtype == "fp32" else 2))
    constants: dict[str, Any] = {"PLUS_ONE": plus_one, "STEPS": tiling.steps, "STAGES": stages}
    constants |= {"ROWS": tiling.rows, "DIM": dim, "CHUNK": tiling.chunk_of(dim)}
    constants |= dict.fromkeys(absent or ())
    constants = {argument: constant for argument, constant in constants.items() if argument in kernel.arg_names}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument == "tokens" or argument.endswith(STRIDES):
            signature[argument] = "i32"
        elif argument == "eps":
            signature[argument] = "fp32"
        else:
            signature[argument] = "*fp32" if argument in SINGLE else f"*{dtype}"
    aligned = tuple(n for n, t in signature.items() if t.startswith("*") or n.endswith(STRIDES))
    return Compiled(name, kernel, signature, constants, {"num_warps": tiling.warps_of(dim)}, aligned)


def forward(name: str, **options: Any) -> Compiled:
    return compiled(name, fused.norm_kernel, fused.TILINGS["norm"], **options)


def backward(name: str, **options: Any) -> Compiled:
    absent = options.get("absent", set())
    tiling = fused.TILINGS["norm_backward" if absent >= SUMS else "norm_backward_sums"]
    return compiled(name, fused.norm_backward_kernel, tiling, **options)


AHEAD_OF_TIME = [
    forward("adaln_bf16", absent=RESIDUAL),
    forward("residual_adaln_bf16"),
    forward("residual_norm_bf16", absent={"gate"}, plus_one=False),
    forward("adaln_fp16", dtype="fp16", absent=RESIDUAL),
    forward("residual_adaln_fp32", dtype="fp32"),
    forward("residual_adaln_14b_bf16", dim=5120),
    backward("adaln_backward_bf16", absent=RESIDUAL | SUMS),
    backward("adaln_backward_sums_bf16", absent=RESIDUAL),
    backward("residual_adaln_backward_bf16", absent=SUMS | {"y"}),
    backward("residual_norm_backward_bf16", absent=SUMS | {"y", "gate", "dy"}, plus_one=False),
    backward("residual_adaln_backward_sums_bf16"),
    backward("residual_adaln_backward_sums_fp32", dtype="fp32"),
    backward("residual_adaln_backward_sums_14b_bf16", dim=5120),
    compiled("gate_bf16", fused.gate_kernel, fused.TILINGS["gate"]),
    compiled("gate_backward_bf16", fused.gate_backward_kernel, fused.TILINGS["gate_backward_sums"]),
    compiled("gate_backward_fp32", fused.gate_backward_kernel, fused.TILINGS["gate_backward_sums"], dtype="fp32"),
]
