"""Choice of the implementation of a call, by device, dtype and shape, never by catching an exception.

The backend is "auto" (the fastest implementation that can serve the call) or is forced: for the process by the
environment variable CSRC_TRITON_BACKEND or by `set_backend`, for a context by a `backend` block. A forced backend that
cannot serve a call is an error.

A block holds for its context (`contextvars`): for its thread or asyncio task and for no other; a new thread begins with
the process's backend. The backward pass of a call has the backend that was in force at the call, on whatever thread
autograd runs it. torch.compile cannot read a context, and reads the thread instead: a compiled function follows the
innermost block of its thread, and is compiled anew for another backend.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

BACKENDS = ("auto", "torch", "triton", "hopper")
ENVIRONMENT_VARIABLE = "CSRC_TRITON_BACKEND"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_CAPABILITY = (8, 0)  # sm_80
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # torch.compile cannot trace the question

_process = "auto"  # backend where no block forces one
_block: ContextVar[str | None] = ContextVar("csrc_triton_backend", default=None)
_fake: ContextVar[bool] = ContextVar("csrc_triton_shapes_only", default=False)
_VARIABLES: dict[str, ContextVar[Any]] = {"block": _block, "fake": _fake}


class _Traced(threading.local):
    """The variables as torch.compile can read and guard them, as the thread last set them: instance attributes."""

    def __init__(self) -> None:
        self.block: str | None = None
        self.fake = False


_traced = _Traced()


def set_backend(name: str) -> None:
    """Forces a backend for all later calls of this process outside of `backend` blocks; "auto" ends that.

    Raises:
        ValueError: for a name that is not in BACKENDS.
    """
    global _process
    _check_backend("backend", name)
    _process = name


def get_backend() -> str:
    """The backend in force here."""
    block = _traced.block if torch.compiler.is_compiling() else _block.get()
    return _process if block is None else block


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces a backend inside the `with` block, for this thread or asyncio task alone.

    Raises:
        ValueError: for a name that is not in BACKENDS.
    """
    _check_backend("backend", name)
    before = _hold("block", name)
    try:
        yield
    finally:
        _hold("block", before)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Kernels serve tensors of any device inside the `with` block: for fake tensors, on which no kernel runs.

    Holds for this thread or asyncio task alone.
    """
    before = _hold("fake", True)
    try:
        yield
    finally:
        _hold("fake", before)


def _hold(name: str, value: Any) -> Any:
    """Sets one of the variables and returns its value before."""
    if torch.compiler.is_compiling():
        before = getattr(_traced, name)
    else:
        before = _VARIABLES[name].get()
        _VARIABLES[name].set(value)
    setattr(_traced, name, value)
    return before


def _check_backend(source: str, name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source}: found {name!r}; accepted: {', '.join(BACKENDS)}")


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def older_than(device: torch.device, capability: tuple[int, int]) -> bool:
    """Whether `device` is a GPU of a lower compute capability; not inside of `shapes_only`, where no kernel runs."""
    return device.type == "cuda" and not _shapes_only() and _capability(device) < capability


def _shapes_only() -> bool:
    return _traced.fake if torch.compiler.is_compiling() else _fake.get()


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Reason why the portable kernels cannot serve tensors of this device and dtype; None if they can."""
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    if dtype not in DTYPES:
        return f"{dtype} tensors; accepted: {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}"
    if _shapes_only():
        return None
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "a GPU under ROCm, on which no tiling has been tried; accepted: NVIDIA GPUs from sm_80"
        if _capability(device) < OLDEST_CAPABILITY:
            return "a GPU older than sm_80"
        return None
    if device.type == "cpu" and interpreted():
        return None
    return f"tensors on {device.type}; accepted: cuda, or cpu under TRITON_INTERPRET=1"


def why_unfit(x: torch.Tensor, *vectors: torch.Tensor | None) -> str | None:
    """Reason why no kernel can serve `x` together with these vectors; None if one can."""
    odd = [vector.dtype for vector in vectors if vector is not None and vector.dtype not in DTYPES]
    if odd:
        return f"a vector is {odd[0]}"
    return None if x.numel() else "x has no elements"


def describe(tensor: torch.Tensor) -> str:
    """Shape, dtype and device, for messages."""
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def choose(op: str, device: torch.device, dtype: torch.dtype, *, unfit: str | None = None) -> str:
    """Returns the implementation, "torch" or "triton", that serves one call of `op`.

    Triton's interpreter is for tests and serves only where it is forced. The backend "hopper" counts as "triton" here:
    an op without Hopper kernels uses its portable ones.

    Args:
        op: name for error messages.
        device, dtype: of the op's main tensor.
        unfit: the op's own reason why its kernel cannot serve the call, such as a head size; None if there is none.

    Raises:
        ValueError: when a forced backend cannot serve, with the reason.
    """
    forced = get_backend()
    if forced == "torch":
        return "torch"
    reason = unfit or why_not_triton(device, dtype)
    if reason is None and (forced != "auto" or device.type == "cuda"):
        return "triton"
    if forced != "auto":
        raise ValueError(f"{op}: backend {forced!r} is forced and cannot serve: {reason}")
    return "torch"


_process = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"  # an empty variable is none
_check_backend(ENVIRONMENT_VARIABLE, _process)
