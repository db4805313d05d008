"""Small caches for tests, and what their branches hold."""

from __future__ import annotations

from typing import Any

import torch

from csrc_triton import ForkableKVCache

HEADS, DIM, LAYERS = 2, 4, 2
CPU = torch.device("cpu")


def cache(rows: int = 8, **options: Any) -> ForkableKVCache:
    return ForkableKVCache(LAYERS, HEADS, DIM, rows=rows, dtype=torch.float32, device=CPU, **options)


def fill(own: ForkableKVCache, branches: list[int], length: int, value: float) -> None:
    """Appends `length` tokens; K of layer l is value + l, V its negative."""
    with own.reserve(branches, length) as reservation:
        block = torch.full((len(branches), length, HEADS, DIM), value)
        for layer in range(LAYERS):
            own.write(reservation, layer, block + layer, -block - layer)
        own.commit(reservation)


def keys(own: ForkableKVCache, branch: int, *ranges: tuple[int, int]) -> list[float]:
    """The first layer's K of some tokens, a number a token."""
    return own.views([branch], ranges)[0].gather()[0][0, :, 0, 0].tolist()
