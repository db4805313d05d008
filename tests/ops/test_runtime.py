"""The backend in force: of the process, of a block, of its thread and task, under torch.compile and in backward."""

from __future__ import annotations

import asyncio
import contextvars
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from csrc_triton import gated_residual, runtime

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def process_backend() -> Iterator[None]:
    before = runtime.get_backend()
    yield
    runtime.set_backend(before)


def in_a_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_blocks_nest_and_end_with_an_error() -> None:
    with runtime.backend("torch"):
        with pytest.raises(KeyError), runtime.backend("triton"):
            assert runtime.get_backend() == "triton"
            raise KeyError
        assert runtime.get_backend() == "torch"
    assert runtime.get_backend() == "auto"


def test_threads_do_not_change_each_others_backend() -> None:
    """Blocks that overlap in time and end in another order than they began."""
    steps = {name: threading.Event() for name in ("one entered", "two entered", "one left")}
    found: dict[str, str] = {}

    def one() -> None:
        with runtime.backend("torch"), runtime.shapes_only():
            steps["one entered"].set()
            steps["two entered"].wait(10)
            found["one inside"] = runtime.get_backend()
        found["one after"] = runtime.get_backend()
        steps["one left"].set()

    def two() -> None:
        steps["one entered"].wait(10)
        found["two before"] = runtime.get_backend()
        with runtime.backend("triton"):
            steps["two entered"].set()
            steps["one left"].wait(10)
            found["two inside"] = runtime.get_backend()
            found["two's devices"] = str(runtime.why_not_triton(torch.device("meta"), torch.float32))
        found["two after"] = runtime.get_backend()

    threads = [threading.Thread(target=target) for target in (one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found.pop("two's devices").startswith("tensors on meta")
    assert found == {
        "one inside": "torch", "one after": "auto", "two before": "auto", "two inside": "triton", "two after": "auto",
    }  # fmt: skip
    assert runtime.get_backend() == "auto"


def test_a_new_thread_has_the_process_backend_and_a_copied_context_the_blocks() -> None:
    runtime.set_backend("torch")
    with runtime.backend("triton"):
        runtime.set_backend("hopper")  # of the process: the block goes on
        assert runtime.get_backend() == "triton"
        assert in_a_thread(runtime.get_backend) == "hopper"
        copied = contextvars.copy_context()
        assert in_a_thread(lambda: copied.run(runtime.get_backend)) == "triton"
    assert runtime.get_backend() == "hopper"


def test_tasks_of_one_thread_do_not_change_each_others_backend() -> None:
    async def task(name: str) -> list[str]:
        found = []
        with runtime.backend(name):
            for _ in range(3):
                await asyncio.sleep(0)
                found.append(runtime.get_backend())
        return [*found, runtime.get_backend()]

    async def both() -> list[list[str]]:
        return list(await asyncio.gather(task("torch"), task("triton")))

    assert asyncio.run(both()) == [["torch"] * 3 + ["auto"], ["triton"] * 3 + ["auto"]]


def test_shapes_only_lets_kernels_serve_any_device() -> None:
    meta = torch.device("meta")
    with runtime.shapes_only():
        assert runtime.why_not_triton(meta, torch.float32) is None
        assert in_a_thread(lambda: runtime.why_not_triton(meta, torch.float32)) is not None
    assert runtime.why_not_triton(meta, torch.float32) == (
        "tensors on meta; accepted: cuda, or cpu under TRITON_INTERPRET=1"
    )


def test_compiled_code_follows_the_block_of_its_thread() -> None:
    """And is compiled once for each backend, also where another thread meets it."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        compiled.append("csrc_triton" in graph.code)
        return graph

    x = torch.ones(1, 2, 8)
    step = torch.compile(lambda x: gated_residual(x, x, x), backend=backend, fullgraph=True)
    with runtime.backend("triton"):
        step(x)
        in_a_thread(lambda: step(x))
        step(x)
    step(x)
    assert compiled == [True, False]
    with runtime.backend("hopper"):  # counts as the kernels
        step(x)
    assert compiled == [True, False, True]


def test_a_block_inside_compiled_code_ends_with_it() -> None:
    def step(x: Tensor) -> Tensor:
        with runtime.backend("triton"):
            x = gated_residual(x, x, x)
        return x + len(runtime.get_backend())

    x = torch.ones(1, 2, 8)
    graphs = []
    out = torch.compile(step, backend=lambda graph, _: graphs.append(graph.code) or graph, fullgraph=True)(x)
    assert torch.equal(out, torch.full_like(x, 2 + len("auto")))
    assert "csrc_triton.gated_residual" in graphs[0] and runtime.get_backend() == "auto"


@pytest.mark.parametrize(("value", "found"), [("", "auto"), ("torch", "torch")])
def test_the_environment_names_the_process_backend(value: str, found: str) -> None:
    assert imported(value).stdout == found


def test_an_unknown_backend_is_named_with_where_it_came_from() -> None:
    message = "CSRC_TRITON_BACKEND: found 'cutlass'; accepted: auto, torch, triton, hopper"
    assert message in imported("cutlass").stderr
    for call in (runtime.set_backend, lambda name: runtime.backend(name).__enter__()):
        with pytest.raises(ValueError, match="^backend: found 'cutlass'; accepted: auto, torch, triton, hopper$"):
            call("cutlass")
    assert runtime.get_backend() == "auto"


def imported(value: str) -> subprocess.CompletedProcess[str]:
    """A process that says its backend, with the variable set."""
    environment = {**os.environ, runtime.ENVIRONMENT_VARIABLE: value}
    code = "import sys; from csrc_triton import runtime; sys.stdout.write(runtime.get_backend())"
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
