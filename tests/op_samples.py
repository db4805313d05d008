"""A small call of every public op, and of every op registered with torch, for tests of what all of them must do."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import csrc_triton
from csrc_triton import (
    CacheRows,
    adaln,
    decode_attention,
    enlarge,
    flow_policy_loss,
    flow_policy_loss_and_grad,
    flow_sde_step,
    fork_attention,
    fp8_linear,
    fp8_rows,
    gated_residual,
    gated_residual_adaln,
    gated_residual_norm,
    norm_silu,
    qk_norm_rope,
)

EPS, CLIP = 1e-6, 0.1
B, L, DIM, HEADS, HEAD_DIM = 2, 4, 32, 1, 32


@dataclass(frozen=True)
class Call:
    """One call of a public op.

    run: from the tensors of `inputs` to one tensor of fp32 numbers, in which all outputs that have gradients take part.
    leaves: inputs that get gradients; none for ops of inference.
    """

    run: Callable[..., Tensor]
    inputs: tuple[str, ...]
    leaves: tuple[str, ...] = ()
    writes: bool = False


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _tensors() -> dict[str, Tensor]:
    x, y, q, k, v = (draw(B, L, DIM, seed=seed) for seed in range(5))
    gate, shift, scale = (draw(B, 2, DIM, seed=seed) for seed in range(5, 8))
    weight, bias = 1 + draw(DIM, seed=8), draw(DIM, seed=9)
    turns = draw(L, HEAD_DIM // 2, seed=10)
    return {
        "x": x, "y": y, "gate": gate, "shift": shift, "scale": scale, "weight": weight, "bias": bias,
        "q": q, "k": k, "v": v, "cos": turns.cos(), "sin": turns.sin(),
        "q4": q.view(B, L, HEADS, HEAD_DIM), "k4": k.view(B, L, HEADS, HEAD_DIM), "v4": v.view(B, L, HEADS, HEAD_DIM),
        "past_k": draw(1, 5, HEADS, HEAD_DIM, seed=11), "past_v": draw(1, 5, HEADS, HEAD_DIM, seed=12),
        "noise": draw(B, L, DIM, seed=13), "advantage": draw(B, seed=14),
        "query": draw(B, HEADS, HEAD_DIM, seed=15), "lengths": torch.tensor([3, 5]),
        "keys": draw(B, 1, 5, HEAD_DIM, seed=16), "values": draw(B, 1, 5, HEAD_DIM, seed=17),
    }  # fmt: skip


INPUTS = _tensors()


def total(outputs: Any) -> Tensor:
    """[B] of all outputs that are tensors, of any shape [B, ...], each element with a weight of its own."""
    outputs = [outputs] if isinstance(outputs, Tensor) else [out for out in outputs if isinstance(out, Tensor)]
    floats = [out.flatten(1) if out.ndim > 1 else out[:, None] for out in outputs if out.is_floating_point()]
    return torch.stack(
        [(out.sin() * torch.arange(1, out.shape[1] + 1, device=out.device)).mean(1) for out in floats]
    ).sum(0)


def _norm_silu(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    out, summed = torch.zeros_like(x), torch.zeros_like(x)
    norm_silu(x, weight, out=out, update=y, total=summed)
    return total((out, summed))


def _write(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    pools = [torch.zeros(B * L, HEADS, HEAD_DIM, device=q.device) for _ in range(2)]
    rows = CacheRows(*pools, L * torch.arange(B, device=q.device), L)
    out = qk_norm_rope(q, k, weight, bias, None, heads=HEADS, eps=EPS, v=v, write=rows)
    return total([*out, *(pool.unflatten(0, (B, L)) for pool in pools)])


def _fp8_rows(x: Tensor) -> Tensor:
    rows = fp8_rows(x, gelu=True)
    return total((rows.values.float(), rows.scales))


def _terms_and_grad(x: Tensor, y: Tensor, v: Tensor, noise: Tensor, advantage: Tensor) -> Tensor:
    terms, gradient = flow_policy_loss_and_grad(x, y, v, noise, advantage, clip=CLIP, kl_weight=0.5)
    return total([*terms, gradient])


CALLS = {
    "adaln": Call(lambda x, shift, scale: total(adaln(x, shift, scale, eps=EPS)), *(("x", "shift", "scale"),) * 2),
    "gated_residual": Call(lambda x, y, gate: total(gated_residual(x, y, gate)), *(("x", "y", "gate"),) * 2),
    "gated_residual_adaln": Call(
        lambda x, y, gate, shift, scale: total(gated_residual_adaln(x, y, gate, shift, scale, eps=EPS)),
        *(("x", "y", "gate", "shift", "scale"),) * 2,
    ),
    "gated_residual_norm": Call(
        lambda x, y, gate, weight, bias: total(gated_residual_norm(x, y, gate, weight, bias, eps=EPS)),
        *(("x", "y", "gate", "weight", "bias"),) * 2,
    ),
    "qk_norm_rope": Call(
        lambda q, k, weight, bias, cos, sin: total(qk_norm_rope(q, k, weight, bias, (cos, sin), heads=HEADS, eps=EPS)),
        ("q", "k", "weight", "bias", "cos", "sin"),
        ("q", "k", "weight", "bias"),
    ),
    "qk_norm_rope (write)": Call(_write, ("q", "k", "v", "weight", "bias"), ("q", "k", "weight", "bias"), writes=True),
    "flow_sde_step": Call(
        lambda x, v, noise: total(flow_sde_step(x, v, noise, 0.9, 0.5)[1:4:2]), ("x", "v", "noise"), ("x", "v")
    ),
    "flow_policy_loss": Call(
        lambda x, y, v, noise, advantage: total(flow_policy_loss(x, y, v, noise, advantage, clip=CLIP)),
        ("x", "y", "v", "noise", "advantage"),
        ("x",),
    ),
    "flow_policy_loss_and_grad": Call(_terms_and_grad, ("x", "y", "v", "noise", "advantage")),
    "fork_attention": Call(
        lambda q4, k4, v4, past_k, past_v: total(fork_attention(q4, k4, v4, (past_k, past_v), return_lse=True)),
        ("q4", "k4", "v4", "past_k", "past_v"),
        ("q4", "k4", "v4"),
    ),
    "norm_silu": Call(_norm_silu, ("x", "y", "weight"), writes=True),
    "enlarge": Call(lambda x, y: total(enlarge(x[:, None], update=y[:, None]).unflatten(0, (B, -1))), ("x", "y")),
    "decode_attention": Call(
        lambda query, keys, values, lengths: total(decode_attention(query, keys, values, lengths)),
        ("query", "keys", "values", "lengths"),
    ),
    "fp8_rows": Call(_fp8_rows, ("x",)),
    "fp8_linear": Call(lambda x, keys: total(fp8_linear(x, fp8_rows(keys.flatten(0, 2)), None)), ("x", "keys")),
}


def run(name: str, changes: dict[str, Tensor] | None = None) -> Tensor:
    call, given = CALLS[name], INPUTS | (changes or {})
    return call.run(*(given[key] for key in call.inputs))


def registered() -> set[str]:
    """Names of all ops of the namespace csrc_triton, after every module of the package was imported."""
    for module in pkgutil.walk_packages(csrc_triton.__path__, "csrc_triton."):
        if not module.name.startswith("csrc_triton.integrations.") and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("csrc_triton::") for name in names if name.startswith("csrc_triton::")}
