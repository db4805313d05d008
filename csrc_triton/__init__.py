"""Kernels for autoregressive video diffusion: needs torch (and Triton) and nothing else."""

from csrc_triton.adaln import adaln, gated_residual, gated_residual_adaln, gated_residual_norm
from csrc_triton.feature_maps import enlarge, norm_silu
from csrc_triton.flow_policy_loss import FlowPolicyTerms, flow_policy_loss, flow_policy_loss_and_grad
from csrc_triton.flow_sde import FlowStep, flow_sde_step
from csrc_triton.fork_attention import fork_attention
from csrc_triton.kv_cache import CacheRows, CacheView, ForkableKVCache, LayerViews
from csrc_triton.qk_norm_rope import qk_norm_rope

__all__ = [
    "CacheRows",
    "CacheView",
    "FlowPolicyTerms",
    "FlowStep",
    "ForkableKVCache",
    "LayerViews",
    "adaln",
    "enlarge",
    "flow_policy_loss",
    "flow_policy_loss_and_grad",
    "flow_sde_step",
    "fork_attention",
    "gated_residual",
    "gated_residual_adaln",
    "gated_residual_norm",
    "norm_silu",
    "qk_norm_rope",
]
