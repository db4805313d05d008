"""One stochastic denoising step as plain maths (ALGORITHM.md 2.1).

Every kind is a Gaussian whose mean is linear in the sample and the velocity:
mean = decay * x - kappa * v, with kappa = -d mean / d v.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """mean = decay * x - kappa * v, and the standard deviation; one shape, that of the noise levels."""

    decay: Tensor
    kappa: Tensor
    std: Tensor


def renoise(s: Tensor, n: Tensor, eta: float) -> Coefficients:
    """The distilled sampler: predict x0, add fresh noise at level n. `eta` has no say (it is 1)."""
    return Coefficients(1 - n, (1 - n) * s, n)


def cps(s: Tensor, n: Tensor, eta: float) -> Coefficients:
    """Coefficient-preserving sampling (2509.05952): a part of level n is the predicted noise, the rest fresh."""
    fresh = math.sin(eta * math.pi / 2)
    kept = n * math.sqrt(1 - fresh**2)
    return Coefficients(1 - n + kept, (1 - n) * s - kept * (1 - s), n * fresh)


def dance_grpo(s: Tensor, n: Tensor, eta: float | Tensor) -> Coefficients:
    """DanceGRPO's SDE: Euler plus half eta^2 times the score, which is -(x + (1 - s) v) / s."""
    delta = s - n
    pull = 0.5 * eta**2 * delta / s
    return Coefficients(1 - pull, delta + pull * (1 - s), eta * delta.sqrt())


def flow_grpo(s: Tensor, n: Tensor, eta: float) -> Coefficients:
    """Flow-GRPO's SDE: the same with eta grown by sqrt(s / (1 - s)); at s = 1 the next level stands in for s."""
    return dance_grpo(s, n, eta * (s / (1 - torch.where(s < 1, s, n))).sqrt())


KINDS: dict[str, Callable[[Tensor, Tensor, float], Coefficients]] = {
    "cps": cps,
    "dance_grpo": dance_grpo,
    "flow_grpo": flow_grpo,
    "renoise": renoise,
}


def flow_sde_step(
    x: Tensor, v: Tensor, noise: Tensor, coefficients: Coefficients
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample [B, ...], mean [B, ...], std [B], mean per-dimension log-density of the sample [B].

    The coefficients are 0-d or [B]. The sample is a constant for its own log-density.
    """
    wide = [c.view(-1, *(1,) * (x.ndim - 1)) if c.ndim else c for c in coefficients]
    decay, kappa, std = (c.to(x.dtype) if c.ndim else c for c in wide)
    mean = decay * x - kappa * v
    sample = (mean + std * noise).detach()
    drawn = torch.where(std > 0, std, torch.ones_like(std))  # no 0 / 0 in the gradient of a deterministic row
    # equals (sample - mean) / std; subtracting the sample itself would round the noise away
    residual = noise + (mean.detach() - mean) / drawn
    per_sample = coefficients.std.to(x.dtype) if coefficients.std.ndim else coefficients.std
    constant = per_sample.log() + 0.5 * math.log(2 * math.pi)
    constant = torch.where(per_sample > 0, constant, torch.full_like(constant, math.nan))
    log_prob = -0.5 * residual.square().flatten(1).mean(1) - constant
    return sample, mean, torch.ones_like(log_prob.detach()) * per_sample, log_prob
