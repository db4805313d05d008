"""Fork attention with a forkable KV cache under diffusers' Wan transformer, chunk by chunk.

Stock diffusers attends within the frames of one call. Here a chunk of latent frames also attends to the committed
frames of its branch, at their absolute temporal positions:

    wan = ForkedWan(transformer, frame_tokens=1560, frames=36)
    branch = wan.cache.new_branch()
    with wan.chunk([branch]):                                # reads the branch's frames
        velocity = transformer(x, timestep, text).sample
    with wan.chunk([branch], commit=True):                   # the context pass: the clean chunk joins the branch
        transformer(clean, torch.zeros_like(timestep), text)
    branches = wan.cache.fork(branch, 8)                     # shares the rows; now batches of 8
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from csrc_triton import CacheRows, ForkableKVCache, LayerViews, fork_attention, qk_norm_rope
from csrc_triton.kv_cache import Reservation


@dataclass
class _Chunk:
    """What the transformer's call belongs to: B branches that hold frames [0, start)."""

    branches: list[int]
    start: int
    views: LayerViews | None
    commit: bool
    rope: tuple[Tensor, Tensor] | None = None  # cos and sin of the call, [L, 1, head_dim / 2]
    reservation: Reservation | None = None


class ForkedWan:
    """A `WanTransformer3DModel` whose self-attention reads and writes a `ForkableKVCache`.

    `cache` holds the K/V of the branches: fork, release and drop branches there (positions in tokens). Keys are stored
    with RoPE. Cross-attention keeps its processors. The transformer must be called inside `chunk`, and the backward
    pass of a call with gradient checkpointing, which calls the blocks again, must run inside it too.

    Args:
        transformer: used with its own weights, adapters and fused projections.
        frame_tokens: tokens of a latent frame, H * W divided by the area of a patch.
        frames: latent frames of all branches together that the cache holds before it grows.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(self, transformer: WanTransformer3DModel, *, frame_tokens: int, frames: int):
        if not isinstance(transformer, WanTransformer3DModel):
            raise ValueError(f"transformer: found {type(transformer).__name__}; accepted: a WanTransformer3DModel")
        if frame_tokens < 1 or frames < 1:
            raise ValueError(f"frame_tokens, frames: found {frame_tokens}, {frames}; accepted: at least 1")
        self.transformer = cast(Any, transformer)  # a torch module says nothing of its children's types
        self.frame_tokens = frame_tokens
        blocks, config = list(self.transformer.blocks), self.transformer.config
        weight = self.transformer.patch_embedding.weight
        self.cache = ForkableKVCache(
            len(blocks), config.num_attention_heads, config.attention_head_dim, rows=frames * frame_tokens,
            dtype=weight.dtype, device=weight.device,
        )  # fmt: skip
        self._chunk: _Chunk | None = None
        self._stock = [block.attn1.processor for block in blocks]
        for layer, block in enumerate(blocks):
            block.attn1.set_processor(ForkAttnProcessor(self, layer))
        self._hook = self.transformer.rope.register_forward_hook(self._at_position)

    def remove(self) -> None:
        """Restores the transformer's own processors."""
        self._hook.remove()
        for block, processor in zip(self.transformer.blocks, self._stock, strict=True):
            block.attn1.set_processor(processor)

    @contextmanager
    def chunk(
        self, branches: Sequence[int], *, attended: Sequence[tuple[int, int]] | None = None, commit: bool = False
    ) -> Iterator[None]:
        """Inside the `with` block, calls of the transformer process the next chunk of `branches`, one a batch row.

        attended: ranges [first, last) of committed latent frames to attend to; all of them by default.
        commit: append the call's K and V to the branches (the context pass, without gradient).

        Raises:
            ValueError: for branches of different lengths or with a part of a frame, for frames that a branch does not
                hold, and for a context pass without a call of the transformer.
        """
        if self._chunk is not None:
            raise ValueError(
                f"chunk: found one inside that of branches {self._chunk.branches}; accepted: one at a time"
            )
        lengths = sorted({self.cache.length(branch) for branch in branches})
        if len(lengths) != 1 or lengths[0] % self.frame_tokens:
            accepted = f"one length, a multiple of {self.frame_tokens}"
            raise ValueError(f"branches: found {list(branches)} with {lengths} tokens; accepted: {accepted}")
        start = lengths[0] // self.frame_tokens
        frames = [(0, start)] if attended is None else list(attended)
        ranges = [(a * self.frame_tokens, b * self.frame_tokens) for a, b in frames if b > a]
        views = self.cache.views(branches, ranges) if ranges else None
        current = self._chunk = _Chunk(list(branches), start, views, commit)
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not commit):
                yield
            if commit:
                if current.reservation is None:
                    raise ValueError("commit: found no call of the transformer inside; accepted: one call")
                self.cache.commit(current.reservation)
        finally:
            self._chunk = None
            if current.reservation is not None and current.reservation.state == "open":
                self.cache.cancel(current.reservation)

    @property
    def active(self) -> _Chunk:
        if self._chunk is None:
            raise ValueError("transformer: called outside of `chunk`; accepted: calls inside `with wan.chunk(...)`")
        return self._chunk

    def _at_position(self, rope: Any, given: tuple[Tensor], output: Any) -> tuple[Tensor, Tensor]:
        """Hook of the transformer's RoPE module: the tables of frames [start, start + F) in place of [0, F)."""
        chunk, latents = self.active, given[0]
        batch, _, frames, height, width = latents.shape
        steps, tokens = frames // rope.patch_size[0], height * width // (rope.patch_size[1] * rope.patch_size[2])
        if batch != len(chunk.branches) or tokens != self.frame_tokens:
            accepted = f"a batch of {len(chunk.branches)}, a row a branch, and {self.frame_tokens} tokens a frame"
            raise ValueError(
                f"hidden_states: found {tuple(latents.shape)}, {tokens} tokens a frame; accepted: {accepted}"
            )
        if chunk.start + steps > rope.max_seq_len:
            accepted = f"{rope.max_seq_len} at most (rope_max_seq_len)"
            raise ValueError(f"hidden_states: found frames up to {chunk.start + steps}; accepted: {accepted}")
        if chunk.start:
            longer = latents.new_empty(1).expand(1, 1, (chunk.start + steps) * rope.patch_size[0], height, width)
            output = tuple(table[:, -steps * tokens :] for table in rope.forward(longer))
        cos, sin = output  # [1, L, 1, head_dim], every angle twice in a row
        chunk.rope = cos[0, :, :, 0::2].float().contiguous(), sin[0, :, :, 1::2].float().contiguous()
        return cos, sin


class ForkAttnProcessor:
    """Self-attention of one layer, as `WanAttnProcessor`, plus attention to the context of the current chunk."""

    _attention_backend = None  # diffusers sets and reads these on every processor
    _parallel_config = None

    def __init__(self, wan: ForkedWan, layer: int):
        self.wan, self.layer = wan, layer

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention output [B, L, dim] of hidden_states [B, L, dim], with RoPE at the chunk's positions."""
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("encoder_hidden_states, attention_mask: found a tensor; accepted: None (self-attention)")
        chunk = self.wan.active
        q, k, v = _projections(attn, hidden_states)
        stored: dict[str, Any] = {"v": v, "write": self._rows(chunk, k.shape[1])} if chunk.commit else {}
        q, k = qk_norm_rope(
            q, k, attn.norm_q.weight, attn.norm_k.weight, chunk.rope, heads=attn.heads, eps=attn.norm_q.eps, **stored
        )
        out = fork_attention(
            q, k, v.unflatten(-1, (attn.heads, -1)), None if chunk.views is None else chunk.views[self.layer]
        )  # fmt: skip
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))

    def _rows(self, chunk: _Chunk, tokens: int) -> CacheRows:
        cache = self.wan.cache
        if chunk.reservation is None:
            chunk.reservation = cache.reserve(chunk.branches, tokens)
        return cache.rows_of(chunk.reservation, self.layer)


def _projections(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if getattr(attn, "fused_projections", False):
        return attn.to_qkv(x).chunk(3, dim=-1)
    return attn.to_q(x), attn.to_k(x), attn.to_v(x)
