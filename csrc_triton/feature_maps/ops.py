"""The fused kernels as custom ops of torch. Their implementations import Triton when they first run."""

from __future__ import annotations

from torch import Tensor

from csrc_triton._registration import custom_op


@custom_op("norm_silu", mutates_args=("total", "out"))
def norm_silu_op(
    x: Tensor, update: Tensor | None, bias: Tensor | None, gamma: Tensor | None, total: Tensor | None, out: Tensor
) -> None:
    """As `feature_maps.norm_silu`; without gamma the sum alone goes to out."""
    from csrc_triton.feature_maps import fused

    fused.norm_silu(x, update, bias, gamma, total, out)


@norm_silu_op.register_fake
def _(
    x: Tensor, update: Tensor | None, bias: Tensor | None, gamma: Tensor | None, total: Tensor | None, out: Tensor
) -> None:
    pass


@custom_op("enlarge")
def enlarge_op(x: Tensor, update: Tensor | None, bias: Tensor | None, parts: int) -> Tensor:
    """As `feature_maps.enlarge`."""
    from csrc_triton.feature_maps import fused

    out = _enlarged(x, parts)
    fused.enlarge(x, update, bias, parts, out)
    return out


@enlarge_op.register_fake
def _(x: Tensor, update: Tensor | None, bias: Tensor | None, parts: int) -> Tensor:
    return _enlarged(x, parts)


def _enlarged(x: Tensor, parts: int) -> Tensor:
    n, height, width, channels = x.shape
    return x.new_empty(n * parts, 2 * height, 2 * width, channels // parts)
