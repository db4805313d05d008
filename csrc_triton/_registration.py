"""The one way in which the package's kernels become ops of torch.

An op works under torch.compile, checkpointing and torch.func (grad, vjp, jacrev, vmap), and refuses in one line what
has no formula: forward mode, derivatives of derivatives, and gradients of what is for inference alone. Its kernels run
on the GPU of its tensors, whichever is the current one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import CustomOpDef

from csrc_triton import runtime

PREFIX = "csrc_triton::"  # of the ops' names
BACKWARD = "_backward"  # how the name of an op ends that computes another's gradient
REVERSE = "reverse mode, once (backward, torch.func.grad, torch.func.vjp)"

_transforms = torch.library.Library(PREFIX.removesuffix("::"), "FRAGMENT")  # an op's rules live as long as it does


def custom_op(
    name: str, *, mutates_args: Iterable[str] = (), schema: str | None = None
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Registers a function of tensors of one device as `csrc_triton::name`; it has no gradient until `differentiable`.

    mutates_args, schema: as for `torch.library.custom_op`.
    """

    def register(implementation: Callable[..., Any]) -> CustomOpDef:
        written = tuple(mutates_args)
        signature = torch.library.infer_schema(implementation, mutates_args=written) if schema is None else schema

        @functools.wraps(implementation)
        def run(*args: Any) -> Any:
            tensors = [value for value in args if isinstance(value, Tensor)]
            if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
                _refuse_forward_mode(name, op)
            with torch.cuda.device_of(tensors[0]):
                return implementation(*args)

        op = torch.library.custom_op(f"{PREFIX}{name}", run, mutates_args=written, schema=signature)
        if written:
            _transforms.impl(name, functools.partial(_refuse_transform, name), "FuncTorchDynamicLayerFrontMode")
        else:
            op.register_autograd(functools.partial(_refuse_derivative, name))
            _transforms.impl(name, _transformed(name, op), "FuncTorchDynamicLayerFrontMode")
        return op

    return register


def differentiable(
    op: CustomOpDef,
    backward: Callable[..., tuple[Tensor | None, ...]],
    *,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
) -> None:
    """Gives an op its gradient; arguments as of `CustomOpDef.register_autograd`.

    The gradient is computed by the backend that was in force at the call, on whatever thread autograd runs it.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend = runtime.get_backend()
        setup_context(ctx, inputs, output)

    def run(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with runtime.backend(ctx.backend):
            return backward(ctx, *grads)

    op.register_autograd(run, setup_context=save)


def no_gradient(op: str, **tensors: Tensor | None) -> None:
    """Of an op for inference alone.

    Raises:
        ValueError: for a tensor that requires a gradient where gradients are recorded.
    """
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                accepted = "tensors without gradient, or a call under torch.no_grad()"
                raise ValueError(f"{name}: found a tensor that requires grad; accepted by {op}: {accepted}")


def _transformed(name: str, op: CustomOpDef) -> Callable[..., Any]:
    """The op as torch.func calls it inside of a transform. torch.library has no rules of its own for that."""
    overload = op._opoverload

    class Functional(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return overload(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if op._setup_context_fn is not None:
                op._setup_context_fn(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            assert op._backward_fn is not None
            return op._backward_fn(ctx, *grads)

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> NoReturn:
            _refuse_forward_mode(name, op)

        @staticmethod
        def vmap(info: Any, dims: tuple[Any, ...], *args: Any) -> Any:
            """Call by call: kernels know no further batch dimension."""
            outs = [
                overload(*(a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, dims, strict=True)))
                for i in range(info.batch_size)
            ]
            if isinstance(outs[0], Tensor):
                return torch.stack(outs), 0
            return tuple(torch.stack(parts) for parts in zip(*outs, strict=True)), (0,) * len(outs[0])

    defaults = [argument.default_value for argument in overload._schema.arguments]
    # the dispatcher leaves out arguments at the end that equal their defaults
    return lambda *args: Functional.apply(*args, *defaults[len(args) :])


def _refuse_forward_mode(name: str, op: CustomOpDef) -> NoReturn:
    accepted = "tensors without tangents" if op._setup_context_fn is None else REVERSE
    raise NotImplementedError(
        f"{name.removesuffix(BACKWARD)}: found forward-mode differentiation (torch.func.jvp, jacfwd, hessian, dual "
        f"tensors); accepted: {accepted}"
    )


def _refuse_derivative(name: str, ctx: Any, *grads: Tensor | None) -> NoReturn:
    op = name.removesuffix(BACKWARD)
    if op == name:
        raise NotImplementedError(f"{op}: found a backward pass; accepted: tensors without gradient (inference)")
    raise NotImplementedError(f"{op}: found a derivative of its gradient; accepted: {REVERSE}")


def _refuse_transform(name: str, *args: Any) -> NoReturn:
    raise NotImplementedError(
        f"{name}: found a call inside of a transform of torch.func; accepted: calls outside of them, because the op "
        "writes into its arguments"
    )
