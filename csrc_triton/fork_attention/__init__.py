"""Attention of chunks over their own tokens and a frozen context that several chunks may share."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from csrc_triton import runtime
from csrc_triton._tables import CacheView
from csrc_triton.fork_attention import naive, ops

Context = CacheView | tuple[Tensor, Tensor]

HEAD_DIMS = (32, 64, 128)  # that the kernels serve


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
    """Softmax attention of each query over the keys of the context and of its own chunk together.

    Equal to attention over the concatenated keys, without concatenating or expanding them; lengths are arbitrary.
    Gradients reach q, k and v, also through the log-sum-exp. The context gets none, and its rows must not change until
    the backward pass: `CacheView` says where that is checked. Returns [B, L, heads, head_dim] in the dtype of q.

    Args:
        q, k, v: [B, L, heads, head_dim], one dtype and device, the last dimension contiguous.
        context: None, a `CacheView` of P branches, or keys and values [P, Lp, heads, head_dim]; P divides B, and batch
            row b attends to context b // (B // P). The segments of a view must lie in its pools, which the cache and
            `CacheView.of` ensure; a check here would synchronise with the device.
        softmax_scale: factor of the scores, > 0; head_dim ** -0.5 by default.
        return_lse: also return the natural log of the sum of exponentials, fp32 [B, heads, L].

    Raises:
        ValueError: for tensors that do not fit together, and where a forced backend cannot serve (the kernels: head
            sizes 32, 64 and 128 in fp32, bf16 and fp16; the Hopper kernels: a GPU of capability 9.0, head sizes 64
            and 128 in bf16 and fp16, and addresses and strides that are multiples of 16 bytes), naming the argument,
            what was found and what is accepted.
    """
    _check_own(q, k, v)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"softmax_scale: found {scale}; accepted: a positive number")
    if isinstance(context, CacheView):
        _check_view(q, context)
    elif context is not None:
        _check_pair(q, context)
    unfit = None if q.shape[-1] in HEAD_DIMS else f"head_dim {q.shape[-1]}; accepted: 32, 64, 128"
    if runtime.choose("fork_attention", q.device, q.dtype, unfit=unfit) == "torch":
        found = _on_torch(q, k, v, context, scale, return_lse)
        if isinstance(context, CacheView):
            context.guard(*(found if isinstance(found, tuple) else (found,)))
        return found
    if isinstance(context, CacheView):
        out, lse = ops.forward(q, k, v, context.k, context.v, context.table, scale)
        context.guard(out)
    else:
        out, lse = ops.forward(q, k, v, *(context or (None, None)), None, scale)
    return (out, lse) if return_lse else out


def _on_torch(
    q: Tensor, k: Tensor, v: Tensor, context: Context | None, scale: float, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    pair = context.gather() if isinstance(context, CacheView) else context
    if return_lse:
        working = torch.promote_types(q.dtype, torch.float32)
        out, lse = naive.fork_attention(q.to(working), k.to(working), v.to(working), pair, scale)
        return out.to(q.dtype), lse.float()
    if pair is not None:
        k, v = naive.concatenate(k, v, pair)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out.transpose(1, 2)


def _check_own(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape or q.numel() == 0:
        found = tuple(q.shape), tuple(k.shape), tuple(v.shape)
        raise ValueError(f"q, k, v: found {found}; accepted: one shape [B, L, heads, head_dim], none of them 0")
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k, v: found {q.dtype}, {k.dtype}, {v.dtype}; accepted: one floating-point dtype")
    if k.device != q.device or v.device != q.device:
        raise ValueError(f"q, k, v: found them on {q.device}, {k.device}, {v.device}; accepted: one device")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_contiguous(name, tensor)


def _check_view(q: Tensor, view: CacheView) -> None:
    view.check_held()
    heads, head_dim = q.shape[2:]
    if view.k.ndim != 3 or view.v.shape != view.k.shape or view.k.shape[1:] != q.shape[2:]:
        found = tuple(view.k.shape), tuple(view.v.shape)
        raise ValueError(f"context.k, context.v: found {found}; accepted: two of [rows, {heads}, {head_dim}]")
    _check_frozen(q, "context.k", view.k)
    _check_frozen(q, "context.v", view.v)
    if view.table.device != q.device:
        raise ValueError(f"context.table: found it on {view.table.device}; accepted: {q.device}, where q is")
    _check_count("context.table", q, view.table.shape[0])


def _check_pair(q: Tensor, pair: tuple[Tensor, Tensor]) -> None:
    past_k, past_v = pair
    if past_k.ndim != 4 or past_k.shape != past_v.shape or past_k.shape[2:] != q.shape[2:]:
        found = tuple(past_k.shape), tuple(past_v.shape)
        raise ValueError(f"context: found {found}; accepted: two of [P, Lp, {q.shape[2]}, {q.shape[3]}]")
    _check_count("context", q, past_k.shape[0])
    for past in pair:
        _check_frozen(q, "context", past)


def _check_count(name: str, q: Tensor, contexts: int) -> None:
    if contexts < 1 or q.shape[0] % contexts:
        raise ValueError(f"{name}: found {contexts} contexts; accepted: a number that divides {q.shape[0]}")


def _check_frozen(q: Tensor, name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(f"{name}: found a tensor that requires grad; accepted: frozen tensors (detach them)")
    if tensor.dtype != q.dtype or tensor.device != q.device:
        raise ValueError(f"{name}: found {tensor.dtype} on {tensor.device}; accepted: {q.dtype} on {q.device}, as q")
    _check_contiguous(name, tensor)


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name}: found strides {tensor.stride()}; accepted: a contiguous last dimension (stride 1)")
