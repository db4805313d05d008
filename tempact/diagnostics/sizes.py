"""The sizes of the models that a configuration names, from their config files or as published; no weights are read."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import AutoConfig, CLIPConfig, CLIPModel, PretrainedConfig, UMT5Config, UMT5EncoderModel

from csrc_triton.fork_attention import HEAD_DIMS
from tempact.config import ExecutorConfig, PlannerConfig
from tempact.diagnostics.footprints import Sizes
from tempact.diagnostics.planner_footprint import PUBLISHED, PlannerSizes, measure
from tempact.diagnostics.trace import FAKE, fake, on_meta, traced
from tempact.errors import UserError
from tempact.models.wan.checkpoints.files import PICKLES, find_weights
from tempact.models.wan.checkpoints.names import read_config
from tempact.models.wan.codec import DecoderState, pixel_frames
from tempact.models.wan.transformer import WanConfig
from tempact.shapeworld.story import SIZE
from tempact.worlds import SHAPEWORLD, WEIGHTS, is_random, require_wan_packages

INSTRUCTION_TOKENS = 900  # what a planner is told, in Qwen3's tokens (ALGORITHM.md 4.2 counts a prompt of that size)
VAE_STRIDE = 8  # pixels of a latent's side, of Wan's VAE
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


def shapeworld_folder(part: str, weights: str) -> Path | None:
    """The folder of a part of ShapeWorld, if `weights` name one."""
    folder = WEIGHTS / part if weights == SHAPEWORLD else Path(weights)
    return folder if weights and (folder / "transformer.json").is_file() else None


def executor_sizes(settings: ExecutorConfig, *, kernels: bool) -> Sizes:
    """What the executor's traces need. Where nothing says another size, that of Wan2.1-T2V-1.3B is planned for."""
    own = shapeworld_folder("executor", settings.weights)
    if own is not None:
        read = json.loads((own / "transformer.json").read_text())
        model, latent = WanConfig(**{**read, "patch": tuple(read["patch"])}), (SIZE, SIZE)
    else:
        require_wan_packages(settings.weights)
        model = _wan_sizes(settings.weights)
        height, width = settings.video_size
        latent = height // VAE_STRIDE, width // VAE_STRIDE
    return Sizes(model, settings, latent, kernels and model.head_dim in HEAD_DIMS)


def _wan_sizes(weights: str) -> WanConfig:
    if is_random(weights):
        from tempact.models.wan.random_weights import RANDOM

        return RANDOM[weights][0]
    if weights and Path(weights).exists():
        first = find_weights(Path(weights))[0]
        beside = first.with_name("config.json")
        if first.suffix not in PICKLES and beside.is_file():
            return read_config(beside)
    return WanConfig()


def planner_sizes(settings: PlannerConfig) -> PlannerSizes | None:
    """What the planner holds; None for a model whose config is not at hand and which is not one of PUBLISHED."""
    model = planner_config(settings.weights)
    return model and measure(model, settings, INSTRUCTION_TOKENS + settings.max_new_tokens)


def planner_config(weights: str) -> PretrainedConfig | None:
    """The planner's config.json, or that of PUBLISHED."""
    folder = planner_folder(weights)
    if folder is not None:
        try:
            return AutoConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: not readable ({str(error).splitlines()[0]}); accepted: a causal LM") from error
    return PUBLISHED.get(weights)


def planner_folder(weights: str) -> Path | None:
    """Where the planner's files are on this machine: a folder, or the hub's cache."""
    return hub_folder(str(WEIGHTS / "planner") if weights in (SHAPEWORLD, "random") else weights, "config.json")


def hub_folder(name: str, file: str) -> Path | None:
    """The folder with this file that `name` names: a folder, or the hub's cache of a model; None if there is none."""
    folder = Path(name)
    if not (folder / file).is_file():
        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except (OSError, HFValidationError, ValueError):
            return None
    return folder if (folder / file).is_file() else None


@lru_cache(maxsize=8)
def text_encoder_bytes(settings: ExecutorConfig, dtype: torch.dtype) -> int:
    """Weights of the text encoder; random executors have none."""
    own = shapeworld_folder("executor", settings.weights)
    if own is None and is_random(settings.weights):
        return 0
    folder = own or Path(settings.wan_folder or settings.weights)
    file = folder / "text_encoder" / "config.json"
    sizes = UMT5Config.from_pretrained(file.parent, local_files_only=True) if file.is_file() else UMT5_XXL
    with on_meta():
        return numbers(UMT5EncoderModel(sizes)) * dtype.itemsize


@lru_cache(maxsize=8)
def scorer_bytes(weights: str, *, on_gpu: bool) -> int:
    """Weights of the CLIP model behind the aesthetics reward: fp16 on a GPU, fp32 elsewhere."""
    folder = hub_folder(weights, "config.json")
    sizes = PICKSCORE if folder is None else CLIPConfig.from_pretrained(folder, local_files_only=True)
    with on_meta():
        return numbers(CLIPModel(sizes)) * (2 if on_gpu else 4)


def numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class Decoder:
    """Wan's VAE decoder under a configuration, traced: bytes and operations.

    weights: bytes of the whole VAE. state: of one video that has two latent frames or more. videos, latents: how many
    of each may go through the network together. call: bytes of such a call for each video beside its state. flops: of
    the first latent frame and of each later one.
    """

    def __init__(self, sizes: Sizes, *, on_gpu: bool):
        from diffusers import AutoencoderKLWan

        from tempact.models.wan.random_weights import RANDOM
        from tempact.models.wan.vae_decoder import DecodeOptions, WanDecoder

        settings = sizes.settings
        base = RANDOM[settings.weights][1] if is_random(settings.weights) else None
        folder = Path(settings.wan_folder or settings.weights or ".") / "vae"
        with on_meta():
            if base is None and (folder / "config.json").is_file():
                vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(folder))
            else:
                vae = AutoencoderKLWan() if base is None else AutoencoderKLWan(base_dim=base)
            for parameter in vae.parameters():
                parameter.data = parameter.data.to(sizes.dtype)
        self.weights = numbers(vae) * sizes.dtype.itemsize
        options = DecodeOptions.of(torch.device("cuda" if on_gpu else "cpu"))
        with traced(kernels=on_gpu) as trace, torch.no_grad():
            fake(vae)
            decoder = WanDecoder(vae, options)
            self.latents, self.videos = decoder.call_size(sizes.latent)

            def latents(count: int) -> torch.Tensor:
                return torch.empty(1, vae.config.z_dim, count, *sizes.latent, device=FAKE)

            states = [DecoderState()]
            trace.restart()
            decoder.pixels(states, latents(1))
            self.flops_first = trace.flops
            trace.restart()
            decoder.pixels(states, latents(self.latents))
            self.flops_later = trace.flops // self.latents
            self.state = states[0].elements * sizes.dtype.itemsize
            before = trace.live
            trace.restart()
            decoder.pixels(states, latents(self.latents))
            self.call = trace.peak - before

    def flops(self, frames: int) -> int:
        """Of one video from its beginning."""
        return self.flops_first + (frames - 1) * self.flops_later


@lru_cache(maxsize=8)
def decoder_of(sizes: Sizes, on_gpu: bool) -> Decoder:
    return Decoder(sizes, on_gpu=on_gpu)


def video_bytes(sizes: Sizes, frames: int, *, wan: bool) -> int:
    """uint8 frames of one video."""
    side = VAE_STRIDE if wan else 1
    return 3 * (pixel_frames(frames) if wan else frames) * side * sizes.latent[0] * side * sizes.latent[1]
