"""Kernels for autoregressive video diffusion. The package imports torch and, for its kernels, Triton; nothing else.

One folder an op: `__init__.py` has the public function; `naive.py` the arithmetic in plain PyTorch, which is the
reference of tests and benches and serves where no kernel can; `fused.py` (for fork attention `portable/` and `hopper/`)
the kernels. `runtime` chooses the implementation by device and dtype.

The package is a library: parts of it have no caller in this repository and are tested like the rest. These are the
Philox noise of `flow_sde_step` (`seed`, `offset`), its step kinds other than "cps" with their log-probabilities, the
differentiable `flow_policy_loss`, `gated_residual`, and `ForkableKVCache.bind` and `bind_rows` (segment tables and
rows at fixed addresses for CUDA graphs).

Where an op has the name of its folder, `csrc_triton.NAME` is the function, and `csrc_triton.NAME.naive` its reference,
however it is imported (`from csrc_triton.NAME import naive`, `import csrc_triton.NAME.naive`).
"""

import importlib

from csrc_triton.adaln import adaln, gated_residual, gated_residual_adaln, gated_residual_norm
from csrc_triton.decode_attention import decode_attention
from csrc_triton.feature_maps import enlarge, norm_silu
from csrc_triton.flow_policy_loss import FlowPolicyTerms, flow_policy_loss, flow_policy_loss_and_grad
from csrc_triton.flow_sde import FlowStep, flow_sde_step
from csrc_triton.fork_attention import fork_attention
from csrc_triton.fp8_linear import Fp8Rows, fp8_linear, fp8_rows
from csrc_triton.kv_cache import CacheRows, CacheView, Chunk, ForkableKVCache, LayerViews, PoolFull
from csrc_triton.qk_norm_rope import qk_norm_rope, rope_tables, rope_tables_from_complex

# an import looks for a submodule in what has the package's name, which here is the function
for _function in (adaln, decode_attention, flow_policy_loss, fork_attention, fp8_linear, qk_norm_rope):
    vars(_function)["naive"] = importlib.import_module(f"{_function.__module__}.naive")
vars(qk_norm_rope)["rope"] = importlib.import_module(f"{qk_norm_rope.__module__}.rope")

__all__ = [
    "CacheRows",
    "CacheView",
    "Chunk",
    "FlowPolicyTerms",
    "FlowStep",
    "ForkableKVCache",
    "Fp8Rows",
    "LayerViews",
    "PoolFull",
    "adaln",
    "decode_attention",
    "enlarge",
    "flow_policy_loss",
    "flow_policy_loss_and_grad",
    "flow_sde_step",
    "fork_attention",
    "fp8_linear",
    "fp8_rows",
    "gated_residual",
    "gated_residual_adaln",
    "gated_residual_norm",
    "norm_silu",
    "qk_norm_rope",
    "rope_tables",
    "rope_tables_from_complex",
]
