"""The transformer's linears in float8 (`executor.fp8_linears`): of a model that makes videos and is not trained."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from csrc_triton import runtime
from csrc_triton.fp8_linear import why_plain
from tempact.executor.lora import LoraLinear
from tempact.models.wan.fp8 import Fp8Linear
from tempact.models.wan.transformer import WanTransformer

log = logging.getLogger(__name__)

# of a block. Text keys and values are made once a prompt, and their few rows would gain no time
LINEARS = (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2",
)  # fmt: skip


@torch.no_grad()
def round_linears(model: WanTransformer) -> None:
    """Replaces `LINEARS` of all blocks by `Fp8Linear`, one after the other, so that no more than one is there twice.

    An adapter that is active is merged in fp32 before the weight is rounded; it can then be neither switched off nor
    loaded anew.
    """
    for block in model.blocks:
        for name in LINEARS:
            linear = block.get_submodule(name)
            base = linear.get_base_layer() if isinstance(linear, LoraLinear) else linear
            assert isinstance(base, nn.Linear), f"{name}: {type(base).__name__}"
            block.set_submodule(name, Fp8Linear(merged_weight(linear), base.bias, base.weight.dtype))
    config = model.config
    reason = why_plain(model.device, model.dtype, config.dim, config.ffn_dim)
    if runtime.get_backend() == "torch":
        reason = "the kernels of torch are asked for"
    if reason is not None:
        log.warning("executor.fp8_linears: the rounded numbers are multiplied in fp32, which is slower: %s", reason)


def merged_weight(linear: nn.Module) -> Tensor:
    """The weight with the adapters that are active, fp32 [N, K]."""
    if not isinstance(linear, LoraLinear):
        assert isinstance(linear, nn.Linear)
        return linear.weight.float()
    weight: Tensor = linear.get_base_layer().weight.float()
    for name in linear.active_adapters:
        if name in linear.lora_A:
            weight = weight + linear.get_delta_weight(name)
    return weight
