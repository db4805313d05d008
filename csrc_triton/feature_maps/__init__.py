"""Passes between the convolutions of a video decoder, on channels-last feature maps. Inference only: no gradients.

Sums and norms are computed in fp32 and rounded once. `bias` is the bias of the convolution before, which is run without
it: on a GPU a convolution adds its bias in a separate pass over memory.
"""

from __future__ import annotations

from torch import Tensor

from csrc_triton import runtime
from csrc_triton._registration import no_gradient
from csrc_triton.feature_maps import naive, ops
from csrc_triton.runtime import describe

MOST_CHANNELS = 4096
MOST_BATCH = 65_535  # the kernels' grid


def norm_silu(
    x: Tensor,
    gamma: Tensor | None,
    *,
    out: Tensor,
    update: Tensor | None = None,
    bias: Tensor | None = None,
    total: Tensor | None = None,
) -> None:
    """out = SiLU(norm(s)) and total = s with s = x + update + bias and the channel norm of Wan's VAE.

    norm(s) = s / max(||s||, 1e-12) * sqrt(C) * gamma. Channels of `out` beyond C are set to zero. Every batch row of
    the tensors must be contiguous.

    Args:
        x: [b, positions, C].
        gamma: [C]; None: out is s itself.
        out: [b, positions, at least C], written in place.
        update: shape and dtype of x; None: not added.
        bias: [C]; None: not added.
        total: shape and dtype of x, written in place; None: s is not stored.

    Raises:
        ValueError: naming the argument, also for one that requires a gradient where gradients are recorded.
    """
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x: found {describe(x)}; accepted: floating point [b, positions, C]")
    for name, tensor in (("x", x), ("update", update), ("total", total)):
        _check_map(name, tensor, x, x.shape)
    if out.ndim != 3 or out.shape[-1] < x.shape[-1]:
        raise ValueError(f"out: found {describe(out)}; accepted: [b, positions, at least {x.shape[-1]}]")
    _check_map("out", out, x, (*x.shape[:2], out.shape[-1]))
    _check_vectors(x, x.shape[-1], gamma=gamma, bias=bias)
    no_gradient("norm_silu", x=x, update=update, gamma=gamma, bias=bias, out=out, total=total)
    if _choose("norm_silu", x, out.shape[-1], gamma, bias) == "triton":
        ops.norm_silu_op(x, update, bias, gamma, total, out)
        return
    joined = naive.total(x, update, bias)
    if total is not None:
        total.copy_(joined)
    channels = x.shape[-1]
    out[..., :channels].copy_(joined if gamma is None else naive.norm_silu(joined, gamma))
    if out.shape[-1] > channels:
        out[..., channels:].zero_()


def enlarge(x: Tensor, *, update: Tensor | None = None, bias: Tensor | None = None, parts: int = 1) -> Tensor:
    """Nearest-neighbour upsampling by 2 of x + update + bias; returns [n * parts, 2H, 2W, C].

    Args:
        x: [n, H, W, parts * C], contiguous.
        update: shape and dtype of x; None: not added.
        bias: [parts * C]; None: not added.
        parts: groups of channels; each becomes a map of its own, in order.

    Raises:
        ValueError: naming the argument, also for one that requires a gradient where gradients are recorded.
    """
    if x.ndim != 4 or not x.is_floating_point() or not x.is_contiguous():
        raise ValueError(f"x: found {describe(x)}; accepted: contiguous floating point [n, H, W, parts * C]")
    if parts < 1 or x.shape[-1] % parts:
        raise ValueError(f"parts: found {parts}; accepted: a divisor of the {x.shape[-1]} channels")
    if update is not None and (describe(update) != describe(x) or not update.is_contiguous()):
        raise ValueError(f"update: found {describe(update)}; accepted: contiguous {describe(x)}, as x")
    _check_vectors(x, x.shape[-1], bias=bias)
    no_gradient("enlarge", x=x, update=update, bias=bias)
    if _choose("enlarge", x, x.shape[-1] // parts, bias) == "triton":
        return ops.enlarge_op(x, update, bias, parts)
    return naive.enlarge(naive.total(x, update, bias).to(x.dtype), parts)


def _choose(op: str, x: Tensor, channels: int, *vectors: Tensor | None) -> str:
    unfit = runtime.why_unfit(x, *vectors)
    if unfit is None and (channels > MOST_CHANNELS or x.shape[0] > MOST_BATCH):
        unfit = f"more than {MOST_CHANNELS} channels or {MOST_BATCH} batch rows"
    return runtime.choose(op, x.device, x.dtype, unfit=unfit)


def _check_map(name: str, tensor: Tensor | None, x: Tensor, shape: tuple[int, ...]) -> None:
    if tensor is None:
        return
    if tensor.shape != shape or tensor.dtype != x.dtype or tensor.device != x.device:
        raise ValueError(f"{name}: found {describe(tensor)}; accepted: {tuple(shape)} {x.dtype} on {x.device}")
    if tensor.numel() and not tensor[0].is_contiguous():
        raise ValueError(f"{name}: found strides {tensor.stride()}; accepted: contiguous batch rows")


def _check_vectors(x: Tensor, channels: int, **vectors: Tensor | None) -> None:
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape != (channels,) or vector.device != x.device or not vector.is_contiguous():
            raise ValueError(f"{name}: found {describe(vector)}; accepted: contiguous ({channels},) on {x.device}")
