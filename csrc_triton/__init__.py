"""Kernels for autoregressive video diffusion: needs torch (and Triton) and nothing else."""

from csrc_triton.fork_attention import fork_attention
from csrc_triton.kv_cache import CacheView, ForkableKVCache

__all__ = ["CacheView", "ForkableKVCache", "fork_attention"]
