"""Memory and operations of a computation, by running its code on fake tensors: shapes only, no data.

The bytes are those of tensors, as torch.cuda.max_memory_allocated counts them; workspaces of libraries, the CUDA
context and holes between tensors come on top.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry, register_flop_formula

from csrc_triton import runtime

ALLOCATION = 512  # bytes that torch's allocator on a GPU rounds a tensor up to
FAKE = torch.device("cpu")  # fake tensors of a GPU need a torch that has been built for one


class Trace:
    """live: bytes of tensors alive now; peak: the most since `restart`; flops: operations since then.

    flops: two for every multiplication of matrix products, convolutions and attention; nothing else counts.
    """

    def __init__(self) -> None:
        self.live = self.peak = self.flops = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def restart(self) -> int:
        """Peak and operations start from here; returns the bytes alive now."""
        self.peak, self.flops = self.live, 0
        return self.live

    def hold(self, tensor: Tensor) -> None:
        """Counts a tensor's memory for as long as it is there; views count once."""
        storage = tensor.untyped_storage()
        key, size = id(storage), -(-storage.nbytes() // ALLOCATION) * ALLOCATION
        known = self._known.get(key)
        if known is not None and known() is storage:
            return

        def gone(_: object) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


class Watch(TorchDispatchMode):
    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.trace.flops += formula(*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.trace.hold(leaf)
        return out


class AsOnGpu(TorchFunctionMode):
    """The operations that a GPU does differently from the CPU, on which fake tensors pretend to be.

    Attention of torch is a flash kernel, or the memory-efficient one where there is a mask; under autocast, layer norms
    are computed and kept in fp32. A backward runs without this mode, so `recomputed` enters it.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **given)
        if func is F.layer_norm and torch.is_autocast_enabled(FAKE.type):
            args = tuple(_wide(arg) for arg in args)
            given = {name: _wide(arg) for name, arg in given.items()}
        return func(*args, **given)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if enable_gqa:  # the kernels read each key head for several query heads; the formulas for shapes want them equal
        k, v = (x.expand(-1, q.shape[1], -1, -1) if x.shape[1] == 1 else _repeated(x, q.shape[1]) for x in (k, v))
    if torch.is_autocast_enabled(FAKE.type):
        q, k, v = (x.to(torch.get_autocast_dtype(FAKE.type)) for x in (q, k, v))
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(q, k, v, dropout_p, is_causal, scale=scale)[0]
    bias = attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(q, k, v, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


@contextmanager
def traced(*, kernels: bool) -> Iterator[Trace]:
    """New tensors are fake and counted. kernels: ops are csrc_triton's kernels, rather than the torch path."""
    trace = Trace()
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(Watch(trace))
        stack.enter_context(AsOnGpu())
        if kernels:
            stack.enter_context(runtime.shapes_only())
        stack.enter_context(runtime.backend("triton" if kernels else "torch"))
        yield trace


def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` that keeps only its inputs, and is computed again in the backward."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with AsOnGpu():
            return forward(*args, **kwargs)

    return partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)


def on_meta() -> AbstractContextManager[Any]:
    """Context in which modules are made for `fake`: initialising them costs nothing."""
    return torch.device("meta")


def fake(module: nn.Module) -> None:
    """Gives a module that was made on the meta device fake parameters and buffers, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(_like(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = _like(buffer)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=FAKE)


@register_flop_formula(torch.ops.aten.addmm_)
def _addmm_flops(out: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    """Of the form in place, which torch does not count."""
    return 2 * a[0] * a[1] * b[1]


@register_flop_formula(torch.ops.csrc_triton.fork_attention)
def _forward_flops(q: Any, k: Any, v: Any, context_k: Any, context_v: Any, table: Any, *_: Any, **__: Any) -> int:
    return 2 * _product(q, _keys(k, context_k, table))


@register_flop_formula(torch.ops.csrc_triton.fork_attention_backward)
def _backward_flops(
    grad: Any, grad_lse: Any, q: Any, k: Any, v: Any, context_k: Any, context_v: Any, table: Any, *_: Any, **__: Any
) -> int:
    """Scores, their gradient and the gradient of q for all keys; gradients of k and v for the own keys."""
    return 3 * _product(q, _keys(k, context_k, table)) + 2 * _product(q, k[1])


def _product(q: Any, keys: int) -> int:
    """Operations of one matrix product between queries [B, L, heads, head_dim] and so many keys each."""
    batch, length, heads, head_dim = q
    return 2 * batch * heads * length * keys * head_dim


def _keys(k: Any, context: Any, table: Any) -> int:
    """Keys of one query. Of a pool [rows, heads, head_dim] every row counts: a trace has one context in its pool."""
    if context is None:
        return k[1]
    return k[1] + (context[0] if table is not None else context[1])
