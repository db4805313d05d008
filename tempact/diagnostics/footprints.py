"""What an executor of given sizes holds and computes, from traces of its own code on fake tensors.

Two and three blocks are traced and the rest is extrapolated: blocks are alike, so bytes and operations grow by the
same amount with each. They do so with the rows of a batch, too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from csrc_triton import ForkableKVCache, LayerViews
from tempact.config import ExecutorConfig
from tempact.diagnostics.trace import FAKE, fake, on_meta, recomputed, traced
from tempact.executor.cuda_graphs import Context
from tempact.executor.executor import Executor
from tempact.executor.kv_history import FIRST_FRAMES, KVHistory
from tempact.executor.rollout import Branch, walk_chunks
from tempact.executor.sampler import RolloutSettings
from tempact.models.wan.checkpoints.load import set_precision
from tempact.models.wan.transformer import TextKV, WanConfig, WanTransformer

FEW_BLOCKS, MORE_BLOCKS = 2, 3  # traced instead of all: with one, the peak lies elsewhere


@dataclass(frozen=True)
class Cost:
    """bytes: the most alive at once beside weights, adapters, their gradients and the cache. flops: operations."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Sizes:
    """What is traced: the transformer, its settings, latents (H, W), and whether csrc_triton's kernels serve."""

    model: WanConfig
    settings: ExecutorConfig
    latent: tuple[int, int]
    kernels: bool = True

    @property
    def frame_tokens(self) -> int:
        return self.model.frame_tokens(*self.latent)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and the cache."""
        return torch.float32 if self.settings.precision == "fp32" else torch.bfloat16

    @property
    def text_bytes(self) -> int:
        """Cross-attention K and V of one text."""
        return 2 * self.model.layers * self.model.text_len * self.model.dim * self.dtype.itemsize

    @property
    def frame_bytes(self) -> int:
        """Self-attention K and V of one latent frame."""
        return 2 * self.model.layers * self.frame_tokens * self.model.dim * self.dtype.itemsize

    def latent_bytes(self, frames: int) -> int:
        """fp32 latents of one video's frames."""
        return 4 * self.model.in_dim * frames * self.latent[0] * self.latent[1]


class _NoText(nn.Module):
    """Stands where an executor has its text encoder, which no trace calls."""

    def encode(self, prompts: list[str]) -> Tensor:
        raise NotImplementedError


@dataclass
class _Latents:
    """Stands where an executor has its codec: the size of latents is all that is asked."""

    size: tuple[int, int]
    latent_channels: int

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        return self.size


def make_executor(sizes: Sizes) -> Executor:
    """The executor on the meta device: every parameter with its shape and dtype, none with memory."""
    with on_meta():
        model = set_precision(WanTransformer(sizes.model), sizes.settings.precision)
        codec = _Latents(sizes.latent, sizes.model.in_dim)
        return Executor(model, _NoText(), cast(Any, codec), sizes.settings, sizes.latent)


@dataclass(frozen=True)
class Parameters:
    """Numbers and bytes of the transformer, numbers of its trained adapter."""

    weights: int
    weight_bytes: int
    trained: int


@lru_cache(maxsize=8)
def parameters_of(sizes: Sizes) -> Parameters:
    named = list(make_executor(sizes).peft.named_parameters())
    own = [p for name, p in named if ".lora_" not in name]
    return Parameters(
        sum(p.numel() for p in own),
        sum(p.numel() * p.element_size() for p in own),
        sum(p.numel() for _, p in named if p.requires_grad),
    )


def denoise(sizes: Sizes, rows: int, context_frames: int, frames: int, *, adapters: bool = True) -> Cost:
    """One denoiser call without gradient: `rows` videos of `frames` latent frames on a context of their own."""
    return _by_rows(partial(_denoise, sizes, context_frames, frames, adapters), rows)


def update(sizes: Sizes, rows: int, context_frames: int, *, checkpointing: bool = False) -> Cost:
    """The reference's velocity, the policy's and its backward, of `rows` recorded transitions on one shared context.

    checkpointing: every block keeps its inputs alone and is computed again in the backward.
    """
    return _by_rows(partial(_update, sizes, context_frames, checkpointing), rows)


def cache_rows(settings: RolloutSettings, plans: int, continuations: int, fork: int, frame_tokens: int) -> int:
    """Rows of the cache's pools after a roll-out whose plans all fork at frame `fork`, by the books of a cache."""
    rows = FIRST_FRAMES * frame_tokens
    cache = ForkableKVCache(1, 1, 1, rows=rows, dtype=torch.bfloat16, device=torch.device("cpu"))
    # a switch at every chunk is the most there can be
    prompts = [[str(chunk) for chunk in range(settings.chunks)]] * plans
    nothing = torch.empty(plans * continuations, 0, settings.frames)
    with _Bookkeeping(cast(Any, None), cache, settings, frame_tokens) as history:

        def make(start: int, branches: list[Branch], _: TextKV) -> Tensor:
            history.context([branch.cached for branch in branches], start)
            return nothing

        def past(*_: object) -> Tensor:
            return nothing

        loop = walk_chunks(
            history, prompts, lambda _: TextKV([]), make, past,
            continuations=continuations, switch_frames=[fork] * plans,
        )  # fmt: skip
        for _ in loop:
            pass
        return cache.rows_total


class _Bookkeeping(KVHistory):
    """A history whose rows are reserved and dropped, and never written."""

    def _turn(self, *_: object) -> None:
        pass

    def _write(self, *_: object) -> None:
        pass


def _by_rows(measure: Callable[[int], Cost], rows: int) -> Cost:
    """What grows by the same amount with each row, from one and two of them."""
    one = measure(1)
    two = measure(2) if rows > 1 else one
    return Cost(
        one.bytes + (rows - 1) * (two.bytes - one.bytes), one.flops + (rows - 1) * (two.flops - one.flops)
    )  # fmt: skip


def _by_blocks(sizes: Sizes, measure: Callable[[Sizes], Cost]) -> Cost:
    """The same for blocks."""
    layers = sizes.model.layers
    if layers <= MORE_BLOCKS:
        return measure(sizes)
    few, more = (measure(replace(sizes, model=replace(sizes.model, layers=n))) for n in (FEW_BLOCKS, MORE_BLOCKS))
    beyond = (layers - FEW_BLOCKS) // (MORE_BLOCKS - FEW_BLOCKS)
    return Cost(
        few.bytes + beyond * (more.bytes - few.bytes), few.flops + beyond * (more.flops - few.flops)
    )  # fmt: skip


@lru_cache(maxsize=256)
def _denoise(sizes: Sizes, context_frames: int, frames: int, adapters: bool, rows: int) -> Cost:
    return _by_blocks(sizes, lambda own: trace_denoise(own, context_frames, frames, adapters, rows))


@lru_cache(maxsize=256)
def _update(sizes: Sizes, context_frames: int, checkpointing: bool, rows: int) -> Cost:
    return _by_blocks(sizes, lambda own: trace_update(own, context_frames, checkpointing, rows))


def trace_denoise(sizes: Sizes, context_frames: int, frames: int, adapters: bool, rows: int) -> Cost:
    """As `denoise`, all blocks and rows traced."""
    executor = make_executor(sizes)
    model = sizes.model
    with traced(kernels=sizes.kernels) as trace, torch.no_grad():
        fake(executor.peft)
        x, sigma, positions = _inputs(sizes, rows, context_frames, frames)
        shape = rows, model.text_len, model.heads, model.head_dim
        text = TextKV([(_empty(sizes, *shape), _empty(sizes, *shape)) for _ in range(model.layers)])
        context = _context(sizes, context_frames, rows)
        before = trace.live
        trace.restart()
        with executor.precision(), _switched(executor, adapters):
            executor.runner.velocity(x, sigma, text, positions, context)
        return Cost(trace.peak - before, trace.flops)


def trace_update(sizes: Sizes, context_frames: int, checkpointing: bool, rows: int) -> Cost:
    """As `update`, all blocks and rows traced."""
    executor = make_executor(sizes)
    executor.model.checkpoint_activations = False  # a backward on fake tensors needs another way
    if checkpointing:
        for block in executor.model.blocks:
            cast(Any, block).forward = recomputed(block.forward)
    with traced(kernels=sizes.kernels) as trace:
        fake(executor.peft)
        for parameter in executor.parameters().values():  # CUDA graphs keep them; without, the second micro-batch adds
            parameter.grad = torch.zeros_like(parameter)
        x, sigma, positions = _inputs(sizes, rows, context_frames, sizes.settings.chunk_frames)
        words = _empty(sizes, 1, sizes.model.text_len, sizes.model.text_dim)
        index = torch.zeros(rows, dtype=torch.int64, device=FAKE)
        context = _context(sizes, context_frames, 1)
        before = trace.live
        trace.restart()

        def velocity() -> Tensor:
            with executor.precision():
                return executor.runner.policy_velocity(x, sigma, words, index, positions, context).float()

        with torch.no_grad(), executor.reference():
            reference = velocity()
        (velocity() - reference).square().mean().backward()
        return Cost(trace.peak - before, trace.flops)


def _empty(sizes: Sizes, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=sizes.dtype, device=FAKE)


def _inputs(sizes: Sizes, rows: int, start: int, frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, noise levels and temporal positions of the frames behind `start`."""
    x = torch.empty(rows, sizes.model.in_dim, frames, *sizes.latent, device=FAKE)
    return x, torch.empty(rows, frames, device=FAKE), torch.arange(start, start + frames, device=FAKE)


def _context(sizes: Sizes, frames: int, contexts: int) -> Context:
    """K and V of so many frames, in pools where kernels read them, else a pair of tensors a batch row."""
    if not frames:
        return None
    rows, head = frames * sizes.frame_tokens, (sizes.model.heads, sizes.model.head_dim)
    layers = range(sizes.model.layers)
    if not sizes.kernels:
        return [(_empty(sizes, contexts, rows, *head), _empty(sizes, contexts, rows, *head)) for _ in layers]
    pools = [(_empty(sizes, rows, *head), _empty(sizes, rows, *head)) for _ in layers]
    return LayerViews.of(pools, [[(0, rows)]] * contexts)


def _switched(executor: Executor, adapters: bool) -> AbstractContextManager[Any]:
    return nullcontext() if adapters else executor.peft.disable_adapter()
