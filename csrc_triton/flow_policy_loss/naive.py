"""The terms of the policy loss in plain PyTorch (docs/algorithm.md 2.2, 2.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def flow_policy_loss(
    v: Tensor, v_old: Tensor, v_ref: Tensor, noise: Tensor, advantage: Tensor, clip: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Clipped policy loss, velocity KL, ratio, log-ratio and clipped (bool) of each transition, [B].

    The clip acts on the log-ratio: next to 1 an fp32 ratio is too coarse for a clip of 1e-5.
    """
    log_ratio = -(noise * (v - v_old)).flatten(1).mean(1)
    low, high = math.log1p(-clip), math.log1p(clip)
    # max(-A r, -A clip(r)) bounds the ratio from above where A > 0, from below where A < 0
    bounded = torch.where(advantage > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=low))
    loss = -advantage * bounded.exp()
    clipped = ((advantage > 0) & (log_ratio > high)) | ((advantage < 0) & (log_ratio < low))
    return loss, (v - v_ref).square().flatten(1).mean(1), log_ratio.exp(), log_ratio, clipped
