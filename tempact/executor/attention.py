"""Whom a chunk attends to beside itself, and where its K and V go."""

from __future__ import annotations

from torch import Tensor

from csrc_triton import CacheRows, CacheView, fork_attention
from tempact.models.wan.transformer import ChunkAttention

Pair = tuple[Tensor, Tensor]
Context = list[CacheView] | list[Pair] | None  # one entry a layer; a pair is K and V [P, Lp, heads, head_dim]


class CachedAttention(ChunkAttention):
    """Attention to a frozen context, one entry a layer, and to the own chunk."""

    def __init__(self, context: Context):
        self.context = context

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fork_attention(q, k, v, None if self.context is None else self.context[layer])


class StoringAttention(CachedAttention):
    """The same, and the chunk's K and V go to `places`, one entry a layer."""

    def __init__(self, context: Context, places: list[CacheRows]):
        super().__init__(context)
        self.places = places

    def rows(self, layer: int) -> CacheRows:
        return self.places[layer]
