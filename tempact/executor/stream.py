"""One video of any length, chunk by chunk: what the window no longer needs is gone before the next chunk.

The numbers are those of `Executor.rollout` for one plan and one continuation. That one holds a whole video's latents
and frames; here K/V, latents and decoder state stay as large as they are once the window is full, and frames leave
while the device works on the next chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tempact.executor.executor import Executor
from tempact.executor.kv_history import KVHistory
from tempact.executor.rollout import NoiseSource, PromptKV, chunk_prompts, denoise_chunk
from tempact.models.wan.codec import HostFrames
from tempact.types import Plan


def stream_latents(executor: Executor, plan: Plan, noise: NoiseSource) -> Iterator[Tensor]:
    """The clean latents of a plan's video, [C, c, H, W] fp32 a chunk.

    noise: as for `Executor.rollout`, of one plan and one continuation: [1, 1, K, C, c, H, W] a chunk. The plan is
    as long as the executor's videos. An iterator that is dropped half-way gives its cache rows back.
    """
    settings, calls = executor.settings, executor.calls
    assert plan.frames == settings.frames, (plan.frames, settings.frames)
    prompts = chunk_prompts(plan, settings)
    kept = 0 if settings.text_switch != "recache" else settings.window.window or settings.frames  # for a recache
    # neither gradients nor precision are switched while the caller has the floor
    with torch.no_grad(), executor.precision():
        book = PromptKV(calls.model, executor.encode, prompts)
        history = KVHistory(calls, settings.window, settings.chunk, executor.latent_size)
    with history:
        branch = [history.new_branch()]
        past: Tensor | None = None
        for chunk, prompt in enumerate(prompts):
            start, end = chunk * settings.chunk, (chunk + 1) * settings.chunk
            with torch.no_grad(), executor.precision():
                text = book([prompt])
                if past is not None and prompt != prompts[chunk - 1]:
                    history.recache(branch, past, text)
                drawn = noise(chunk)
                assert drawn.shape[:2] == (1, 1), drawn.shape
                context = history.context(branch, start)
                clean, _ = denoise_chunk(calls, drawn[0], text, history.positions(start), context, settings)
                if end < settings.frames:
                    history.commit(branch, clean, text)
                if kept:
                    past = clean if past is None else torch.cat([past, clean], dim=2)[:, :, -kept:]
            yield clean[0]


def stream_frames(executor: Executor, plan: Plan, noise: NoiseSource) -> Iterator[Tensor]:
    """The frames of a plan's video, uint8 [T, 3, height, width] on the host, as many as each chunk has.

    A chunk's frames come when the next chunk has been queued, so a GPU goes on while they are written away.
    """
    states = [executor.codec.start()]
    leaving: HostFrames | None = None
    for latents in stream_latents(executor, plan, noise):
        frames = executor.codec.decode_chunk(states, latents[None])[0]
        arriving = HostFrames(frames.shape, frames.device)
        arriving.put((slice(None),), frames)
        if leaving is not None:
            yield leaving.wait()
        leaving = arriving
    if leaving is not None:
        yield leaving.wait()
