"""A stochastic denoising step of a flow model, with its log-probability."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from csrc_triton.flow_sde import naive


class FlowStep(NamedTuple):
    """sample, mean [B, ...]; std, log_prob, k [B]; all fp32 (fp64 when x is).

    sample has no gradient. log_prob is averaged over dimensions; its gradient with respect to v is -k noise / D.
    k = -(d mean / d v) / std. Where std is 0 the step is deterministic: log_prob is NaN and k infinite.
    """

    sample: Tensor
    mean: Tensor
    std: Tensor
    log_prob: Tensor
    k: Tensor


def flow_sde_step(
    x: Tensor,
    v: Tensor,
    noise: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    kind: str = "cps",
    eta: float = 1.0,
) -> FlowStep:
    """sample = mean(x, v) + std * noise (ALGORITHM.md 2.1), computed in fp32, in fp64 when x is.

    Args:
        x, v, noise: [B, ...], one shape. x = (1 - sigma) x0 + sigma xi and v = xi - x0 in the model's convention.
        sigma, sigma_next: noise levels, 1 >= sigma > sigma_next >= 0; numbers, or tensors [B].
        kind: "cps" (coefficient-preserving), "renoise" (the distilled sampler: "cps" at eta 1), "flow_grpo" or
            "dance_grpo".
        eta: amount of noise, 0 being the Euler step: in [0, 1] for "cps", exactly 1 for "renoise", at least 0 for
            "flow_grpo" (its a, about 0.7) and "dance_grpo".

    Raises:
        ValueError: naming the argument. Tensors of levels are not checked for their order: that would wait for the
            device.
    """
    if x.ndim < 2 or not x.shape == v.shape == noise.shape:
        found = tuple(x.shape), tuple(v.shape), tuple(noise.shape)
        raise ValueError(f"x, v, noise: found shapes {found}; accepted: one shape [B, ...] with at least 2 dimensions")
    if not all(t.is_floating_point() for t in (x, v, noise)):
        raise ValueError(f"x, v, noise: found {x.dtype}, {v.dtype}, {noise.dtype}; accepted: floating point")
    _check_kind(kind, eta)
    s, n = _level("sigma", sigma, x), _level("sigma_next", sigma_next, x)
    if not isinstance(sigma, Tensor) and not isinstance(sigma_next, Tensor) and not sigma > sigma_next:
        raise ValueError(f"sigma_next: found {sigma_next}; accepted: a level below sigma ({sigma})")
    coefficients = naive.KINDS[kind](s, n, eta)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    sample, mean, std, log_prob = naive.flow_sde_step(x.to(dtype), v.to(dtype), noise.to(dtype), coefficients)
    k = torch.ones_like(std) * (coefficients.kappa / coefficients.std)
    return FlowStep(sample, mean, std, log_prob, k.to(dtype))


def _check_kind(kind: str, eta: float) -> None:
    if kind not in naive.KINDS:
        raise ValueError(f"kind: found {kind!r}; accepted: {', '.join(naive.KINDS)}")
    low, high = {"cps": (0.0, 1.0), "renoise": (1.0, 1.0)}.get(kind, (0.0, math.inf))
    if not (low <= eta <= high and math.isfinite(eta)):
        raise ValueError(f"eta: found {eta}; accepted: a finite number in [{low:g}, {high:g}] for kind {kind!r}")


def _level(name: str, level: float | Tensor, x: Tensor) -> Tensor:
    """fp64, 0-d on the CPU for a number (such a tensor joins any device without a copy), else [B] beside x."""
    if isinstance(level, Tensor):
        if level.shape != x.shape[:1]:
            raise ValueError(f"{name}: found shape {tuple(level.shape)}; accepted: a number or [{x.shape[0]}]")
        return level.to(x.device, torch.float64)
    if not 0.0 <= level <= 1.0:
        raise ValueError(f"{name}: found {level}; accepted: a number in [0, 1]")
    return torch.tensor(float(level), dtype=torch.float64)
