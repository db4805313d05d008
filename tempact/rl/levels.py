"""Noise levels: those that an iteration trains, and those of trained rows."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor


def levels_of(which: str, count: int, iteration: int, seed: int) -> range:
    """Which of `count` levels iteration 0, 1, ... trains.

    "all" of them; "sliding": one, the next in every iteration, from the noisiest on (MixGRPO, arXiv 2507.21802, with a
    window of one step); "drawn": one, alike for all plans and continuations (Flash-GRPO, arXiv 2605.15980), by `seed`.
    """
    if which == "all":
        return range(count)
    first = iteration % count if which == "sliding" else random.Random(seed).randrange(count)
    return range(first, first + 1)


def of_levels(values: Sequence[float], levels: Tensor) -> Tensor:
    """The value of each row's level, fp32 [B]; levels [B] int64, numbers of values.

    Nothing is copied to the device, which the host would wait for.
    """
    found = torch.zeros(levels.shape, dtype=torch.float32, device=levels.device)
    for number, value in enumerate(values):
        found.masked_fill_(levels == number, value)
    return found
