"""What the kernels over whole samples share: how a sample is cut into blocks, whose sums are then added in order."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

SUM_BLOCK = 256  # partial sums of a sample that are added at once


@dataclass(frozen=True)
class Config:
    """Elements of one program, and its warps."""

    block: int
    warps: int


def as_rows(tensor: Tensor) -> Tensor:
    """[B, D], each row contiguous; a copy only where the elements of a sample are not laid out in order."""
    flat = tensor.flatten(1)
    return flat if flat.stride(1) == 1 else flat.contiguous()
