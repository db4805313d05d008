"""Causal decoders as streams: the state is held outside, forks for nothing, and frames leave while the GPU goes on.

Pixels to latents and back, behind the interface that the Wan VAE implements too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

LATENT_STRIDE = 4  # pixel frames of every latent frame but the first, which gives one


def pixel_frames(latent_frames: int) -> int:
    """Pixel frames of the first `latent_frames` latent frames of a video: 0, 1, 5, 9, ... (BACKBONES.md section 5)."""
    return max(0, 1 + LATENT_STRIDE * (latent_frames - 1))


@dataclass
class DecoderState:
    """What a decoder remembers of one video.

    latents: latent frames decoded so far. slots: what each remembering layer has kept, one tensor a layer without a
    batch dimension; None stands for zeros. Slots are replaced, never written into, so states may share them.
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


class StreamDecoder(Protocol):
    """Latents to pixels, a few latent frames at a time."""

    latents_per_call: int  # latent frames after the first that go through the network together

    def pixels(self, states: Sequence[DecoderState], latents: Tensor) -> Tensor:
        """The next frames of B videos, [B, 3, T, 8H, 8W] in [-1, 1]; the states move on.

        latents [B, C, n, H, W] as the transformer has them; all states stand at the same latent frame. At the start
        of the videos n is 1, later at most `latents_per_call`.
        """
        ...

    def videos_per_call(self, latents: int, size: tuple[int, int]) -> int:
        """How many videos of `size` (H, W) may go through the network together with `latents` frames each."""
        ...


@torch.no_grad()
def decode_chunk(decoder: StreamDecoder, states: Sequence[DecoderState], latents: Tensor) -> Tensor:
    """The frames of the next latents of B videos, uint8 [B, T, 3, 8H, 8W]; the states move on.

    latents [B, C, n, H, W] with any n >= 1. All states stand at the same latent frame.
    """
    assert len(states) == len(latents) and len({state.latents for state in states}) == 1, "states of one batch"
    height, width = latents.shape[3:]
    decoded, total = states[0].latents, states[0].latents + latents.shape[2]
    shape = (len(states), pixel_frames(total) - pixel_frames(decoded), 3, 8 * height, 8 * width)
    frames = torch.empty(shape, dtype=torch.uint8, device=latents.device)
    most, group = call_size(decoder, (height, width))
    for first in range(0, len(states), group):
        own = slice(first, first + group)
        at = done = 0
        while at < latents.shape[2]:
            count = 1 if decoded + at == 0 else min(most, latents.shape[2] - at)
            pixels = decoder.pixels(states[own], latents[own, :, at : at + count])
            frames[own, done : done + pixels.shape[2]] = to_bytes(pixels).transpose(1, 2)
            at, done = at + count, done + pixels.shape[2]
    return frames


def call_size(decoder: StreamDecoder, size: tuple[int, int]) -> tuple[int, int]:
    """(latent frames, videos) of `size` (H, W) that go through the network together, at least one of each."""
    latents = decoder.latents_per_call
    while latents > 1 and not decoder.videos_per_call(latents, size):
        latents -= 1
    return latents, max(1, decoder.videos_per_call(latents, size))


def to_bytes(pixels: Tensor) -> Tensor:
    """[-1, 1] to uint8."""
    return ((pixels.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


class HostFrames:
    """Frames on their way to the host.

    uint8 `shape`, on the host in pinned memory if they come from a GPU. `put` only queues a copy; `wait` is the one
    place that waits for the device.
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


@torch.no_grad()
def decode_forked(decoder: StreamDecoder, latents: Tensor, fork_frames: Sequence[int]) -> HostFrames:
    """Frames of P plans x N continuations, [P, N, T, 3, 8H, 8W]; what continuations share is decoded once.

    latents [P, N, C, F, H, W], in which the continuations of plan p agree on frames [0, fork_frames[p]). Each plan's
    context is decoded, its state forked, and the continuations go on, as many at a time as fit; no more states are
    alive than that.
    """
    plans, count, _, total, height, width = latents.shape
    shape = (plans, count, pixel_frames(total), 3, 8 * height, 8 * width)
    host = HostFrames(shape, latents.device)
    step, group = call_size(decoder, (height, width))
    for p, fork in enumerate(fork_frames):
        assert 0 <= fork <= total, (fork, total)
        root = DecoderState()
        for start in range(0, fork, step):
            end = min(start + step, fork)
            frames = decode_chunk(decoder, [root], latents[p, :1, :, start:end])
            for n in range(count):
                host.put((p, n, slice(pixel_frames(start), pixel_frames(end))), frames[0])
        for first in range(0, count, group):
            branches = range(first, min(first + group, count))
            states = root.fork(len(branches))
            for start in range(fork, total, step):
                end = min(start + step, total)
                frames = decode_chunk(decoder, states, latents[p, first : branches.stop, :, start:end])
                for n, own in zip(branches, frames, strict=True):
                    host.put((p, n, slice(pixel_frames(start), pixel_frames(end))), own)
    return host


@torch.no_grad()
def decode_whole(decoder: StreamDecoder, latents: Tensor) -> Tensor:
    """Videos of their own: latents [B, C, F, H, W] to uint8 [B, T, 3, 8H, 8W] on the latents' device."""
    group = call_size(decoder, (latents.shape[3], latents.shape[4]))[1]
    return torch.cat([decode_chunk(decoder, [DecoderState() for _ in own], own) for own in latents.split(group)])


class Arriving(Protocol):
    """Frames that a device may still be working on."""

    def wait(self) -> Tensor:
        """All of them."""
        ...


@dataclass(frozen=True)
class Arrived:
    """Frames that are there."""

    frames: Tensor

    def wait(self) -> Tensor:
        return self.frames


class Codec(Protocol):
    """Frames are uint8 [B, T, 3, height, width], `fps` of them a second; latents fp32 [B, C, F, H, W]."""

    latent_channels: int
    fps: float

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) of the latents of a height x width video."""
        ...

    def pixel_frames(self, latent_frames: int) -> int:
        """Pixel frames of the first `latent_frames` latent frames of a video."""
        ...

    def encode(self, frames: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def decode_forked(self, latents: Tensor, fork_frames: Sequence[int]) -> Arriving:
        """Frames [P, N, T, 3, height, width] of latents [P, N, C, F, H, W]: N continuations of P plans.

        The continuations of plan p agree on latent frames [0, fork_frames[p]), which need decoding once only.
        """
        ...

    def start(self) -> DecoderState:
        """The state of a video that `decode_chunk` has not seen yet."""
        ...

    def decode_chunk(self, states: Sequence[DecoderState], latents: Tensor) -> Tensor:
        """The next frames of B videos, from their next latents; the states move on."""
        ...


class PixelCodec:
    """Latents are the pixels themselves, scaled to [-1, 1]; one latent frame is one pixel frame."""

    latent_channels = 3
    fps = 8.0

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        return height, width

    def pixel_frames(self, latent_frames: int) -> int:
        return latent_frames

    def encode(self, frames: Tensor) -> Tensor:
        return (frames.float() / 127.5 - 1.0).transpose(1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        pixels = (latents.transpose(1, 2).float() + 1.0) * 127.5
        return pixels.round().clamp(0, 255).to(torch.uint8)

    def decode_forked(self, latents: Tensor, fork_frames: Sequence[int]) -> Arrived:
        return Arrived(self.decode(latents.flatten(0, 1)).unflatten(0, latents.shape[:2]))

    def start(self) -> DecoderState:
        return DecoderState()

    def decode_chunk(self, states: Sequence[DecoderState], latents: Tensor) -> Tensor:
        for state in states:
            state.latents += latents.shape[2]
        return self.decode(latents)
