"""Kernels for autoregressive video diffusion: needs torch (and Triton) and nothing else."""

from csrc_triton.flow_policy_loss import FlowPolicyTerms, flow_policy_loss
from csrc_triton.flow_sde import FlowStep, flow_sde_step
from csrc_triton.fork_attention import fork_attention
from csrc_triton.kv_cache import CacheView, ForkableKVCache

__all__ = [
    "CacheView",
    "FlowPolicyTerms",
    "FlowStep",
    "ForkableKVCache",
    "flow_policy_loss",
    "flow_sde_step",
    "fork_attention",
]
