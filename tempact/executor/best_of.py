"""Best-of-N while a video is made: continuations that share all of its history, of which one goes on.

A fork of the K/V cache is free, so N continuations of a chunk cost their denoising calls alone: no history is made or
stored a second time, and the K/V of the continuation that goes on are the only ones that stay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tempact.executor.kv_history import KVHistory
from tempact.executor.rollout import Branch, denoised, on_device, units_of
from tempact.executor.sampler import NoiseSource
from tempact.models.wan.codec import DecoderState
from tempact.models.wan.transformer import TextKV
from tempact.types import Plan

if TYPE_CHECKING:
    from tempact.executor.executor import Executor


@dataclass(frozen=True)
class Continuations:
    """N continuations of a video's latent frames [start, end), of which one is to go on.

    frames  [N, T, 3, height, width] uint8: `shared` pixel frames that are before all of them, then those of each
    broken  [N] bool, continuations whose latents are NaN or infinite
    """

    start: int
    end: int
    frames: Tensor
    shared: int
    broken: Tensor


@dataclass(frozen=True)
class BestOf:
    """Where a video has continuations, how many, and who chooses.

    count     N; continuation n of a chunk follows the noise of (n, chunk), everything else that of continuation 0
    choose    the number of the continuation that goes on
    chunks    that continuations are made before one is chosen, at most to the end of their step; 0: always to its end
    first     the first chunk has continuations too, beside the chunks at which a step begins
    together  continuations that are made and decoded together; 0: all
    whole     `choose` is given all frames before a switch; else those of the chunk before
    """

    count: int
    choose: Callable[[Continuations], int]
    chunks: int = 1
    first: bool = False
    together: int = 0
    whole: bool = False

    def until(self, plan: Plan, start: int, chunk: int) -> int:
        """The latent frame up to which the chunk at `start` has continuations; `start` where it has none."""
        step = plan.steps[plan.step_at(start)]
        if step.start != start or (start == 0 and not self.first):
            return start
        return min(step.end, start + self.chunks * chunk) if self.chunks else step.end

    @property
    def groups(self) -> list[range]:
        """Continuations that are made together, one group after the other."""
        return units_of(self.count, 1, self.together or self.count)

    def ahead(self, plan: Plan, chunk: int) -> int:
        """Latent frames at most that continuations have in the cache beside the video's own, all in all."""
        longest = max(self.until(plan, step.start, chunk) - step.start for step in plan.steps)
        return max(0, longest - chunk) * len(self.groups[0])


class ChosenChunks:
    """Makes the chunks of one video, with continuations where `best_of` says so.

    states: the decoder's state, a list of one, of all that has been yielded and decoded; it is read and never moved.
    """

    def __init__(self, executor: Executor, plan: Plan, best_of: BestOf, states: list[DecoderState]):
        self.executor, self.plan, self.best_of, self.states = executor, plan, best_of, states
        self._seen: list[Tensor] = []  # frames [T, 3, height, width] that `choose` is given as shared
        self._ready: deque[Tensor] = deque()  # further chunks of the continuation that goes on

    def passed(self, frames: Tensor) -> None:
        """Takes the frames uint8 [T, 3, height, width] of the chunk that was yielded last."""
        if not self.best_of.whole:
            self._seen.clear()
        self._seen.append(frames)

    def chunk(self, history: KVHistory, noise: NoiseSource, start: int, branch: Branch, text: TextKV) -> Tensor:
        """The clean chunk [1, C, c, H, W] at latent frame `start` of the video, whose K/V are not committed yet."""
        if not self._ready:
            end = self.best_of.until(self.plan, start, history.chunk)
            if end == start:
                return denoised(history, noise, start, [branch], text)[0]
            made = [self._made(history, noise, (start, end), branch, text, own) for own in self.best_of.groups]
            latents = torch.cat(made)
            chosen = self._chosen(start, end, latents)
            self._ready.extend(latents[chosen : chosen + 1].clone().split(history.chunk, dim=2))
        return self._ready.popleft()

    def _made(
        self, history: KVHistory, noise: NoiseSource, span: tuple[int, int], branch: Branch, text: TextKV, own: range
    ) -> Tensor:
        """Clean latents [n, C, end - start, H, W] of these continuations; their branches are given back."""
        start, end = span
        branch.cached, *forks = history.fork(branch.cached, len(own) + 1)
        branches = [Branch(branch.plan, [n], fork) for n, fork in zip(own, forks, strict=True)]
        texts = text.select(on_device([0] * len(own), self.executor.device))
        chunks = []
        for at in range(start, end, history.chunk):
            chunks.append(denoised(history, noise, at, branches, texts)[0])
            if at + history.chunk < end:
                history.commit(forks, chunks[-1], texts)
        history.release(forks)
        return torch.cat(chunks, dim=2)

    def _chosen(self, start: int, end: int, latents: Tensor) -> int:
        from tempact.executor.executor import not_finite

        # as the stream decodes: in the codec's own precision
        with torch.autocast(latents.device.type, enabled=False):
            parts = []
            for own in self.best_of.groups:
                states = self.states[0].fork(len(own))
                parts.append(self.executor.codec.decode_chunk(states, latents[own.start : own.stop]))
                del states  # a state of every continuation of a group at a time
            frames, shared = torch.cat(parts), 0
            if self._seen:
                before = torch.cat(self._seen).to(frames.device)
                frames, shared = torch.cat([before.expand(len(frames), *before.shape), frames], dim=1), len(before)
            chosen = self.best_of.choose(Continuations(start, end, frames, shared, not_finite(latents[None])[0]))
        assert 0 <= chosen < self.best_of.count, chosen
        return chosen
