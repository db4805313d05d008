"""What a reward is: scores of plans or of videos, with *missing* as a result of its own."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from tempact.types import PlanBatch, Rollout


class PlanReward(Protocol):
    """Judges plans as text."""

    def score(self, plans: PlanBatch) -> Tensor:
        """[P] fp32; NaN where no score could be had (ALGORITHM.md decision 7)."""
        ...


class VideoReward(Protocol):
    """Judges every continuation of every plan."""

    def score(self, plans: PlanBatch, rollout: Rollout) -> Tensor:
        """[P, N] fp32; NaN where no score could be had."""
        ...
