"""A stand-in for CUDA graphs on the CPU: what a recording does to memory, one operation of torch at a time.

A recording runs nothing that changes a tensor that was there before; a replay runs its operations again on the same
tensors, so that it reads its inputs and parameters as they are then and overwrites what the replay before it left.
Graphs of one pool overwrite each other's tensors, as their memory is shared.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar
from weakref import WeakSet

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tempact.executor.cuda_graphs import CudaGraphRunner


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class CpuGraph(TorchDispatchMode):
    """As `torch.cuda.CUDAGraph`."""

    pools: ClassVar[dict[object, WeakSet[CpuGraph]]] = defaultdict(WeakSet)  # the graphs of each
    uses: ClassVar[dict[object, int]] = {}  # of each pool that was recorded to; at 0 it is freed
    drawing: ClassVar[bool] = True  # whether numbers can be drawn: not in a recording, nor after a broken one
    underway: ClassVar[list[object]] = []  # pools that take what is allocated, also after a broken recording

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, dict[str, Any], Any]] = []
        self.made: list[Tensor] = []  # memory of the recording's own
        self.read: set[int] = set()
        self.capturing = self.ended = False

    def __del__(self) -> None:
        if self.ended:
            self.release(0, self.pool)

    def capture_begin(self, pool: object | None = None, *, capture_error_mode: str) -> None:
        self.pool, self.error, CpuGraph.drawing = object() if pool is None else pool, sys.exc_info()[1], False
        if self.uses.get(self.pool) == 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        if self.pool in self.underway:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.uses[self.pool] = self.uses.get(self.pool, 0) + 1
        self.underway.append(self.pool)
        self.capturing = True
        self.__enter__()

    def capture_end(self) -> None:
        if not self.capturing:
            raise RuntimeError("the stream records nothing")
        self.capturing = False
        self.__exit__(None, None, None)
        if sys.exc_info()[1] is not self.error and self.operations:
            raise RuntimeError("the recording is broken")
        self.end_allocation(0, self.pool)
        CpuGraph.drawing = self.ended = True
        self.pools[self.pool].add(self)

    @classmethod
    def end_allocation(cls, device: int | None, pool: object) -> None:
        if pool not in cls.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        cls.underway.remove(pool)

    @classmethod
    def release(cls, device: int | None, pool: object) -> None:
        if pool in cls.uses:  # or it was of an earlier test
            cls.uses[pool] -= 1

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        given = tensors((args, kwargs))
        out = self._shapes(op, args, kwargs) if op._schema.is_mutable else op(*args, **kwargs)
        self.read.update(map(storage, given))
        if not aliases(op):
            known = {id(tensor) for tensor in given}
            self.made += [tensor for tensor in tensors(out) if id(tensor) not in known]
        self.operations.append((op, args, kwargs, out))
        return out

    def _shapes(self, op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What an operation that writes to its arguments returns, with the arguments as they were."""
        copies = {id(tensor): tensor.clone() for tensor in tensors((args, kwargs))}
        originals = {id(copy): tensor for tensor in tensors((args, kwargs)) for copy in [copies[id(tensor)]]}
        args, kwargs = tree_map(lambda leaf: copies.get(id(leaf), leaf), (args, kwargs))
        return tree_map(lambda leaf: originals.get(id(leaf), leaf), op(*args, **kwargs))

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)  # the recorded operations have its casts among them
    def replay(self) -> None:
        for other in self.pools[self.pool]:
            for tensor in other.made if other is not self else ():
                if storage(tensor) not in self.read and tensor.is_floating_point():
                    tensor.fill_(torch.nan)
        for op, args, kwargs, out in self.operations:
            if aliases(op):
                continue
            given = {id(tensor) for tensor in tensors((args, kwargs))}
            for own, new in zip(tensors(out), tensors(op(*args, **kwargs)), strict=True):
                if id(own) not in given:
                    own.copy_(new)


def aliases(op: Any) -> bool:
    """Whether an operation only returns other views of its arguments."""
    returned: Sequence[Any] = op._schema.returns
    return bool(returned) and all(r.alias_info is not None and not r.alias_info.is_write for r in returned)


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


@pytest.fixture(params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def cpu_graphs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runners that are made inside of the test record on the CPU, or on a GPU with its own graphs."""
    if request.param == "gpu":
        return
    if torch.cuda.is_available():
        pytest.skip("stands in for a GPU, which is there: run `pytest -m gpu`")
    CpuGraph.pools.clear()
    CpuGraph.uses.clear()
    CpuGraph.underway.clear()
    stand_ins: dict[str, Any] = {
        "CUDAGraph": CpuGraph, "Stream": Stream, "current_stream": Stream, "graph_pool_handle": object,
        "stream": lambda stream: nullcontext(), "synchronize": lambda: None, "empty_cache": lambda: None,
        "memory_reserved": lambda: 1, "memory_allocated": lambda: 0, "mem_get_info": lambda: (1, 1),
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", CpuGraph.end_allocation, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", CpuGraph.release, raising=False)
    monkeypatch.setattr(CudaGraphRunner, "_usable", lambda runner, x: runner.graphs)
