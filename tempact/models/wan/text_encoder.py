"""Prompts to the text rows that the transformer cross-attends to: a UMT5 encoder and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel


class PromptEncoder(Protocol):
    """What the executor needs of a text encoder."""

    def encode(self, prompts: list[str]) -> Tensor:
        """[n, text_len, d_model], zero past each prompt's end."""
        ...

    def requires_grad_(self, requires_grad: bool = True) -> Self: ...


class TextEncoder(nn.Module):
    """UMT5 encoder; rows past a prompt's end are exactly zero, as the transformer expects."""

    def __init__(self, model: UMT5EncoderModel, tokenizer: PreTrainedTokenizerFast, text_len: int):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.text_len = text_len

    @classmethod
    def from_config(cls, config: UMT5Config, tokenizer: PreTrainedTokenizerFast, text_len: int) -> TextEncoder:
        return cls(UMT5EncoderModel(config), tokenizer, text_len)

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """ids [n, text_len] int64 and mask [n, text_len] bool; every prompt ends with EOS, also when cut."""
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        ids = torch.full((len(prompts), self.text_len), pad)
        encoded = self.tokenizer(prompts, add_special_tokens=False)["input_ids"] if prompts else []
        for row, tokens in zip(ids, encoded, strict=True):
            tokens = [*tokens[: self.text_len - 1], eos]
            row[: len(tokens)] = torch.tensor(tokens)
        # EOS closes every row and pad differs from it, so the mask follows from the ids
        return ids, ids != pad

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[n, text_len, d_model], zero past each prompt's end."""
        hidden = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return hidden * mask[..., None].to(hidden.dtype)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        ids, mask = self.tokenize(prompts)
        device = self.model.device
        return self(ids.to(device), mask.to(device))

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def load(cls, folder: Path, text_len: int) -> TextEncoder:
        model = UMT5EncoderModel.from_pretrained(folder, local_files_only=True)
        return cls(model, PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True), text_len)
