"""Policy-gradient terms of a batch of recorded denoising transitions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from csrc_triton.flow_policy_loss import naive


class FlowPolicyTerms(NamedTuple):
    """Per sample [B], fp32 (fp64 when v is).

    loss       max(-A r, -A clip(r, 1 - clip, 1 + clip))
    kl         mean((v - v_ref)^2)
    ratio      r = exp(log_ratio)
    log_ratio  z = -mean(noise * (v - v_old))
    clipped    bool, True where the clip stopped the policy gradient
    """

    loss: Tensor
    kl: Tensor
    ratio: Tensor
    log_ratio: Tensor
    clipped: Tensor


def flow_policy_loss(
    v: Tensor, v_old: Tensor, v_ref: Tensor, noise: Tensor, advantage: Tensor, *, clip: float
) -> FlowPolicyTerms:
    """Closed-form ratio, clip and velocity KL of B transitions (ALGORITHM.md 2.2, 2.3).

    The ratio is exactly 1 where v equals v_old. Only v gets a gradient, so v_old may be v itself.

    Args:
        v, v_old, v_ref, noise: [B, ...], one shape, floating point. noise is the draw that made the sample.
        advantage: [B].
        clip: epsilon of the ratio's clip, in (0, 1). It scales with 1 / sqrt(elements of a sample); see
            `clip_velocity_rms` in ALGORITHM.md 2.2.

    Raises:
        ValueError: naming the argument, for shapes or dtypes that do not fit and a clip out of range.
    """
    constants = {"v_old": v_old, "v_ref": v_ref, "noise": noise}
    if v.ndim < 2 or not v.is_floating_point():
        found = f"{v.dtype} {tuple(v.shape)}"
        raise ValueError(f"v: found {found}; accepted: floating point [B, ...] with at least 2 dimensions")
    for name, tensor in constants.items():
        if tensor.shape != v.shape or not tensor.is_floating_point():
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{name}: found {found}; accepted: floating point {tuple(v.shape)}, the shape of v")
    if advantage.shape != v.shape[:1]:
        raise ValueError(f"advantage: found shape {tuple(advantage.shape)}; accepted: {tuple(v.shape[:1])}")
    if not 0 < clip < 1:
        raise ValueError(f"clip: found {clip}; accepted: a number in (0, 1)")
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    old, ref, draw, gain = (tensor.detach().to(dtype) for tensor in (v_old, v_ref, noise, advantage))
    return FlowPolicyTerms(*naive.flow_policy_loss(v.to(dtype), old, ref, draw, gain, clip))
