"""What the integrations share: a cache counted in latent frames, windows over them, and the state of the current chunk.

What a layer reads and writes lies in an object of its own (`LayerState`), as tensors: a compiled layer then serves all
layers and chunks, since neither the layer's number nor the chunk's position is part of its code.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from csrc_triton.fork_attention import fork_attention
from csrc_triton.kv_cache import CacheRows, CacheView, ForkableKVCache, LayerViews
from csrc_triton.qk_norm_rope import qk_norm_rope, rope_tables, rotate

Frames = tuple[int, int]  # [first, last)
Rope = tuple[Tensor, Tensor]  # cos and sin, fp32 [L, head_dim / 2]


OUTSIDE = "transformer: called outside of `chunk`; accepted: calls inside `with wan.chunk(...)`, recomputed ones too"


@dataclass(frozen=True)
class Window:
    """A chunk attends to its own frames, to the newest ones before it and to a sink, the first frames of the video.

    Args:
        frames: latent frames attended to, those of the sink and of the chunk included.
        sink: of them the first ones of the video.
        relative: once frames lie between sink and window, the sink's keys are turned to the positions right before
            the newest frames' (LongLive's infinite attention); False: positions stay absolute. The turned keys are
            given back at the end of the block: the backward pass must run inside it, or before rows are reserved again.

    Raises:
        ValueError: where there is no place for a frame besides the sink.
    """

    frames: int
    sink: int = 0
    relative: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.sink < self.frames:
            raise ValueError(
                f"window: found a sink of {self.sink} in {self.frames} frames; accepted: 0 <= sink < frames"
            )

    def attended(self, first: int, last: int) -> list[Frames]:
        """Frames before `first` that a call over the frames [first, last) attends to.

        Raises:
            ValueError: for a call that does not fit beside the sink.
        """
        if last <= self.frames:
            return [(0, first)]
        recent = self.frames - self.sink - (last - first)
        if recent < 0:
            accepted = f"at most {self.frames - self.sink}, the window without its sink"
            raise ValueError(f"frames: found {last - first}; accepted: {accepted}")
        return [(0, self.sink), (first - recent, first)]

    def rewritten(self, last: int) -> int:
        """First of the frames up to `last` that are computed again under a new text."""
        return 0 if last <= self.frames else last - self.frames + self.sink

    def shift(self, attended: Sequence[Frames]) -> int:
        """Positions by which a relative window turns the sink of these attended frames."""
        return attended[-1][0] - self.sink if self.relative and self.sink and len(attended) > 1 else 0


@dataclass
class LayerState:
    """What one layer reads and writes in the current chunk; closed outside of chunks."""

    closed: bool = True
    view: CacheView | None = None
    rows: CacheRows | None = None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor, rope: Rope, heads: int, eps: float,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """Attention output [B, L, heads * head_dim] of projections of that shape, in their dtype.

        weight_q, weight_k: of the RMS norms. dtype: the cache's, in which norms, RoPE and attention are computed.
        """
        if self.closed:
            raise ValueError(OUTSIDE)
        given = v.dtype
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if self.rows is None:
            q, own = qk_norm_rope(q, k, weight_q, weight_k, rope, heads=heads, eps=eps)
        else:
            q, own = qk_norm_rope(q, k, weight_q, weight_k, rope, heads=heads, eps=eps, v=v, write=self.rows)
        out = fork_attention(q, own, v.unflatten(-1, (heads, -1)), self.view)
        return out.flatten(2).to(given)


@dataclass
class Call:
    """What the model's calls inside a block belong to: `batch` branches, and their frames from `first` on.

    positions: of the frames, int64 [F] on the cache's device.
    """

    first: int
    batch: int
    positions: Tensor
    commit: bool
    called: bool = False
    tables: dict[tuple[int, int], Rope] = field(default_factory=dict)  # by height and width in tokens

    @property
    def frames(self) -> int:
        return self.positions.shape[0]

    def check_batch(self, rows: int) -> None:
        if rows % self.batch or (self.commit and rows != self.batch):
            accepted = f"{self.batch}, a row a branch" + ("" if self.commit else ", or a multiple of it")
            raise ValueError(f"batch: found {rows} rows; accepted: {accepted}")


class FrameCache:
    """A `ForkableKVCache` of branches of whole latent frames, and the chunk that a model is processing.

    frame_tokens: tokens of a latent frame. frames: latent frames held before the cache grows. window: None: chunks
    attend to all frames before them. last: first position that RoPE does not know; None: all are known.
    """

    def __init__(
        self, layers: int, heads: int, head_dim: int, *, frame_tokens: int, frames: int, window: Window | None,
        last: int | None, dtype: torch.dtype, device: torch.device,
    ):  # fmt: skip
        if frame_tokens < 1 or frames < 1:
            raise ValueError(f"frame_tokens, frames: found {frame_tokens}, {frames}; accepted: at least 1")
        self.cache = ForkableKVCache(
            layers, heads, head_dim, rows=frames * frame_tokens, page=frame_tokens, dtype=dtype, device=device
        )
        self.frame_tokens, self.window, self.last = frame_tokens, window, last
        self.head_dim, self.dtype, self.device = head_dim, dtype, device
        self.states = [LayerState() for _ in range(layers)]
        self._call: Call | None = None

    @property
    def call(self) -> Call:
        if self._call is None:
            raise ValueError(OUTSIDE)
        return self._call

    @contextmanager
    def chunk(
        self, branches: Sequence[int], frames: int, *, attended: Sequence[Frames] | None, commit: bool
    ) -> Iterator[Call]:
        """The next `frames` latent frames of the branches; `attended` in place of the window's."""
        self._check_alone(branches)
        first = self.length(branches)
        if frames < 1:
            raise ValueError(f"frames: found {frames}; accepted: at least 1")
        self._check_last(first + frames)
        shift = 0
        if attended is None:
            attended, shift = self._attended(first, first + frames)
        with (
            self._pieces(branches, attended, shift) as pieces,
            self.cache.chunk(branches, frames * self.frame_tokens, attended=(), commit=commit) as chunk,
        ):
            # views after the rows: reserving may have moved the pools
            views = self.cache.joined_views(pieces) if pieces else None
            rows = [chunk.rows(layer) for layer in range(self.cache.layers)] if commit else None
            with self._inside(branches, range(first, first + frames), views, rows) as call:
                yield call

    @contextmanager
    def recache(self, branches: Sequence[int]) -> Iterator[range]:
        """One call over the window's frames under a new text, in place of the old ones; yields the frames' numbers."""
        self._check_alone(branches)
        last = self.length(branches)
        first = 0 if self.window is None else self.window.rewritten(last)
        if not last:
            raise ValueError(f"branches: found {list(branches)} without frames; accepted: branches that hold some")
        attended, shift = self._attended(first, last)
        with (
            self._pieces(branches, attended, shift) as pieces,
            self.cache.reserve(branches, (last - first) * self.frame_tokens) as reservation,
        ):
            views = self.cache.joined_views(pieces) if pieces else None
            rows = [self.cache.rows_of(reservation, layer) for layer in range(self.cache.layers)]
            with self._inside(branches, range(first, last), views, rows):
                yield range(first, last)
            self.cache.replace(reservation, first * self.frame_tokens)

    def length(self, branches: Sequence[int]) -> int:
        """Latent frames that each of the branches has had."""
        lengths = sorted({self.cache.length(branch) for branch in branches})
        if len(lengths) != 1 or lengths[0] % self.frame_tokens:
            accepted = f"one length, a multiple of {self.frame_tokens}"
            raise ValueError(f"branches: found {list(branches)} with {lengths} tokens; accepted: {accepted}")
        return lengths[0] // self.frame_tokens

    @contextmanager
    def _inside(
        self, branches: Sequence[int], frames: range, views: LayerViews | None, rows: list[CacheRows] | None
    ) -> Iterator[Call]:
        positions = torch.arange(frames.start, frames.stop, device=self.device)
        call = self._call = Call(frames.start, len(branches), positions, rows is not None)
        for layer, state in enumerate(self.states):
            state.view = None if views is None else views[layer]
            state.rows = None if rows is None else rows[layer]
            state.closed = False
        if "torch._dynamo" in sys.modules:
            self._for_compiled_layers(views)
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled() and rows is None):
                yield call
            if rows is not None and not call.called:
                raise ValueError("commit: found no call of the transformer inside; accepted: one call")
        finally:
            self._call = None
            for state in self.states:
                state.closed, state.view, state.rows = True, None, None

    def _for_compiled_layers(self, views: LayerViews | None) -> None:
        """Sizes that differ from chunk to chunk are no part of a compiled layer."""
        changing = [(pool, 0) for pools in (views.pools if views else ()) for pool in pools]
        changing += [(pool, 0) for state in self.states if state.rows for pool in (state.rows.k, state.rows.v)]
        if views is not None and views.segments is not None:
            # for the torch path, which otherwise would make the rows of the context from lengths on the host
            changing += [(views.table, 1), (views.segments.rows(), 1)]
        for tensor, dimension in changing:
            torch._dynamo.maybe_mark_dynamic(tensor, dimension)

    @contextmanager
    def _pieces(
        self, branches: Sequence[int], attended: Sequence[Frames], shift: int
    ) -> Iterator[list[list[tuple[int, list[Frames]]]] | None]:
        """Branches and token ranges of each batch row's context, as `joined_views` takes them; None: no context.

        shift: positions by which the keys of the first range, the sink, are turned: in branches of their own, one for
        all rows that share the sink, which are given back at the end of the block.
        """
        ranges = self._tokens(attended)
        if not shift:
            yield [[(branch, ranges)] for branch in branches] if ranges else None
            return
        sink, rest = ranges[:1], ranges[1:]
        copies: dict[tuple[Frames, ...], int] = {}  # rows of a sink -> branch of turned keys
        try:
            pieces = []
            for branch in branches:
                rows = tuple(self.cache.segments(branch, sink))
                if rows not in copies:
                    copies[rows] = self.cache.new_branch()
                    self._turn(branch, copies[rows], sink, shift)
                pieces.append([(copies[rows], sink), (branch, rest)])
            yield pieces
        finally:
            for copy in copies.values():
                self.cache.release(copy)

    @torch.no_grad()
    def _turn(self, branch: int, copy: int, sink: list[Frames], shift: int) -> None:
        # at row and column 0, which turn nothing
        rope = rope_tables(self.head_dim, torch.full((1,), shift, device=self.device), 1, 1)
        with self.cache.reserve([copy], sum(stop - start for start, stop in sink)) as reservation:
            for layer, view in enumerate(self.cache.views([branch], sink)):
                k, v = view.gather()
                self.cache.write(reservation, layer, rotate(k, *rope), v)
            self.cache.commit(reservation)

    def _attended(self, first: int, last: int) -> tuple[list[Frames], int]:
        """What a call over the frames [first, last) attends to before them, and by how much its sink is turned."""
        if self.window is None:
            return [(0, first)], 0
        attended = self.window.attended(first, last)
        return attended, self.window.shift(attended)

    def _tokens(self, frames: Sequence[Frames]) -> list[Frames]:
        return [(a * self.frame_tokens, b * self.frame_tokens) for a, b in frames if b > a]

    def _check_alone(self, branches: Sequence[int]) -> None:
        if self._call is not None:
            found = f"one for branches {list(branches)} inside another"
            raise ValueError(f"chunk: found {found}; accepted: one at a time")

    def _check_last(self, last: int) -> None:
        relative = self.window is not None and self.window.relative
        if self.last is not None and last > self.last and not relative:
            raise ValueError(f"frames: found frames up to {last}; accepted: {self.last} at most, the positions of RoPE")
