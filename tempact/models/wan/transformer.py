"""The causal Wan2.1 diffusion transformer.

Module and parameter names, shapes and arithmetic are those of the published checkpoints (825 tensors
at full size). One class serves every backbone: what a chunk attends to is the caller's `Attend`.
Arithmetic: the residual stream, norms and gates stay in the dtype of the weights; RoPE angles are
computed in fp64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csrc_triton import fork_attention

TIMESTEP_SCALE = 1000.0  # the time embedding sees 1000 * sigma
ROPE_THETA = 10_000.0

# attend(layer, q, k, v, raw_k) -> attention output; q, k with RoPE, raw_k without, all [B, L, heads, head_dim]
Attend = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class WanConfig:
    """Sizes; the defaults are Wan2.1-T2V-1.3B.

    prediction: what the head's output means. "velocity" for published checkpoints; "x0" for small
    models trained from nothing, where v = (x - x0) / sigma is formed after the head.
    """

    dim: int = 1536
    ffn_dim: int = 8960
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    heads: int = 12
    layers: int = 30
    in_dim: int = 16
    out_dim: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    prediction: str = "velocity"

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


@dataclass
class TextKV:
    """Cross-attention keys and values of n texts, per layer [n, text_len, heads, head_dim]."""

    layers: list[tuple[Tensor, Tensor]]

    def select(self, index: Tensor) -> TextKV:
        """The texts `index` [B] int64, one a batch row."""
        # index_select: the backward of plain indexing sorts the index, which takes longer than attention
        return TextKV([(k.index_select(0, index), v.index_select(0, index)) for k, v in self.layers])


def attend_own(layer: int, q: Tensor, k: Tensor, v: Tensor, raw_k: Tensor) -> Tensor:
    """Full attention within the given frames and to nothing else."""
    return fork_attention(q, k, v)


class RMSNorm(nn.Module):
    """Root-mean-square norm over all channels, fp32 inside."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class SelfAttention(nn.Module):
    """Projections and norms; who attends to whom is decided by `Attend`."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(config.dim, config.eps), RMSNorm(config.dim, config.eps)

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """K without RoPE, and V, [B, L, heads, head_dim]."""
        return self.norm_k(self.k(x)).unflatten(-1, (self.heads, -1)), self.v(x).unflatten(-1, (self.heads, -1))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, layer: int) -> Tensor:
        q = self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))
        k, v = self.keys(x)
        return self.o(attend(layer, apply_rope(q, rope), apply_rope(k, rope), v, k).flatten(2))


class CrossAttention(SelfAttention):
    """Attention to text; every padded text row is attended too, as in Wan."""

    def forward(self, x: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        k, v = text
        groups = k.shape[0] // x.shape[0]  # texts a video: consecutive equal parts of its tokens
        q = self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1)).unflatten(1, (groups, -1)).flatten(0, 1)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o(out.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """Self-attention, cross-attention, FFN; six modulation vectors a latent frame."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.norm2 = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        gelu = nn.GELU(approximate="tanh")
        self.ffn = nn.Sequential(nn.Linear(config.dim, config.ffn_dim), gelu, nn.Linear(config.ffn_dim, config.dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)

    def forward(
        self,
        x: Tensor,
        e0: Tensor,
        rope: tuple[Tensor, Tensor],
        text: tuple[Tensor, Tensor],
        attend: Attend,
        layer: int,
    ) -> Tensor:
        m = (self.modulation + e0).unbind(2)
        x = x + gate(self.self_attn(modulate(self.norm1(x), m[0], m[1]), rope, attend, layer), m[2])
        x = x + self.cross_attn(self.norm3(x), text)
        return x + gate(self.ffn(modulate(self.norm2(x), m[3], m[4])), m[5])

    def write_keys(self, x: Tensor, e0: Tensor) -> tuple[Tensor, Tensor]:
        """K without RoPE and V of this block's self-attention, and nothing after them."""
        m = (self.modulation + e0).unbind(2)
        return self.self_attn.keys(modulate(self.norm1(x), m[0], m[1]))


class Head(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, config.out_dim * config.patch[0] * config.patch[1] * config.patch[2])
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.modulation + e[:, :, None]).unbind(2)
        return self.head(modulate(self.norm(x), shift, scale))


class WanTransformer(nn.Module):
    """velocity = model(x, sigma, text, positions, attend); see `forward`."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch, config.patch)
        gelu = nn.GELU(approximate="tanh")
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), gelu, nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        # to type checkers a ModuleList holds any modules
        self.blocks = cast(Sequence[Block], nn.ModuleList(Block(config) for _ in range(config.layers)))
        self.head = Head(config)

    def initialise(self) -> None:
        """Wan's start for training from nothing: Xavier linears, zero biases, zero head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for linear in (*self.text_embedding, *self.time_embedding):
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    def project_text(self, text: Tensor) -> TextKV:
        """Cross-attention K and V of n texts; text [n, text_len, text_dim], zero past each text's end."""
        hidden = self.text_embedding(text)
        return TextKV([block.cross_attn.keys(hidden) for block in self.blocks])

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        text: TextKV,
        positions: Tensor,
        attend: Attend = attend_own,
    ) -> Tensor:
        """Velocity of the given frames.

        x [B, C, F, H, W] latents; sigma [B, F] noise level of each frame in [0, 1]; text of B*G texts, G
        dividing F (frames fall into G consecutive parts with a text each); positions [F] temporal RoPE
        positions. Returns [B, C, F, H, W] with v = noise - x0.
        """
        tokens, e, e0, rope = self._embed(x, sigma, positions)
        for layer, block in enumerate(self.blocks):
            tokens = block(tokens, e0, rope, text.layers[layer], attend, layer)
        out = self._unpatchify(self.head(tokens, e), x.shape)
        if self.config.prediction == "velocity":
            return out
        return (x - out) / sigma[:, None, :, None, None].clamp_min(1.0 / TIMESTEP_SCALE)

    def write_context(
        self, x: Tensor, sigma: Tensor, text: TextKV, positions: Tensor, attend: Attend, write: Attend
    ) -> None:
        """The context pass: as `forward`, but stops at the last layer's K and V, which nothing follows.

        `attend` serves all layers but the last and also stores K and V; `write` only stores the last ones.
        """
        tokens, _, e0, rope = self._embed(x, sigma, positions)
        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks[:last]):
            tokens = block(tokens, e0, rope, text.layers[layer], attend, layer)
        k, v = self.blocks[last].write_keys(tokens, e0)
        roped = apply_rope(k, rope)
        write(last, roped, roped, v, k)

    def rope(self, positions: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """cos and sin [F * rows * columns, 1, head_dim / 2] for frames at temporal `positions` [F]."""
        return rope_tables(self.config.head_dim, positions, rows, columns)

    def _embed(
        self, x: Tensor, sigma: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        patches = self.patch_embedding(x)
        half = self.config.freq_dim // 2
        powers = torch.arange(half, device=x.device, dtype=torch.float64)
        rates = torch.exp(powers * -(torch.log(torch.tensor(1e4)) / half))
        angles = (sigma.double() * TIMESTEP_SCALE)[..., None] * rates
        e = self.time_embedding(torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype))
        e0 = self.time_projection(e).unflatten(-1, (6, -1))
        rope = self.rope(positions, patches.shape[3], patches.shape[4])
        return patches.flatten(2).transpose(1, 2), e, e0, rope

    def _unpatchify(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        batch, _, frames, height, width = shape
        pt, ph, pw = self.config.patch
        grid = tokens.reshape(batch, frames // pt, height // ph, width // pw, pt, ph, pw, self.config.out_dim)
        return grid.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(batch, self.config.out_dim, frames, height, width)


def rope_tables(head_dim: int, positions: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """3-D RoPE: channels split into time, row and column parts (44 + 42 + 42 at head_dim 128).

    positions [F] int64. Returns fp32 cos and sin [F * rows * columns, 1, head_dim / 2]; angles in fp64.
    """
    side = 2 * (head_dim // 6)
    device = positions.device
    parts = []
    axes = (positions, torch.arange(rows, device=device), torch.arange(columns, device=device))
    for axis, (index, dims) in enumerate(zip(axes, (head_dim - 2 * side, side, side), strict=True)):
        rates = ROPE_THETA ** -(torch.arange(0, dims, 2, device=device, dtype=torch.float64) / dims)
        shape = [1, 1, 1, dims // 2]
        shape[axis] = len(index)
        angles = (index.double()[:, None] * rates).view(shape)
        parts.append(angles.expand(len(positions), rows, columns, -1))
    angles = torch.cat(parts, dim=-1).flatten(0, 2)[:, None]
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates adjacent channel pairs of x [B, L, heads, head_dim], in fp32."""
    cos, sin = rope
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift; x [B, F * tokens, dim], shift and scale [B, F, dim] of each frame."""
    frames = x.unflatten(1, (shift.shape[1], -1))
    return (frames * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)


def gate(x: Tensor, factor: Tensor) -> Tensor:
    """x times its frame's gate [B, F, dim]."""
    return (x.unflatten(1, (factor.shape[1], -1)) * factor[:, :, None]).flatten(1, 2)
