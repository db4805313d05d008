"""Shared by the kernels over whole samples: a sample is split into blocks, whose sums are added in a fixed order."""

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
    """The samples as rows [B, D], each contiguous; a copy only where a sample is not contiguous."""
    flat = tensor.flatten(1)
    return flat if flat.stride(1) == 1 else flat.contiguous()
