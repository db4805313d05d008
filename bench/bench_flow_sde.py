"""One stochastic denoising step of 24 continuations x 3 transitions of a chunk of 3 x 16 x 60 x 104 latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.harness import OURS, Bench, Contender, Outputs, gradients
from csrc_triton import flow_sde_step
from csrc_triton.flow_sde import KINDS as COEFFICIENTS
from csrc_triton.flow_sde import naive
from csrc_triton.runtime import backend

SIGMAS = (1.0, 0.9375, 5 / 6, 0.625)  # the published four-step schedule; three of its steps are stochastic
KIND, ETA = "cps", 1.0


def make_inputs(bench: Bench) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """x, v, noise [N * T, 16, 3, 60, 104] fp32, and the noise levels [N * T] before and after."""
    rows, shape = bench.size(24, 2), (16, 3, bench.size(60, 4), bench.size(104, 6))
    tensors = tuple(torch.randn(3 * rows, *shape, device=bench.device) for _ in range(3))
    levels = torch.tensor(SIGMAS, device=bench.device)
    return tensors, (levels[:-1].repeat(rows), levels[1:].repeat(rows))


def ours(tensors: tuple[Tensor, ...], levels: tuple[Tensor, Tensor]) -> Any:
    return flow_sde_step(*tensors, *levels, kind=KIND, eta=ETA)


def eager(tensors: tuple[Tensor, ...], levels: tuple[Tensor, Tensor]) -> Any:
    with backend("torch"):
        return ours(tensors, levels)


def plain(x: Tensor, v: Tensor, noise: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, ...]:
    """The reference's maths alone: sample, mean, std, log_prob."""
    return naive.flow_sde_step(x, v, noise, COEFFICIENTS[KIND](sigma.double(), sigma_next.double(), ETA))


def outputs(step: Any) -> Outputs:
    return {"sample": step[0], "mean": step[1], "log_prob": step[3]}


def test_forward(bench: Bench) -> None:
    tensors, levels = make_inputs(bench)
    exact = outputs(eager(tuple(t.double() for t in tensors), levels))
    compiled = torch.compile(plain, dynamic=False)
    nbytes = 5.0 * tensors[0].nbytes  # reads x, v and noise, writes sample and mean
    runs: dict[str, Callable[[], Any]] = {
        OURS: lambda: ours(tensors, levels),
        "torch eager": lambda: eager(tensors, levels),
        "torch.compile": lambda: compiled(*tensors, *levels),
    }
    contenders = [
        Contender(name, run, outputs, nbytes=nbytes, compiled=name == "torch.compile") for name, run in runs.items()
    ]
    bench.measure("flow_sde", case("step", tensors[0]), contenders, exact, outputs(eager(tensors, levels)))


@torch.no_grad()
def test_step_that_draws_its_noise(bench: Bench) -> None:
    """As rollouts make it: noise from a seed, no mean. The peers draw with torch.randn, so they are not checked."""
    (x, v, _), levels = make_inputs(bench)

    def drawn(x: Tensor, v: Tensor) -> Any:
        return flow_sde_step(x, v, None, *levels, kind=KIND, eta=ETA, seed=7, return_mean=False)

    def reference(dtype: torch.dtype) -> Outputs:
        with backend("torch"):
            return drawn_outputs(drawn(x.to(dtype), v.to(dtype)))

    compiled = torch.compile(plain, dynamic=False)
    nbytes = 4.0 * x.nbytes  # reads x and v, writes sample and noise
    contenders = [
        Contender(OURS, lambda: drawn(x, v), drawn_outputs, nbytes=nbytes),
        Contender("torch eager", lambda: plain(x, v, torch.randn_like(x), *levels), None, nbytes=nbytes),
        Contender(
            "torch.compile", lambda: compiled(x, v, torch.randn_like(x), *levels), None, nbytes=nbytes, compiled=True
        ),
    ]
    exact, same = reference(torch.float64), reference(torch.float32)
    bench.measure("flow_sde", case("step that draws its noise", x), contenders, exact, same)


def drawn_outputs(step: Any) -> Outputs:
    return {"sample": step.sample, "log_prob": step.log_prob, "noise": step.noise}


def test_backward(bench: Bench) -> None:
    """The log-probability's gradient with respect to the velocity."""
    (x, v, noise), levels = make_inputs(bench)
    v.requires_grad_()
    grad = torch.randn(x.shape[0], device=bench.device)

    def reference(dtype: torch.dtype) -> Outputs:
        velocity = v.detach().to(dtype).requires_grad_()
        log_prob = eager((x.to(dtype), velocity, noise.to(dtype)), levels).log_prob
        return {"dv": torch.autograd.grad(log_prob, velocity, grad.to(dtype))[0]}

    compiled = torch.compile(plain, dynamic=False)
    forwards: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: ours((x, v, noise), levels).log_prob,
        "torch eager": lambda: eager((x, v, noise), levels).log_prob,
        "torch.compile": lambda: compiled(x, v, noise, *levels)[3],
    }
    contenders = [
        Contender(
            name, gradients([v]), lambda found: {"dv": found[0]}, lambda forward=forward: (forward(), grad),
            nbytes=2.0 * v.nbytes, compiled=name == "torch.compile",  # reads the noise, writes the gradient
        )
        for name, forward in forwards.items()
    ]  # fmt: skip
    exact, same = reference(torch.float64), reference(torch.float32)
    bench.measure("flow_sde", case("backward of the log-prob", x), contenders, exact, same)


def case(what: str, x: Tensor) -> str:
    return f"{what}, {KIND}, {x.shape[0]} x {'x'.join(map(str, x.shape[1:]))}, float32"
