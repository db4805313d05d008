"""Attention of a chunk to a frozen, shared context and to itself."""

from __future__ import annotations

from typing import Literal, overload

import torch.nn.functional as F
from torch import Tensor

from csrc_triton.fork_attention import naive
from csrc_triton.kv_cache import CacheView

Context = CacheView | tuple[Tensor, Tensor]


@overload
def fork_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: Context | None = None,
    *,
    softmax_scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def fork_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: Context | None = None,
    *,
    softmax_scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def fork_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: Context | None = None,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of q over the context's keys and its own chunk's keys together.

    Args:
        q, k, v: [B, L, heads, head_dim], one dtype and device.
        context: None, a `CacheView` of P branches, or a pair of tensors [P, Lp, heads, head_dim], with P
            dividing B: batch b attends to context b // (B // P). It is frozen: no gradient reaches it.
        softmax_scale: multiplies the scores; head_dim ** -0.5 by default.
        return_lse: also return the fp32 log-sum-exp [B, heads, L].

    Raises:
        ValueError: for shapes that do not fit, naming the argument.
    """
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape:
        found = tuple(q.shape), tuple(k.shape), tuple(v.shape)
        raise ValueError(f"q, k, v: found {found}; accepted: one shape [B, L, heads, head_dim]")
    pair = context.gather() if isinstance(context, CacheView) else context
    if pair is not None:
        _check_context(q, pair)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if return_lse:
        out, lse = naive.fork_attention(q, k, v, pair, scale)
        return out, lse.float()
    if pair is not None:
        k, v = naive.concatenate(k, v, pair)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out.transpose(1, 2)


def _check_context(q: Tensor, pair: tuple[Tensor, Tensor]) -> None:
    past_k, past_v = pair
    if past_k.ndim != 4 or past_k.shape != past_v.shape or past_k.shape[2:] != q.shape[2:]:
        found = tuple(past_k.shape), tuple(past_v.shape)
        raise ValueError(f"context: found {found}; accepted: two of [P, Lp, {q.shape[2]}, {q.shape[3]}]")
    if past_k.shape[0] < 1 or q.shape[0] % past_k.shape[0]:
        raise ValueError(f"context: found {past_k.shape[0]} contexts; accepted: a number that divides {q.shape[0]}")
    if past_k.requires_grad or past_v.requires_grad:
        raise ValueError("context: found a tensor that requires grad; accepted: frozen tensors (detach them)")
