"""A CLIP of two small layers with random weights, its tokenizer of single letters, and its image sizes."""

from __future__ import annotations

import string

import torch
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIDE = 32


def tiny_clip() -> tuple[CLIPModel, CLIPProcessor]:
    letters = string.ascii_lowercase + string.digits + ".,<|>"
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = layers | {
        "vocab_size": len(pieces), "max_position_embeddings": 77, "bos_token_id": len(pieces) - 2,
        "eos_token_id": len(pieces) - 1, "pad_token_id": len(pieces) - 1,
    }  # fmt: skip
    vision = layers | {"image_size": SIDE, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, resample=3)
    return model, CLIPProcessor(image_processor=images, tokenizer=tokenizer)
