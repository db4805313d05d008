"""LayerNorm with a shift and scale of each latent frame, and the gated residual add, of 8 chunks of Wan-1.3B."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import OURS, Bench, Contender, Outputs, gradients
from csrc_triton.adaln import adaln, gated_residual, gated_residual_adaln, naive
from csrc_triton.runtime import backend

EPS = 1e-6
BRANCHES, FRAMES = 8, 3


def make_inputs(bench: Bench) -> tuple[Tensor, ...]:
    """x, y [B, F * T, dim], and shift, scale and gate [B, F, dim], slices of one tensor as in the model."""
    dtype = torch.bfloat16 if bench.real else torch.float32
    tokens, dim = bench.size(1560, 6), bench.size(1536, 64)
    x, y = (torch.randn(BRANCHES, FRAMES * tokens, dim, device=bench.device, dtype=dtype) for _ in range(2))
    modulation = torch.randn(BRANCHES, FRAMES, 6, dim, device=bench.device, dtype=dtype)
    return tuple(t.detach().requires_grad_() for t in (x, y, *modulation.unbind(2)[:3]))


@dataclass(frozen=True)
class Op:
    """A function of tensors: ours, and the same as plain maths.

    forward, backward: how often they must at least read or write a whole tensor [B, F * T, dim].
    """

    name: str
    fused: Callable[..., Any]
    plain: Callable[..., Any]
    given: dict[str, Tensor]
    outputs: tuple[str, ...]
    forward: int
    backward: int

    def eager(self, *given: Tensor) -> tuple[Tensor, ...]:
        with backend("torch"):
            return as_tuple(self.fused(*given))

    def named(self, found: Any) -> Outputs:
        return dict(zip(self.outputs, as_tuple(found), strict=True))

    def named_gradients(self, found: tuple[Tensor, ...]) -> Outputs:
        return {f"d{name}": grad for name, grad in zip(self.given, found, strict=True)}


def as_tuple(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def measure(bench: Bench, op: Op) -> None:
    """Forward and backward of one op."""
    leaves = list(op.given.values())
    functions = {OURS: op.fused, "torch eager": op.eager, "torch.compile": torch.compile(op.plain, dynamic=False)}
    grads = tuple(torch.randn_like(leaves[0]) for _ in op.outputs)

    def reference(dtype: torch.dtype) -> tuple[Outputs, Outputs]:
        given = [t.detach().to(dtype).requires_grad_() for t in leaves]
        out = op.eager(*given)
        found = torch.autograd.grad(out, given, [grad.to(dtype) for grad in grads])
        return op.named(tuple(t.detach() for t in out)), op.named_gradients(found)

    exact, same = reference(torch.float64), reference(leaves[0].dtype)
    frozen = [t.detach() for t in leaves]
    forward = [
        Contender(name, lambda run=run: run(*frozen), op.named, nbytes=op.forward * grads[0].nbytes,
                  compiled=name == "torch.compile")
        for name, run in functions.items()
    ]  # fmt: skip
    backward = [
        Contender(name, gradients(leaves), op.named_gradients, lambda run=run: (as_tuple(run(*leaves)), grads),
                  nbytes=op.backward * grads[0].nbytes, compiled=name == "torch.compile")
        for name, run in functions.items()
    ]  # fmt: skip
    dtype = str(leaves[0].dtype).removeprefix("torch.")
    about = f"{'x'.join(map(str, leaves[0].shape))}, {FRAMES} frames, {dtype}"
    for way, contenders, i in (("forward", forward, 0), ("backward", backward, 1)):
        bench.measure("adaln", f"{op.name} {way}, {about}", contenders, exact[i], same[i])


def test_adaln(bench: Bench) -> None:
    """The backward reads x and a gradient and writes one."""
    x, _, shift, scale, _ = make_inputs(bench)
    given = {"x": x, "shift": shift, "scale": scale}
    measure(
        bench, Op("norm and modulate", partial(adaln, eps=EPS), partial(naive.adaln, eps=EPS), given, ("out",), 2, 3)
    )


def test_gated_residual(bench: Bench) -> None:
    """The gradient of x is the incoming one, so the backward reads that and y and writes one."""
    x, y, _, _, gate = make_inputs(bench)
    given = {"x": x, "y": y, "gate": gate}
    measure(bench, Op("gated residual", gated_residual, naive.gated_residual, given, ("out",), 3, 3))


def test_gated_residual_adaln(bench: Bench) -> None:
    """Both in one pass: the backward reads two gradients, the sum and y, and writes two."""
    x, y, shift, scale, gate = make_inputs(bench)

    def plain(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        residual = naive.gated_residual(x, y, gate)
        return residual, naive.adaln(residual, shift, scale, EPS)

    given = {"x": x, "y": y, "gate": gate, "shift": shift, "scale": scale}
    name, outputs = "gated residual, norm and modulate", ("residual", "out")
    measure(bench, Op(name, partial(gated_residual_adaln, eps=EPS), plain, given, outputs, 4, 6))
