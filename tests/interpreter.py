"""Triton's interpreter, which stands in for a GPU: with the hardware's rounding, and without needless work."""

from __future__ import annotations

import dataclasses
import functools
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def rounds_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """For test modules that import it: the interpreter rounds as the hardware does.

    By itself it truncates fp32 to bfloat16 and float8_e4m3fn; the hardware rounds to nearest.
    """
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


def work_once() -> None:
    """Makes the interpreter about twice as fast, with the same results.

    It replaces the functions of triton.language anew in every call of one jitted function by another, though the
    launch has replaced them already. Here a launch replaces them once. What a dtype is in NumPy is looked up once, too,
    and no sums are made for assertions of overflow that the interpreter, which does not debug, never asserts.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, launch, look_up = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter._get_np_dtype
    dtypes: dict[str, np.dtype] = {}
    replaced: list[ModuleType] = []  # in the launch that is under way

    @functools.cache
    def seen_from(function: Any) -> list[ModuleType]:
        return [each for each in (tl, tl.core) if any(value is each for value in function.__globals__.values())]

    def patched(function: Any) -> Any:
        names = seen_from(function)
        if names and all(each in replaced for each in names):
            return interpreter._LangPatchScope()  # with nothing to put back
        replaced.extend(names)
        return patch(function)

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        replaced.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            replaced.clear()

    def numpy_dtype(dtype: Any) -> np.dtype:
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = look_up(dtype)
        return dtypes[name]

    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    interpreter._patch_lang = patched
    interpreter.GridExecutor.__call__ = launched  # type: ignore[method-assign]
    interpreter._get_np_dtype = numpy_dtype
