"""The Wan2.1 VAE as the executor's codec: diffusers' `AutoencoderKLWan`, decoded as a stream."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor

from tempact.errors import UserError
from tempact.models.wan.checkpoints.files import fill, read_weights
from tempact.models.wan.codec import (
    LATENT_STRIDE,
    DecoderState,
    HostFrames,
    StreamDecoder,
    decode_chunk,
    decode_forked,
    decode_whole,
    pixel_frames,
)
from tempact.models.wan.vae_decoder import DecodeOptions, WanDecoder

SPACE_STRIDE = 8  # pixels of a latent's side
ORIGINAL_FILE = "Wan2.1_VAE.pth"  # in the folder of Wan's own release
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
TRANSIENT = ("_class_name", "_diffusers_version", "_name_or_path")  # keys of a config.json that are no settings


class WanCodec:
    """Frames to latents and back; see `Codec` for shapes. `decoder` may be a tiny one; only `encode` needs `vae`."""

    latent_channels = 16
    fps = 16.0

    def __init__(self, vae: AutoencoderKLWan | None, decoder: StreamDecoder | None = None):
        if decoder is None:
            assert vae is not None, "a decoder, or a VAE that has one"
            decoder = WanDecoder(vae)
        self.vae, self.decoder = vae, decoder

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) of the latents of a height x width video; UserError unless both are multiples of 8."""
        if height < 1 or width < 1 or height % SPACE_STRIDE or width % SPACE_STRIDE:
            accepted = f"positive multiples of {SPACE_STRIDE}"
            raise UserError(f"executor.video_size: found {height}x{width}; accepted: {accepted}")
        return height // SPACE_STRIDE, width // SPACE_STRIDE

    def pixel_frames(self, latent_frames: int) -> int:
        """Pixel frames of a video's first `latent_frames` latent frames: 1 + 4 (n - 1)."""
        return pixel_frames(latent_frames)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Means of the posterior, normalised as the transformer has them, fp32 [B, 16, F, H, W].

        frames uint8 [B, 1 + 4 (F - 1), 3, 8H, 8W]; UserError for another count.
        """
        if self.vae is None:
            raise UserError("vae: found a decoder alone; accepted: the full VAE where videos are encoded")
        if frames.shape[1] % LATENT_STRIDE != 1:
            raise UserError(f"video: found {frames.shape[1]} frames; accepted: 1 + {LATENT_STRIDE} n")
        weight, config = self.vae.quant_conv.weight, self.vae.config
        pixels = (frames.to(weight.device).float() / 127.5 - 1.0).transpose(1, 2).to(weight.dtype)
        latents = torch.cat([self.vae.encode(own).latent_dist.mode().float() for own in pixels.split(1)])
        shape = (1, -1, 1, 1, 1)
        mean = torch.tensor(config.latents_mean, device=latents.device).view(shape)
        return (latents - mean) / torch.tensor(config.latents_std, device=latents.device).view(shape)

    def decode(self, latents: Tensor) -> Tensor:
        return decode_whole(self.decoder, latents)

    def decode_forked(self, latents: Tensor, fork_frames: Sequence[int]) -> HostFrames:
        """Frames of P plans x N continuations; see `vae_stream.decode_forked`."""
        return decode_forked(self.decoder, latents, fork_frames)

    def start(self) -> DecoderState:
        """The state of a video that `decode_chunk` has not seen yet."""
        return DecoderState()

    def decode_chunk(self, states: Sequence[DecoderState], latents: Tensor) -> Tensor:
        """The next frames of B videos; see `vae_stream.decode_chunk`."""
        return decode_chunk(self.decoder, states, latents)


def load_codec(path: Path, dtype: torch.dtype, device: torch.device, options: DecodeOptions | None = None) -> WanCodec:
    """The codec of the VAE at `path`; see `load_vae`."""
    vae = load_vae(path, dtype, device)
    return WanCodec(vae, WanDecoder(vae, options))


def load_vae(path: Path, dtype: torch.dtype, device: torch.device) -> AutoencoderKLWan:
    """Wan2.1's VAE in any published layout (BACKBONES.md sections 4 and 5).

    `path`: a diffusers folder (or the pipeline's, with vae/ in it), the folder of Wan's own release, or a single
    .safetensors or .pth file with Wan's or diffusers' names, of any width. UserError names what does not fit.
    """
    folder = path / "vae" if (path / "vae").is_dir() else path
    if (folder / "config.json").is_file() and (folder / DIFFUSERS_FILE).is_file():
        file = folder / DIFFUSERS_FILE
        state, settings = read_weights(file), _settings(folder / "config.json")
    else:
        file = path / ORIGINAL_FILE if path.is_dir() else path
        if path.is_dir() and not file.is_file():
            accepted = f"config.json with {DIFFUSERS_FILE}, or {ORIGINAL_FILE}"
            raise UserError(f"{path}: found no VAE in this folder; accepted: {accepted}")
        state = read_weights(file)
        if "decoder.conv1.weight" in state:
            state = convert_wan_vae_to_diffusers(state)
        settings = _widths(state, file)
    with torch.device("meta"):
        vae = AutoencoderKLWan(**settings)
    fill(vae, state, file, dtype, device)
    return vae.eval().requires_grad_(False)


def _settings(config: Path) -> dict[str, object]:
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config}: found no JSON ({error}); accepted: the VAE's config.json") from error
    name = settings.get("_class_name") if isinstance(settings, dict) else None
    if name != AutoencoderKLWan.__name__:
        raise UserError(f"{config}: found _class_name {name!r}; accepted: {AutoencoderKLWan.__name__}")
    return {key: value for key, value in settings.items() if key not in TRANSIENT}


def _widths(state: dict[str, Tensor], source: Path) -> dict[str, object]:
    """What a file without a config.json says of its sizes; everything else is Wan2.1's."""
    try:
        encoder, decoder = state["encoder.conv_in.weight"], state["decoder.conv_out.weight"]
    except KeyError as error:
        raise UserError(f"{source}: found no {error}; accepted: the weights of Wan2.1's VAE") from error
    return {"base_dim": encoder.shape[0], "decoder_base_dim": decoder.shape[1]}
