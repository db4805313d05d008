"""Pixels to latents and back, behind the interface that the Wan VAE implements too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tempact.models.wan.vae_stream import DecoderState


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
