"""Latents of videos to frames, chunk by chunk: decoder state is held outside of the decoder and forks for free.

`Codec` is the executor's interface, `PixelCodec` ShapeWorld's, `WanCodec` the base of the VAE's decoder and of the
tiny ones. Frames are copied to the host while the GPU goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tempact.config import TOKEN_PIXELS
from tempact.errors import UserError

LATENT_STRIDE = 4  # pixel frames of every latent frame of Wan's but the first, which gives one
SPACE_STRIDE = 8  # pixels of a latent's side


def pixel_frames(latent_frames: int) -> int:
    """Pixel frames of the first `latent_frames` latent frames of a Wan video: 0, 1, 5, 9, ...

    Source: docs/backbones.md section 5.
    """
    return max(0, 1 + LATENT_STRIDE * (latent_frames - 1))


@dataclass
class DecoderState:
    """A decoder's memory of one video.

    latents: latent frames decoded so far. slots: one tensor without a batch dimension for each layer with memory; None
    stands for zeros. Slots are replaced, never written into, so states may share them.
    """

    latents: int = 0
    slots: list[Tensor | None] = field(default_factory=list)

    def fork(self, n: int) -> list[DecoderState]:
        """n states that go on from here; they share this one's memory."""
        return [DecoderState(self.latents, list(self.slots)) for _ in range(n)]

    @property
    def elements(self) -> int:
        """Numbers held, those shared with other states included."""
        return sum(slot.numel() for slot in self.slots if slot is not None)


class Codec(Protocol):
    """Decoder of a video's latents [B, C, F, H, W] to frames, uint8 [B, T, 3, height, width]; `fps` frames a second."""

    latent_channels: int
    fps: float

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) of the latents of a height x width video."""

    def pixel_frames(self, latent_frames: int) -> int:
        """Pixel frames of the first `latent_frames` latent frames of a video."""

    def start(self) -> DecoderState:
        """The state of a video of which nothing has been decoded."""
        return DecoderState()

    def decode_chunk(self, states: Sequence[DecoderState], latents: Tensor) -> Tensor:
        """The next frames of B videos, from their next n >= 1 latent frames [B, C, n, H, W]; the states move on.

        All states must stand at the same latent frame. The frames are on the latents' device.
        """

    def decode_forked(self, latents: Tensor, fork_frames: Sequence[int]) -> Tensor:
        """Frames [P, N, T, 3, height, width] of latents [P, N, C, F, H, W]: N continuations of P plans.

        The continuations of plan p agree on latent frames [0, fork_frames[p]).
        """


class PixelCodec(Codec):
    """Latents are the pixels themselves, scaled to [-1, 1]; one latent frame is one pixel frame."""

    latent_channels = 3
    fps = 8.0

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        return height, width

    def pixel_frames(self, latent_frames: int) -> int:
        return latent_frames

    def decode_chunk(self, states: Sequence[DecoderState], latents: Tensor) -> Tensor:
        for state in states:
            state.latents += latents.shape[2]
        return to_bytes(latents).transpose(1, 2)

    def decode_forked(self, latents: Tensor, fork_frames: Sequence[int]) -> Tensor:
        return to_bytes(latents).transpose(2, 3)


class WanCodec(Codec):
    """A streaming decoder of Wan2.1's latents: `pixels` of a few latent frames at a time.

    latents_per_call: latent frames after the first that go through the network together, at most.
    """

    latent_channels = 16
    fps = 16.0
    latents_per_call: int

    def pixels(self, states: Sequence[DecoderState], latents: Tensor) -> Tensor:
        """The next frames of B videos, [B, 3, T, 8H, 8W] in [-1, 1]; the states move on.

        latents [B, 16, n, H, W], normalised as the transformer's. The first latent frame of a video comes alone (n = 1)
        and gives one pixel frame, every later one four.
        """
        raise NotImplementedError

    def videos_per_call(self, latents: int, size: tuple[int, int]) -> int:
        """Videos of `size` (H, W) that fit into one call with `latents` frames each; 0 if not even one fits."""
        raise NotImplementedError

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) of the latents of a height x width video; UserError unless both are multiples of 16."""
        if height < 1 or width < 1 or height % TOKEN_PIXELS or width % TOKEN_PIXELS:
            accepted = f"positive multiples of {TOKEN_PIXELS}"
            raise UserError(f"executor.video_size: found {height}x{width}; accepted: {accepted}")
        return height // SPACE_STRIDE, width // SPACE_STRIDE

    def pixel_frames(self, latent_frames: int) -> int:
        return pixel_frames(latent_frames)

    def call_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(latent frames, videos) of `size` (H, W) that go through the network together, at least one of each."""
        latents = self.latents_per_call
        while latents > 1 and not self.videos_per_call(latents, size):
            latents -= 1
        return latents, max(1, self.videos_per_call(latents, size))

    @torch.no_grad()
    def decode_chunk(self, states: Sequence[DecoderState], latents: Tensor) -> Tensor:
        assert len(states) == len(latents) and len({state.latents for state in states}) == 1, "states of one batch"
        height, width = latents.shape[3:]
        decoded, total = states[0].latents, states[0].latents + latents.shape[2]
        count, size = pixel_frames(total) - pixel_frames(decoded), (SPACE_STRIDE * height, SPACE_STRIDE * width)
        frames = torch.empty((len(states), count, 3, *size), dtype=torch.uint8, device=latents.device)
        most, group = self.call_size((height, width))
        for first in range(0, len(states), group):
            own = slice(first, first + group)
            at = done = 0
            while at < latents.shape[2]:
                count = 1 if decoded + at == 0 else min(most, latents.shape[2] - at)
                pixels = self.pixels(states[own], latents[own, :, at : at + count])
                frames[own, done : done + pixels.shape[2]] = to_bytes(pixels).transpose(1, 2)
                at, done = at + count, done + pixels.shape[2]
        return frames

    @torch.no_grad()
    def decode_forked(self, latents: Tensor, fork_frames: Sequence[int]) -> Tensor:
        """See `Codec.decode_forked`; the frames are on the host.

        Each plan's context is decoded once, its state forked, and the continuations go on, as many at a time as fit; no
        more states are alive than that.
        """
        plans, count, _, total, height, width = latents.shape
        shape = (plans, count, pixel_frames(total), 3, SPACE_STRIDE * height, SPACE_STRIDE * width)
        host = HostFrames(shape, latents.device)
        step, group = self.call_size((height, width))
        for p, fork in enumerate(fork_frames):
            assert 0 <= fork <= total, (fork, total)
            root = DecoderState()
            for start in range(0, fork, step):
                end = min(start + step, fork)
                frames = self.decode_chunk([root], latents[p, :1, :, start:end])
                for n in range(count):
                    host.put((p, n, slice(pixel_frames(start), pixel_frames(end))), frames[0])
            for first in range(0, count, group):
                branches = range(first, min(first + group, count))
                states = root.fork(len(branches))
                for start in range(fork, total, step):
                    end = min(start + step, total)
                    frames = self.decode_chunk(states, latents[p, first : branches.stop, :, start:end])
                    for n, own in zip(branches, frames, strict=True):
                        host.put((p, n, slice(pixel_frames(start), pixel_frames(end))), own)
        return host.wait()


def to_bytes(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] to uint8."""
    return ((pixels.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


class HostFrames:
    """Frames on their way to the host: uint8 `shape`, in pinned memory if they come from a GPU.

    `put` only queues a copy; `wait` is the one place that waits for the device.
    """

    def __init__(self, shape: Sequence[int], device: torch.device):
        on_gpu = device.type == "cuda"
        self.frames = torch.empty(tuple(shape), dtype=torch.uint8, pin_memory=on_gpu)
        self.stream = torch.cuda.Stream(device) if on_gpu else None
        self.done = torch.cuda.Event() if on_gpu else None

    def put(self, where: tuple[int | slice, ...], frames: Tensor) -> None:
        """frames[where] = frames, behind what is queued on the current stream; a contiguous place copies at once."""
        target = self.frames[where]
        if self.stream is None or self.done is None:
            target.copy_(frames)
            return
        self.stream.wait_stream(torch.cuda.current_stream(frames.device))
        with torch.cuda.stream(self.stream):
            target.copy_(frames, non_blocking=True)
            self.done.record(self.stream)
        frames.record_stream(self.stream)  # or its memory would be given away before it is read

    def wait(self) -> Tensor:
        """The frames, all of them arrived."""
        if self.done is not None:
            self.done.synchronize()
        return self.frames
