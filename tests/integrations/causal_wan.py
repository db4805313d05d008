"""A small causal model with the interface of Self-Forcing's and LongLive's, for the tests of `wan_causal`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, HEAD_DIM, TEXT_DIM, CHANNELS, LAYERS = 2, 32, 12, 4, 3
DIM = HEADS * HEAD_DIM
HEIGHT, WIDTH = 4, 6  # of latents; a patch has 2 x 2
FRAME_TOKENS = HEIGHT * WIDTH // 4
CHUNK = 3
POSITIONS = 32

Cache = list[dict[str, Tensor]]


def complex_table(head_dim: int) -> Tensor:
    """exp(i angle), complex128 [POSITIONS, head_dim / 2]: pairs of time, of height and of width."""
    side = 2 * (head_dim // 6)
    parts = []
    for channels in (head_dim - 2 * side, side, side):
        rates = 1e4 ** -(torch.arange(0, channels, 2).double() / channels)
        angles = torch.arange(POSITIONS).double()[:, None] * rates
        parts.append(torch.polar(torch.ones_like(angles), angles))
    return torch.cat(parts, dim=1)


def turned(x: Tensor, grid: list[int], table: Tensor, start: int) -> Tensor:
    """x [B, L, heads, head_dim] of the frames from `start` on, turned in fp64 and rounded once."""
    frames, height, width = grid
    pairs = x.shape[-1] // 2
    time, rows, columns = table.split([pairs - 2 * (pairs // 3), pairs // 3, pairs // 3], dim=1)
    full = frames, height, width, -1
    angles = torch.cat(
        [
            time[start : start + frames, None, None].expand(full),
            rows[None, :height, None].expand(full),
            columns[None, None, :width].expand(full),
        ],
        dim=-1,
    ).flatten(0, 2)
    numbers = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(numbers * angles[:, None]).flatten(-2).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(DIM)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class SelfAttention(nn.Module):
    def __init__(self, local_attn_size: int, sink_size: int, reports: bool):
        super().__init__()
        self.num_heads, self.head_dim = HEADS, HEAD_DIM
        self.local_attn_size, self.sink_size, self.reports = local_attn_size, sink_size, reports
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(), RMSNorm()

    def forward(
        self, x: Tensor, seq_lens: Tensor, grid_sizes: Tensor, freqs: Tensor, block_mask: Any, kv_cache: Any = None,
        current_start: int = 0, cache_start: int | None = None,
    ) -> Any:  # fmt: skip
        heads = (HEADS, HEAD_DIM)
        q = self.norm_q(self.q(x)).unflatten(-1, heads)
        k = self.norm_k(self.k(x)).unflatten(-1, heads)
        v = self.v(x).unflatten(-1, heads)
        grid = grid_sizes[0].tolist()
        tokens, length = grid[1] * grid[2], x.shape[1]
        q, k = (turned(each, grid, freqs, current_start // tokens) for each in (q, k))
        end = current_start + length
        local_end = int(kv_cache["local_end_index"]) + end - int(kv_cache["global_end_index"])
        size, sink = kv_cache["k"].shape[1], self.sink_size * tokens
        evicted = max(0, local_end - size)
        local_end -= evicted
        past = []
        for pool in (kv_cache["k"], kv_cache["v"]):
            kept = pool[:, : local_end - length + evicted]
            past.append(torch.cat([kept[:, :sink], kept[:, sink + evicted :]], dim=1) if evicted else kept)
        own = [torch.cat([old.clone(), new], dim=1) for old, new in zip(past, (k, v), strict=True)]
        out = F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, *own))).transpose(1, 2)
        update = end, local_end, own
        if self.reports:
            return self.o(out.flatten(2)), update
        store(kv_cache, *update)
        return self.o(out.flatten(2))


def store(cache: dict[str, Tensor], end: int, local_end: int, own: list[Tensor] | None) -> None:
    if own is not None:
        for name, new in zip(("k", "v"), own, strict=True):
            cache[name][:, :local_end] = new.detach()
    cache["global_end_index"].fill_(end)
    cache["local_end_index"].fill_(local_end)


class Block(nn.Module):
    def __init__(self, *attention: Any):
        super().__init__()
        self.self_attn = SelfAttention(*attention)
        self.norm, self.text, self.ffn = nn.LayerNorm(DIM), nn.Linear(TEXT_DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, context: Tensor, shift: Tensor, **attention: Any) -> Any:
        y = self.self_attn(self.norm(x) + shift, block_mask=None, **attention)
        y, update = y if isinstance(y, tuple) else (y, None)
        x = x + y + self.text(context).mean(1, keepdim=True)
        x = x + F.gelu(self.ffn(self.norm(x)))
        return x if update is None else (x, update)


class CausalModel(nn.Module):
    """Velocities [B, C, F, H, W] of latents of that shape; t [B, F], context [B, n, TEXT_DIM]."""

    def __init__(self, local_attn_size: int = -1, sink_size: int = 0):
        super().__init__()
        self.patch_embedding = nn.Conv3d(CHANNELS, DIM, (1, 2, 2), stride=(1, 2, 2))
        self.blocks = nn.ModuleList(Block(local_attn_size, sink_size, self.reports) for _ in range(LAYERS))
        self.head = nn.Linear(DIM, 4 * CHANNELS)
        self.freqs = complex_table(HEAD_DIM)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2)

    reports = False

    def forward(self, x: Tensor, t: Tensor, context: Tensor, kv_cache: Any = None, current_start: int = 0) -> Tensor:
        x = self.patch_embedding(x)
        grid = torch.tensor(x.shape[2:]).expand(x.shape[0], -1)
        x = x.flatten(2).transpose(1, 2)
        shift = (t / 1000).to(x.dtype).repeat_interleave(x.shape[1] // t.shape[1], dim=1)[..., None]
        updates = []
        for block, cache in zip(self.blocks, kv_cache or [None] * LAYERS, strict=True):
            x = block(
                x, context, shift, seq_lens=grid.prod(1), grid_sizes=grid, freqs=self.freqs, kv_cache=cache,
                current_start=current_start, cache_start=None,
            )  # fmt: skip
            if self.reports:
                x, update = x
                updates.append(update)
        if self.reports:
            self._apply_cache_updates(kv_cache, updates)
        frames, rows, columns = grid[0].tolist()
        x = self.head(x).view(x.shape[0], frames, rows, columns, 2, 2, CHANNELS)
        return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(x.shape[0], CHANNELS, frames, 2 * rows, 2 * columns)


class ReportingModel(CausalModel):
    """As LongLive's: attention returns what is to be written, and the model writes it after the last block."""

    reports = True

    def _apply_cache_updates(self, kv_cache: Cache, updates: list[tuple[int, int, Any]]) -> None:
        for cache, update in zip(kv_cache, updates, strict=True):
            store(cache, *update)


def empty_cache(frames: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cache:
    """Caches of `frames` frames as the models' pipelines make them."""
    shape = batch, frames * FRAME_TOKENS, HEADS, HEAD_DIM
    return [
        {"k": torch.zeros(shape, dtype=dtype), "v": torch.zeros(shape, dtype=dtype)}
        | {name: torch.zeros(1, dtype=torch.long) for name in ("global_end_index", "local_end_index")}
        for _ in range(LAYERS)
    ]
