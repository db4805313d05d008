"""The linears of one block of Wan-1.3B in float8, the rounding of their inputs counted, against those in bf16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import OURS, Bench, Contender, Outputs
from csrc_triton import fp8_linear, fp8_rows
from csrc_triton.runtime import backend

SQUARE = ("q", "k", "v", "o", "cross q", "cross o")
Linear = tuple[Tensor, Tensor]  # weight and bias


def make_linears(bench: Bench, dim: int, hidden: int) -> dict[str, Linear]:
    sizes = dict.fromkeys(SQUARE, (dim, dim)) | {"up": (hidden, dim), "down": (dim, hidden)}

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=bench.device, dtype=torch.bfloat16)

    return {name: (draw(n, k) / k**0.5, draw(n)) for name, (n, k) in sizes.items()}


def block(x: Tensor, linears: dict[str, Linear], dtype: torch.dtype) -> Outputs:
    """All linears of a block, each of the same rows, and the GELU between the last two, in plain torch."""
    own = {name: (weight.to(dtype), bias.to(dtype)) for name, (weight, bias) in linears.items()}
    out = {name: F.linear(x.to(dtype), *own[name]) for name in SQUARE}
    return out | {"ffn": F.linear(F.gelu(F.linear(x.to(dtype), *own["up"]), approximate="tanh"), *own["down"])}


def with_epilogue(x: Tensor, linears: dict[str, Linear]) -> Outputs:
    """The GELU comes out of the product before it."""
    weight, bias = linears["up"]
    hidden = torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    return {name: F.linear(x, *linears[name]) for name in SQUARE} | {"ffn": F.linear(hidden, *linears["down"])}


def rounded(x: Tensor, linears: dict[str, Linear]) -> Callable[[], Outputs]:
    """As the executor computes them: q, k and v share a rounding; the GELU is part of that of the hidden rows."""
    own = {name: (fp8_rows(weight), bias) for name, (weight, bias) in linears.items()}

    def run() -> Outputs:
        shared = fp8_rows(x)
        out = {name: fp8_linear(shared if name in "qkv" else x, *own[name]) for name in SQUARE}
        return out | {"ffn": fp8_linear(fp8_rows(fp8_linear(x, *own["up"]), gelu=True), *own["down"])}

    return run


@torch.no_grad()
@pytest.mark.parametrize("chunks", [1, 8])
def test_block(bench: Bench, chunks: int) -> None:
    """Of one video's chunk, and of eight."""
    dim, hidden = bench.size(1536, 64), bench.size(8960, 96)
    x = torch.randn(chunks * bench.size(4680, 12), dim, device=bench.device, dtype=torch.bfloat16)
    linears = make_linears(bench, dim, hidden)
    run = rounded(x, linears)
    flops = 2.0 * len(x) * (len(SQUARE) * dim * dim + 2 * dim * hidden)
    contenders = [
        Contender(OURS, run, dict, flops=flops),
        Contender("bf16", lambda: block(x, linears, torch.bfloat16), dict, flops=flops),
    ]
    if bench.real:
        contenders.append(Contender("bf16, GELU in the epilogue", lambda: with_epilogue(x, linears), dict, flops=flops))
    with backend("torch"):
        same = rounded(x, linears)()
    case = f"{len(x)} rows, {dim} and {hidden} channels"
    bench.measure("fp8_linear", case, contenders, block(x, linears, torch.float64), same)
