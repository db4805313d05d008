"""What a planner of given sizes holds and computes, from traces of its model on fake tensors.

As in `diagnostics.footprints`, two and three layers are traced and the rest is extrapolated. The output layer is
left out of the traces: what its logits take is said by `PlannerSizes.logits_bytes`. With Liger's kernels it is less.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config

from tempact.config import PlannerConfig
from tempact.diagnostics.trace import FAKE, fake, on_meta, recomputed, traced
from tempact.models.adapters import freeze_reference
from tempact.planner.language_model import DTYPES, LOGITS_AT_ONCE

FEW_LAYERS, MORE_LAYERS = 2, 3
SHORT, LONG = 128, 192  # tokens traced instead of all: with flash attention bytes grow by the same amount with each


def _qwen3(width: int, inner: int, layers: int, heads: int, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=128, vocab_size=151_936, tie_word_embeddings=tied,
    )  # fmt: skip


# sizes of published planners, for a plan before their weights are there
PUBLISHED = {
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, False),
}


@dataclass(frozen=True)
class PlannerSizes:
    """weights: bytes. trained: numbers of the adapter. cached: bytes of one token's K and V. tokens: of a plan with its
    instruction. row_bytes: what the update keeps of one plan of a micro-batch, beside its logits. vocabulary, dtype: of
    these."""

    weights: int
    trained: int
    cached: int
    tokens: int
    row_bytes: int
    vocabulary: int
    dtype: torch.dtype

    def logits_bytes(self, rows: int, tokens: int) -> int:
        """Logits that exist at a time (`planner.head`) of `rows` plans with `tokens` counted each: in the model's dtype
        and in fp32, and the gradients of both."""
        most = max(1, LOGITS_AT_ONCE // self.vocabulary) * self.vocabulary
        return min(most, rows * tokens * self.vocabulary) * 2 * (self.dtype.itemsize + torch.float32.itemsize)


def measure(model: PretrainedConfig, config: PlannerConfig, tokens: int) -> PlannerSizes:
    """A planner of these sizes; a plan and its instruction have `tokens`, or as many as the model takes."""
    dtype = DTYPES[config.precision]
    tokens = min(tokens, getattr(model, "max_position_embeddings", tokens))
    peft = _make(model, config, dtype)
    parameters = dict(peft.named_parameters())
    weights = sum(p.numel() * p.element_size() for name, p in parameters.items() if ".lora_" not in name)
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    cached = 2 * model.num_hidden_layers * heads * head_dim * dtype.itemsize
    row_bytes = _row_bytes(model, config, tokens, dtype)
    return PlannerSizes(weights, trained, cached, tokens, row_bytes, model.vocab_size, dtype)


def _make(model: PretrainedConfig, config: PlannerConfig, dtype: torch.dtype) -> PeftModel:
    lora = PeftLoraConfig(
        r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=list(config.lora.targets),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    with on_meta(), warnings.catch_warnings():
        # PEFT reads an attribute that newer transformers have renamed; nobody here can act on it
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        base = AutoModelForCausalLM.from_config(model, dtype=dtype, attn_implementation="sdpa")
        peft = get_peft_model(base.requires_grad_(False), lora)
        freeze_reference(peft, lora)
    return peft


def _row_bytes(model: PretrainedConfig, config: PlannerConfig, tokens: int, dtype: torch.dtype) -> int:
    def kept(layers: int, length: int) -> int:
        own = copy.deepcopy(model)
        own.num_hidden_layers = layers
        if getattr(own, "layer_types", None):
            own.layer_types = own.layer_types[:layers]
        return _traced_row(own, config, length, dtype)

    # a + b layers + c tokens + d layers tokens, from four traces
    few, more = [[kept(n, length) for length in (SHORT, LONG)] for n in (FEW_LAYERS, MORE_LAYERS)]
    layers = model.num_hidden_layers - FEW_LAYERS
    short, long = (a + layers * (b - a) for a, b in zip(few, more, strict=True))
    return short + (tokens - SHORT) * (long - short) // (LONG - SHORT)


def _traced_row(model: PretrainedConfig, config: PlannerConfig, length: int, dtype: torch.dtype) -> int:
    peft = _make(model, config, dtype).eval()
    with traced(kernels=False) as trace:
        fake(peft)
        for parameter in peft.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        before = trace.live
        trace.restart()
        ids = torch.zeros(1, length, dtype=torch.int64, device=FAKE)
        inner: Any = peft.get_base_model()
        # without a mask: the row is whole
        if config.checkpoint_activations:
            for layer in inner.model.layers:
                layer.forward = recomputed(layer.forward)
        hidden = inner.model(input_ids=ids, use_cache=False).last_hidden_state
        hidden.float().square().mean().backward()
        return trace.peak - before
