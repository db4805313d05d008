"""Query and key norms, RoPE, and the write of a chunk's K and V into a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from csrc_triton import runtime
from csrc_triton.qk_norm_rope import naive, ops
from csrc_triton.qk_norm_rope.rope import rope_tables, rope_tables_from_complex, rotate

if TYPE_CHECKING:
    from csrc_triton.kv_cache import CacheRows

__all__ = ["qk_norm_rope", "rope_tables", "rope_tables_from_complex", "rotate"]

Rope = tuple[Tensor, Tensor]
HEAD_DIMS = tuple(2**power for power in range(1, 9))  # that the kernels serve: a head lies within one chunk of a row
MOST_BATCH = 65_535  # its grid's second dimension


@overload
def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    rope: Rope | None,
    *,
    heads: int,
    eps: float,
    v: Tensor | None = None,
    write: CacheRows | None = None,
    write_roped: bool = True,
) -> tuple[Tensor, Tensor]: ...


@overload
def qk_norm_rope(
    q: Tensor,
    k: None,
    weight_q: Tensor,
    weight_k: None,
    rope: Rope | None,
    *,
    heads: int,
    eps: float,
) -> tuple[Tensor, None]: ...


def qk_norm_rope(
    q: Tensor,
    k: Tensor | None,
    weight_q: Tensor,
    weight_k: Tensor | None,
    rope: Rope | None,
    *,
    heads: int,
    eps: float,
    v: Tensor | None = None,
    write: CacheRows | None = None,
    write_roped: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """RMS norm of queries and keys over all channels, split into heads, RoPE, and optionally the write to the cache.

    Returns queries and keys [B, L, heads, head_dim]. Gradients reach q, k and the weights, but do not pass through the
    cache. The fused path computes in fp32 and rounds once; where autograd records, `write` is a second pass over k
    and v.

    Args:
        q, k, v: projections [B, L, heads * head_dim], one dtype and device. k None: norm queries alone.
        weight_q, weight_k: [heads * head_dim] of the RMS norms.
        rope: cos and sin of the rotation angles of adjacent channel pairs, fp32 [L, head_dim / 2] or
            [L, 1, head_dim / 2], the same in every head and batch row; None: no rotation.
        heads: number of heads.
        eps: added to the mean square.
        v: values to write; None without `write`.
        write: cache rows to write K and V to, from `ForkableKVCache.rows_of`; None: no write.
        write_roped: write K after RoPE; False: before it.

    Raises:
        ValueError: naming the argument. Rows outside the pools are detected on the CPU only: on a GPU that would
            synchronise.
    """
    _check(q, k, weight_q, weight_k, rope, heads, eps)
    _check_write(q, k, v, write, heads)
    if rope is not None:
        cos, sin = (table.reshape(q.shape[1], -1).contiguous() for table in rope)
        rope = cos, sin
    unfit = _unfit(q, weight_q, weight_k, write, heads)
    if runtime.choose("qk_norm_rope", q.device, q.dtype, unfit=unfit) == "triton":
        return _fused(q, k, weight_q, weight_k, rope, heads, eps, v, write, write_roped)
    q_out, _ = naive.norm_rope(q, weight_q, rope, heads, eps)
    if k is None or weight_k is None:
        return q_out, None
    k_out, plain = naive.norm_rope(k, weight_k, rope, heads, eps)
    if write is not None and v is not None:
        for pool, own in ((write.k, k_out if write_roped else plain), (write.v, v.unflatten(-1, (heads, -1)))):
            # .data: autograd need not know, committed rows never change
            pool.data.index_copy_(0, write.rows, own.detach().flatten(0, 1).to(pool.dtype))
    return q_out, k_out


def _fused(
    q: Tensor,
    k: Tensor | None,
    weight_q: Tensor,
    weight_k: Tensor | None,
    rope: Rope | None,
    heads: int,
    eps: float,
    v: Tensor | None,
    write: CacheRows | None,
    write_roped: bool,
) -> tuple[Tensor, Tensor | None]:
    cos, sin = rope or (None, None)
    if write is None or k is None or v is None or weight_k is None:
        q_out, k_out = ops.forward_op(q, k, weight_q, weight_k, cos, sin, heads, eps)
        return q_out, None if k is None else k_out
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, weight_q, weight_k))
    with torch.no_grad():
        q_out, k_out = ops.write_op(
            None if recorded else q, k, v, None if recorded else weight_q, weight_k, cos, sin,
            write.k.data, write.v.data, write.first_rows, heads, eps, write_roped,
        )  # fmt: skip
    if recorded:
        q_out, k_out = ops.forward_op(q, k, weight_q, weight_k, cos, sin, heads, eps)
    return q_out, k_out


def _check(
    q: Tensor,
    k: Tensor | None,
    weight_q: Tensor,
    weight_k: Tensor | None,
    rope: Rope | None,
    heads: int,
    eps: float,
) -> None:
    if q.ndim != 3 or not q.is_floating_point():
        raise ValueError(f"q: found {tuple(q.shape)} {q.dtype}; accepted: floating point [B, L, heads * head_dim]")
    if heads < 1 or q.shape[-1] % heads:
        raise ValueError(f"heads: found {heads}; accepted: a number that divides the {q.shape[-1]} channels of q")
    if not eps >= 0:
        raise ValueError(f"eps: found {eps}; accepted: a number of at least 0")
    if (k is None) != (weight_k is None):
        raise ValueError("weight_k: found one of k and weight_k without the other; accepted: both, or neither")
    _check_like("k", k, q)
    _check_contiguous(q=q, k=k)
    for name, weight in (("weight_q", weight_q), ("weight_k", weight_k)):
        if weight is not None and (weight.shape != q.shape[-1:] or weight.device != q.device):
            found, accepted = f"{tuple(weight.shape)} on {weight.device}", f"{tuple(q.shape[-1:])} on {q.device}"
            raise ValueError(f"{name}: found {found}; accepted: {accepted}")
        if weight is not None and not (weight.is_floating_point() and weight.is_contiguous()):
            found = f"{weight.dtype} with strides {weight.stride()}"
            raise ValueError(f"{name}: found {found}; accepted: floating point, contiguous")
    if rope is not None:
        _check_rope(rope, q, heads)


def _check_rope(rope: Rope, q: Tensor, heads: int) -> None:
    length, head_dim = q.shape[1], q.shape[2] // heads
    if head_dim % 2:
        raise ValueError(f"heads: found {heads} heads of {head_dim} channels; accepted with rope: even head sizes")
    shapes = (length, head_dim // 2), (length, 1, head_dim // 2)
    for name, table in zip(("cos", "sin"), rope, strict=True):
        if tuple(table.shape) not in shapes or table.dtype != torch.float32 or table.device != q.device:
            found = f"{tuple(table.shape)} {table.dtype} on {table.device}"
            raise ValueError(f"rope: found {name} {found}; accepted: {shapes[0]} or {shapes[1]} float32 on {q.device}")
        if table.requires_grad:
            raise ValueError(f"rope: found {name} that requires grad; accepted: tables without gradient")


def _check_write(q: Tensor, k: Tensor | None, v: Tensor | None, write: CacheRows | None, heads: int) -> None:
    if write is None:
        if v is not None:
            raise ValueError("v: found values and no `write`; accepted: both, or neither")
        return
    if k is None or v is None:
        raise ValueError("write: found no k or no v; accepted: both, K and V are written together")
    _check_like("v", v, q)
    _check_contiguous(v=v)
    head = heads, q.shape[2] // heads
    for name, pool in (("write.k", write.k), ("write.v", write.v)):
        if pool.ndim != 3 or tuple(pool.shape[1:]) != head or pool.device != q.device:
            found, accepted = f"{tuple(pool.shape)} on {pool.device}", f"[rows, {head[0]}, {head[1]}] on {q.device}"
            raise ValueError(f"{name}: found {found}; accepted: {accepted}")
    first, batch = write.first_rows, q.shape[0]
    fits = first.shape[:1] == (batch,) and first.ndim in (1, 2) and first.is_contiguous()
    if not fits or first.dtype != torch.int64 or first.device != q.device:
        found, accepted = f"{tuple(first.shape)} {first.dtype} on {first.device}", f"({batch},) or ({batch}, pages)"
        raise ValueError(f"write.first_rows: found {found}; accepted: {accepted}, int64 on {q.device}, contiguous")
    if write.length != q.shape[1]:
        raise ValueError(f"write.length: found {write.length}; accepted: {q.shape[1]}, the tokens of q")
    pages = first.shape[1] if first.ndim == 2 else 1
    if pages < 1 or write.length % pages:
        accepted = f"a number that divides the {write.length} tokens"
        raise ValueError(f"write.first_rows: found {pages} pages; accepted: {accepted}")
    if first.device.type == "cpu" and len(first) and not torch.compiler.is_compiling():
        last = min(write.k.shape[0], write.v.shape[0]) - write.length // pages
        if first.min() < 0 or first.max() > last:
            raise ValueError(f"write.first_rows: found {first.tolist()}; accepted: rows in [0, {last}]")


def _check_like(name: str, tensor: Tensor | None, q: Tensor) -> None:
    if tensor is not None and (tensor.shape != q.shape or tensor.dtype != q.dtype or tensor.device != q.device):
        found = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        raise ValueError(f"{name}: found {found}; accepted: {tuple(q.shape)} {q.dtype} on {q.device}, as q")


def _check_contiguous(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name}: found strides {tensor.stride()}; accepted: a contiguous last dimension")


def _unfit(q: Tensor, weight_q: Tensor, weight_k: Tensor | None, write: CacheRows | None, heads: int) -> str | None:
    """Why the fused kernels cannot serve."""
    head_dim = q.shape[2] // heads
    if q.numel() == 0:
        return "q has no elements"
    if q.shape[0] > MOST_BATCH:
        return f"more than {MOST_BATCH} batch rows"
    if head_dim not in HEAD_DIMS:
        return f"heads of {head_dim} channels; accepted: a power of two in [{HEAD_DIMS[0]}, {HEAD_DIMS[-1]}]"
    pools = {} if write is None else {"write.k": write.k, "write.v": write.v}
    for name, tensor in {"weight_q": weight_q, "weight_k": weight_k, **pools}.items():
        if tensor is not None and tensor.dtype not in runtime.DTYPES:
            return f"{name} is {tensor.dtype}"
    if any(pool.stride()[1:] != (head_dim, 1) for pool in pools.values()):
        return "a row of the pools is not contiguous"
    return None
