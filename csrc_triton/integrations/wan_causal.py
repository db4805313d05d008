"""Fork attention with a forkable KV cache under causal Wan models of the Self-Forcing family.

Self-Forcing, Causal-Forcing and LongLive's first version have `blocks[i].self_attn` with `q`, `k`, `v`, `o`, `norm_q`,
`norm_k`, and a `forward` that is given `freqs`, `kv_cache` and `current_start`. That interface is what is asked for;
nothing of their code is imported.

    wan = ForkedCausalWan(pipeline.generator, frame_tokens=1560, frames=21)
    branch = wan.cache.new_branch()
    with wan.chunk([branch], 3):                             # the denoising calls
        generator(noisy, text, timestep, kv_cache=wan.kv_cache, crossattn_cache=cross, current_start=wan.start)
    with wan.chunk([branch], 3, commit=True):                # the context pass
        generator(clean, text, 0 * timestep, kv_cache=wan.kv_cache, crossattn_cache=cross, current_start=wan.start)
    branches = wan.cache.fork(branch, 8)
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from csrc_triton.integrations._frames import FrameCache, LayerState, Rope, Window
from csrc_triton.qk_norm_rope import rope_tables, rope_tables_from_complex

__all__ = ["ForkedCausalWan", "Window"]

ATTENTION = ("q", "k", "v", "o", "norm_q.weight", "norm_q.eps", "norm_k.weight", "num_heads", "head_dim")
ARGUMENTS = ("x", "grid_sizes", "freqs", "kv_cache", "current_start")


class ForkedCausalWan:
    """A causal Wan model whose self-attention reads and writes a `ForkableKVCache`.

    `cache` holds the K/V of the branches: fork, release and drop branches there (positions in tokens). Keys are stored
    with RoPE. Calls of the model are given `kv_cache` of this object, in place of tensors of their own, and must lie
    inside `chunk` or `recache`; so must the backward pass of a call with gradient checkpointing, which calls the blocks
    again. Cross-attention and its cache stay with the model: a branch with another text needs another.

    Args:
        model: the causal model, or a wrapper that has it as `model`; used with its weights and adapters.
        frame_tokens: tokens of a latent frame (1560 at 480x832).
        frames: latent frames of all branches together that the cache holds before it grows.
        window: frames that a chunk attends to; None: all that its branch has; "model": the model's `local_attn_size`
            and `sink_size`, at absolute positions. A relative window uses Wan's RoPE of base 10,000.
        dtype: of the cache, and of the arithmetic of self-attention. None: that of autocast where one is on, else that
            of the weights.

    Raises:
        ValueError: naming the argument, and the attribute that a model was looked for and has not.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        frame_tokens: int,
        frames: int,
        window: Window | Literal["model"] | None = "model",
        dtype: torch.dtype | None = None,
    ):
        whole = _unwrapped(model)
        self.layers = _self_attentions(whole)
        first, weight = self.layers[0], self.layers[0].q.weight
        if dtype is None:
            kind = weight.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        table = getattr(whole, "freqs", None)
        self._frames = FrameCache(
            len(self.layers), first.num_heads, first.head_dim, frame_tokens=frame_tokens, frames=frames,
            window=_window_of(first) if window == "model" else window,
            last=None if table is None else len(table), dtype=dtype, device=weight.device,
        )  # fmt: skip
        self.cache = self._frames.cache
        self.kv_cache = [
            {name: torch.zeros(1, dtype=torch.long) for name in ("global_end_index", "local_end_index")}
            for _ in self.layers
        ]
        self._before = [module.__dict__.get("forward") for module in self.layers]
        # LongLive's attention also reports what its model is to write into the caches: here that is nothing
        reports = hasattr(whole, "_apply_cache_updates")
        rope = _CallRope(self._frames)
        for state, module in zip(self._frames.states, self.layers, strict=True):
            module.forward = _SelfAttention(module, state, rope, dtype, reports)

    @property
    def window(self) -> Window | None:
        return self._frames.window

    @property
    def start(self) -> int:
        """`current_start` of calls inside the current block: the position of its first token."""
        return self._frames.call.first * self._frames.frame_tokens

    def remove(self) -> None:
        """Restores the model's own self-attention."""
        for module, before in zip(self.layers, self._before, strict=True):
            del module.forward
            if before is not None:
                module.forward = before

    @contextmanager
    def chunk(
        self,
        branches: Sequence[int],
        frames: int,
        *,
        attended: Sequence[tuple[int, int]] | None = None,
        commit: bool = False,
    ) -> Iterator[None]:
        """Inside the `with` block, calls of the model process the next `frames` latent frames of `branches`.

        Without commit the batch may be a multiple n of the branches: rows b * n to b * n + n - 1 belong to branch b. A
        branch may also be named for several rows.

        attended: ranges [first, last) of committed latent frames to attend to, at their absolute positions; the
            window's by default.
        commit: append the K and V of the one call inside to the branches, a batch row each (the context pass, without
            gradient). Their rows are reserved when the block is entered; an exception inside gives them back.

        Raises:
            ValueError: for branches of different lengths or with a part of a frame, for frames that a branch does not
                hold or that do not fit the window or the model's `freqs`, and for a context pass without a call.
        """
        with self._frames.chunk(branches, frames, attended=attended, commit=commit):
            yield

    @contextmanager
    def recache(self, branches: Sequence[int]) -> Iterator[range]:
        """Inside the `with` block, one call over latent frames that the branches have rewrites their K and V.

        For a new text: the call over the clean latents of the frames that the block yields, at timestep 0. Those are
        the frames of the window without its sink, which keeps the old text (LongLive's `global_sink`), or all where
        the window holds all. An exception inside leaves the branches as they were.

        Raises:
            ValueError: as `chunk`, and for branches without frames.
        """
        with self._frames.recache(branches) as frames:
            yield frames


class _CallRope:
    """RoPE tables of the current call, made in its first layer."""

    def __init__(self, frames: FrameCache):
        self.frames = frames
        self._grid: Tensor | None = None

    def __call__(self, grid_sizes: Tensor, freqs: Tensor, start: int) -> Rope:
        call, tokens = self.frames.call, self.frames.frame_tokens
        if start != call.first * tokens:
            raise ValueError(f"current_start: found {start}; accepted: {call.first * tokens}, where the chunk starts")
        if grid_sizes is not self._grid or not call.tables:  # the model hands one tensor to all of its layers
            sizes = {tuple(row) for row in grid_sizes.tolist()}
            found = sorted(sizes)
            if len(sizes) != 1 or found[0][0] != call.frames or found[0][1] * found[0][2] != tokens:
                accepted = f"one size, {call.frames} frames of {tokens} tokens"
                raise ValueError(f"grid_sizes: found {found}; accepted: {accepted}")
            size = found[0][1:]
            self._grid = grid_sizes
            call.tables = {size: call.tables[size] if size in call.tables else self._made(freqs, *size)}
        return next(iter(call.tables.values()))

    def _made(self, freqs: Tensor, height: int, width: int) -> Rope:
        call = self.frames.call
        if call.first + call.frames > len(freqs):  # where a relative window goes on
            return rope_tables(self.frames.head_dim, call.positions, height, width)
        return rope_tables_from_complex(freqs.to(call.positions.device), call.positions, height, width)


class _SelfAttention:
    """`forward` of one layer's self-attention."""

    def __init__(self, module: Any, state: LayerState, rope: _CallRope, dtype: torch.dtype, reports: bool):
        self.module, self.state, self.rope, self.dtype, self.reports = module, state, rope, dtype, reports

    def __call__(
        self,
        x: Tensor,
        seq_lens: Any,
        grid_sizes: Tensor,
        freqs: Tensor,
        block_mask: Any = None,
        kv_cache: Any = None,
        current_start: int = 0,
        cache_start: Any = None,
        *rest: Any,
        **more: Any,
    ) -> Any:
        if kv_cache is None:
            raise ValueError("kv_cache: found None; accepted: `kv_cache` of the ForkedCausalWan (`remove` it to train)")
        module, call = self.module, self.rope.frames.call
        call.check_batch(x.shape[0])
        tables = self.rope(grid_sizes, freqs, int(current_start))
        call.called = True
        out = self.state.attend(
            module.q(x), module.k(x), module.v(x), module.norm_q.weight, module.norm_k.weight, tables,
            module.num_heads, module.norm_q.eps, self.dtype,
        )  # fmt: skip
        end = int(current_start) + x.shape[1]
        return (module.o(out), (end, end, None)) if self.reports else module.o(out)


def _unwrapped(model: Any) -> Any:
    model = getattr(model, "_orig_mod", model)  # of a compiled module
    if not hasattr(model, "blocks") and hasattr(model, "model"):
        return _unwrapped(model.model)
    return model


def _self_attentions(model: Any) -> list[Any]:
    """The model's self-attention modules, which have what is used of them."""
    accepted = "a causal Wan model (Self-Forcing, Causal-Forcing, LongLive) or its wrapper"
    blocks = list(getattr(model, "blocks", ()))
    if not blocks:
        raise ValueError(f"model: found {type(model).__name__} without blocks; accepted: {accepted}")
    modules = []
    for i, block in enumerate(blocks):
        module = _attribute(block, "self_attn")
        names = ["self_attn"] if module is None else [name for name in ATTENTION if _attribute(module, name) is None]
        if names:
            name = "self_attn" if module is None else f"self_attn.{names[0]}"
            raise ValueError(f"model: found {type(model).__name__} without blocks[{i}].{name}; accepted: {accepted}")
        missing = [name for name in ARGUMENTS if name not in inspect.signature(module.forward).parameters]
        if missing:
            place = f"an argument {missing[0]} of blocks[{i}].self_attn.forward"
            raise ValueError(f"model: found {type(model).__name__} without {place}; accepted: {accepted}")
        modules.append(module)
    return modules


def _attribute(owner: Any, path: str) -> Any:
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner


def _window_of(attention: Any) -> Window | None:
    """By `local_attn_size` (-1: no window; LongLive's may be a list) and `sink_size`."""
    size = getattr(attention, "local_attn_size", -1)
    frames = max([int(size)] if isinstance(size, int) else [int(each) for each in size])
    return None if frames == -1 else Window(frames, int(getattr(attention, "sink_size", 0)))
