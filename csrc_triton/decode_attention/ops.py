"""The fused kernels as a custom op of torch. Its implementation imports Triton when it first runs."""

from __future__ import annotations

from torch import Tensor

from csrc_triton._registration import custom_op


@custom_op("decode_attention")
def decode_attention_op(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """As the public function; `scale` given."""
    from csrc_triton.decode_attention import fused

    return fused.decode_attention(q, k, v, lengths, scale)


@decode_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape)
