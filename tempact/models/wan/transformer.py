"""The causal Wan2.1 diffusion transformer (docs/backbones.md section 1).

Module and parameter names, shapes and arithmetic are those of the published checkpoints (825 tensors at full size). One
class serves every backbone: the caller's `ChunkAttention` says what a chunk attends to. The residual stream, norms and
gates stay in the dtype of the weights; weights kept in fp32 (`config.EXECUTOR_PRECISIONS`) compute the time MLP and the
gates in fp32. Angles of RoPE and of timesteps are computed in fp64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from csrc_triton import (
    CacheRows,
    Fp8Rows,
    adaln,
    fork_attention,
    gated_residual_adaln,
    gated_residual_norm,
    qk_norm_rope,
    rope_tables,
    runtime,
)
from csrc_triton.fork_attention import HEAD_DIMS as ATTENTION_HEADS
from csrc_triton.qk_norm_rope import HEAD_DIMS as ROPE_HEADS
from tempact.models.wan.fp8 import Fp8Linear
from tempact.models.wan.text_padding import padding_mask

TIMESTEP_SCALE = 1000.0  # the time embedding sees 1000 * sigma
TIMESTEP_PERIOD = 10_000.0
FEW_ROWS = 32  # a CPU's products of fewer rows may round them otherwise: a video alone would differ from one of several

Rope = tuple[Tensor, Tensor]  # cos and sin, fp32 [L, head_dim / 2]


@dataclass(frozen=True)
class WanConfig:
    """Sizes; the defaults are Wan2.1-T2V-1.3B.

    prediction: meaning of the head's output. "velocity" for published checkpoints; "x0" for small models trained from
    nothing, where v = (x - x0) / sigma is formed after the head. text_multiple: texts may come cut to a multiple of so
    many rows (`text_padding`); 0: whole.
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
    text_multiple: int = 0

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    def frame_tokens(self, height: int, width: int) -> int:
        """Tokens of a latent frame of this size."""
        return height // self.patch[1] * (width // self.patch[2])


WAN_14B = WanConfig(dim=5120, ffn_dim=13_824, heads=40, layers=40)  # Wan2.1-T2V-14B


@dataclass
class TextKV:
    """Cross-attention keys and values of n texts, per layer [n, text_len, heads, head_dim]."""

    layers: list[tuple[Tensor, Tensor]]

    def select(self, index: Tensor) -> TextKV:
        """The texts `index` [B] int64, one a batch row."""
        # index_select: the backward of plain indexing sorts the index, which takes longer than attention
        return TextKV([(k.index_select(0, index), v.index_select(0, index)) for k, v in self.layers])

    def row(self, row: int) -> TextKV:
        """One text, without a copy."""
        return TextKV([(k[row : row + 1], v[row : row + 1]) for k, v in self.layers])


class ChunkAttention:
    """Attention of one chunk over its own tokens; subclasses attend to more, and store the chunk's K and V."""

    def rows(self, layer: int) -> CacheRows | None:
        """The cache rows that this layer's K and V are written to; None: they are not stored."""
        return None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output; it, q, k and v are [B, L, heads, head_dim], q and k with RoPE."""
        return fork_attention(q, k, v)


OWN_CHUNK = ChunkAttention()


class Stream(NamedTuple):
    """The residual stream x + update * gate, whose addition is fused with the norm that follows.

    x, update [B, L, dim]; gate [B, F, dim], None for a plain addition; update None: nothing to add.
    """

    x: Tensor
    update: Tensor | None = None
    gate: Tensor | None = None

    def adaln(self, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The sum and its modulated norm; shift and scale [B, F, dim]."""
        if self.update is None:
            return self.x, adaln(self.x, shift, scale, eps=eps)
        return gated_residual_adaln(self.x, self.update.to(self.x.dtype), self.gate, shift, scale, eps=eps)

    def norm(self, layer: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """The sum and its norm with a layer's own weights."""
        assert self.update is not None
        update = self.update.to(self.x.dtype)
        return gated_residual_norm(self.x, update, self.gate, layer.weight, layer.bias, eps=layer.eps)


class RMSNorm(nn.Module):
    """The weight of a root-mean-square norm over all channels; `qk_norm_rope` applies it."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class SelfAttention(nn.Module):
    """Projections and norms of self-attention, which itself is the caller's `ChunkAttention`."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.heads, self.eps = config.heads, config.eps
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(config.dim), RMSNorm(config.dim)

    def split(self, x: Tensor) -> Tensor:
        """[B, L, dim] by heads: [B, L, heads, head_dim]."""
        return x.unflatten(-1, (self.heads, -1))

    def forward(self, x: Tensor, rope: Rope, attend: ChunkAttention, layer: int) -> Tensor:
        rows = self.rows(x)
        q, k, v = self.norm_rope(self.q(rows), rows, rope, attend, layer)
        return self.o(attend(layer, q, k, v).flatten(2))

    def rows(self, x: Tensor) -> Tensor | Fp8Rows:
        """x as q, k and v take it: where they are in float8, rounded once for all three."""
        return self.q.rounded(x) if isinstance(self.q, Fp8Linear) else x

    def norm_rope(
        self, q: Tensor | None, x: Tensor | Fp8Rows, rope: Rope, attend: ChunkAttention, layer: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q and k with RoPE, and v, by heads; k and v are stored in the rows of `attend`. Without q, k replaces it."""
        k, v, rows = self.k(x), self.v(x), attend.rows(layer)
        q_weight, q = (self.norm_k.weight, k) if q is None else (self.norm_q.weight, q)
        kept = {"v": v, "write": rows} if rows is not None else {}
        q, k = qk_norm_rope(q, k, q_weight, self.norm_k.weight, rope, heads=self.heads, eps=self.eps, **kept)
        return q, k, self.split(v)


class CrossAttention(SelfAttention):
    """Attention to text, padded text rows included, as in Wan, also where they are cut off."""

    def __init__(self, config: WanConfig):
        super().__init__(config)
        self.text_len = config.text_len

    def keys(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of text rows, [n, text_len, heads, head_dim]."""
        return self.norm(self.k(text), self.norm_k), self.split(self.v(text))

    def norm(self, x: Tensor, norm: RMSNorm) -> Tensor:
        return qk_norm_rope(x, None, norm.weight, None, None, heads=self.heads, eps=self.eps)[0]

    def forward(self, x: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        k, v = text
        groups = k.shape[0] // x.shape[0]  # texts a video: consecutive equal parts of its tokens
        q = self.norm(self.q(x), self.norm_q).unflatten(1, (groups, -1)).flatten(0, 1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        rows, kind, mask = k.shape[2], k.device.type, None
        if rows < self.text_len:
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else k.dtype
            mask = padding_mask(rows, self.text_len, dtype, k.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(out.transpose(1, 2).reshape(x.shape))


def up_gelu(up: nn.Module, x: Tensor) -> Tensor:
    """gelu(up(x)), tanh approximation.

    Without gradients, where the kernels serve, the GELU comes out of the matrix product's own epilogue: the hidden
    rows are written once.
    """
    if isinstance(up, nn.Linear) and has_epilogue(up.weight):
        rows = x.to(up.weight.dtype).flatten(0, -2)
        out = torch._addmm_activation(up.bias, rows, up.weight.t(), use_gelu=True)
        return out.unflatten(0, x.shape[:-1])
    return F.gelu(up(x), approximate="tanh")


def has_epilogue(weight: Tensor) -> bool:
    """Whether a product with `weight` can end in the GELU: no gradients, half precision, and the kernels serve."""
    low = weight.dtype in (torch.bfloat16, torch.float16)
    if not weight.is_cuda or not low or torch.is_grad_enabled():
        return False
    return runtime.choose("feed_forward", weight.device, torch.float32) != "torch"


class FeedForward(nn.Sequential):
    """Two linears with a GELU between them."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__(nn.Linear(dim, hidden_dim), nn.GELU(approximate="tanh"), nn.Linear(hidden_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        up, _, down = self
        # an adapter may compute both linears, so that the hidden rows need not be kept for the backward
        fused = getattr(down, "feed_forward", None)
        return down(up_gelu(up, x)) if fused is None else fused(up, x)


class Block(nn.Module):
    """Self-attention, cross-attention, FFN; six modulation vectors a latent frame."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.eps = config.eps
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = FeedForward(config.dim, config.ffn_dim)
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)

    def forward(
        self, stream: Stream, e0: Tensor, rope: Rope, text: tuple[Tensor, Tensor], attend: ChunkAttention, layer: int
    ) -> Stream:
        m = (self.modulation + e0).unbind(2)
        x, normed = stream.adaln(m[0], m[1], self.eps)
        x, normed = Stream(x, self.self_attn(normed, rope, attend, layer), m[2]).norm(self.norm3)
        x, normed = Stream(x, self.cross_attn(normed, text)).adaln(m[3], m[4], self.eps)
        return Stream(x, self.ffn(normed), m[5])

    def store(self, stream: Stream, e0: Tensor, rope: Rope, attend: ChunkAttention, layer: int) -> None:
        """Stores this block's K and V where `attend` says, and computes nothing after them."""
        m = (self.modulation + e0).unbind(2)
        rows = self.self_attn.rows(stream.adaln(m[0], m[1], self.eps)[1])
        self.self_attn.norm_rope(None, rows, rope, attend, layer)


class Head(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.dim, config.out_dim * config.patch[0] * config.patch[1] * config.patch[2])
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, stream: Stream, e: Tensor) -> Tensor:
        shift, scale = (self.modulation + e[:, :, None]).unbind(2)
        return self.head(stream.adaln(shift, scale, self.eps)[1])


class WanTransformer(nn.Module):
    """velocity = model(x, sigma, text, positions, attend); see `forward`."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # for a backward, every block keeps its inputs alone and is computed again
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch, config.patch)
        gelu = nn.GELU(approximate="tanh")
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), gelu, nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        # to type checkers a ModuleList holds any modules
        self.blocks = cast(Sequence[Block], nn.ModuleList(Block(config) for _ in range(config.layers)))
        self.head = Head(config)

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; the time MLP and the gates may be kept in fp32 (`config.EXECUTOR_PRECISIONS`)."""
        return self.patch_embedding.weight.dtype

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
        """Cross-attention K and V of n texts; text [n, text_len, text_dim], zero past each text's end, or cut there
        to `text_padding.cut_length` rows."""
        hidden = self.text_embedding(text)
        return TextKV([block.cross_attn.keys(hidden) for block in self.blocks])

    def forward(
        self, x: Tensor, sigma: Tensor, text: TextKV, positions: Tensor, attend: ChunkAttention = OWN_CHUNK
    ) -> Tensor:
        """Velocity of the given frames.

        x [B, C, F, H, W] latents; sigma [B, F] noise level of each frame in [0, 1]; text of B*G texts, G
        dividing F (frames fall into G consecutive parts with a text each); positions [F] temporal RoPE
        positions. Returns [B, C, F, H, W] with v = noise - x0.
        """
        stream, e, e0, rope = self._embed(x, sigma, positions)
        again = self.checkpoint_activations and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            inputs = stream, e0, rope, text.layers[layer], attend, layer
            if again:  # nothing in a block is random
                stream = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                stream = block(*inputs)
        out = self._unpatchify(self.head(stream, e), x.shape)
        if self.config.prediction == "velocity":
            return out
        return (x - out) / sigma[:, None, :, None, None].clamp_min(1.0 / TIMESTEP_SCALE)

    def write_context(self, x: Tensor, sigma: Tensor, text: TextKV, positions: Tensor, attend: ChunkAttention) -> None:
        """The context pass: as `forward`, up to the last layer's K and V."""
        stream, _, e0, rope = self._embed(x, sigma, positions)
        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks[:last]):
            stream = block(stream, e0, rope, text.layers[layer], attend, layer)
        self.blocks[last].store(stream, e0, rope, attend, last)

    def _embed(self, x: Tensor, sigma: Tensor, positions: Tensor) -> tuple[Stream, Tensor, Tensor, Rope]:
        patches = self.patch_embedding(x)
        dtype = next(self.time_embedding.parameters()).dtype
        # as precise as its weights, also where the rest is autocast: gates multiply everything that follows
        with _without_autocast(x.device):
            waves = timestep_waves(sigma.flatten(), self.config.freq_dim).to(dtype)
            if waves.device.type == "cpu" and type(waves) is Tensor and len(waves) < FEW_ROWS:  # not the dry run's
                waves = F.pad(waves, (0, 0, 0, FEW_ROWS - len(waves)))
            rows = self.time_embedding(waves)
            rows0 = self.time_projection(rows)
        e = rows[: sigma.numel()].unflatten(0, sigma.shape)
        e0 = rows0[: sigma.numel()].unflatten(0, sigma.shape).unflatten(-1, (6, -1))
        rope = rope_tables(self.config.head_dim, positions, patches.shape[3], patches.shape[4])
        # under autocast the stream stays as precise as the weights
        tokens = patches.flatten(2).transpose(1, 2).to(self.dtype).contiguous()
        return Stream(tokens), e, e0, rope

    def _unpatchify(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        batch, _, frames, height, width = shape
        pt, ph, pw = self.config.patch
        grid = tokens.reshape(batch, frames // pt, height // ph, width // pw, pt, ph, pw, self.config.out_dim)
        return grid.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(batch, self.config.out_dim, frames, height, width)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    known = torch.amp.is_autocast_available(device.type)  # the meta device knows no autocast
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def kernels_serve(head_dim: int) -> bool:
    """Whether kernels serve all of a layer with heads of this size, so that nothing in it waits for the device."""
    return head_dim in ATTENTION_HEADS and head_dim in ROPE_HEADS


def timestep_waves(sigma: Tensor, count: int) -> Tensor:
    """cos, then sin, of t * 10000^(-2i / count), t = 1000 sigma: fp64 [*sigma.shape, count]."""
    half = count // 2
    rates = TIMESTEP_PERIOD ** -(torch.arange(half, device=sigma.device, dtype=torch.float64) / half)
    angles = (sigma.double() * TIMESTEP_SCALE)[..., None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
