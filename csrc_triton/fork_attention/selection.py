"""Which kernels serve a call of fork attention on a GPU: those for Hopper (Gluon), the portable ones, or those of few
queries, which are portable too and for the forward pass alone."""

from __future__ import annotations

import functools
import logging

import torch
import triton
from torch import Tensor

from csrc_triton import runtime
from csrc_triton.fork_attention.portable import few
from csrc_triton.fork_attention.tiles import HOPPER, Call, describable

log = logging.getLogger(__name__)

# Gluon changes between minor versions. 3.9 compiles too, with an option of its assembler that no GPU has run yet
TESTED_TRITON = ((3, 6), (3, 7), (3, 8))
HEAD_DIMS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16)


def hopper_serves(q: Tensor, *others: Tensor | None, unfit: str | None = None) -> bool:
    """Whether the Hopper kernels serve these queries, keys and values [..., heads, head_dim].

    Decided by the backend in force and by device, dtype, head size, addresses and strides. unfit: a reason against them
    that the caller has found, such as `why_not_shapes`. Each reason is logged once; an untested version of Triton is a
    warning.

    Raises:
        ValueError: where the backend "hopper" is forced and they cannot serve, with the reason.
    """
    backend = runtime.get_backend()
    if backend == "triton":
        return False
    reason = why_not_hopper(q.device, q.dtype, q.shape[-1]) or unfit
    if reason is None and not describable(q, *(t for t in others if t is not None)):
        reason = "a tensor whose address or strides are not multiples of 16 bytes"
    if reason is not None and backend == "hopper":
        raise ValueError(f"fork_attention: backend 'hopper' is forced and cannot serve: {reason}")
    _say(reason)
    return reason is None


def few_queries(call: Call) -> bool:
    """Whether the kernels of few queries serve the forward pass: by shapes, unless the backend "hopper" is forced."""
    return runtime.get_backend() != "hopper" and few.serves(call)


def why_not_shapes(call: Call) -> str | None:
    """Reason why the shapes and options of a call keep the Hopper kernels from serving it; None if they do not."""
    if call.causal_block:
        return f"causal_block {call.causal_block}; accepted: None"
    if call.own != call.q.shape[1]:
        return "a query length other than the own keys'; accepted: equal lengths"
    if call.past.index is not None:
        return "context_index with a pair of tensors; accepted: with a view of a cache"
    return None


@functools.cache
def why_not_hopper(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Reason why the Hopper kernels cannot serve tensors of any strides; None if they can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"tensors on {device.type}; accepted: an NVIDIA GPU of capability 9.0"
    major, minor = torch.cuda.get_device_capability(device)
    if major != HOPPER:
        return f"a GPU of capability {major}.{minor}; accepted: 9.0"
    if dtype not in DTYPES:
        return f"{dtype} tensors; accepted: bfloat16, float16"
    if head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim}; accepted: 64, 128"
    return why_not_triton(triton.__version__)


def minor(version: str) -> tuple[int, ...]:
    """The major and minor number of a version of Triton."""
    return tuple(int(part) for part in version.split(".")[:2])


def why_not_triton(version: str) -> str | None:
    """Reason why the Hopper kernels cannot run on a version of Triton; None if they can."""
    if minor(version) in TESTED_TRITON:
        return None
    return f"Triton {version}; accepted: {', '.join('.'.join(map(str, v)) for v in TESTED_TRITON)}"


@functools.cache
def _say(reason: str | None) -> None:
    if reason is None:
        log.info("fork_attention: the Hopper kernels serve")
    else:
        level = logging.WARNING if reason == why_not_triton(triton.__version__) else logging.INFO
        log.log(level, "fork_attention: the portable kernels serve: %s", reason)
