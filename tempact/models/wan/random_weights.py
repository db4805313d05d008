"""Random weights in place of a checkpoint: everything but the pictures can be seen, measured and tested with them.

"random" and "random-14b" have the sizes of Wan2.1-T2V-1.3B, -14B and their VAE, "random-tiny" small ones for a machine
without a GPU. Videos are noise; a command that shows them has to say so.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from tempact.models.wan.checkpoints.load import set_precision
from tempact.models.wan.codec import WanCodec
from tempact.models.wan.transformer import WAN_14B, WanConfig, WanTransformer

RANDOM = {  # name -> sizes of the transformer, base width of the VAE
    "random": (WanConfig(), 96),
    "random-14b": (WAN_14B, 96),
    "random-tiny": (WanConfig(dim=48, ffn_dim=96, freq_dim=16, text_dim=16, text_len=64, heads=2, layers=2), 8),
}


def random_transformer(name: str, precision: str, device: torch.device) -> WanTransformer:
    """A transformer drawn from torch's global generator."""
    with device:
        return set_precision(WanTransformer(RANDOM[name][0]), precision)


def random_codec(name: str, dtype: torch.dtype, device: torch.device) -> WanCodec:
    """A VAE drawn from torch's global generator."""
    from diffusers import AutoencoderKLWan  # late: of the extra "wan", and sizes are told without it

    from tempact.models.wan.vae_decoder import WanDecoder

    with device:
        vae = AutoencoderKLWan(base_dim=RANDOM[name][1])
    nn.Module.to(vae, dtype)  # diffusers' own warns of modules to be kept in fp32, of which this one names none
    return WanDecoder(vae.eval().requires_grad_(False))


class RandomText(nn.Module):
    """A text encoder whose rows are decided by a prompt's words alone, the same in every process: one row a word."""

    def __init__(self, name: str, device: torch.device):
        super().__init__()
        config = RANDOM[name][0]
        self.text_len, self.text_dim, self.device = config.text_len, config.text_dim, device

    def encode(self, prompts: list[str]) -> Tensor:
        """[n, text_len, text_dim] fp32, zero past each prompt's last word; an empty prompt has one row."""
        rows = torch.zeros(len(prompts), self.text_len, self.text_dim)
        for row, prompt in zip(rows, prompts, strict=True):
            for i, word in enumerate((prompt.split() or [""])[: self.text_len]):
                seed = int.from_bytes(hashlib.sha256(word.encode("utf-8", "surrogatepass")).digest()[:7], "big")
                row[i] = torch.randn(self.text_dim, generator=torch.Generator().manual_seed(seed))
        return rows.to(self.device)

    def unseen(self, prompt: str) -> str:
        return " ".join(prompt.split()[self.text_len :])
