"""Attention of one new token a sequence to the keys and values of its sequence so far. Inference only: no gradients.

Sequences of any lengths share a batch of fixed size, as CUDA graphs need it: the kernel reads the keys that count and
no others, so a sequence's result does not depend on the lengths of those beside it, and idle rows cost nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from csrc_triton import runtime
from csrc_triton._registration import no_gradient
from csrc_triton.decode_attention import naive, ops
from csrc_triton.runtime import describe

HEAD_DIMS = (16, 32, 64, 128, 256)  # that a kernel serves
MOST_HEADS = 65_535  # the kernels' grid


def decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, softmax_scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale) v over the first `lengths[b]` keys of each sequence; returns [B, heads, head_dim].

    Args:
        q: [B, heads, head_dim], the new tokens.
        k, v: [B, key heads, most keys, head_dim], dtype of q, the last dimension contiguous; `heads` is a multiple of
            `key heads`, and consecutive heads share one (GQA).
        lengths: [B] int32 or int64, from 0 to the number of keys, on the device of q, which is not synchronised: larger
            ones count as that number. A sequence of length 0 gives zeros.
        softmax_scale: None for head_dim ** -0.5.

    Raises:
        ValueError: naming the argument, also for one that requires a gradient where gradients are recorded.
    """
    _check(q, k, v, lengths)
    no_gradient("decode_attention", q=q, k=k, v=v)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    unfit = runtime.why_unfit(q)
    if unfit is None and q.shape[-1] not in HEAD_DIMS:
        unfit = f"heads of {q.shape[-1]}; accepted: {', '.join(map(str, HEAD_DIMS))}"
    if unfit is None and max(q.shape[0], k.shape[1]) > MOST_HEADS:
        unfit = f"more than {MOST_HEADS} sequences or key heads"
    if runtime.choose("decode_attention", q.device, q.dtype, unfit=unfit) == "triton":
        return ops.decode_attention_op(q, k, v, lengths, scale)
    return naive.decode_attention(q, k, v, lengths, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> None:
    if q.ndim != 3 or not q.is_floating_point():
        raise ValueError(f"q: found {describe(q)}; accepted: floating point [B, heads, head_dim]")
    batch, heads, dim = q.shape
    for name, tensor in (("k", k), ("v", v)):
        fits = tensor.ndim == 4 and (tensor.shape[0], tensor.shape[3]) == (batch, dim) and tensor.shape == k.shape
        if not fits or tensor.dtype != q.dtype or tensor.device != q.device:
            accepted = f"({batch}, key heads, keys, {dim}) {q.dtype} on {q.device}, k and v alike"
            raise ValueError(f"{name}: found {describe(tensor)}; accepted: {accepted}")
        if tensor.numel() and tensor.stride(3) != 1:
            raise ValueError(f"{name}: found strides {tensor.stride()}; accepted: a contiguous last dimension")
    if not k.shape[1] or heads % k.shape[1]:
        raise ValueError(f"k: found {k.shape[1]} key heads; accepted: a divisor of the {heads} heads of q")
    whole = lengths.dtype in (torch.int32, torch.int64)
    if lengths.shape != (batch,) or not whole or lengths.device != q.device:
        raise ValueError(f"lengths: found {describe(lengths)}; accepted: ({batch},) int32 or int64 on {q.device}")
