"""Offsets of more than 31 bits, in the interpreter: tensors in address space that is reserved and hardly touched."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import pytest
import torch
from attention_cases import Case, assert_right, equal, make, on_kernel
from torch import Tensor

from csrc_triton import CacheView
from csrc_triton.fork_attention import naive

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter: run it without a GPU")
MARGIN = 2**32  # bytes before and behind, in which an offset cut to 32 bits would land
FAR = 2**31  # elements
NORESERVE = 0x4000  # of Linux, as the mmap module has it from Python 3.13 on


def reserved(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """A tensor of zeros whose pages take memory when they are touched."""
    count = int(np.prod(shape, dtype=np.int64))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory = mmap.mmap(-1, count * dtype.itemsize + 2 * MARGIN * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=MARGIN * dtype.itemsize).view(shape)


@pytest.fixture(autouse=True)
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter works on the tensors themselves here; it would copy whole storages onto themselves afterwards."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)


def test_pools_and_tables() -> None:
    case = make("cpu", 1, 9, 1, 16, torch.float16, [[(0, 20), (30, 5)]])
    rows = FAR // 16 + 100
    pools = [reserved(rows, 1, 16) for _ in range(2)]
    for pool, near in zip(pools, case.pools, strict=True):
        pool[-len(near) :] = near
    far = CacheView.of(*pools, [[(rows - len(case.pools[0]) + row, n) for row, n in case.segments[0]]])
    assert equal(on_kernel(case, far), on_kernel(case, case.view))


@pytest.mark.parametrize("dimension", ["branches", "heads"])
def test_strides_of_branches_and_heads(dimension: str) -> None:
    """The third branch, or head, begins 2^31 elements from the first."""
    branches, heads = (3, 1) if dimension == "branches" else (1, 3)
    case = make("cpu", branches, 5, heads, 16, torch.float16, [[(20 * i, 4)] for i in range(branches)])
    far, memory, used = FAR // 2, reserved(FAR + 2**16), 0

    def moved(tensor: Tensor) -> Tensor:
        nonlocal used
        strides = (far, 16 * heads, 16) if dimension == "branches" else (0, 16, far)
        there = memory.as_strided(tensor.shape, (*strides, 1), used).copy_(tensor)
        used += 1024
        return there

    pair = tuple(torch.stack([pool[row : row + n] for [(row, n)] in case.segments]) for pool in case.pools)
    expected = on_kernel(case, pair)  # type: ignore[arg-type]
    own = (moved(t) for t in (case.q, case.k, case.v, case.grad))
    there = Case(*own, case.pools, case.segments, case.scale)
    assert equal(on_kernel(there, tuple(moved(t) for t in pair)), expected)  # type: ignore[arg-type]
    assert_right(case, expected)


def test_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last program of each kernel, for 2^27 branches of 16 tokens: its log-sum-exps lie 2^31 elements away."""
    import triton.language as tl
    from triton.runtime import interpreter

    from csrc_triton.fork_attention.portable import backward, forward
    from csrc_triton.fork_attention.tiles import Call, Past

    run = interpreter.GridExecutor.__call__

    def last(self: Any, *args: Any, **kwargs: Any) -> None:
        programs, self.grid = self.grid[0], (1,)
        number = interpreter.TensorHandle(np.array([programs - 1], dtype=np.int32), tl.int32)
        monkeypatch.setattr(interpreter.interpreter_builder, "create_get_program_id", lambda axis: number)
        run(self, *args, **kwargs)

    def empty(*shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        return reserved(*(shape[0] if isinstance(shape[0], tuple) else shape), dtype=dtype)

    length, branches = 16, FAR // 16 + 1
    near = [torch.randn(1, length, 1, 16).half() for _ in range(4)]
    q, k, v = (t.expand(branches, -1, -1, -1) for t in near[:3])
    grad = reserved(8 * branches + 16 * length).as_strided(q.shape, (8, 16, 16, 1))
    grad[-1] = near[3][0]
    call = Call(q, k, v, Past.of(q, None, None, None), 0.25)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", last)
    monkeypatch.setattr(torch, "empty", empty)
    out, lse = forward.forward(call)
    grads = backward.backward(call, out, lse, grad, None, True, True)
    leaves = [t.double().requires_grad_() for t in near[:3]]
    exact, exact_lse = naive.fork_attention(*leaves, None, 0.25)
    wanted = torch.autograd.grad(exact, leaves, near[3].double())
    assert (out[-1] - exact[0]).abs().max() < 2e-3
    assert (lse[-1] - exact_lse[0]).abs().max() < 1e-5
    for a, b in zip(grads, wanted, strict=True):
        assert (a[-1] - b[0]).abs().max() < 1e-2
