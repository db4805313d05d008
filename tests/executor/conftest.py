"""A tiny executor with random weights, in fp64 where bits are compared."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tempact.config import ExecutorConfig, LoraConfig, OptimConfig
from tempact.executor.executor import Executor
from tempact.models.wan.codec import PixelCodec
from tempact.models.wan.transformer import WanConfig, WanTransformer

TEXT_LEN, TEXT_DIM = 4, 8


class WordEncoder(torch.nn.Module):
    """Every prompt gets rows that depend on it alone."""

    def encode(self, prompts: list[str]) -> torch.Tensor:
        rows = [
            torch.randn(TEXT_LEN, TEXT_DIM, generator=torch.Generator().manual_seed(sum(map(ord, p)))) for p in prompts
        ]
        return torch.stack(rows)


@pytest.fixture
def make_executor() -> Callable[..., Executor]:
    def make(**changes: object) -> Executor:
        torch.manual_seed(0)
        sizes = WanConfig(
            dim=48, ffn_dim=64, freq_dim=16, text_dim=TEXT_DIM, text_len=TEXT_LEN, heads=2, layers=2, in_dim=3,
            out_dim=3, patch=(1, 4, 4),
        )  # fmt: skip
        model = WanTransformer(sizes)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
        settings = {"frames": 18, "continuations": 3, "micro_batch": 64} | changes
        lora = LoraConfig(2, 2, ("self_attn.q", "self_attn.v", "ffn.0"))
        config = ExecutorConfig(weights="", lora=lora, optim=OptimConfig(1e-3), **settings)
        return Executor(model, WordEncoder(), PixelCodec(), config, (8, 8))

    return make
