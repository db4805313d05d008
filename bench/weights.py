"""Random weights of all models of a `self-forcing` run, in published layouts: `python -m bench.weights FOLDER`.

    planner/    Qwen3-1.7B, bf16 in two shards, with a tokenizer of 151,650 tokens     3.2 GiB
    executor/   Wan2.1-T2V-1.3B's transformer, fp32                                    5.3 GiB
    release/    its VAE, fp32, and UMT5-XXL's encoder, bf16 in shards                 11.1 GiB
    scorer/     PickScore's CLIP-H, fp32                                               3.7 GiB

They are drawn on the GPU where there is one. The planner names an end token that its model does not have, so that all
of its answers have the full length. --tiny: the same layouts with small widths, for a CPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from models import synthesise
from rewards.tiny_clip import PIECES, SIDE, random_clip
from rewards.tiny_server import make_tokenizer
from tokenizers import Tokenizer, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from bench import stories
from tempact.diagnostics.sizes import PICKSCORE, PLANNERS, UMT5_XXL
from tempact.models.wan.transformer import WanConfig
from tempact.planner.plans import plan_messages
from tempact.shapeworld.pretraining import fit_bpe

DONE = "weights.json"  # written last: which sizes the folder has
MERGES = 4000  # words and parts of words that the tokenizer learns from the stories
SMALL_LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_HEADS = {"num_key_value_heads": 1, "head_dim": 16}


@dataclass(frozen=True)
class Sizes:
    """Sizes of all models. tokens: entries of the planner's tokenizer, special ones not counted; 0: as few as it can
    do with. text, clip: settings of UMT5's encoder, and of CLIP's two models with the width of its embeddings."""

    wan: WanConfig
    planner: dict[str, Any]
    tokens: int
    text: dict[str, Any]
    vae_width: int
    clip: tuple[dict[str, Any], dict[str, Any], int]
    dtype: torch.dtype  # of planner and text encoder


REAL = Sizes(
    wan=WanConfig(),
    planner=PLANNERS["Qwen/Qwen3-1.7B"].to_diff_dict(),
    tokens=151_643,
    text=UMT5_XXL.to_diff_dict(),
    vae_width=96,
    clip=(PICKSCORE.text_config.to_diff_dict(), PICKSCORE.vision_config.to_diff_dict(), PICKSCORE.projection_dim),
    dtype=torch.bfloat16,
)
TINY_WAN = WanConfig(dim=48, ffn_dim=64, freq_dim=16, text_dim=16, text_len=512, heads=2, layers=2)
TINY = Sizes(
    wan=TINY_WAN,
    planner=SMALL_LAYERS | SMALL_HEADS | {"num_hidden_layers": 4, "vocab_size": 3072, "tie_word_embeddings": True},
    tokens=0,
    text=synthesise.SMALL_UMT5 | {"d_model": TINY_WAN.text_dim, "vocab_size": 128},
    vae_width=8,
    clip=(
        SMALL_LAYERS | {"max_position_embeddings": 77, "vocab_size": len(PIECES)},
        SMALL_LAYERS | {"image_size": SIDE, "patch_size": 8},
        16,
    ),
    dtype=torch.float32,
)


def planner(folder: Path, sizes: Sizes, device: str) -> None:
    tokenizer = chat_tokenizer(sizes.tokens)
    with torch.device(device):
        model = Qwen3ForCausalLM(Qwen3Config(**sizes.planner)).to(sizes.dtype)
    assert len(tokenizer) <= model.config.vocab_size, len(tokenizer)
    model.generation_config = GenerationConfig(eos_token_id=model.config.vocab_size)
    model.save_pretrained(folder, max_shard_size="2GB")
    tokenizer.save_pretrained(folder)


def chat_tokenizer(tokens: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE fitted to what a planner is told here, filled up to `tokens` entries that no text contains, and
    the special tokens of a chat behind them."""
    told = [message["content"] for message in plan_messages(stories.instruction(0), 30, 3)]
    texts = [*told, *(stories.instruction(story) for story in range(200))]
    fitted = fit_bpe(texts, pre_tokenizers.ByteLevel(add_prefix_space=False), MERGES, [])
    state = json.loads(fitted.to_str())
    known = state["model"]["vocab"]
    for letters in product(ascii_lowercase, repeat=4):
        if len(known) >= tokens:
            break
        known.setdefault("".join(letters), len(known))
    return make_tokenizer(Tokenizer.from_str(json.dumps(state)))


def executor(folder: Path, sizes: Sizes, device: str) -> None:
    synthesise.wan_folder(folder, synthesise.random_state(sizes.wan, device=device), sizes.wan)


def release(folder: Path, sizes: Sizes, device: str) -> None:
    synthesise.release_folder(
        folder, sizes.text, sizes.vae_width, stories.words(), device=device, dtype=sizes.dtype, shard="5GB"
    )


def scorer(folder: Path, sizes: Sizes, device: str) -> None:
    with torch.device(device):
        model, processor = random_clip(*sizes.clip)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


PARTS: tuple[Callable[[Path, Sizes, str], None], ...] = (planner, executor, release, scorer)


def write(folder: Path, *, tiny: bool) -> None:
    """Writes all parts, unless the folder has them; a line for each."""
    done = {"tiny": tiny}
    if (folder / DONE).is_file() and json.loads((folder / DONE).read_text()) == done:
        return
    shutil.rmtree(folder, ignore_errors=True)
    if tiny or not torch.cuda.is_available():
        for part in PARTS:
            written(part, folder, tiny, "cpu")
    else:  # a process each: most of the time is one processor's, which copies
        with ProcessPoolExecutor(len(PARTS), multiprocessing.get_context("spawn")) as pool:
            for future in [pool.submit(written, part, folder, tiny, "cuda") for part in PARTS]:
                future.result()
    (folder / DONE).write_text(json.dumps(done))


def written(part: Callable[[Path, Sizes, str], None], folder: Path, tiny: bool, device: str) -> None:
    began, own = time.monotonic(), folder / part.__name__
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    part(own, TINY if tiny else REAL, device)
    gib = sum(file.stat().st_size for file in own.rglob("*") if file.is_file()) / 2**30
    print(f"{own}: {gib:.1f} GiB in {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true", help="small widths")
    arguments = parser.parse_args()
    write(arguments.folder, tiny=arguments.tiny)


if __name__ == "__main__":
    main()
