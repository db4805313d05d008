"""Flow-GRPO's ratio as published (arXiv 2505.05470), to compare with what GRPO-Guard (arXiv 2510.22319) makes of it."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from csrc_triton.flow_sde import cps
from tempact.rl.histograms import ratio_bins


def plain_ratio_gradient(
    velocity: Tensor,
    old: Tensor,
    reference: Tensor,
    noise: Tensor,
    k: Tensor,
    weight: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    clip: float,
    kl_weight: float,
    terms: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `flow_grpo_gradient`, with the mean log-ratio of the transition itself, l = -mean(k noise dv + k^2 dv^2 / 2).

    dv is velocity - old. The expectation of l is negative and its scale is that of k, so one clip means another step of
    the policy at every noise level.

    Args:
        velocity, old, reference, noise: [B, C, c, H, W] fp32, one recorded transition a row.
        k: [B], of the row's transition (docs/algorithm.md 2.1). weight: [B], of its policy loss (`rectifying`).
        advantage, mask, clip, kl_weight, terms: as for `flow_grpo_gradient`.

    Returns:
        Gradient and metrics as `flow_grpo_gradient`.
    """
    velocity, old = velocity.detach(), old.detach()
    wide = (-1, *[1] * (velocity.ndim - 1))
    moved, away, scale = velocity - old, velocity - reference, k.view(wide)
    log_ratio = -(scale * moved * (noise + 0.5 * scale * moved)).flatten(1).mean(1)
    low, high = math.log1p(-clip), math.log1p(clip)
    bounded = torch.where(advantage > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=low))
    below, above = (advantage < 0) & (log_ratio < low), (advantage > 0) & (log_ratio > high)
    ratio, kl = log_ratio.exp(), away.square().flatten(1).mean(1)
    pull = torch.where(below | above, 0.0, weight * advantage * ratio * k).view(wide)
    gradient = (pull * (noise + scale * moved) + 2 * kl_weight * away) / velocity[0].numel()
    shares = {
        "loss": -weight * advantage * bounded.exp() + kl_weight * kl,
        "kl": kl,
        "ratio": ratio,
        "ratio_deviation": torch.expm1(log_ratio).abs(),
        "clip_ratio/low": below,
        "clip_ratio/high": above,
        **ratio_bins(torch.expm1(log_ratio) / clip),
    }
    gradient = torch.where(mask.view(wide), gradient / terms, 0.0)
    return gradient, {name: torch.where(mask, value.double(), 0.0).sum() / terms for name, value in shares.items()}


def scales(sigmas: tuple[float, ...], eta: float) -> list[float]:
    """k of every stochastic transition between these levels, of which the last is 0."""
    return [kappa / std for _, kappa, std in (cps(*levels, eta) for levels in pairwise(sigmas[:-1]))]


def rectifying(k: list[float]) -> list[float]:
    """Weights of the transitions' losses, mean 1, under which all have gradients of one scale: in proportion to 1/k."""
    mean = sum(1 / own for own in k) / max(1, len(k))
    return [1 / own / mean for own in k]
