"""For every op's tests: memory that a kernel forgets to write is NaN, and the device that tests run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and its kin come filled with NaN (largest negative numbers for integers)."""

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            if tensor.dtype == torch.bool:
                return tensor
            with torch.no_grad():
                has_nan = tensor.is_floating_point() or tensor.is_complex()
                return tensor.fill_(float("nan") if has_nan else torch.iinfo(tensor.dtype).min)

        return wrapped

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", filled(Tensor.new_empty))


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one, else the CPU, where Triton's kernels run in its interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
