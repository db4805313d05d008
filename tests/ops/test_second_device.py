"""Kernels are launched on the GPU of their tensors, also where another one is the current one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from op_samples import CALLS, INPUTS, run
from torch import Tensor

from csrc_triton import runtime

TWO_GPUS = torch.cuda.device_count() > 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter stands in where there is no GPU")
@pytest.mark.parametrize("name", CALLS)
def test_every_launch_is_inside_of_its_tensors_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward. `torch.cuda.device_of` and Triton's launcher are watched in place of a second GPU."""
    from triton.runtime.interpreter import GridExecutor

    entered: list[Tensor] = []
    launched: list[int] = []
    launch = GridExecutor.__call__

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        entered.append(tensor)
        yield
        entered.pop()

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(len(entered))
        tensors = [value for value in args if isinstance(value, Tensor)]
        assert not entered or entered[-1].device == tensors[0].device
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(GridExecutor, "__call__", watched)
    leaves = {key: INPUTS[key].clone().requires_grad_() for key in CALLS[name].leaves}
    with runtime.backend("triton"):
        out = run(name, leaves)
        forward = len(launched)
        if leaves:
            out.sum().backward()
    assert forward and all(launched) and (not leaves or len(launched) > forward)


@pytest.mark.gpu
@pytest.mark.skipif(not TWO_GPUS, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if not call.writes])
def test_calls_on_a_second_gpu_equal_those_on_the_first(name: str) -> None:
    found = []
    for device in ("cuda:0", "cuda:1"):
        leaves = {key: value.to(device).requires_grad_(key in CALLS[name].leaves) for key, value in INPUTS.items()}
        with torch.cuda.device(0), runtime.backend("triton"):
            out = run(name, leaves)
            if CALLS[name].leaves:
                out.sum().backward()
        found.append([out.detach().cpu(), *(leaves[key].grad.cpu() for key in CALLS[name].leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
