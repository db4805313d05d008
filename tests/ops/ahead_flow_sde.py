"""The specialisations of flow_sde's kernels that a chunk of Wan needs."""

from __future__ import annotations

from typing import Any

from kernel_checks import Compiled

from csrc_triton.flow_sde import fused

POINTERS = ("x", "v", "noise", "sample", "mean", "drawn", "partials", "sigma", "sigma_next", "table", "log_prob")
NUMBERS = ("decay", "kappa", "std", "k", "constant", "first", "second")
HALVES = ("seed_high", "seed_low", "offset_high", "offset_low")
ALIGNED = ("elements", "x_stride", "v_stride", "noise_stride")  # D is 299,520


def compiled(name: str, kernel: Any, config: Any, pointers: dict[str, str], constants: dict[str, Any]) -> Compiled:
    """pointers: the types of those that are there; the others are None."""
    constants = {**constants, "BLOCK": config.block}
    signature: dict[str, str] = {}
    for argument in kernel.arg_names:
        if argument in pointers:
            signature[argument] = "*" + pointers[argument]
        elif argument in constants:
            signature[argument] = "constexpr"
        elif argument in NUMBERS:
            signature[argument] = "fp32"
        elif argument in (*HALVES, *ALIGNED, "blocks", "rows"):
            signature[argument] = "i32"
        else:
            signature[argument], constants[argument] = "constexpr", None
    aligned = tuple(a for a in kernel.arg_names if a in pointers or a in ALIGNED)
    return Compiled(name, kernel, signature, constants, {"num_warps": config.warps}, aligned)


def steps() -> list[Compiled]:
    cases = []
    for dtype in ("fp32", "bf16", "fp16"):
        given = {"x": "fp32", "v": dtype, "noise": "fp32", "sample": "fp32", "partials": "fp32"}
        drawn = {**given, "drawn": "fp32"}
        del drawn["noise"]
        levels = {"sigma": "fp32", "sigma_next": "fp32"}
        constants = {"KIND": "cps", "ALIGNED": False}
        step, config = fused.step_kernel, fused.CONFIGS["step"]
        cases += [
            compiled(f"step {dtype}", step, config, given, constants),
            compiled(f"step {dtype} mean", step, config, {**given, "mean": "fp32"}, constants),
            compiled(f"step {dtype} levels", step, config, {**given, **levels}, constants),
        ]
        config = fused.CONFIGS["step_drawn"]
        for aligned in (True, False):
            constants = {"KIND": "cps", "ALIGNED": aligned}
            cases.append(compiled(f"step {dtype} drawn {aligned}", step, config, drawn, constants))
    for kind in ("renoise", "flow_grpo", "dance_grpo"):
        constants = {"KIND": kind, "ALIGNED": False}
        pointers = {**given, **levels, "mean": "fp32"}
        cases.append(compiled(f"step {kind}", fused.step_kernel, fused.CONFIGS["step"], pointers, constants))
    return cases


def finishes() -> list[Compiled]:
    pointers = {name: "fp32" for name in ("partials", "table", "log_prob")}
    levels = {"sigma": "fp32", "sigma_next": "fp32"}
    config = fused.Config(fused.SUM_BLOCK, 1)
    return [
        compiled("finish", fused.finish_kernel, config, pointers, {"KIND": "cps"}),
        compiled("finish levels", fused.finish_kernel, config, {**pointers, **levels}, {"KIND": "flow_grpo"}),
    ]


def backwards() -> list[Compiled]:
    cases = []
    for dtype in ("fp32", "bf16", "fp16"):
        pointers = {"noise": "fp32", "table": "fp32", "grad_log_prob": "fp32", "dv": dtype}
        every = {**pointers, "grad_mean": "fp32", "dx": dtype}
        for name, chosen in (("", pointers), (" of all", every)):
            cases.append(
                compiled(f"backward {dtype}{name}", fused.backward_kernel, fused.CONFIGS["backward"], chosen, {})
            )
    return cases


AHEAD_OF_TIME = [*steps(), *finishes(), *backwards()]
