"""PEFT's LoRA linear in fewer passes over memory where kernels serve; merged for generation there and on a CPU in fp32.

PEFT computes W x + b, then casts x to the adapter's fp32, scales and adds in separate passes, and autograd keeps the
cast copy. Here the adapter is cast to the precision of the weights and its product is accumulated onto the output; the
backward keeps the input alone. A feed-forward part also keeps its input alone: the hidden rows, six times as wide in
Wan, are computed again. Same parameters, same formula: W x + b + (alpha / r) B A x (Hu et al., LoRA, arXiv 2106.09685).

Inside `merged`, passes without gradients use W + (alpha / r) B A, rounded once to the precision of W: a sum beside the
base weights, which are not touched. Rounding keeps of a weight's change what is above half of the weight's last place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from csrc_triton import runtime
from tempact.distributed.shards import sharded
from tempact.models.wan.transformer import has_epilogue, up_gelu


@dataclass
class _Merged:
    """W + (alpha / r) B A of one adapter, with the base's bias, in memory of its own that is refilled in place."""

    linear: nn.Linear
    state: tuple[object, ...] = ()  # of what it is the sum


class LoraLinear(Linear):
    """PEFT's layer; on the torch path, with anything but one plain adapter active, and under an autocast to another
    precision than that of the weights, it computes as PEFT does. A CPU merges on the torch path too."""

    merging = False  # use the merged weights where they are those of the active adapter
    _merged: _Merged | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        served = self._served(x)
        if served is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        if (linear := self._in_force) is not None:
            return linear(x.to(linear.weight.dtype))
        return _Linear.apply(_rows(x, served[0]), *served).unflatten(0, x.shape[:-1])

    def feed_forward(self, up: nn.Module, x: Tensor) -> Tensor:
        """self(gelu(up(x))), tanh approximation; `up` is the linear before."""
        first, second = up._served(x) if isinstance(up, LoraLinear) else None, self._served(x)
        if first is None or second is None or not isinstance(up, LoraLinear):
            return self(up_gelu(up.get_base_layer() if self._idle(up) else up, x))
        if (linear := up._in_force) is not None and self._in_force is not None:
            return self(up_gelu(linear, x.to(linear.weight.dtype)))
        return _FeedForward.apply(_rows(x, first[0]), *first, *second).unflatten(0, x.shape[:-1])

    @staticmethod
    def _idle(layer: nn.Module) -> TypeGuard[LoraLinear]:
        return (
            isinstance(layer, LoraLinear) and not layer.merged and (layer.disable_adapters or not layer.active_adapters)
        )

    def _served(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, float] | None:
        """Weight, bias, A, B and alpha / r, if these passes serve and one plain adapter is active."""
        base = self.get_base_layer()
        if runtime.choose("lora_linear", x.device, torch.float32) == "torch" and not self._merged_on_cpu(base.weight):
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] in self.lora_variant:
            return None
        (name,) = active
        a, b = self.lora_A[name], self.lora_B[name]
        plain = isinstance(self.lora_dropout[name], nn.Identity) and base.bias is not None
        if not plain or a.bias is not None or b.bias is not None or _cast_otherwise(base.weight):
            return None
        return base.weight, base.bias, a.weight, b.weight, self.scaling[name]

    def _merged_on_cpu(self, weight: Tensor) -> bool:
        """Whether a CPU merges, which needs no kernels: into fp32 weights, which lose nothing, unless the torch path is
        asked for by name. Its training passes are PEFT's: to compute hidden rows again costs more than it saves."""
        inside = self.merging and not torch.is_grad_enabled()
        return (
            inside and weight.device.type == "cpu" and weight.dtype == torch.float32 and runtime.get_backend() == "auto"
        )

    @property
    def mode(self) -> tuple[object, ...]:
        """What decides, beside shapes and the backend, how a call is computed: the adapters, and whether merged."""
        return () if self.disable_adapters else (*self.active_adapters, self._in_force is not None)

    @property
    def _in_force(self) -> nn.Linear | None:
        """The merged linear, where it is used now."""
        if self._merged is None or not self.merging or torch.is_grad_enabled() or self.disable_adapters:
            return None
        return self._merged.linear if self._merged.state[:1] == tuple(self.active_adapters) else None

    @torch.no_grad()
    def merge_beside(self) -> None:
        """Fills the merged weights, unless they are the sum of just these; nothing, where PEFT's passes serve."""
        base: nn.Linear = self.get_base_layer()
        served = self._served(base.weight)
        if served is None:
            return
        weight, _, a, b, scaling = served
        tensors = [number for tensor in (weight, a, b) for number in (tensor.data_ptr(), tensor._version)]
        state = *self.active_adapters, scaling, *tensors
        if self._merged is None or self._merged.linear.weight.dtype != weight.dtype:
            linear = nn.Linear(1, 1, device="meta")
            linear.weight, linear.bias = nn.Parameter(torch.empty_like(weight), requires_grad=False), base.bias
            self._merged = _Merged(linear)
        if self._merged.state != state:
            self._merged.state = ()
            with torch.autocast(weight.device.type, enabled=False):
                self._merged.linear.weight.copy_(torch.addmm(weight.float(), b.float(), a.float(), alpha=scaling))
            self._merged.state = state


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Inside, passes without gradients use merged weights of the adapters that are active now, where PEFT's own passes
    do not serve.

    A sharded model has none: its adapters are computed beside the weights, which are whole only inside a call.
    """
    modules = () if sharded(model) else model.modules()
    layers = [layer for layer in modules if isinstance(layer, LoraLinear)]
    before = [layer.merging for layer in layers]
    try:
        for layer in layers:
            layer.merging = True
            layer.merge_beside()
        yield
    finally:
        for layer, merging in zip(layers, before, strict=True):
            layer.merging = merging


def _cast_otherwise(weight: Tensor) -> bool:
    """Whether autocast is on for another precision than that of the weights."""
    kind = weight.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != weight.dtype


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    return x.to(weight.dtype).flatten(0, -2)


def _scaled(b: Tensor, scaling: float) -> Tensor:
    return b if scaling == 1.0 else b * scaling


def _forward(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The output, and A x."""
    inner = x @ a.to(x.dtype).t()
    return torch.addmm(bias, x, weight.t()).addmm_(inner, _scaled(b, scaling).to(x.dtype).t()), inner


def _gelu_forward(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """gelu of `_forward`'s output; in half precision on a GPU it comes out of the epilogue of one product, of the rows
    [x, A x] with [W, (alpha / r) B]: the wide hidden rows are written once and never read."""
    if not has_epilogue(weight):
        return F.gelu(_forward(x, weight, bias, a, b, scaling)[0], approximate="tanh")
    width = x.shape[1]
    both = x.new_empty(len(x), width + len(a))
    both[:, :width] = x
    torch.mm(x, a.to(x.dtype).t(), out=both[:, width:])
    weights = torch.cat([weight, _scaled(b, scaling).to(x.dtype)], dim=1)
    return torch._addmm_activation(bias, both, weights.t(), use_gelu=True)


def _backward(
    grad: Tensor, x: Tensor, inner: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, wants_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of x, A and B; the base weights are frozen."""
    inner_grad = grad @ _scaled(b, scaling).to(grad.dtype)
    dx = (grad @ weight).addmm_(inner_grad, a.to(grad.dtype)) if wants_x else None
    return dx, (inner_grad.t() @ x).to(a.dtype), _scaled((grad.t() @ inner).to(b.dtype), scaling)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        out, inner = _forward(x, weight, bias, a, b, scaling)
        ctx.save_for_backward(x, inner, weight, a, b)
        ctx.scaling = scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, weight, a, b = ctx.saved_tensors
        dx, da, db = _backward(grad, x, inner, weight, a, b, ctx.scaling, ctx.needs_input_grad[0])
        return dx, None, None, da, db, None


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, scaling: float,
        weight_2: Tensor, bias_2: Tensor, a_2: Tensor, b_2: Tensor, scaling_2: float,
    ) -> Tensor:  # fmt: skip
        hidden = _gelu_forward(x, weight, bias, a, b, scaling)
        out, inner_2 = _forward(hidden, weight_2, bias_2, a_2, b_2, scaling_2)
        ctx.save_for_backward(x, weight, bias, a, b, inner_2, weight_2, a_2, b_2)
        ctx.scalings = scaling, scaling_2
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, a, b, inner_2, weight_2, a_2, b_2 = ctx.saved_tensors
        hidden, inner = _forward(x, weight, bias, a, b, ctx.scalings[0])
        gelu = F.gelu(hidden, approximate="tanh")
        inside, da_2, db_2 = _backward(grad, gelu, inner_2, weight_2, a_2, b_2, ctx.scalings[1], True)
        grad = torch.ops.aten.gelu_backward(inside, hidden, approximate="tanh")
        del hidden, gelu, inside  # wide
        dx, da, db = _backward(grad, x, inner, weight, a, b, ctx.scalings[0], ctx.needs_input_grad[0])
        return dx, None, None, da, db, None, None, None, da_2, db_2, None
