"""Shared by the kernels over whole samples: a sample is split into blocks, whose sums are added in a fixed order."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from csrc_triton import runtime

SUM_BLOCK = 256  # partial sums of a sample that are added at once


@dataclass(frozen=True)
class Config:
    """Elements of one program, and its warps."""

    block: int
    warps: int


def as_rows(tensor: Tensor) -> Tensor:
    """The samples as rows [B, D], each contiguous; a copy only where a sample is not contiguous."""
    flat = tensor.flatten(1)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def why_unfit(name: str, sample: str, x: Tensor, **others: Tensor | None) -> str | None:
    """Reason why no kernel over samples can serve x and the tensors beside it; None if one can.

    name, sample: words for x and for one of its rows in the message.
    """
    for other, tensor in others.items():
        if tensor is not None and tensor.dtype not in runtime.DTYPES:
            return f"{other} is {tensor.dtype}"
    if x.numel() == 0:
        return f"{name} has no elements"
    # positions inside a sample are 32-bit, also those past its end in the last block
    return f"a {sample} of {name} has more than 2**30 elements" if x.numel() > 2**30 * x.shape[0] else None
