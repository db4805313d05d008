"""The specialisations of flow_policy_loss's kernels that a chunk of Wan needs."""

from __future__ import annotations

from typing import Any

from kernel_checks import Compiled

from csrc_triton.flow_policy_loss import fused

ALIGNED = ("elements", "v_stride", "old_stride", "ref_stride", "noise_stride")  # D is 299,520


def compiled(
    name: str, kernel: Any, config: fused.Config, pointers: dict[str, str], constants: dict[str, Any]
) -> Compiled:
    """pointers: the types of those that are there; the others are None."""
    constants = {**constants, "BLOCK": config.block}
    signature: dict[str, str] = {}
    for argument in kernel.arg_names:
        if argument in pointers:
            signature[argument] = "*" + pointers[argument]
        elif argument in constants:
            signature[argument] = "constexpr"
        elif argument in ("low", "high"):
            signature[argument] = "fp32"
        elif argument in (*ALIGNED, "blocks"):
            signature[argument] = "i32"
        else:
            signature[argument], constants[argument] = "constexpr", None
    aligned = tuple(a for a in kernel.arg_names if a in pointers or a in ALIGNED)
    return Compiled(name, kernel, signature, constants, {"num_warps": config.warps}, aligned)


def passes() -> list[Compiled]:
    kernel, forward, backward = fused.policy_kernel, fused.CONFIGS["forward"], fused.CONFIGS["backward"]
    one_pass = fused.CONFIGS["one_pass"]
    sums, policy, kl = {"partials": "fp32"}, {"slope": "fp32", "grad_loss": "fp32"}, {"grad_kl": "fp32"}
    cases = []
    for dtype in ("fp32", "bf16", "fp16"):
        v, old, ref, dv = ({name: dtype} for name in ("v", "v_old", "v_ref", "dv"))
        noise = {"noise": "fp32"}
        for name, config, pointers in (
            ("forward", forward, v | old | ref | noise | sums),
            ("forward on policy", forward, v | ref | noise | sums),
            ("forward without KL", forward, v | old | noise | sums),
            ("backward", backward, v | ref | noise | dv | policy | kl),
            ("backward of the policy", backward, noise | dv | policy),
            ("backward of KL", backward, v | ref | dv | kl),
            ("one pass", one_pass, v | ref | noise | sums | dv | policy | kl),
        ):
            cases.append(compiled(f"{name} {dtype}", kernel, config, pointers, {}))
    pointers = {"noise": "fp32", "dv": "fp32", "slope": "fp32", "ratio": "fp32"}
    pointers |= {name: "fp32" for name in ("grad_loss", "grad_ratio", "grad_log_ratio")}
    return [*cases, compiled("backward of every term", kernel, backward, pointers, {})]


def terms() -> list[Compiled]:
    pointers = {name: "fp32" for name in ("partials", "advantage", "loss", "kl", "ratio", "log_ratio", "slope")}
    config = fused.Config(fused.SUM_BLOCK, 1)
    return [
        compiled(f"terms {kl}", fused.terms_kernel, config, {**pointers, "clipped": "i1"}, {"KL": kl})
        for kl in (True, False)
    ]


AHEAD_OF_TIME = [*passes(), *terms()]
