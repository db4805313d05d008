"""Tiny decoders of Wan2.1's latents: TAEHV's `taew2_1` and LightX2V's `lighttaew2_1`, decoded as streams.

A few percent of the VAE's work, for previews and generated videos. A tiny decoder must not decode videos for rewards
before the rank correlation of such rewards with those of the full decoder has been shown.
Source: docs/backbones.md section 5.

Files of Wan2.1's VAE and of the tiny decoders, and the codec that they give the executor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor, nn

from tempact.errors import UserError
from tempact.models.wan.checkpoints.files import assign_weights, read_json, read_tensors
from tempact.models.wan.codec import LATENT_STRIDE, DecoderState, WanCodec
from tempact.models.wan.vae_decoder import CALL_ELEMENTS, WanDecoder

WIDTHS = (256, 128, 64, 64)  # channels at 1, 2, 4 and 8 times the latents' rows and columns
TIME = (1, 2, 2)  # frames that each of the three enlargements makes of one
MEMORIES = 3  # memory blocks before an enlargement
LATENT_CHANNELS = 16
LATENTS_PER_CALL = 3
# starts of file names, and whether the network takes latents times their deviation plus their mean
KINDS = {"taew2_1": False, "lighttaew2_1": True}


class Squash(nn.Module):
    """Soft clamp to (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Memory(nn.Module):
    """A residual block that also sees the frame before."""

    def __init__(self, width: int):
        super().__init__()
        first, *rest = (nn.Conv2d(width * inputs, width, 3, padding=1) for inputs in (2, 1, 1))
        self.conv = nn.Sequential(first, *(layer for conv in rest for layer in (nn.ReLU(), conv)))

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """x [n, C, H, W] and each frame's predecessor."""
        return F.relu(self.conv(torch.cat([x, past], dim=1)) + x)


class Grow(nn.Module):
    """Every frame becomes `times` frames: [n, C, H, W] to [n*times, C, H, W]."""

    def __init__(self, width: int, times: int):
        super().__init__()
        self.times = times
        self.conv = nn.Conv2d(width, width * times, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).unflatten(1, (self.times, -1)).flatten(0, 1)


class TinyNetwork(nn.Module):
    """The published decoder: names and shapes are the checkpoints', `decoder.0` to `decoder.22`."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [Squash(), nn.Conv2d(LATENT_CHANNELS, WIDTHS[0], 3, padding=1), nn.ReLU()]
        for width, narrower, times in zip(WIDTHS, WIDTHS[1:], TIME, strict=False):
            layers += [Memory(width) for _ in range(MEMORIES)]
            layers += [nn.Upsample(scale_factor=2), Grow(width, times)]
            layers += [nn.Conv2d(width, narrower, 3, padding=1, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(WIDTHS[-1], 3, 3, padding=1))


class TinyDecoder(WanCodec):
    """A tiny decoder as a codec. scaled: the network takes un-normalised latents, as lighttaew2_1's does."""

    def __init__(self, network: TinyNetwork, scaled: bool, latents_per_call: int = LATENTS_PER_CALL):
        self.network, self.scaled, self.latents_per_call = network.requires_grad_(False), scaled, latents_per_call
        for parameter in network.parameters():
            if parameter.device.type == "cuda" and parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
            self.dtype, self.device = parameter.dtype, parameter.device
        with torch.device("meta"):
            config = AutoencoderKLWan(base_dim=4).config  # Wan2.1's statistics are the defaults of diffusers' class
        shape = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(config.latents_mean, device=self.device).view(shape)
        self.std = torch.tensor(config.latents_std, device=self.device).view(shape)

    def videos_per_call(self, latents: int, size: tuple[int, int]) -> int:
        frames = latents * math.prod(TIME)
        return CALL_ELEMENTS // (frames * size[0] * size[1] * 64 * WIDTHS[-1])

    @torch.no_grad()
    def pixels(self, states: Sequence[DecoderState], latents: Tensor) -> Tensor:
        first = states[0].latents == 0
        assert not first or latents.shape[2] == 1, "the first latent frame comes alone"
        x = latents.float() * self.std + self.mean if self.scaled else latents.float()
        b = len(states)
        x = x.to(self.dtype).transpose(1, 2).flatten(0, 1)
        kept: list[Tensor] = []
        for layer in self.network.decoder:
            if isinstance(layer, Memory):
                frames = x.unflatten(0, (b, -1))
                past = cast(list[Tensor], [state.slots[len(kept)] for state in states if state.slots])
                before = torch.stack(past)[:, None] if past else torch.zeros_like(frames[:, :1])
                kept.append(frames[:, -1].clone())
                x = layer(x, torch.cat([before, frames[:, :-1]], dim=1).flatten(0, 1))
            else:
                x = layer(x)
        for i, state in enumerate(states):
            state.slots = [slot[i] for slot in kept]
            state.latents += latents.shape[2]
        out = x.unflatten(0, (b, -1)).transpose(1, 2)
        # three frames come before the video's first one
        out = out[:, :, LATENT_STRIDE - 1 :] if first else out
        return out.clamp(0.0, 1.0) * 2.0 - 1.0


def load_tiny_decoder(path: Path, dtype: torch.dtype, device: torch.device) -> TinyDecoder:
    """The decoder in a taew2_1 or lighttaew2_1 file; an encoder in the file is left alone.

    The start of the file's name says which of the two it is: their tensors have the same names and shapes.

    Raises UserError for another name, and for tensors that are missing, extra or of another shape.
    """
    scaled = next((scaled for kind, scaled in KINDS.items() if path.name.lower().startswith(kind)), None)
    if scaled is None:
        raise UserError(f"executor.decoder: found {path}; accepted: a file whose name starts with {', '.join(KINDS)}")
    state = {name: tensor for name, tensor in read_tensors([path])[1].items() if not name.startswith("encoder.")}
    with torch.device("meta"):
        network = TinyNetwork()
    for i, layer in enumerate(network.decoder):
        name = f"decoder.{i}.conv.weight"
        if isinstance(layer, Grow) and name in state:
            # files of the family may hold more frames than this network makes; its own are the last ones
            state[name] = state[name][-layer.conv.out_channels :]
    assign_weights(network, state, path, dtype, device)
    return TinyDecoder(network.eval(), scaled)


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
