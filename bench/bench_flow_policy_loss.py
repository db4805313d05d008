"""The executor's policy loss over 24 continuations x 3 transitions of a chunk of 3 x 16 x 60 x 104 latents.

An update makes one call of `flow_policy_loss_and_grad` a micro-batch (tempact/rl/flow_grpo.py): `test_update` is that
call. `test_forward` and `test_backward` are the two halves of the differentiable `flow_policy_loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.harness import OURS, Bench, Contender, Outputs, gradients
from csrc_triton import flow_policy_loss, flow_policy_loss_and_grad
from csrc_triton.flow_policy_loss import naive
from csrc_triton.runtime import backend

CLIP = 1e-5
KL_WEIGHT = 5e-4


def make_inputs(bench: Bench, *, requires_grad: bool = False) -> tuple[Tensor, ...]:
    """v, v_old, v_ref, noise [N * T, 16, 3, 60, 104] fp32 and advantage [N * T]; the v differ as in training."""
    shape = (bench.size(72, 6), 16, 3, bench.size(60, 4), bench.size(104, 6))
    v, noise = (torch.randn(shape, device=bench.device) for _ in range(2))
    v_old, v_ref = (v + 0.0055 * torch.randn_like(v) for _ in range(2))
    return v.requires_grad_(requires_grad), v_old, v_ref, noise, torch.randn(shape[0], device=bench.device)


def ours(tensors: tuple[Tensor, ...]) -> Any:
    return flow_policy_loss(*tensors, clip=CLIP)


def eager(tensors: tuple[Tensor, ...]) -> Any:
    with backend("torch"):
        return ours(tensors)


def outputs(terms: Any) -> Outputs:
    return {name: terms[i] for i, name in enumerate(("loss", "kl", "ratio", "log_ratio"))}


def implementations(tensors: tuple[Tensor, ...]) -> dict[str, Callable[[], Any]]:
    compiled = torch.compile(naive.flow_policy_loss, dynamic=False)
    return {
        OURS: lambda: ours(tensors),
        "torch eager": lambda: eager(tensors),
        "torch.compile": lambda: compiled(*tensors, CLIP),
    }


def test_forward(bench: Bench) -> None:
    tensors = make_inputs(bench)
    exact = outputs(eager(tuple(t.double() for t in tensors)))
    contenders = [
        Contender(name, run, outputs, nbytes=4.0 * tensors[0].nbytes, compiled=name == "torch.compile")
        for name, run in implementations(tensors).items()
    ]
    bench.measure("flow_policy_loss", case("forward", tensors[0]), contenders, exact, outputs(eager(tensors)))


def test_backward(bench: Bench) -> None:
    """The gradient of the loss with its KL term, as the trainer weighs them."""
    tensors = make_inputs(bench, requires_grad=True)
    v = tensors[0]
    grads = torch.ones(v.shape[0], device=bench.device), torch.full((v.shape[0],), KL_WEIGHT, device=bench.device)

    def reference(dtype: torch.dtype) -> Outputs:
        given = [t.detach().to(dtype) for t in tensors]
        velocity = given[0].requires_grad_()
        terms = eager(tuple(given))
        found = torch.autograd.grad((terms.loss, terms.kl), velocity, [grad.to(dtype) for grad in grads])
        return {"dv": found[0]}

    def setup(forward: Callable[[], Any]) -> tuple[Any, ...]:
        terms = forward()
        return (terms[0], terms[1]), grads

    contenders = [
        Contender(
            name, gradients([v]), lambda found: {"dv": found[0]}, lambda forward=forward: setup(forward),
            nbytes=4.0 * v.nbytes, compiled=name == "torch.compile",  # reads v, v_ref and noise, writes the gradient
        )
        for name, forward in implementations(tensors).items()
    ]  # fmt: skip
    exact, same = reference(torch.float64), reference(torch.float32)
    bench.measure("flow_policy_loss", case("backward", v), contenders, exact, same)


@pytest.mark.parametrize("on_policy", [True, False], ids=["on policy", "off policy"])
def test_update(bench: Bench, on_policy: bool) -> None:
    """Terms and gradient of one micro-batch, with a weight a row, as an update asks for them.

    On policy: the first update after a roll-out, whose old velocities are its own. Off policy: each later one.
    """
    v, v_old, *others = make_inputs(bench)
    given = v, None if on_policy else v_old, *others

    def run(v: Tensor, v_old: Tensor | None, *rest: Tensor) -> tuple[Any, Tensor]:
        weight = torch.ones_like(rest[-1]) / len(v)
        old = v.detach() if v_old is None else v_old
        return flow_policy_loss_and_grad(
            v, old, *rest, clip=CLIP, loss_weight=weight, kl_weight=KL_WEIGHT * weight
        )  # fmt: skip

    def plain(*tensors: Tensor | None) -> tuple[Any, Tensor]:
        with backend("torch"):
            return run(*tensors)

    def named(found: tuple[Any, Tensor]) -> Outputs:
        return outputs(found[0]) | {"dv": found[1]}

    calls = {OURS: run, "torch eager": plain, "torch.compile": _with_compiled_loss()}
    contenders = [
        Contender(
            name, lambda call=call: call(*given), named,
            # on policy reads v, v_ref and noise and writes the gradient; off policy reads v_old, and all but it twice
            nbytes=(4.0 if on_policy else 8.0) * v.nbytes, compiled=name == "torch.compile",
        )
        for name, call in calls.items()
    ]  # fmt: skip
    exact, same = named(plain(*(None if t is None else t.double() for t in given))), named(plain(*given))
    what = f"loss and gradient, {'on' if on_policy else 'off'} policy"
    bench.measure("flow_policy_loss", case(what, v), contenders, exact, same)


def _with_compiled_loss() -> Callable[..., tuple[Any, Tensor]]:
    """The same from a compiled loss and its compiled backward; on policy its graph knows that the old v is v."""

    @partial(torch.compile, dynamic=False)
    def weighted(
        v: Tensor, v_old: Tensor | None, v_ref: Tensor, noise: Tensor, advantage: Tensor
    ) -> tuple[Any, Tensor]:
        terms = naive.flow_policy_loss(v, v.detach() if v_old is None else v_old, v_ref, noise, advantage, CLIP)
        return terms, (terms[0] + KL_WEIGHT * terms[1]).sum() / len(v)

    def call(v: Tensor, *rest: Tensor | None) -> tuple[Any, Tensor]:
        leaf = v.detach().requires_grad_()
        terms, loss = weighted(leaf, *rest)
        return terms, torch.autograd.grad(loss, leaf)[0]

    return call


def case(what: str, v: Tensor) -> str:
    return f"{what}, {v.shape[0]} x {'x'.join(map(str, v.shape[1:]))}, float32"
