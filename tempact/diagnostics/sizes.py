"""Sizes of the models beside the executor's transformer, from config files or as published; no weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, CLIPConfig, CLIPModel, PretrainedConfig, Qwen3Config, UMT5Config, UMT5EncoderModel

from tempact.config import PlannerConfig
from tempact.diagnostics.footprints import PlannerSizes, Sizes
from tempact.diagnostics.trace import FAKE, fake, on_meta, traced
from tempact.errors import UserError
from tempact.models.wan.codec import DecoderState, pixel_frames
from tempact.worlds import VAE_STRIDE, local_folder

# what a planner is told, in Qwen3's tokens (docs/algorithm.md 4.2 counts a prompt of that size)
INSTRUCTION_TOKENS = 900
UMT5_XXL = UMT5Config(
    vocab_size=256_384, d_model=4096, d_kv=64, d_ff=10_240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu",
    is_encoder_decoder=False, use_cache=False,
)  # fmt: skip
PICKSCORE = CLIPConfig(  # CLIP-ViT-H-14
    text_config={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    vision_config={
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
        "patch_size": 14,
    },
    projection_dim=1024,
)  # fmt: skip


def qwen3(width: int, inner: int, layers: int, heads: int, tied: bool) -> Qwen3Config:
    """A Qwen3 of these sizes."""
    return Qwen3Config(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=128, vocab_size=151_936, tie_word_embeddings=tied,
    )  # fmt: skip


PLANNERS = {  # published ones, for a plan before their weights are there
    "Qwen/Qwen3-1.7B": qwen3(2048, 6144, 28, 16, True),
    "Qwen/Qwen3-4B": qwen3(2560, 9728, 36, 32, True),
    "Qwen/Qwen3-8B": qwen3(4096, 12288, 36, 32, False),
}


def planner_sizes(settings: PlannerConfig) -> PlannerSizes | None:
    """What the planner holds; None for a model whose config is not at hand and which is not one of PLANNERS."""
    folder = local_folder(settings.weights)
    model: PretrainedConfig | None = PLANNERS.get(settings.weights)
    if folder is not None:
        try:
            model = AutoConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: not readable ({str(error).splitlines()[0]}); accepted: a causal LM") from error
    return model and PlannerSizes.of(model, settings, INSTRUCTION_TOKENS + settings.max_new_tokens)


def text_encoder_bytes(folder: Path | None, dtype: torch.dtype) -> int:
    """Weights of the UMT5 encoder with that folder's config.json, else of the published one; None: no encoder."""
    if folder is None:
        return 0
    there = (folder / "config.json").is_file()
    return _bytes(UMT5EncoderModel, UMT5Config.from_pretrained(folder) if there else UMT5_XXL, dtype)


def scorer_bytes(weights: str, *, on_gpu: bool) -> int:
    """Weights of the CLIP model behind the aesthetics reward: fp16 on a GPU, fp32 elsewhere."""
    folder = local_folder(weights)
    sizes = CLIPConfig.from_pretrained(folder) if folder else PICKSCORE
    return _bytes(CLIPModel, sizes, torch.float16 if on_gpu else torch.float32)


def _bytes(kind: Any, sizes: PretrainedConfig, dtype: torch.dtype) -> int:
    with on_meta():
        return _numbers(kind(sizes)) * dtype.itemsize


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class Decoder:
    """Bytes and operations of Wan's VAE decoder, traced.

    weights: bytes of the whole VAE. state: bytes of one video that has two latent frames or more. videos, latents: how
    many of each may go through the network together. call: bytes of such a call for each video beside its state.
    flops_first, flops_later: operations of the first latent frame and of each later one.
    """

    def __init__(self, sizes: Sizes, settings: dict[str, Any], *, on_gpu: bool):
        """settings: of diffusers' AutoencoderKLWan."""
        from diffusers import AutoencoderKLWan

        from tempact.models.wan.vae_decoder import DecodeOptions, WanDecoder

        with on_meta():
            vae = nn.Module.to(AutoencoderKLWan.from_config(settings), sizes.dtype)
        self.weights = _numbers(vae) * sizes.dtype.itemsize
        options = DecodeOptions.of(torch.device("cuda" if on_gpu else "cpu"))
        with traced(kernels=on_gpu) as trace, torch.no_grad():
            fake(vae)
            decoder = WanDecoder(vae, options)
            self.latents, self.videos = decoder.call_size(sizes.latent)
            states = [DecoderState()]

            def decode(count: int) -> tuple[int, int]:
                """Bytes and operations of the next latent frames."""
                latents = torch.empty(1, vae.config.z_dim, count, *sizes.latent, device=FAKE)
                before = trace.restart()
                decoder.pixels(states, latents)
                return trace.peak - before, trace.flops

            _, self.flops_first = decode(1)
            self.flops_later = decode(self.latents)[1] // self.latents
            self.state = states[0].elements * sizes.dtype.itemsize
            self.call = decode(self.latents)[0]

    def flops(self, frames: int) -> int:
        """Of one video of so many latent frames from its beginning."""
        return self.flops_first + (frames - 1) * self.flops_later if frames else 0


def video_bytes(latent: tuple[int, int], frames: int, decoder: Decoder | None) -> int:
    """uint8 frames of one video of `frames` latent frames; without a decoder, latents (H, W) are pixels."""
    side, count = (1, frames) if decoder is None else (VAE_STRIDE, pixel_frames(frames))
    return 3 * count * side * latent[0] * side * latent[1]
