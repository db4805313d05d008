"""The noise levels of a few-step distilled sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tempact.config import TRAIN_TIMESTEPS


@dataclass(frozen=True)
class Schedule:
    """sigmas: K noise levels of the denoiser calls in falling order, then 0 (K + 1 numbers in [0, 1])."""

    sigmas: tuple[float, ...]

    @classmethod
    def from_timesteps(cls, timesteps: Sequence[int], shift: float) -> Schedule:
        """Warps timesteps tau in (0, 1000]: sigma(u) = shift u / (1 + (shift - 1) u), u = tau / 1000.

        (1000, 750, 500, 250) with shift 5 give 1, 0.9375, 0.8333, 0.625 (ALGORITHM.md 2.1).
        """
        assert timesteps and all(a > b for a, b in pairwise((TRAIN_TIMESTEPS + 1, *timesteps, 0))) and shift > 0
        levels = (tau / TRAIN_TIMESTEPS for tau in timesteps)
        return cls((*(shift * u / (1.0 + (shift - 1.0) * u) for u in levels), 0.0))

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The warped timestep of each of the K denoiser calls, in (0, 1000]."""
        return tuple(TRAIN_TIMESTEPS * sigma for sigma in self.sigmas[:-1])

    @property
    def transitions(self) -> int:
        """T, the stochastic transitions: every denoiser call but the last one."""
        return len(self.sigmas) - 2
