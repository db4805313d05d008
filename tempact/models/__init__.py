"""Models, and weights that wait on the host while they are not used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def visiting(weights: Sequence[Tensor], device: torch.device | None) -> Iterator[None]:
    """Inside, the weights are on `device`, as copies that are dropped at the end: they must not be changed.

    None: they are used where they are.
    """
    waiting = [weight.data for weight in weights]
    try:
        for weight in weights if device is not None else ():
            weight.data = weight.data.to(device, non_blocking=True)
        yield
    finally:
        for weight, own in zip(weights, waiting, strict=True):
            weight.data = own
