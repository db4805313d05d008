"""What fork attention accepts: each refusal names the argument, what was found and what is accepted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from csrc_triton._tables import CacheView, staged

Context = CacheView | tuple[Tensor, Tensor]
Index = Tensor | Sequence[int]


def own_keys(q: Tensor, k: Tensor | None, v: Tensor | None, context: Context | None) -> tuple[Tensor, Tensor]:
    """k and v, checked together with q; those of an empty own chunk where they are None."""
    if q.ndim != 4 or q.numel() == 0:
        raise ValueError(f"q: found {tuple(q.shape)}; accepted: [B, Lq, heads, head_dim], none of them 0")
    if (k is None) != (v is None):
        raise ValueError(f"k, v: found None for {'k' if k is None else 'v'} alone; accepted: both or none of them")
    if k is None or v is None:
        if context is None:
            raise ValueError("k, v: found None and no context; accepted: own keys, or a context to attend to")
        keys = context.k if isinstance(context, CacheView) else context[0]
        k, v = (q.new_zeros(q.shape[0], 0, keys.shape[-2] if keys.ndim > 2 else 1, q.shape[3]) for _ in range(2))
    fits = k.ndim == 4 and k.shape == v.shape and (k.shape[0], k.shape[3]) == (q.shape[0], q.shape[3])
    if not fits or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        found = f"{tuple(k.shape)}, {tuple(v.shape)} for q {tuple(q.shape)}"
        accepted = f"two of [{q.shape[0]}, Lk, kv_heads, {q.shape[3]}] with kv_heads dividing {q.shape[2]}"
        raise ValueError(f"k, v: found {found}; accepted: {accepted}")
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k, v: found {q.dtype}, {k.dtype}, {v.dtype}; accepted: one floating-point dtype")
    if k.device != q.device or v.device != q.device:
        raise ValueError(f"q, k, v: found them on {q.device}, {k.device}, {v.device}; accepted: one device")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _contiguous(name, tensor)
    return k, v


def options(q: Tensor, softmax_scale: float | None, causal_block: int | None) -> float:
    """The factor of the scores."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if not 0 < scale < math.inf:
        raise ValueError(f"softmax_scale: found {scale}; accepted: a positive number")
    if causal_block is not None and (type(causal_block) is not int or causal_block < 1):
        raise ValueError(f"causal_block: found {causal_block!r}; accepted: None, or a number of tokens from 1")
    return scale


def context(q: Tensor, kv_heads: int, given: Context | None, index: Index | None) -> Tensor | None:
    """Checks the context and returns the index on the device of q."""
    if given is None:
        if index is not None:
            raise ValueError("context_index: found one without a context; accepted: None, or a context")
        return None
    if isinstance(given, CacheView):
        name, contexts = "context.table", given.table.shape[0]
        _view(q, kv_heads, given)
    else:
        name, contexts = "context", given[0].shape[0] if given[0].ndim else 0
        _pair(q, kv_heads, given)
    if index is not None:
        return _index(q, index, contexts)
    if contexts < 1 or q.shape[0] % contexts:
        accepted = f"a number that divides {q.shape[0]}, or any with a context_index"
        raise ValueError(f"{name}: found {contexts} contexts; accepted: {accepted}")
    return None


def _view(q: Tensor, kv_heads: int, view: CacheView) -> None:
    view.check_held()
    head_dim = q.shape[3]
    if view.k.ndim != 3 or view.v.shape != view.k.shape or view.k.shape[1:] != (kv_heads, head_dim):
        found = tuple(view.k.shape), tuple(view.v.shape)
        raise ValueError(f"context.k, context.v: found {found}; accepted: two of [rows, {kv_heads}, {head_dim}]")
    _frozen(q, "context.k", view.k)
    _frozen(q, "context.v", view.v)
    if view.table.device != q.device:
        raise ValueError(f"context.table: found it on {view.table.device}; accepted: {q.device}, where q is")


def _pair(q: Tensor, kv_heads: int, pair: tuple[Tensor, Tensor]) -> None:
    past_k, past_v = pair
    if past_k.ndim != 4 or past_k.shape != past_v.shape or past_k.shape[2:] != (kv_heads, q.shape[3]):
        found = tuple(past_k.shape), tuple(past_v.shape)
        raise ValueError(f"context: found {found}; accepted: two of [P, Lp, {kv_heads}, {q.shape[3]}]")
    for past in pair:
        _frozen(q, "context", past)


def _index(q: Tensor, index: Index, contexts: int) -> Tensor:
    """Its range is checked where the index is on the host, and not while torch.compile traces."""
    if isinstance(index, Tensor):
        whole = index.dtype in (torch.int32, torch.int64)
        if index.shape != q.shape[:1] or not whole or index.device not in (q.device, torch.device("cpu")):
            found = f"{tuple(index.shape)} {index.dtype} on {index.device}"
            accepted = f"({q.shape[0]},) int32 or int64 on {q.device} or the CPU"
            raise ValueError(f"context_index: found {found}; accepted: {accepted}")
        known = index.device.type == "cpu" and not torch.compiler.is_compiling()
        _range(index.tolist() if known else [], contexts)
        return index.to(q.device).contiguous()
    if len(index) != q.shape[0] or not all(isinstance(i, int) for i in index):
        raise ValueError(f"context_index: found {index}; accepted: {q.shape[0]} numbers, one a batch row")
    _range(index, contexts)
    return staged(list(index), torch.int32, q.device).to(q.device, non_blocking=True)


def _range(index: Sequence[int], contexts: int) -> None:
    outside = [i for i in index if not 0 <= i < contexts]
    if outside:
        raise ValueError(f"context_index: found {outside[0]}; accepted: 0 to {contexts - 1}, a number of a context")


def _frozen(q: Tensor, name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(f"{name}: found a tensor that requires grad; accepted: frozen tensors (detach them)")
    if tensor.dtype != q.dtype or tensor.device != q.device:
        raise ValueError(f"{name}: found {tensor.dtype} on {tensor.device}; accepted: {q.dtype} on {q.device}, as q")
    _contiguous(name, tensor)


def _contiguous(name: str, tensor: Tensor) -> None:
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name}: found strides {tensor.stride()}; accepted: a contiguous last dimension (stride 1)")
