"""Bytes and operations of an executor and a planner of given sizes, from traces of their code on fake tensors.

Two and three layers are traced and the others extrapolated: layers are alike, so bytes and operations grow by the same
amount with each. They do so with the rows of a batch, too.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from csrc_triton import LayerViews
from tempact.config import ExecutorConfig, PlannerConfig
from tempact.diagnostics.trace import FAKE, fake, on_meta, recomputed, traced
from tempact.distributed.shards import READ_OUTSIDE
from tempact.executor.cuda_graphs import Context
from tempact.executor.executor import Executor
from tempact.models.adapters import freeze_reference
from tempact.models.wan.checkpoints.load import set_precision
from tempact.models.wan.transformer import TextKV, WanConfig, WanTransformer
from tempact.planner.language_model import DTYPES, LOGITS_AT_ONCE

FEW_LAYERS, MORE_LAYERS = 2, 3  # traced instead of all: with one, the peak lies elsewhere
SHORT, LONG = 128, 192  # tokens traced instead of a plan's: with flash attention bytes grow evenly with them


@dataclass(frozen=True)
class Cost:
    """bytes: the most alive at once beside weights, adapters, their gradients and the cache. flops: operations."""

    bytes: int
    flops: int

    def and_more(self, other: Cost, times: int) -> Cost:
        """Extrapolated: `times` the way from this one to another."""
        return Cost(
            self.bytes + times * (other.bytes - self.bytes), self.flops + times * (other.flops - self.flops)
        )  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """An executor to trace; latents (H, W); kernels: csrc_triton's kernels serve, else the torch path."""

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


def make_executor(sizes: Sizes) -> Executor:
    """The executor on the meta device: every parameter with its shape and dtype, none with memory."""
    with on_meta():
        model = set_precision(WanTransformer(sizes.model), sizes.settings.precision)
        # of the codec an executor asks the size of latents alone, and no trace calls the text encoder
        codec = SimpleNamespace(latent_channels=sizes.model.in_dim, latent_size=lambda *video: sizes.latent)
        return Executor(model, cast(Any, nn.Identity()), cast(Any, codec), sizes.settings, sizes.latent)


@dataclass(frozen=True)
class Parameters:
    """Numbers and bytes of a policy's frozen weights, bytes of those under adapters and of those that can be sharded,
    numbers of its trained adapter."""

    weights: int
    weight_bytes: int
    adapted_bytes: int
    shared_bytes: int
    trained: int

    @classmethod
    def of(cls, peft: nn.Module) -> Parameters:
        own = {name: p for name, p in peft.named_parameters() if ".lora_" not in name}
        sizes = {name: p.numel() * p.element_size() for name, p in own.items()}
        return cls(
            sum(p.numel() for p in own.values()),
            sum(sizes.values()),
            sum(size for name, size in sizes.items() if name.endswith(".base_layer.weight")),
            sum(size for n, size in sizes.items() if ".blocks." in n and not any(part in n for part in READ_OUTSIDE)),
            sum(p.numel() for p in peft.parameters() if p.requires_grad),
        )


@lru_cache(maxsize=8)
def parameters_of(sizes: Sizes) -> Parameters:
    """Of the executor."""
    return Parameters.of(make_executor(sizes).peft)


def denoise(sizes: Sizes, rows: int, context_frames: int, frames: int, *, adapters: bool = True) -> Cost:
    """One denoiser call without gradient: `rows` videos of `frames` latent frames, each behind its own context."""
    return _extrapolated(trace_denoise, sizes, rows, context_frames, frames, adapters)


def update(sizes: Sizes, rows: int, context_frames: int, *, checkpointing: bool = False) -> Cost:
    """The reference's velocity, the policy's and its backward, of `rows` recorded transitions on one shared context.

    checkpointing: every block keeps only its inputs and is computed again in the backward.
    """
    return _extrapolated(trace_update, sizes, rows, context_frames, checkpointing)


def _extrapolated(trace: Callable[..., Cost], sizes: Sizes, rows: int, *call: Any) -> Cost:
    one = _all_layers(trace, sizes, 1, *call)
    return one.and_more(_all_layers(trace, sizes, 2, *call), rows - 1) if rows > 1 else one


@lru_cache(maxsize=512)
def _all_layers(trace: Callable[..., Cost], sizes: Sizes, rows: int, *call: Any) -> Cost:
    layers = sizes.model.layers
    if layers <= MORE_LAYERS:
        return trace(sizes, rows, *call)
    few, more = (
        trace(replace(sizes, model=replace(sizes.model, layers=n)), rows, *call) for n in (FEW_LAYERS, MORE_LAYERS)
    )
    return few.and_more(more, layers - FEW_LAYERS)


def trace_denoise(sizes: Sizes, rows: int, context_frames: int, frames: int, adapters: bool) -> Cost:
    """As `denoise`, all blocks and rows traced."""
    executor = make_executor(sizes)
    model = sizes.model
    with traced(kernels=sizes.kernels) as trace, torch.no_grad():
        fake(executor.peft)
        x, sigma, positions = _inputs(sizes, rows, context_frames, frames)
        shape = rows, model.text_len, model.heads, model.head_dim
        text = TextKV([(_empty(sizes, *shape), _empty(sizes, *shape)) for _ in range(model.layers)])
        context = _context(sizes, context_frames, rows)
        before = trace.restart()
        with executor.precision(), nullcontext() if adapters else executor.peft.disable_adapter():
            executor.runner.velocity(x, sigma, text, positions, context)
        return Cost(trace.peak - before, trace.flops)


def trace_update(sizes: Sizes, rows: int, context_frames: int, checkpointing: bool) -> Cost:
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
        before = trace.restart()

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


@dataclass(frozen=True)
class PlannerSizes:
    """A planner's memory.

    weights: bytes. trained: numbers of the adapter. cached: bytes of one token's K and V. tokens: of an instruction
    with its plan. row_bytes: kept by the update for one plan of a micro-batch, beside its logits. vocabulary and dtype:
    of the logits, which the traces leave out. With Liger's kernels it is less.
    """

    weights: int
    trained: int
    cached: int
    tokens: int
    row_bytes: int
    vocabulary: int
    dtype: torch.dtype

    @classmethod
    def of(cls, model: PretrainedConfig, config: PlannerConfig, tokens: int) -> PlannerSizes:
        """tokens: of an instruction with its plan, cut to the length of the model's context."""
        tokens = min(tokens, getattr(model, "max_position_embeddings", tokens))
        parameters, dtype = Parameters.of(_make_planner(model, config)), DTYPES[config.precision]
        heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
        head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
        return cls(
            weights=parameters.weight_bytes,
            trained=parameters.trained,
            cached=2 * model.num_hidden_layers * heads * head_dim * dtype.itemsize,
            tokens=tokens,
            row_bytes=plan_bytes(model, config, tokens),
            vocabulary=model.vocab_size,
            dtype=dtype,
        )

    def logits_bytes(self, rows: int, tokens: int) -> int:
        """Logits that exist at a time (`planner.language_model`) of `rows` plans with `tokens` counted each: in the
        model's dtype and in fp32, and the gradients of both."""
        most = max(1, LOGITS_AT_ONCE // self.vocabulary) * self.vocabulary
        return min(most, rows * tokens * self.vocabulary) * 2 * (self.dtype.itemsize + torch.float32.itemsize)


def _make_planner(model: PretrainedConfig, config: PlannerConfig) -> PeftModel:
    """On the meta device."""
    lora = PeftLoraConfig(
        r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=list(config.lora.targets),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    with on_meta(), warnings.catch_warnings():
        # PEFT reads an attribute that newer transformers have renamed; nobody here can act on it
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        base = AutoModelForCausalLM.from_config(model, dtype=DTYPES[config.precision], attn_implementation="sdpa")
        peft = get_peft_model(base.requires_grad_(False), lora)
        freeze_reference(peft, lora)
    return peft


def plan_bytes(model: PretrainedConfig, config: PlannerConfig, tokens: int) -> int:
    """Kept by the update for one plan of so many tokens, beside its logits: a + b layers + c tokens + d layers tokens,
    from four traces."""
    traces = [[trace_plan(model, config, length, n) for length in (SHORT, LONG)] for n in (FEW_LAYERS, MORE_LAYERS)]
    short, long = (a.and_more(b, model.num_hidden_layers - FEW_LAYERS) for a, b in zip(*traces, strict=True))
    return short.bytes + (tokens - SHORT) * (long.bytes - short.bytes) // (LONG - SHORT)


def trace_plan(model: PretrainedConfig, config: PlannerConfig, length: int, layers: int | None = None) -> Cost:
    """Forward and backward of a plan of `length` tokens, up to its logits; layers: how many of the model's, or all."""
    own = copy.deepcopy(model)
    own.num_hidden_layers = layers or own.num_hidden_layers
    if getattr(own, "layer_types", None):
        own.layer_types = [own.layer_types[i % len(own.layer_types)] for i in range(own.num_hidden_layers)]
    peft = _make_planner(own, config).eval()
    inner: Any = peft.get_base_model()
    for layer in inner.model.layers if config.checkpoint_activations else ():
        layer.forward = recomputed(layer.forward)
    with traced(kernels=False) as trace:
        fake(peft)
        for parameter in peft.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        before = trace.restart()
        ids = torch.zeros(1, length, dtype=torch.int64, device=FAKE)
        # without a mask: the row is whole
        hidden = inner.model(input_ids=ids, use_cache=False).last_hidden_state
        hidden.float().square().mean().backward()
        return Cost(trace.peak - before, trace.flops)
