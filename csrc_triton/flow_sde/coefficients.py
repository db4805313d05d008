"""Coefficients of the stochastic denoising steps, by kind (docs/algorithm.md 2.1).

Each kind draws the next sample from a Gaussian whose mean is linear in the sample x and the velocity v:
mean = decay * x - kappa * v, so that kappa = -d mean / d v. `s` is the noise level of x and `n` the next one,
1 >= s > n >= 0; `eta` scales the noise that is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Level = Any  # a float, or an fp64 tensor: 0-d or [B]


class Coefficients(NamedTuple):
    """Of one step: mean = decay * x - kappa * v, standard deviation std. Type and shape are those of the levels."""

    decay: Level
    kappa: Level
    std: Level


def renoise(s: Level, n: Level, eta: float) -> Coefficients:
    """The sampler of distilled models: predict x0 and add fresh noise at level n. `eta` is ignored (it is 1)."""
    return Coefficients(1 - n, (1 - n) * s, n)


def cps(s: Level, n: Level, eta: float) -> Coefficients:
    """Coefficient-preserving sampling (arXiv 2509.05952): the noise at level n is part predicted, part fresh.

    eta in [0, 1]: 0 adds no fresh noise (an Euler step), 1 only fresh noise (`renoise`).
    """
    fresh, left = cps_shares(eta)
    kept = n * left
    return Coefficients(1 - n + kept, (1 - n) * s - kept * (1 - s), n * fresh)


def cps_shares(eta: float) -> tuple[float, float]:
    """Shares of fresh and of predicted noise in the next level, for `cps`; their squares add up to 1."""
    fresh = math.sin(eta * math.pi / 2)
    return fresh, math.sqrt(1 - fresh**2)


def dance_grpo(s: Level, n: Level, eta: Level) -> Coefficients:
    """DanceGRPO's SDE: an Euler step plus eta^2 / 2 times the score, -(x + (1 - s) v) / s."""
    delta = s - n
    pull = 0.5 * eta**2 * delta / s
    return Coefficients(1 - pull, delta + pull * (1 - s), eta * _root(delta))


def flow_grpo(s: Level, n: Level, eta: float) -> Coefficients:
    """Flow-GRPO's SDE: `dance_grpo` with eta times sqrt(s / (1 - s)); at s = 1 the next level replaces s."""
    below = torch.where(s < 1, s, n) if isinstance(s, Tensor) else (s if s < 1 else n)
    return dance_grpo(s, n, eta * _root(s / (1 - below)))


def _root(value: Level) -> Level:
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


KINDS: dict[str, Callable[[Level, Level, float], Coefficients]] = {
    "cps": cps,
    "dance_grpo": dance_grpo,
    "flow_grpo": flow_grpo,
    "renoise": renoise,
}
