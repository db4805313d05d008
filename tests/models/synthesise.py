"""Checkpoints of every published layout with random weights, of any size; no file was downloaded to make them.

Names, wrappers and dtypes are those of docs/backbones.md section 4. At full size, for a machine with room:

    PYTHONPATH=.:tests python -m models.synthesise FOLDER     # 24 GB: every layout of Wan2.1-T2V-1.3B
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from tempact.models.wan.transformer import WanConfig, WanTransformer

ATTENTION = [f"{kind}_attn.{name}" for kind in ("self", "cross") for name in "qkvo"]
ALL_LINEARS = [*ATTENTION, "ffn.0", "ffn.2"]
SELF_FORCING_TARGETS = [*ATTENTION[:4], "ffn.0", "ffn.2"]  # of TempAct's adapter on Self-Forcing
CONFIG_JSON = {  # that of Wan's release; sizes are put in
    "_class_name": "WanModel", "_diffusers_version": "0.30.0", "eps": 1e-06, "model_type": "t2v", "text_len": 512,
}  # fmt: skip


def random_state(
    config: WanConfig, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Tensor]:
    """Tensors by Wan name, of such sizes that every one of them shows in the velocity."""
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in WanTransformer(config).state_dict().items()}
    state = {}
    for name, shape in shapes.items():
        fan_in = shape[1:].numel() if len(shape) > 1 and not name.endswith("modulation") else 16
        noise = torch.empty(shape, device=device).normal_(generator=generator) / fan_in**0.5
        scale = name.endswith(".weight") and "norm" in name
        state[name] = (1.0 + noise if scale else noise).to(dtype)
    return state


def wan_folder(folder: Path, state: Mapping[str, Tensor], config: WanConfig, shards: int = 1) -> Path:
    """Wan's own release; sharded as the 14B model's is."""
    folder.mkdir(parents=True)
    sizes = {
        "dim": config.dim, "ffn_dim": config.ffn_dim, "freq_dim": config.freq_dim, "in_dim": config.in_dim,
        "num_heads": config.heads, "num_layers": config.layers, "out_dim": config.out_dim,
    }  # fmt: skip
    if config.text_dim != WanConfig().text_dim:  # the release leaves it out
        sizes |= {"text_dim": config.text_dim, "text_len": config.text_len}
    (folder / "config.json").write_text(json.dumps(CONFIG_JSON | sizes))
    if shards == 1:
        save_file(dict(state), folder / "diffusion_pytorch_model.safetensors")
        return folder
    names = list(state)
    weight_map = {}
    for i in range(shards):
        own, file = names[i::shards], f"diffusion_pytorch_model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: state[name] for name in own}, folder / file)
        weight_map |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def diffusers_model(state: Mapping[str, Tensor], config: WanConfig) -> Any:
    """diffusers' transformer with these weights, which it has renamed itself."""
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    with torch.device("meta"):
        model = WanTransformer3DModel(
            patch_size=config.patch, num_attention_heads=config.heads, attention_head_dim=config.head_dim,
            in_channels=config.in_dim, out_channels=config.out_dim, text_dim=config.text_dim,
            freq_dim=config.freq_dim, ffn_dim=config.ffn_dim, num_layers=config.layers, eps=config.eps,
        )  # fmt: skip
        # not stored, so it must not stay on the meta device
        model.rope = None
    model.load_state_dict(convert_wan_transformer_to_diffusers(dict(state)), assign=True)
    model.rope = type_of_rope()(config.head_dim, config.patch, 1024)
    return model.eval()


def type_of_rope() -> type[nn.Module]:
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    return WanRotaryPosEmbed


def diffusers_folder(folder: Path, state: Mapping[str, Tensor], config: WanConfig, shard: str = "10GB") -> Path:
    """A pipeline's folder with transformer/ in it, written by diffusers; returns the pipeline's folder."""
    diffusers_model(state, config).save_pretrained(folder / "transformer", max_shard_size=shard)
    return folder


def pipeline_folder(folder: Path, state: Mapping[str, Tensor], config: WanConfig) -> Path:
    """A whole pipeline's folder of diffusers: transformer, and VAE, text encoder and tokenizer of small widths."""
    return release_folder(diffusers_folder(folder, state, config), SMALL_UMT5 | {"d_model": config.text_dim}, 8)


SMALL_UMT5 = {"vocab_size": 8, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
WORDS = ("a", "circle", "square")


def release_folder(
    folder: Path, text: Mapping[str, Any], vae_width: int, words: Iterable[str] = WORDS, *,
    device: str = "cpu", dtype: torch.dtype = torch.float32, shard: str = "10GB",
) -> Path:  # fmt: skip
    """VAE, text encoder and tokenizer of a pipeline's folder of diffusers.

    text: settings of UMT5's encoder. words: those that the tokenizer knows. device: where weights are drawn. dtype: of
    the text encoder; the VAE is fp32 as published.
    """
    from diffusers import AutoencoderKLWan
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    with torch.device(device):
        AutoencoderKLWan(base_dim=vae_width).save_pretrained(folder / "vae")
        encoder = UMT5EncoderModel(UMT5Config(**text)).to(dtype)
    encoder.save_pretrained(folder / "text_encoder", max_shard_size=shard)
    known = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")
    return folder


def self_forcing(file: Path, state: Mapping[str, Tensor]) -> Path:
    """self_forcing_dmd.pt: averaged weights whose names the wrapper and FSDP have lengthened."""
    parts = ("model._fsdp_wrapped_module", "_fsdp_wrapped_module")
    wrapped = {}
    for name, tensor in state.items():
        inner = name.split(".")
        if inner[0] == "blocks":
            inner.insert(2, parts[1])
        wrapped[".".join((parts[0], *inner))] = tensor
    torch.save({"generator_ema": wrapped}, file)
    return file


def causal_forcing(file: Path, state: Mapping[str, Tensor]) -> Path:
    """chunkwise/causal_forcing.pt; LongLive's longlive_base.pt is the same."""
    torch.save({"generator": {f"model.{name}": tensor for name, tensor in state.items()}}, file)
    return file


def training_state(file: Path, state: Mapping[str, Tensor], averaged: Mapping[str, Tensor]) -> Path:
    """What a trainer of that family saves, with a critic and a step beside the generators."""
    content = {
        "generator": {f"model.{name}": tensor for name, tensor in state.items()},
        "generator_ema": {f"model.{name}": tensor for name, tensor in averaged.items()},
        "critic": {"model.head.weight": torch.zeros(3)},
        "step": 600,
    }
    torch.save(content, file)
    return file


def lora_pairs(config: WanConfig, targets: Iterable[str], rank: int, seed: int = 1) -> dict[str, Tensor]:
    """LongLive's and PEFT's names; products are as large as the weights, so that a wrong scale shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        blocks = WanTransformer(config).blocks
    pairs = {}
    for i in range(config.layers):
        for target in targets:
            rows, columns = blocks[i].get_submodule(target).weight.shape
            name = f"base_model.model.blocks.{i}.{target}.lora_"
            pairs[f"{name}A.weight"] = torch.empty(rank, columns).normal_(generator=generator) / columns**0.5
            pairs[f"{name}B.weight"] = torch.empty(rows, rank).normal_(generator=generator) / rank**0.5
    return pairs


def longlive_lora(file: Path, config: WanConfig, rank: int, *, raw: bool = False) -> Path:
    """lora.pt: all ten linears of every block, alone or beside a critic's."""
    pairs = lora_pairs(config, ALL_LINEARS, rank)
    critic = {name: torch.zeros_like(tensor) for name, tensor in pairs.items()}
    torch.save(pairs if raw else {"generator_lora": pairs, "critic_lora": critic, "step": 3000}, file)
    return file


def peft_folder(folder: Path, config: WanConfig, targets: Iterable[str], rank: int, **settings: Any) -> Path:
    """TempAct's executors: a folder that PEFT has written, with random matrices."""
    lora = LoraConfig(r=rank, target_modules=list(targets), **{"lora_alpha": rank, **settings})
    with torch.device("meta"):
        model = get_peft_model(WanTransformer(config), lora)
    pairs = {}
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            fan_in = parameter.shape[-1]
            pairs[name] = torch.empty(parameter.shape).normal_(generator=generator) / fan_in**0.5
    model.save_pretrained(folder, state_dict=pairs)
    return folder


def main(folder: Path) -> None:
    config = WanConfig()
    state = random_state(config)
    folder.mkdir(parents=True)
    wan_folder(folder / "Wan2.1-T2V-1.3B", state, config)
    diffusers_folder(folder / "Wan2.1-T2V-1.3B-Diffusers", state, config)
    self_forcing(folder / "self_forcing_dmd.pt", state)
    causal_forcing(folder / "longlive_base.pt", state)
    longlive_lora(folder / "lora.pt", config, 256)
    peft_folder(folder / "tempact-self-forcing", config, SELF_FORCING_TARGETS, 256, init_lora_weights="gaussian")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
