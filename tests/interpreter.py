"""Triton's interpreter truncates fp32 to bfloat16 and float8_e4m3fn; the hardware rounds to nearest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def rounds_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """For test modules that import it: the interpreter rounds as the hardware does."""
    if torch.cuda.is_available():
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values: np.ndarray, found: Any, wanted: Any, mode: Any) -> np.ndarray:
        if found.is_fp32() and wanted.is_bf16():
            nearest = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
            return nearest.view(torch.int16).numpy().view(np.uint16).reshape(values.shape)
        if found.is_fp32() and wanted.is_fp8e4nv():
            near = torch.from_numpy(np.ascontiguousarray(values)).to(torch.float8_e4m3fn)
            return near.view(torch.uint8).numpy().reshape(values.shape)
        return convert(values, found, wanted, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
