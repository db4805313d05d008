"""A chunk of a batch of branches: the context that it reads, its rows, and the layers written so far."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from torch import Tensor

from csrc_triton._tables import CacheRows, CacheView, LayerViews, Reservation
from csrc_triton.fork_attention import fork_attention


class _Cache(Protocol):
    """What a chunk needs of a `ForkableKVCache`."""

    @property
    def layers(self) -> int: ...

    @property
    def rows_total(self) -> int: ...

    def length(self, branch: int) -> int: ...

    def views(self, branches: Sequence[int], ranges: Sequence[tuple[int, int]]) -> LayerViews: ...

    def reserve(self, branches: Sequence[int], length: int) -> Reservation: ...

    def rows_of(self, reservation: Reservation, layer: int) -> CacheRows: ...

    def write(self, reservation: Reservation, layer: int, k: Tensor, v: Tensor) -> None: ...

    def commit(self, reservation: Reservation) -> None: ...


class Chunk:
    """The next `tokens` tokens of B branches in every layer of a model; made by `ForkableKVCache.chunk`.

    A context manager, to be entered once. Layers may be called in any order: with commit=True each once, otherwise any
    number of times, so that several denoising steps share one block. torch.compile traces calls of a chunk without
    commit; a pass with commit=True runs uncompiled.

    branches: the branches, one a batch row. tokens: L. views: the context, one view a layer; None where there is none
        (then a layer attends to its own tokens alone).
    """

    def __init__(
        self,
        cache: _Cache,
        branches: Sequence[int],
        tokens: int,
        attended: Sequence[tuple[int, int]] | None,
        commit: bool,
    ):
        if tokens < 1:
            raise ValueError(f"tokens: found {tokens}; accepted: at least 1 (chunk of branches {tuple(branches)})")
        if not len(branches):
            raise ValueError("branches: found none; accepted: at least one")
        self.branches, self.tokens = tuple(branches), tokens
        self._cache, self._commit = cache, commit
        self._lengths = [cache.length(branch) for branch in self.branches]
        ranges = [(0, self.start)] if attended is None else attended
        self._ranges = [(start, stop) for start, stop in ranges if start != stop]
        self._look()
        self._attended: set[int] = set()
        self._reservation: Reservation | None = None
        self._state = "not entered"

    @property
    def start(self) -> int:
        """Position of the chunk's first token: the length of its branches before the chunk.

        Raises:
            ValueError: for branches of different lengths.
        """
        if len(set(self._lengths)) > 1:
            found = f"{self.branches} with {self._lengths} tokens"
            raise ValueError(f"branches: found {found}; accepted: one length, or `attended` where `start` is not asked")
        return self._lengths[0]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one layer to the context and to the chunk's own keys, as `fork_attention`.

        With commit=True k and v are also written to the chunk's rows of this layer, unless `rows(layer)` was asked for
        before: then they have been written. The context and the written copies get no gradient; q, k and v do.

        Args:
            layer: in [0, layers).
            q, k, v: [B, L, heads, head_dim], queries and keys with RoPE.

        Raises:
            ValueError: for a layer out of range, tensors of another shape, a second call of a layer with commit=True,
                and outside of the chunk's block. Nothing is written then.
        """
        self._check(layer)
        if q.shape[:2] != (len(self.branches), self.tokens):
            accepted = f"[{len(self.branches)}, {self.tokens}, heads, head_dim], the chunk's"
            raise ValueError(f"q: found {tuple(q.shape)}; accepted: {accepted}")
        if self._reservation is not None and layer in self._attended:
            raise ValueError(f"layer: found {layer} a second time; accepted with commit=True: each layer once")
        out = fork_attention(q, k, v, self._contexts[layer])
        if self._reservation is not None:
            if layer not in self._reservation.written:
                self._cache.write(self._reservation, layer, k, v)
            self._attended.add(layer)
        return out

    def rows(self, layer: int) -> CacheRows:
        """The chunk's rows of one layer, for ops that write K and V themselves; the layer counts as written.

        Raises:
            ValueError: for a layer out of range or written before, without commit=True, and outside of the chunk's
                block.
        """
        self._check(layer)
        if self._reservation is None:
            raise ValueError("rows: found a chunk with commit=False; accepted: commit=True, which reserves rows")
        if layer in self._reservation.written:
            raise ValueError(f"layer: found {layer}, which is written; accepted with commit=True: each layer once")
        return self._cache.rows_of(self._reservation, layer)

    def _look(self) -> None:
        self.views: LayerViews | None = self._cache.views(self.branches, self._ranges) if self._ranges else None
        none: list[None] = [None] * self._cache.layers
        self._contexts: list[CacheView] | list[None] = none if self.views is None else [*self.views]

    def _check(self, layer: int) -> None:
        if self._state != "open":
            raise ValueError(f"chunk of branches {self.branches}: found it {self._state}; accepted: inside its block")
        if not 0 <= layer < len(self._contexts):
            raise ValueError(f"layer: found {layer}; accepted: 0 to {len(self._contexts) - 1}")

    def __enter__(self) -> Chunk:
        if self._state != "not entered":
            raise ValueError(f"chunk of branches {self.branches}: found it {self._state}; accepted: entered once")
        if self._commit:
            rows = self._cache.rows_total
            self._reservation = self._cache.reserve(self.branches, self.tokens)
            if self._cache.rows_total != rows:  # views of before would keep the old pools alive
                self._look()
        self._state = "open"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        self._state = "closed"
        if self._reservation is not None:
            with self._reservation:  # cancelled unless committed
                if kind is None:
                    self._cache.commit(self._reservation)
