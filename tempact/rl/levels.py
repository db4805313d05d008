"""Noise levels of trained rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def of_levels(values: Sequence[float], levels: Tensor) -> Tensor:
    """The value of each row's level, fp32 [B]; levels [B] int64, numbers of values.

    Nothing is copied to the device, which the host would wait for.
    """
    found = torch.zeros(levels.shape, dtype=torch.float32, device=levels.device)
    for number, value in enumerate(values):
        found.masked_fill_(levels == number, value)
    return found
