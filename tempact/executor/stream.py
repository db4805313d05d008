"""One video of any length, generated chunk by chunk in constant memory.

The numbers are those of `Executor.rollout` for one plan and one continuation, which holds a whole video's latents and
frames; here K/V, latents and the decoder's state stop growing once the window is full, and frames leave while the
device works on the next chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tempact.errors import UserError
from tempact.executor.best_of import BestOf, ChosenChunks
from tempact.executor.executor import Executor, not_finite
from tempact.executor.rollout import Branch, PromptKV, chunk_prompts, denoised, walk_chunks
from tempact.executor.sampler import NoiseSource
from tempact.models.wan.codec import HostFrames
from tempact.models.wan.transformer import TextKV
from tempact.types import Plan


def stream_latents(
    executor: Executor, plan: Plan, noise: NoiseSource, chosen: ChosenChunks | None = None
) -> Iterator[Tensor]:
    """The clean latents of a plan's video, fp32 [C, c, H, W] a chunk.

    noise: of one plan, and of one continuation or those that are chosen from. The plan is as long as the executor's
    videos. An iterator that is dropped half-way gives its cache rows back.
    """
    settings = executor.settings
    assert plan.frames == settings.frames, (plan.frames, settings.frames)
    assert noise.shape[:2] == (1, 1 if chosen is None else chosen.best_of.count), noise.shape
    prompts = chunk_prompts(plan, settings)
    kept = 0 if settings.text_switch != "recache" else settings.window.window or settings.frames  # for a recache
    seen: list[Tensor] = []  # latents of the last `kept` frames

    def make(start: int, branches: list[Branch], words: TextKV) -> Tensor:
        if chosen is None:
            clean = denoised(history, noise, start, branches, words)[0]
        else:
            clean = chosen.chunk(history, noise, start, branches[0], words)
        if kept:
            seen[:] = [torch.cat([*seen, clean], dim=2)[:, :, -kept:]]
        return clean

    more = 0 if chosen is None else chosen.best_of.ahead(plan, settings.chunk)
    with executor.history(plans=1, more=more) as history:
        # neither gradients, weights nor precision are switched while the caller has the floor
        with torch.no_grad(), executor.merged(), executor.precision():
            executor.read(prompts)
            text = PromptKV(executor.model, executor.encode, prompts)
        chunks = walk_chunks(history, [prompts], text, make, lambda *_: seen[0])
        while True:
            with torch.no_grad(), executor.merged(), executor.precision():
                clean = next(chunks, None)
            if clean is None:
                return
            yield clean[0]


def stream_frames(
    executor: Executor, plan: Plan, noise: NoiseSource, best_of: BestOf | None = None,
    broken: list[bool] | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """The frames of a plan's video on the host, uint8 [T, 3, height, width] a chunk.

    A chunk's frames come when the next chunk has been queued, so a GPU goes on while they are written. best_of: where
    the video has continuations, as many as the noise. Raises UserError for latents that are NaN or infinite, unless a
    list `broken` is given, which gets whether a chunk's are.
    """
    states = [executor.codec.start()]
    chosen = None if best_of is None else ChosenChunks(executor, plan, best_of, states)
    leaving: tuple[HostFrames, Tensor] | None = None
    for latents in stream_latents(executor, plan, noise, chosen):
        frames = executor.codec.decode_chunk(states, latents[None])[0]
        if chosen is not None:
            chosen.passed(frames)
        arriving = HostFrames(frames.shape, frames.device), not_finite(latents[None, None])
        arriving[0].put((slice(None),), frames)
        if leaving is not None:
            yield _arrived(*leaving, broken)
        leaving = arriving
    if leaving is not None:
        yield _arrived(*leaving, broken)


def _arrived(frames: HostFrames, bad: Tensor, broken: list[bool] | None) -> Tensor:
    arrived, found = frames.wait(), bool(bad.any())
    if broken is not None:
        broken.append(found)
    elif found:
        raise UserError("executor: found latents that are not finite; accepted: weights that give pictures")
    return arrived
