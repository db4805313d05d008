"""Fork attention with a forkable KV cache under diffusers' Wan transformer, chunk by chunk.

Stock diffusers attends within the frames of one call. Here a chunk of latent frames also attends to the committed
frames of its branch, at their temporal positions:

    wan = ForkedWan(transformer, frame_tokens=1560, frames=36)
    branch = wan.cache.new_branch()
    with wan.chunk([branch], 3):                             # reads the branch's frames
        velocity = transformer(x, timestep, text).sample
    with wan.chunk([branch], 3, commit=True):                # the context pass: the clean chunk joins the branch
        transformer(clean, torch.zeros_like(timestep), text)
    branches = wan.cache.fork(branch, 8)                     # shares the rows; now batches of 8
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from csrc_triton.integrations._frames import FrameCache, LayerState, Window
from csrc_triton.qk_norm_rope import rope_tables

__all__ = ["ForkAttnProcessor", "ForkedWan", "Window"]


class ForkedWan:
    """A `WanTransformer3DModel` whose self-attention reads and writes a `ForkableKVCache`.

    `cache` holds the K/V of the branches: fork, release and drop branches there (positions in tokens). Keys are stored
    with RoPE. Cross-attention keeps its processors. The transformer must be called inside `chunk`, and the backward
    pass of a call with gradient checkpointing, which calls the blocks again, must run inside it too.

    The transformer and its blocks may be compiled, before or after (also with `fullgraph=True`).

    Args:
        transformer: used with its own weights, adapters and fused projections.
        frame_tokens: tokens of a latent frame, H * W divided by the area of a patch.
        frames: latent frames of all branches together that the cache holds before it grows.
        window: frames that a chunk attends to; None: all that its branch has.
        dtype: of the cache, and of the arithmetic of self-attention. None: that of autocast where one is on, else that
            of the weights.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        *,
        frame_tokens: int,
        frames: int,
        window: Window | None = None,
        dtype: torch.dtype | None = None,
    ):
        whole: Any = getattr(transformer, "_orig_mod", transformer)  # of a compiled module
        if not isinstance(whole, WanTransformer3DModel):
            raise ValueError(f"transformer: found {type(whole).__name__}; accepted: a WanTransformer3DModel")
        self.transformer = cast(Any, whole)  # a torch module says nothing of its children's types
        blocks, config = list(self.transformer.blocks), self.transformer.config
        weight = self.transformer.patch_embedding.weight
        if dtype is None:
            kind = weight.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        self._frames = FrameCache(
            len(blocks), config.num_attention_heads, config.attention_head_dim, frame_tokens=frame_tokens,
            frames=frames, window=window, last=self.transformer.rope.max_seq_len, dtype=dtype, device=weight.device,
        )  # fmt: skip
        self.cache = self._frames.cache
        self._stock = [block.attn1.processor for block in blocks]
        for state, block in zip(self._frames.states, blocks, strict=True):
            block.attn1.set_processor(ForkAttnProcessor(state, dtype))
        self._hook = self.transformer.rope.register_forward_hook(self._at_position)

    def remove(self) -> None:
        """Restores the transformer's own processors."""
        self._hook.remove()
        for block, processor in zip(self.transformer.blocks, self._stock, strict=True):
            block.attn1.set_processor(processor)

    @contextmanager
    def chunk(
        self,
        branches: Sequence[int],
        frames: int,
        *,
        attended: Sequence[tuple[int, int]] | None = None,
        commit: bool = False,
    ) -> Iterator[None]:
        """Inside the `with` block, calls of the transformer process the next `frames` latent frames of `branches`.

        Without commit the batch may be a multiple n of the branches, for instance with and without a text for
        guidance: rows b * n to b * n + n - 1 then belong to branch b. A branch may also be named for several rows.

        attended: ranges [first, last) of committed latent frames to attend to, at their absolute positions; the
            window's by default.
        commit: append the K and V of the one call inside to the branches, a batch row each (the context pass, without
            gradient). Their rows are reserved when the block is entered; an exception inside gives them back.

        Raises:
            ValueError: for branches of different lengths or with a part of a frame, for frames that a branch does not
                hold or that do not fit the window or RoPE's positions, and for a context pass without a call of the
                transformer.
        """
        with self._frames.chunk(branches, frames, attended=attended, commit=commit):
            yield

    @contextmanager
    def recache(self, branches: Sequence[int]) -> Iterator[range]:
        """Inside the `with` block, one call over latent frames that the branches have rewrites their K and V.

        For a new text: the call over the clean latents of the frames that the block yields, at timestep 0. Those are
        the frames of the window without its sink, which keeps the old text, or all where the window holds all. An
        exception inside leaves the branches as they were.

        Raises:
            ValueError: as `chunk`, and for branches without frames.
        """
        with self._frames.recache(branches) as frames:
            yield frames

    def _at_position(self, rope: Any, given: tuple[Tensor], output: Any) -> tuple[Tensor, Tensor]:
        """Hook of the transformer's RoPE module: tables [L, head_dim / 2] of the chunk's frames in place of its own."""
        call, (batch, _, frames, height, width) = self._frames.call, given[0].shape
        rows, columns = height // rope.patch_size[1], width // rope.patch_size[2]
        call.check_batch(batch)
        if rows * columns != self._frames.frame_tokens or frames != call.frames * rope.patch_size[0]:
            found = f"{tuple(given[0].shape)}, {frames} frames of {rows * columns} tokens"
            accepted = f"{call.frames * rope.patch_size[0]} frames of {self._frames.frame_tokens} tokens"
            raise ValueError(f"hidden_states: found {found}; accepted: {accepted}")
        call.called = True
        if torch.compiler.is_compiling():
            return rope_tables(self._frames.head_dim, call.positions, rows, columns)
        if (rows, columns) not in call.tables:
            call.tables[rows, columns] = rope_tables(self._frames.head_dim, call.positions, rows, columns)
        return call.tables[rows, columns]


class ForkAttnProcessor:
    """Self-attention of one layer, as `WanAttnProcessor`, plus attention to the context of the current chunk."""

    _attention_backend = None  # diffusers sets and reads these on every processor
    _parallel_config = None

    def __init__(self, state: LayerState, dtype: torch.dtype):
        self.state, self.dtype = state, dtype

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
        if rotary_emb is None:
            raise ValueError("rotary_emb: found None; accepted: the tables of the transformer's RoPE module")
        out = self.state.attend(
            *_projections(attn, hidden_states), attn.norm_q.weight, attn.norm_k.weight, rotary_emb, attn.heads,
            attn.norm_q.eps, self.dtype,
        )  # fmt: skip
        return attn.to_out[1](attn.to_out[0](out))


def _projections(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if getattr(attn, "fused_projections", False):
        return attn.to_qkv(x).chunk(3, dim=-1)
    return attn.to_q(x), attn.to_k(x), attn.to_v(x)
