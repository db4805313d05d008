"""Linears in float8_e4m3fn: every row of input and weight has a scale of its own. Inference only: no gradients.

A row is divided by its largest absolute value, so that it fills the range of the format, and rounded to 3 bits behind
the leading one. Products are summed in fp32 and scaled by both rows' scales. The relative error of a linear of normally
distributed numbers is 3.7e-2; that of bf16 is 1.7e-3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from csrc_triton import runtime
from csrc_triton._registration import no_gradient
from csrc_triton.fp8_linear import naive, ops
from csrc_triton.runtime import describe

MOST_WIDTH = 16_384  # of a row that the kernel serves
ROUNDING_CAPABILITY = (8, 9)  # sm_89: the first GPUs with e4m3
PRODUCT_CAPABILITY = (9, 0)  # the oldest on which products with a scale for each row were tried
MULTIPLE = 16  # of both sides of a weight, in these products


class Fp8Rows(NamedTuple):
    """Rows rounded to float8_e4m3fn.

    values: float8_e4m3fn [..., K], contiguous. scales: fp32 [..., 1], by which values are multiplied. dtype: of what
    was rounded.
    """

    values: Tensor
    scales: Tensor
    dtype: torch.dtype


def fp8_rows(x: Tensor, *, gelu: bool = False) -> Fp8Rows:
    """Rounds every row of x by its largest absolute value, in fp32: scale = max |x| / 448, values = x / scale.

    Rows are those of the last dimension: of an input its tokens, of a weight [N, K] its output channels. A row of
    zeros stays one; a row with a NaN or an infinity gives NaN.

    Args:
        x: [..., K], floating point.
        gelu: rounds GELU(x), tanh approximation, in the place of x.

    Raises:
        ValueError: naming the argument, also for one that requires a gradient where gradients are recorded.
    """
    if not x.ndim or not x.is_floating_point():
        raise ValueError(f"x: found {describe(x)}; accepted: floating point [..., K]")
    if not x.shape[-1]:
        raise ValueError(f"x: found {describe(x)}; accepted: rows of at least one element")
    no_gradient("fp8_rows", x=x)
    unfit = runtime.why_unfit(x)
    if unfit is None and x.shape[-1] > MOST_WIDTH:
        unfit = f"rows of {x.shape[-1]}; accepted: up to {MOST_WIDTH}"
    if unfit is None and runtime.older_than(x.device, ROUNDING_CAPABILITY):
        unfit = "a GPU older than sm_89, which has no float8_e4m3fn"
    if runtime.choose("fp8_rows", x.device, x.dtype, unfit=unfit) == "triton":
        values, scales = ops.fp8_rows_op(x, gelu)
        return Fp8Rows(values.view(torch.float8_e4m3fn), scales, x.dtype)
    return Fp8Rows(*naive.fp8_rows(x.contiguous(), gelu), x.dtype)


def fp8_linear(x: Tensor | Fp8Rows, weight: Fp8Rows, bias: Tensor | None) -> Tensor:
    """x weight^T + bias; returns [..., N] in the dtype of the rows x.

    The GPU's own product of float8 rows, cuBLAS's through PyTorch, serves where `why_plain` has no reason against it,
    and PyTorch's product of the same values in fp32 elsewhere and under the backend "torch". Other forced backends
    choose what rounds alone, as the op has no kernel.

    Args:
        x: [..., K]; a tensor is rounded by `fp8_rows`. Rows that several linears share are rounded once.
        weight: rows [N, K], as `fp8_rows` returns them.
        bias: [N]; None: not added.

    Raises:
        ValueError: naming the argument, also for one that requires a gradient where gradients are recorded.
    """
    _check(x, weight, bias)
    no_gradient("fp8_linear", x=x if isinstance(x, Tensor) else None, bias=bias)
    rows = fp8_rows(x) if isinstance(x, Tensor) else x
    channels, width = weight.values.shape
    device = rows.values.device
    served = runtime.get_backend() != "torch" and why_plain(device, rows.dtype, width, channels) is None
    if not served or not rows.values.numel():
        return naive.fp8_linear(*rows[:2], *weight[:2], bias, rows.dtype)
    out = torch._scaled_mm(
        rows.values.reshape(-1, width), weight.values.t(), rows.scales.reshape(-1, 1), weight.scales.t(),
        bias=None if bias is None else bias.to(rows.dtype), out_dtype=rows.dtype, use_fast_accum=True,
    )  # fmt: skip
    return out.view(*rows.values.shape[:-1], channels)


def why_plain(device: torch.device, dtype: torch.dtype, width: int, channels: int) -> str | None:
    """Reason why a GPU's own product cannot serve rows of this dtype and width, to so many channels; None if it can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"tensors on {device.type}; accepted: NVIDIA GPUs from sm_90"
    if runtime.older_than(device, PRODUCT_CAPABILITY):
        return "a GPU older than sm_90"
    if dtype != torch.bfloat16:
        return f"rows of {dtype}; accepted: bfloat16"
    if width % MULTIPLE or channels % MULTIPLE:
        return f"a weight of {channels} x {width}; accepted: multiples of {MULTIPLE}"
    return None


def _check(x: Tensor | Fp8Rows, weight: Fp8Rows, bias: Tensor | None) -> None:
    if not isinstance(weight, Fp8Rows):
        raise ValueError(f"weight: found {type(weight).__name__}; accepted: rows of `fp8_rows`")
    if weight.values.ndim != 2:
        raise ValueError(f"weight: found {describe(weight.values)}; accepted: rows [N, K]")
    channels, width = weight.values.shape
    for name, rows in (("x", x), ("weight", weight)):
        if isinstance(rows, Fp8Rows):
            _check_rows(name, rows)
    values = x.values if isinstance(x, Fp8Rows) else x
    if not values.ndim or values.shape[-1] != width or values.device != weight.values.device:
        accepted = f"[..., {width}] on {weight.values.device}"
        raise ValueError(f"x: found {describe(values)}; accepted: {accepted}")
    if bias is not None and (bias.shape != (channels,) or bias.device != weight.values.device):
        accepted = f"({channels},) on {weight.values.device}"
        raise ValueError(f"bias: found {describe(bias)}; accepted: {accepted}")


def _check_rows(name: str, rows: Fp8Rows) -> None:
    values, scales = rows.values, rows.scales
    if values.dtype != torch.float8_e4m3fn or not values.is_contiguous():
        accepted = "contiguous torch.float8_e4m3fn, as `fp8_rows` returns them"
        raise ValueError(f"{name}: found values {describe(values)}; accepted: {accepted}")
    shape = (*values.shape[:-1], 1)
    if scales.shape != shape or scales.dtype != torch.float32 or scales.device != values.device:
        accepted = f"{shape} torch.float32 on {values.device}"
        raise ValueError(f"{name}: found scales {describe(scales)}; accepted: {accepted}")
