"""A CLIP with random weights, of two small layers or other sizes, its tokenizer of single letters, its image sizes."""

from __future__ import annotations

import string
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIDE = 32
LETTERS = string.ascii_lowercase + string.digits + ".,<|>"
PIECES = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]


def tiny_clip() -> tuple[CLIPModel, CLIPProcessor]:
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    vision = layers | {"image_size": SIDE, "patch_size": 8}
    return random_clip(layers | {"max_position_embeddings": 77, "vocab_size": len(PIECES)}, vision, 16)


def random_clip(text: dict[str, Any], vision: dict[str, Any], width: int) -> tuple[CLIPModel, CLIPProcessor]:
    """text, vision: settings of the two models; width: of the embeddings."""
    tokenizer = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(PIECES)}, merges=[])
    start, end = len(PIECES) - 2, len(PIECES) - 1
    text = text | {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))
    side = model.config.vision_config.image_size
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}, resample=3)
    return model, CLIPProcessor(image_processor=images, tokenizer=tokenizer)
