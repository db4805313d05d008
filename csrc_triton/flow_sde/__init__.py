"""A stochastic denoising step of a flow model, with its log-probability."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor

from csrc_triton import runtime
from csrc_triton._samples import why_unfit
from csrc_triton.flow_sde import naive
from csrc_triton.flow_sde.coefficients import KINDS, Coefficients, cps, dance_grpo, flow_grpo, renoise

__all__ = ["KINDS", "Coefficients", "FlowStep", "cps", "dance_grpo", "flow_grpo", "flow_sde_step", "renoise"]


class FlowStep(NamedTuple):
    """Result of one denoising step; fp32, or fp64 where x is. Only mean and log_prob have gradients, in x and v.

    sample     [B, ...], mean + std * noise
    mean       [B, ...]; None where it was not asked for
    std        [B]; 0 for a deterministic step
    log_prob   [B], log-density of the sample averaged over its D elements; NaN where std is 0. Its gradient in v is
               -k * noise / D
    k          [B], -(d mean / d v) / std; infinite where std is 0
    noise      [B, ...], the given tensor, or the drawn one in fp32
    """

    sample: Tensor
    mean: Tensor | None
    std: Tensor
    log_prob: Tensor
    k: Tensor
    noise: Tensor


def flow_sde_step(
    x: Tensor,
    v: Tensor,
    noise: Tensor | None,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    kind: str = "cps",
    eta: float = 1.0,
    seed: SupportsIndex | None = None,
    offset: SupportsIndex = 0,
    return_mean: bool = True,
) -> FlowStep:
    """One stochastic denoising step, sample = mean(x, v) + std * noise, with its log-probability.

    docs/algorithm.md 2.1. Computed in fp32, or in fp64 where x is fp64. Samples that are not contiguous are copied
    first by the fused path.

    Args:
        x, v: [B, ...], one shape. x = (1 - sigma) x0 + sigma xi and v = xi - x0 in the model's convention.
        noise: [B, ...], shape of x; None: standard normals from a counter-based generator (Philox). Element i of
            sample b is then number offset + b * D + i of the stream `seed`, with D elements a sample: the draw does
            not depend on the device, the dtypes, or how a batch is split.
        sigma, sigma_next: noise levels, 1 >= sigma > sigma_next >= 0; numbers, or tensors, 0-d or [B].
        kind: "cps" (coefficient-preserving), "renoise" (the distilled sampler: "cps" at eta 1), "flow_grpo" or
            "dance_grpo".
        eta: amount of noise; 0 is the Euler step. In [0, 1] for "cps", exactly 1 for "renoise", at least 0 for
            "flow_grpo" (about 0.7, called a there) and "dance_grpo".
        seed: stream of the drawn noise, an integer (NumPy's too) in [0, 2**63); None where noise is given.
        offset: numbers of the stream to skip, an integer of at least 0. Fastest where it and D are multiples of 4.
        return_mean: False: the mean is not written, a fifth of the bytes that the step moves.

    Raises:
        ValueError: naming the argument. The order of levels given as tensors is not checked: that would synchronise
            with the device.
    """
    _check_tensors(x, v, noise)
    _check_kind(kind, eta)
    s, n = _level("sigma", sigma, x), _level("sigma_next", sigma_next, x)
    if not isinstance(s, Tensor) and not isinstance(n, Tensor) and not s > n:
        raise ValueError(f"sigma_next: found {sigma_next}; accepted: a level below sigma ({sigma})")
    stream, skipped = _check_seed(seed, offset, x, drawn=noise is None)
    draw = None if noise is None else noise.detach()
    unfit = why_unfit("x", "sample", x, v=v, noise=noise)
    if runtime.choose("flow_sde_step", x.device, x.dtype, unfit=unfit) == "triton":
        from csrc_triton.flow_sde import fused

        return FlowStep(
            *fused.flow_sde_step(
                x, v, draw, s, n, kind=kind, eta=eta, seed=stream, offset=skipped, return_mean=return_mean
            )
        )
    if draw is None:
        draw = naive.normal_noise(stream, skipped, x.shape[0], math.prod(x.shape[1:]), x.device).view(x.shape)
    coefficients = KINDS[kind](_wide(s), _wide(n), eta)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    sample, mean, std, log_prob = naive.flow_sde_step(x.to(dtype), v.to(dtype), draw.to(dtype), coefficients)
    k = torch.ones_like(std) * (coefficients.kappa / coefficients.std)
    return FlowStep(sample, mean if return_mean else None, std, log_prob, k.to(dtype), draw)


def _check_tensors(x: Tensor, v: Tensor, noise: Tensor | None) -> None:
    tensors = [x, v] if noise is None else [x, v, noise]
    names = "x, v" if noise is None else "x, v, noise"
    if x.ndim < 2 or any(t.shape != x.shape for t in tensors):
        found = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise ValueError(f"{names}: found shapes {found}; accepted: one shape [B, ...] with at least 2 dimensions")
    if not all(t.is_floating_point() for t in tensors):
        found = ", ".join(str(t.dtype) for t in tensors)
        raise ValueError(f"{names}: found {found}; accepted: floating point")
    if any(t.device != x.device for t in tensors):
        found = ", ".join(str(t.device) for t in tensors)
        raise ValueError(f"{names}: found devices {found}; accepted: one device")


def _check_seed(seed: Any, offset: Any, x: Tensor, *, drawn: bool) -> tuple[int, int]:
    """The seed, 0 where nothing is drawn, and the offset."""
    stream, skipped = _integer(seed), _integer(offset)
    if drawn and not (stream is not None and 0 <= stream < 2**63):
        raise ValueError(f"seed: found {seed}; accepted: an integer in [0, 2**63) where noise is None")
    if not drawn and seed is not None:
        raise ValueError(f"seed: found {seed}; accepted: None where noise is given")
    if skipped is None or not 0 <= skipped <= 2**63 - 1 - x.numel():
        raise ValueError(f"offset: found {offset}; accepted: an integer in [0, 2**63 - {x.numel() + 1}]")
    return stream or 0, skipped


def _integer(value: Any) -> int | None:
    """Of a Python or NumPy integer, 0-d arrays included; None for all else. A tensor would synchronise."""
    if isinstance(value, int):
        return value
    if isinstance(value, Tensor) or not hasattr(value, "__index__"):
        return None
    try:
        return operator.index(value)
    except TypeError:  # an array of floats
        return None


def _check_kind(kind: str, eta: float) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: found {kind!r}; accepted: {', '.join(KINDS)}")
    low, high = {"cps": (0.0, 1.0), "renoise": (1.0, 1.0)}.get(kind, (0.0, math.inf))
    if not (low <= eta <= high and math.isfinite(eta)):
        raise ValueError(f"eta: found {eta}; accepted: a finite number in [{low:g}, {high:g}] for kind {kind!r}")


def _level(name: str, level: float | Tensor, x: Tensor) -> float | Tensor:
    """A number, or [B] beside x, without gradient."""
    if isinstance(level, Tensor):
        if level.ndim and level.shape != x.shape[:1]:
            found = tuple(level.shape)
            raise ValueError(f"{name}: found shape {found}; accepted: a number, or a tensor 0-d or [{x.shape[0]}]")
        return level.detach().to(x.device).expand(x.shape[:1])
    if not 0.0 <= level <= 1.0:
        raise ValueError(f"{name}: found {level}; accepted: a number in [0, 1]")
    return float(level)


def _wide(level: float | Tensor) -> Tensor:
    """In fp64; of a number 0-d and on the CPU, which joins any device without a copy."""
    return level.double() if isinstance(level, Tensor) else torch.tensor(level, dtype=torch.float64)
