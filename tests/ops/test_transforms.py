"""What torch.func and forward mode get from the ops: the right derivative, or one line that says what is accepted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from interpreter import rounds_to_nearest  # noqa: F401 - used by every test here
from op_samples import CALLS, INPUTS, run
from torch import Tensor

from csrc_triton import norm_silu, runtime

DIFFERENTIABLE = [name for name, call in CALLS.items() if call.leaves and not call.writes]
INFERENCE = [name for name, call in CALLS.items() if not call.leaves]
NAMES = {
    "qk_norm_rope (write)": "qk_norm_rope",
    "gated_residual_adaln": "adaln",
    "gated_residual_norm": "adaln",
    "fp8_linear": "fp8_rows",
}


def of_leaves(name: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The op as a function of what it differentiates, to a number, and the values."""
    leaves, given = CALLS[name].leaves, INPUTS
    return lambda *values: run(name, dict(zip(leaves, values, strict=True))).sum(), tuple(
        given[leaf] for leaf in leaves
    )


def message(name: str, found: str, accepted: str = "reverse mode, once") -> str:
    return rf"^{NAMES.get(name, name)}: found {found}.*; accepted: {accepted}[^\n]*$"


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_torch_func_grad_equals_backward(name: str) -> None:
    function, values = of_leaves(name)
    arguments = tuple(range(len(values)))
    with runtime.backend("torch"):
        expected = torch.func.grad(function, arguments)(*values)
    with runtime.backend("triton"):
        leaves = [value.clone().requires_grad_() for value in values]
        backward = torch.autograd.grad(function(*leaves), leaves)
        found = torch.func.grad(function, arguments)(*values)
        _, pull = torch.func.vjp(function, *values)
        pulled = pull(torch.tensor(2.0))
    for theirs, ours, transformed, doubled in zip(expected, backward, found, pulled, strict=True):
        assert torch.equal(transformed, ours) and ours.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(doubled, 2 * ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_vmap_of_values_and_of_gradients_equals_a_loop(name: str) -> None:
    """Over the first leaf alone, along its second dimension, so that some arguments are batched and others not."""
    function, (first, *rest) = of_leaves(name)
    several = torch.stack([first, 2 * first, -first], dim=1)
    with runtime.backend("triton"):
        for transformed in (function, torch.func.grad(function)):
            found = torch.vmap(transformed, in_dims=(1, *(None,) * len(rest)))(several, *rest)
            expected = torch.stack([transformed(value, *rest) for value in several.unbind(1)])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in INFERENCE if name != "norm_silu"])
def test_vmap_of_inference_equals_a_loop(name: str) -> None:
    key = CALLS[name].inputs[0]
    value = INPUTS[key]
    several = torch.stack([value, 2 * value])
    with runtime.backend("triton"):
        found = torch.vmap(lambda value: run(name, {key: value}))(several)
        expected = torch.stack([run(name, {key: value}) for value in several])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def tangent_of(name: str) -> None:
    key = CALLS[name].inputs[0]
    value = INPUTS[key]
    torch.func.jvp(lambda value: run(name, {key: value}), (value,), (torch.ones_like(value),))


def dual_of(name: str) -> None:
    key = CALLS[name].inputs[-1 if name == "norm_silu" else 0]
    value = INPUTS[key]
    with forward_ad.dual_level():
        run(name, {key: forward_ad.make_dual(value, torch.ones_like(value))})


@pytest.mark.parametrize("name", [name for name in CALLS if name != "flow_policy_loss_and_grad"])
def test_forward_mode_is_refused(name: str) -> None:
    """(Of `flow_policy_loss_and_grad` the outputs are detached, and have no tangents as those of `detach`.)"""
    accepted = "reverse mode, once" if name in DIFFERENTIABLE else "tensors without tangents"
    with runtime.backend("triton"):
        for found in (tangent_of, dual_of):
            words = "forward-mode differentiation", accepted
            if CALLS[name].writes:
                key = "norm_silu" if name == "norm_silu" else "qk_norm_rope_write"
                inside = rf"^{key}: found a call inside of a transform of torch.func; accepted: calls outside[^\n]*$"
                dual = rf"^{key}: found forward-mode .*; accepted: tensors without tangents$"
                expected = inside if found is tangent_of else dual
            else:
                expected = message(name, *words)
            with pytest.raises(NotImplementedError, match=expected):
                found(name)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_are_refused(name: str) -> None:
    """And a graph of the gradient alone is made without being asked for its derivative."""
    function, values = of_leaves(name)
    leaves, every = [value.clone().requires_grad_() for value in values], tuple(range(len(values)))
    with runtime.backend("triton"):
        grads = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
        with pytest.raises(NotImplementedError, match=message(name, "a derivative of its gradient")):
            torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)
        with pytest.raises(NotImplementedError, match=message(name, "a derivative of its gradient")):
            torch.func.grad(lambda *more: sum(g.square().sum() for g in torch.func.grad(function, every)(*more)))(
                *values
            )
        with pytest.raises(NotImplementedError, match=message(name, "forward-mode differentiation")):
            torch.func.hessian(function)(*values)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["norm_silu", "enlarge", "decode_attention", "fp8_rows", "fp8_linear"])
def test_ops_of_inference_refuse_tensors_that_want_a_gradient(name: str, backend: str) -> None:
    key = CALLS[name].inputs[0]
    argument = {"query": "q"}.get(key, key)
    leaf = {key: INPUTS[key].clone().requires_grad_()}
    expected = f"^{argument}: found a tensor that requires grad; accepted by {name}: tensors without gradient, or"
    with runtime.backend(backend):
        with pytest.raises(ValueError, match=expected):
            run(name, leaf)
        with torch.no_grad():
            assert run(name, leaf).isfinite().all()
        with pytest.raises(ValueError, match=expected):
            torch.func.grad(lambda value: run(name, {key: value}).sum())(INPUTS[key])


def test_in_place_ops_write_no_graph(device: torch.device) -> None:
    out = torch.zeros(1, 2, 32)
    with runtime.backend("triton"), torch.no_grad():
        norm_silu(torch.ones(1, 2, 32, requires_grad=True), None, out=out)
    assert torch.equal(out, torch.ones(1, 2, 32)) and not out.requires_grad
