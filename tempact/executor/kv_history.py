"""The K/V history of a batch of videos: what each chunk attends to and what it leaves behind.

Rollout and training both go through `KVHistory`, so that a context rebuilt for training is the context of
the rollout. Keys are stored with RoPE at their frames' absolute positions. Relative windows move the sink along
(`executor.window`): its turned keys are copies of their own, one for all branches that share the sink, made of the
stored ones at every chunk; in bf16 that rounds them a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

from csrc_triton.kv_cache import CacheView, Reservation, Run
from csrc_triton.qk_norm_rope import rotate
from tempact.executor.attention import Context
from tempact.executor.cuda_graphs import CudaGraphRunner
from tempact.executor.window import WindowPolicy
from tempact.models.wan.transformer import TextKV

FIRST_FRAMES = 12  # latent frames that the first cache holds before it grows


class KVHistory:
    """K/V of videos made by `calls` under a window policy; latents [B, C, F, H, W].

    `size` is the latents' (H, W). Frames that no later chunk attends to are dropped. As a context manager it gives
    all of its branches back at the end.
    """

    def __init__(self, calls: CudaGraphRunner, window: WindowPolicy, chunk: int, size: tuple[int, int]):
        self.calls, self.window, self.chunk = calls, window, chunk
        patch = calls.model.config.patch
        self.rows_columns = (size[0] // patch[1], size[1] // patch[2])
        self.frame_tokens = self.rows_columns[0] * self.rows_columns[1]
        self.device = calls.model.patch_embedding.weight.device
        self.cache = calls.cache(FIRST_FRAMES * self.frame_tokens)
        self.branches: list[int] = []  # in the order they were made
        self._sinks: dict[tuple[int, tuple[Run, ...]], int] = {}  # (shift, rows of the sink) -> branch of turned keys

    def __enter__(self) -> KVHistory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Gives all branches back to the cache."""
        while self.branches:
            self.cache.release(self.branches.pop())
        while self._sinks:
            self.cache.release(self._sinks.popitem()[1])

    def new_branch(self) -> int:
        self.branches.append(self.cache.new_branch())
        return self.branches[-1]

    def fork(self, branch: int, n: int) -> list[int]:
        """n branches that share all of `branch`'s history; `branch` ends."""
        forks = self.cache.fork(branch, n)
        self.cache.release(branch)
        self.branches.remove(branch)
        self.branches += forks
        return forks

    def frames(self, branch: int) -> int:
        """Latent frames committed so far."""
        return self.cache.length(branch) // self.frame_tokens

    def positions(self, start: int) -> Tensor:
        """Temporal positions of the own frames of the chunk at `start`."""
        own = self.window.temporal_positions(start, self.chunk)[1]
        return torch.arange(own[0], own[-1] + 1, device=self.device)

    def context(self, branches: Sequence[int], start: int) -> Context:
        """What the chunk at frame `start` attends to, per layer; None for the first chunk."""
        return self._context(branches, *self._attended(start))

    def _attended(self, start: int) -> tuple[list[int], list[int]]:
        return self.window.attended(start, self.chunk), self.window.temporal_positions(start, self.chunk)[0]

    def _context(self, branches: Sequence[int], frames: list[int], positions: list[int]) -> Context:
        if not frames:
            return None
        moved = sum(position != frame for position, frame in zip(positions, frames, strict=True))  # all of the sink
        if not moved:
            return self.cache.views(branches, self._tokens(frames))
        shift, sink = positions[0] - frames[0], self._tokens(frames[:moved])
        for key in [key for key in self._sinks if key[0] != shift]:
            self.cache.release(self._sinks.pop(key))
        turned = [self._turned_sink(branch, sink, shift) for branch in branches]
        rest = self._tokens(frames[moved:])
        whole = [(0, self.cache.length(turned[0]))]
        return self.cache.joined_views([[(own, whole), (b, rest)] for own, b in zip(turned, branches, strict=True)])

    def _tokens(self, frames: list[int]) -> list[tuple[int, int]]:
        return [(first * self.frame_tokens, last * self.frame_tokens) for first, last in frame_ranges(frames)]

    def _turned_sink(self, branch: int, sink: list[tuple[int, int]], shift: int) -> int:
        """A branch of the cache that holds these tokens of `branch`, `shift` positions later."""
        rows = tuple(self.cache.segments(branch, sink))
        if (shift, rows) not in self._sinks:
            own = self._sinks[shift, rows] = self.cache.new_branch()  # `close` gives it back, whatever happens here
            with self.cache.reserve([own], sum(stop - start for start, stop in sink)) as reservation:
                self._turn(reservation, self.cache.views([branch], sink), shift)
                self.cache.commit(reservation)
        return self._sinks[shift, rows]

    def _turn(self, reservation: Reservation, views: list[CacheView], shift: int) -> None:
        # row and column 0: their channels are not turned
        rope = self.calls.model.rope(torch.arange(shift, shift + 1, device=self.device), 1, 1)
        for layer, view in enumerate(views):
            k, v = view.gather()
            self.cache.write(reservation, layer, rotate(k, *rope), v)

    @torch.no_grad()
    def commit(self, branches: Sequence[int], latents: Tensor, text: TextKV) -> None:
        """The context pass: appends a chunk's clean latents [B, C, c, H, W] at sigma 0."""
        start = self.frames(branches[0])
        with self.cache.reserve(branches, self.chunk * self.frame_tokens) as reservation:
            self._write(reservation, latents, text, self.positions(start), self.context(branches, start))
            self.cache.commit(reservation)
        self._forget(branches, start + self.chunk)

    @torch.no_grad()
    def recache(self, branches: Sequence[int], latents: Tensor, text: TextKV) -> None:
        """Rewrites the window's K/V under a new text, in one bidirectional pass a branch.

        latents [B, C, S, H, W] are the last S committed frames, or all; a window's length is enough. A sink beyond
        the rewritten frames keeps the old text and is attended to (BACKBONES.md section 2, "LL re-cache").

        The old K/V are given up first, since no pass reads them, and new ones that no later chunk attends to at once:
        the cache never holds more than windows. If a pass fails the old ones are gone, and the branches can only be
        given back. A pass has a chunk's tokens several times over: a batch of branches would be no faster, only larger.
        """
        total = self.frames(branches[0])
        frames = self.window.recached(total)
        for branch in branches:
            self.cache.drop(branch, frames[0] * self.frame_tokens, total * self.frame_tokens)
        kept_positions, own_positions = self.window.recache_positions(total)
        kept = list(range(len(kept_positions)))
        positions = torch.arange(own_positions[0], own_positions[-1] + 1, device=self.device)
        for row, branch in enumerate(branches):
            with self.cache.reserve([branch], len(frames) * self.frame_tokens) as reservation:
                context = self._context([branch], kept, kept_positions)
                own = latents[row : row + 1, :, -len(frames) :]
                self._write(reservation, own, text.row(row), positions, context)
                self.cache.replace(reservation, frames[0] * self.frame_tokens)
            self._forget([branch], total)

    def _write(
        self, reservation: Reservation, latents: Tensor, text: TextKV, positions: Tensor, context: Context
    ) -> None:
        sigma = torch.zeros(latents.shape[0], latents.shape[2], device=self.device)
        rows = [self.cache.rows_of(reservation, layer) for layer in range(self.cache.layers)]
        self.calls.write_context(latents, sigma, text, positions, context, rows)

    def _forget(self, branches: Sequence[int], start: int) -> None:
        """Drops the frames that neither the chunk at `start` nor any later one attends to."""
        needed = self.window.attended(start, self.chunk)
        if len(needed) == start:
            return
        first = needed[self.window.sink] if len(needed) > self.window.sink else start
        for branch in branches:
            self.cache.drop(branch, self.window.sink * self.frame_tokens, first * self.frame_tokens)


def frame_ranges(frames: list[int]) -> list[tuple[int, int]]:
    """Consecutive frames as [first, last) ranges: [0, 4, 5, 6] -> [(0, 1), (4, 7)]."""
    ranges: list[tuple[int, int]] = []
    for frame in frames:
        if ranges and ranges[-1][1] == frame:
            ranges[-1] = (ranges[-1][0], frame + 1)
        else:
            ranges.append((frame, frame + 1))
    return ranges
