"""Choice of the implementation of a call, by device, dtype and shape, never by catching an exception.

The backend is "auto" (the fastest implementation that can serve the call) or is forced by the environment variable
CSRC_TRITON_BACKEND, `set_backend` or `backend`. A forced backend that cannot serve a call is an error.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

BACKENDS = ("auto", "torch", "triton", "hopper")
ENVIRONMENT_VARIABLE = "CSRC_TRITON_BACKEND"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_CAPABILITY = (8, 0)  # sm_80
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # torch.compile cannot trace the question

_backend = "auto"
_shapes_only = False


def set_backend(name: str) -> None:
    """Forces a backend for all later calls of this process; "auto" ends that.

    Raises:
        ValueError: for a name that is not in BACKENDS.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"backend: found {name!r}; accepted: {', '.join(BACKENDS)}")
    _backend = name


def get_backend() -> str:
    return _backend


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces a backend inside the `with` block."""
    before = _backend
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Kernels serve tensors of any device inside the `with` block: for fake tensors, on which no kernel runs."""
    global _shapes_only
    before, _shapes_only = _shapes_only, True
    try:
        yield
    finally:
        _shapes_only = before


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Reason why the portable kernels cannot serve tensors of this device and dtype; None if they can."""
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    if dtype not in DTYPES:
        return f"{dtype} tensors; accepted: {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}"
    if _shapes_only:
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
    if _backend == "torch":
        return "torch"
    reason = unfit or why_not_triton(device, dtype)
    if reason is None and (_backend != "auto" or device.type == "cuda"):
        return "triton"
    if _backend != "auto":
        raise ValueError(f"{op}: backend {_backend!r} is forced and cannot serve: {reason}")
    return "torch"


set_backend(os.environ.get(ENVIRONMENT_VARIABLE, "auto"))
