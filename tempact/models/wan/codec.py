"""Pixels to latents and back, behind the interface that the Wan VAE will implement too."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Codec(Protocol):
    """Frames are uint8 [B, T, 3, height, width]; latents fp32 [B, C, F, H, W]."""

    latent_channels: int

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) of the latents of a height x width video."""
        ...

    def encode(self, frames: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class PixelCodec:
    """Latents are the pixels themselves, scaled to [-1, 1]; one latent frame is one pixel frame."""

    latent_channels = 3

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        return height, width

    def encode(self, frames: Tensor) -> Tensor:
        return (frames.float() / 127.5 - 1.0).transpose(1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        pixels = (latents.transpose(1, 2).float() + 1.0) * 127.5
        return pixels.round().clamp(0, 255).to(torch.uint8)
