"""Files of Wan2.1's VAE and of the tiny decoders, and the codec that they give the executor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor

from tempact.errors import UserError
from tempact.models.wan.checkpoints.files import assign_weights, read_json, read_tensors
from tempact.models.wan.codec import WanCodec
from tempact.models.wan.tiny_decoder import load_tiny_decoder
from tempact.models.wan.vae_decoder import WanDecoder

ORIGINAL_FILE = "Wan2.1_VAE.pth"  # in the folder of Wan's own release
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"


def load_codec(path: Path, dtype: torch.dtype, device: torch.device, decoder: Path | None = None) -> WanCodec:
    """The decoder of the VAE at `path`, or the tiny decoder in the file `decoder`, for which no VAE is read."""
    if decoder is not None:
        return load_tiny_decoder(decoder, dtype, device)
    return WanDecoder(load_vae(path, dtype, device))


def load_vae(path: Path, dtype: torch.dtype, device: torch.device) -> AutoencoderKLWan:
    """Wan2.1's VAE in any published layout (docs/backbones.md sections 4 and 5).

    `path`: a diffusers folder (or the pipeline's, with vae/ in it), the folder of Wan's own release, or a single
    .safetensors or .pth file with Wan's or diffusers' names, of any width. UserError names the keys that do not fit.
    """
    file, config = find_vae(path)
    state = read_tensors([file])[1]
    if "decoder.conv1.weight" in state:
        state = convert_wan_vae_to_diffusers(state)
    settings = _widths(state, file) if config is None else read_json(config)
    kind = settings.get("_class_name")
    if config is not None and kind != AutoencoderKLWan.__name__:
        raise UserError(f"{config}: found _class_name {kind!r}; accepted: {AutoencoderKLWan.__name__}")
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(settings)
    assign_weights(vae, state, file, dtype, device)
    return vae.eval().requires_grad_(False)


def find_vae(path: Path) -> tuple[Path, Path | None]:
    """Weights and config.json of the VAE at `path`, see `load_vae`; no config beside Wan's own weights."""
    folder = path / "vae" if (path / "vae").is_dir() else path
    if (folder / "config.json").is_file() and (folder / DIFFUSERS_FILE).is_file():
        return folder / DIFFUSERS_FILE, folder / "config.json"
    if path.is_dir() and not (path / ORIGINAL_FILE).is_file():
        accepted = f"config.json with {DIFFUSERS_FILE}, here or in vae/, or {ORIGINAL_FILE}"
        raise UserError(f"{path}: found no VAE in this folder; accepted: {accepted}")
    return path / ORIGINAL_FILE if path.is_dir() else path, None


def _widths(state: dict[str, Tensor], source: Path) -> dict[str, Any]:
    """Settings of a VAE without a config.json: widths from its tensors, everything else as in Wan2.1's."""
    try:
        encoder, decoder = state["encoder.conv_in.weight"], state["decoder.conv_out.weight"]
    except KeyError as error:
        raise UserError(f"{source}: found no {error}; accepted: the weights of Wan2.1's VAE") from error
    return {"base_dim": encoder.shape[0], "decoder_base_dim": decoder.shape[1]}
