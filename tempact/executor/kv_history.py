"""The K/V history of a batch of videos: the context of every chunk, and the K/V that each chunk adds.

Roll-out and training both go through `KVHistory`, so that a context rebuilt for training is the context of the
roll-out. Keys are stored with RoPE at their frames' absolute positions. Relative windows move the sink along
(`executor.window`): its rotated keys are copies, one for all branches that share the sink, made from the stored keys at
every chunk; in bf16 that rounds them a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from csrc_triton import ForkableKVCache, LayerViews
from csrc_triton.kv_cache import Reservation, Run
from csrc_triton.qk_norm_rope import rope_tables, rotate
from tempact.executor.cuda_graphs import CudaGraphRunner
from tempact.executor.sampler import RolloutSettings
from tempact.models.wan.transformer import TextKV

FIRST_FRAMES = 12  # latent frames that a cache holds before it grows


class KVHistory(AbstractContextManager["KVHistory"]):
    """K/V in `cache` of videos made by `settings`; latents [B, C, F, H, W].

    frame_tokens: tokens of a latent frame. Frames that no later chunk attends to are dropped. As a context manager it
    gives its branches back to the cache at the end.
    """

    def __init__(self, runner: CudaGraphRunner, cache: ForkableKVCache, settings: RolloutSettings, frame_tokens: int):
        self.runner, self.cache, self.settings, self.frame_tokens = runner, cache, settings, frame_tokens
        self.window, self.chunk = settings.window, settings.chunk
        self.branches: list[int] = []  # in the order they were made
        self._sinks: dict[tuple[int, tuple[Run, ...]], int] = {}  # (shift, rows of the sink) -> branch of rotated keys

    def __exit__(self, *_: object) -> None:
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

    def release(self, branches: Sequence[int]) -> None:
        """Gives branches back that no video goes on from."""
        for branch in branches:
            self.cache.release(branch)
            self.branches.remove(branch)

    def frames(self, branch: int) -> int:
        """Latent frames committed so far."""
        return self.cache.length(branch) // self.frame_tokens

    def positions(self, start: int) -> Tensor:
        """Temporal RoPE positions of the frames of the chunk at `start`, int64 [c]."""
        return self._positions(start, self.chunk)

    def context(self, branches: Sequence[int], start: int) -> LayerViews | None:
        """The K/V that the chunk at frame `start` of each branch attends to; None for the first chunk."""
        frames = self.window.attended(start, self.chunk)
        return self._context(branches, frames, self.window.positions_of(frames, start, start + self.chunk))

    def _context(self, branches: Sequence[int], frames: list[int], positions: list[int]) -> LayerViews | None:
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

    def _positions(self, start: int, frames: int) -> Tensor:
        return torch.arange(start, start + frames, device=self.runner.model.device)

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

    def _turn(self, reservation: Reservation, views: LayerViews, shift: int) -> None:
        # row and column 0: their channels are not rotated
        rope = rope_tables(self.runner.model.config.head_dim, self._positions(shift, 1), 1, 1)
        for layer, view in enumerate(views):
            k, v = view.gather()
            self.cache.write(reservation, layer, rotate(k, *rope), v)

    @torch.no_grad()
    def commit(self, branches: Sequence[int], latents: Tensor, text: TextKV) -> None:
        """The context pass: appends the K/V of a chunk's clean latents [B, C, c, H, W], at sigma 0."""
        start = self.frames(branches[0])
        with self.cache.reserve(branches, self.chunk * self.frame_tokens) as reservation:
            self._write(reservation, latents, text, start, self.context(branches, start))
            self.cache.commit(reservation)
        self._forget(branches, start + self.chunk)

    @torch.no_grad()
    def recache(self, branches: Sequence[int], latents: Tensor, text: TextKV) -> None:
        """Rewrites the window's K/V under a new text, in one bidirectional pass a branch.

        latents [B, C, S, H, W] are the last S committed frames, or all; a window's length is enough. A sink beyond
        the rewritten frames keeps the old text and is attended to (docs/backbones.md section 2, "LL re-cache").

        The old K/V are given up first, since no pass reads them, and new ones that no later chunk attends to at once:
        the cache never holds more than windows. If a pass fails the old ones are gone, and the branches can only be
        given back. A pass has a chunk's tokens several times over: a batch of branches would be no faster, only larger.
        """
        total = self.frames(branches[0])
        frames = self.window.recached(total)
        for branch in branches:
            self.cache.drop(branch, frames[0] * self.frame_tokens, total * self.frame_tokens)
        sink = list(range(min(self.window.sink, frames[0])))  # of those that stay
        positions = self.window.positions_of(sink, frames[0], total)
        for row, branch in enumerate(branches):
            with self.cache.reserve([branch], len(frames) * self.frame_tokens) as reservation:
                own = latents[row : row + 1, :, -len(frames) :]
                self._write(reservation, own, text.row(row), frames[0], self._context([branch], sink, positions))
                self.cache.replace(reservation, frames[0] * self.frame_tokens)
            self._forget([branch], total)

    def _write(
        self, reservation: Reservation, latents: Tensor, text: TextKV, start: int, context: LayerViews | None
    ) -> None:
        """The context pass of the frames from `start` on, into reserved rows."""
        positions = self._positions(start, latents.shape[2])
        sigma = torch.zeros(latents.shape[0], latents.shape[2], device=positions.device)
        self.runner.write_context(latents, sigma, text, positions, context, self.cache, reservation)
        reservation.mark_written()  # a replayed graph asks for no rows

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
