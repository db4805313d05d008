"""Peers of fork attention. Keys and values are [B, L, heads, head_dim], as everywhere in csrc_triton."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from csrc_triton import CacheView
from csrc_triton.fork_attention import naive

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Inputs:
    """q, k, v [B, L, heads, head_dim] of B chunks; past_k, past_v [1, Lp, heads, head_dim] that all share."""

    q: Tensor
    k: Tensor
    v: Tensor
    past_k: Tensor
    past_v: Tensor
    view: CacheView  # the same context in a cache

    def concatenated(self) -> tuple[Tensor, Tensor]:
        """Keys and values of every chunk, context first: expanded and copied."""
        return naive.concatenate(self.k, self.v, (self.past_k, self.past_v))


@dataclass(frozen=True)
class Peer:
    """forward() -> out; `leaves` are its q, k and v, of which k and v may hold the context first.

    backward(out, state, grad) -> gradients of the leaves, where autograd has none; then `forward` returns
    (out, state).
    """

    name: str
    forward: Callable[[], Any]
    leaves: tuple[Tensor, Tensor, Tensor]
    backward: Callable[[Tensor, Any, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None
    compiled: bool = False


def peers(inputs: Inputs, *, backward: bool) -> Iterator[Peer]:
    """All that can run here. "+ copies" counts expanding and concatenating the keys; the others get that for free."""
    q, k, v = inputs.q, inputs.k, inputs.v
    whole_k, whole_v = (t.detach().requires_grad_(backward) for t in inputs.concatenated())
    free, own = (q, whole_k, whole_v), (q, k, v)

    def copied() -> tuple[Tensor, Tensor, Tensor]:
        return (q, *inputs.concatenated())

    for name in served(q, whole_k, whole_v):
        yield Peer(f"SDPA {name}", lambda name=name: sdpa(*free, name), free)
        if not backward:  # the copies are the forward's
            yield Peer(f"SDPA {name} + copies", lambda name=name: sdpa(*copied(), name), own)
    plain = torch.compile(lambda: sdpa(*copied(), None), dynamic=False)
    yield Peer("torch.compile + copies", plain, own, compiled=True)
    for name in COMPOSED if q.device.type == "cuda" else ("cpu",):
        if not backward:
            yield Peer(f"composed {name}", lambda name=name: composed(inputs, name)[0], own)
            merged = torch.compile(merge, dynamic=False)
            run = lambda name=name, merged=merged: composed(inputs, name, merged)[0]  # noqa: E731
            yield Peer(f"composed {name}, compiled merge", run, own, compiled=True)
        elif name != "cuDNN":  # its backward takes a bias tensor that cannot be left out from Python
            yield Peer(
                f"composed {name}",
                lambda name=name: composed(inputs, name),
                own,
                backward=composed_backward(inputs, name),
            )
    if q.device.type == "cuda" or not backward:  # it has no backward on a CPU
        yield Peer("FlexAttention", flex(free), free, compiled=True)
    if importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute"):
        from flash_attn.cute import flash_attn_func

        def flash_attention_4(*given: Tensor) -> Tensor:
            out = flash_attn_func(*given)
            return out[0] if isinstance(out, tuple) else out

        yield Peer("flash-attn-4", lambda: flash_attention_4(*free), free)
        if not backward:
            yield Peer("flash-attn-4 + copies", lambda: flash_attention_4(*copied()), own)


def served(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """SDPA backends that take these tensors."""
    if q.device.type != "cuda":
        return ["flash"]  # the CPU has one of that name
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    asked = torch.backends.cuda.SDPAParams(*heads_first, None, 0.0, False, False)
    can = {"flash": torch.backends.cuda.can_use_flash_attention, "cuDNN": torch.backends.cuda.can_use_cudnn_attention}
    return [name for name, answer in can.items() if answer(asked)]


def sdpa(q: Tensor, k: Tensor, v: Tensor, name: str | None) -> Tensor:
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    if name is None:
        return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    with sdpa_kernel(BACKENDS[name]):
        return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def flex(leaves: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(*(t.transpose(1, 2) for t in leaves)).transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)


def _cpu(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)


COMPOSED = {"flash": _flash, "cuDNN": _cudnn}  # attention that also returns its log-sum-exp


def merge(one: Tensor, one_lse: Tensor, two: Tensor, two_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two attentions over disjoint keys as one: outputs [B, L, heads, head_dim], log-sum-exps [B, heads, L]."""
    lse = torch.logaddexp(one_lse, two_lse)
    shares = ((each - lse).exp().transpose(1, 2)[..., None] for each in (one_lse, two_lse))
    return (one * next(shares) + two * next(shares)).to(one.dtype), lse


def composed(
    inputs: Inputs, name: str, merging: Callable[..., tuple[Tensor, Tensor]] = merge
) -> tuple[Tensor, tuple[Any, ...]]:
    """No key is copied: all chunks as one long query against the context, a batched call for the own chunks, a merge.

    Returns the output, and for the backward the merged log-sum-exp and what both calls returned.
    """
    attention = COMPOSED.get(name, _cpu)
    batch, length, heads, head_dim = inputs.q.shape
    flat = inputs.q.detach().reshape(1, batch * length, heads, head_dim)
    past = attention(*(t.transpose(1, 2) for t in (flat, inputs.past_k, inputs.past_v)))
    own = attention(*(t.detach().transpose(1, 2) for t in (inputs.q, inputs.k, inputs.v)))
    past_out = past[0].transpose(1, 2).reshape(inputs.q.shape)
    past_lse = past[1].reshape(heads, batch, length).transpose(0, 1)
    out, lse = merging(past_out, past_lse, own[0].transpose(1, 2), own[1].reshape(batch, heads, length))
    return out, (lse, past, own)


def composed_backward(inputs: Inputs, name: str) -> Callable[[Tensor, Any, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Flash attention's backward needs the output and the log-sum-exp only, so the merged ones give exact parts."""
    q, k, v = (t.detach() for t in (inputs.q, inputs.k, inputs.v))

    def part(grad: Tensor, out: Tensor, lse: Tensor, keys: tuple[Tensor, Tensor, Tensor], state: tuple) -> Any:
        given = [t.transpose(1, 2) for t in (grad, *keys, out)]
        if name == "cpu":
            run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            return run(*given, lse, 0.0, False)
        lengths, seeds = state[2:6], state[6:8]
        run = torch.ops.aten._scaled_dot_product_flash_attention_backward
        return run(*given, lse, *lengths, 0.0, False, *seeds)

    def run(out: Tensor, state: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        lse, past, own = state
        heads, head_dim = q.shape[2:]
        flat = [t.reshape(1, -1, heads, head_dim) for t in (grad, q, out)]
        flat_lse = lse.transpose(0, 1).reshape(1, heads, -1).contiguous()
        from_past = part(flat[0], flat[2], flat_lse, (flat[1], inputs.past_k, inputs.past_v), past)[0]
        from_own, dk, dv = part(grad, out, lse.contiguous(), (q, k, v), own)
        dq = from_past.transpose(1, 2).reshape(q.shape) + from_own.transpose(1, 2)
        return dq, dk.transpose(1, 2), dv.transpose(1, 2)

    return run
