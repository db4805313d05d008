"""Attention of chunks over their own tokens and a frozen context that several chunks may share."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from csrc_triton import runtime
from csrc_triton._tables import CacheView
from csrc_triton.fork_attention import checks, eager, naive, ops
from csrc_triton.fork_attention.checks import Context, Index

__all__ = ["HEAD_DIMS", "Context", "fork_attention", "naive"]

HEAD_DIMS = tuple(range(8, 257, 8))  # that the kernels serve (torch.compile takes no symbol in a range)


@overload
def fork_attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    context: Context | None = None,
    *,
    softmax_scale: float | None = None,
    return_lse: Literal[False] = False,
    context_index: Index | None = None,
    causal_block: int | None = None,
) -> Tensor: ...


@overload
def fork_attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    context: Context | None = None,
    *,
    softmax_scale: float | None = None,
    return_lse: Literal[True],
    context_index: Index | None = None,
    causal_block: int | None = None,
) -> tuple[Tensor, Tensor]: ...


def fork_attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    context: Context | None = None,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    context_index: Index | None = None,
    causal_block: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query over the keys of the context and of its own chunk together.

    Equal to attention over the concatenated keys, without concatenating or expanding them; lengths are arbitrary.
    Gradients reach q, k and v, also through the log-sum-exp. The context gets none, and its rows must not change until
    the backward pass (`CacheView` says where that is checked); other rows of the same storage may, such as those that
    a cache writes next. Returns [B, Lq, heads, head_dim] in the dtype of q, also under autocast.

    A query that sees no key at all (an empty own chunk with an empty context, or the first queries of a causal chunk
    with more queries than keys and no context) gives zeros, a log-sum-exp of -inf and gradients of zero.

    Args:
        q: [B, Lq, heads, head_dim], the last dimension contiguous.
        k, v: [B, Lk, kv_heads, head_dim], as q in dtype, device and layout. kv_heads divides heads, and consecutive
            heads of q share one of k and v (GQA, MQA). Lk may differ from Lq and be 0; None for both is the same as
            Lk = 0: attention to the context alone.
        context: None, a `CacheView` of P contexts, or keys and values [P, Lp, kv_heads, head_dim]; P divides B, and
            batch row b attends to context b // (B // P), unless there is a context_index. The segments of a view must
            lie in its pools, which the cache and `CacheView.of` ensure; a check here would synchronise with the device.
        softmax_scale: factor of the scores, > 0; head_dim ** -0.5 by default.
        return_lse: also return the natural log of the sum of exponentials, fp32 [B, heads, Lq].
        context_index: the number of the context of each batch row, [B] int32 or int64, or a list; P is then any number.
            Numbers outside [0, P) are refused where they are on the host (a list, a tensor on the CPU); on the device
            they are not checked, and the result is undefined.
        causal_block: None, or the tokens of a block of the own chunk: query i sees own key j if
            j // causal_block <= i // causal_block, as in block-causal training (one frame a block); 1 is causal by
            token. Where Lq differs from Lk the last query stands at the last key: i + Lk - Lq instead of i. The
            context is seen whole.

    Raises:
        ValueError: for tensors that do not fit together, and where a forced backend cannot serve (the kernels: head
            sizes that are multiples of 8 up to 256, in fp32, bf16 and fp16; the Hopper kernels: a GPU of capability
            9.0, head sizes 64 and 128 in bf16 and fp16, addresses and strides that are multiples of 16 bytes, Lq = Lk,
            no causal_block, and no context_index with a pair of tensors), naming the argument, what was found and what
            is accepted.
    """
    k, v = checks.own_keys(q, k, v, context)
    scale = checks.options(q, softmax_scale, causal_block)
    index = checks.context(q, k.shape[2], context, context_index)
    unfit = None if q.shape[-1] in HEAD_DIMS else f"head_dim {q.shape[-1]}; accepted: multiples of 8 up to 256"
    if runtime.choose("fork_attention", q.device, q.dtype, unfit=unfit) == "torch":
        out, lse = eager.fork_attention(q, k, v, context, scale, return_lse, index, causal_block)
        if isinstance(context, CacheView):
            context.guard(*(found for found in (out, lse) if found is not None))
        return out if lse is None else (out, lse)
    if isinstance(context, CacheView):
        table = context.table if index is None else context.table.index_select(0, index)
        out, lse = ops.forward(q, k, v, context.k, context.v, table, scale, None, causal_block or 0)
        context.guard(out)
    else:
        out, lse = ops.forward(q, k, v, *(context or (None, None)), None, scale, index, causal_block or 0)
    return (out, lse) if return_lse else out
