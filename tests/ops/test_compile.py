"""Every op under torch.compile(fullgraph=True), on the torch path and on the kernels, and how often it compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from interpreter import rounds_to_nearest  # noqa: F401 - used by every test here
from op_samples import CALLS, INPUTS
from torch import Tensor

from csrc_triton import CacheView, fork_attention, runtime


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", CALLS)
def test_an_op_is_one_graph(name: str, backend: str, compiler: str, device: torch.device) -> None:
    """Outputs and gradients are those of the plain call."""
    call, found = CALLS[name], []
    with runtime.backend(backend):
        for run in (call.run, torch.compile(call.run, backend=compiler, fullgraph=True)):
            given = {key: INPUTS[key].to(device).clone().requires_grad_(key in call.leaves) for key in call.inputs}
            out = run(*given.values())
            if call.leaves:
                out.sum().backward()
            found.append([out.detach(), *(given[key].grad for key in call.leaves)])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)


def counted(function: Callable[..., Tensor], **options: Any) -> tuple[Callable[..., Tensor], list[None]]:
    """The function compiled, and a list that has an entry for each time it was compiled."""
    compiled: list[None] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        compiled.append(None)
        return graph

    return torch.compile(function, backend=backend, fullgraph=True, **options), compiled


@pytest.mark.parametrize(
    ("backend", "options", "times"), [("torch", {}, 2), ("torch", {"dynamic": True}, 1), ("triton", {}, 1)]
)
def test_a_context_that_grows_is_compiled_at_most_twice(backend: str, options: dict[str, Any], times: int) -> None:
    """The kernels see a table of one shape; the torch path gathers, and its second length is any length."""
    k, v, q = INPUTS["k4"].flatten(0, 1).repeat(9, 1, 1), INPUTS["v4"].flatten(0, 1).repeat(9, 1, 1), INPUTS["q4"]
    attend, compiled = counted(lambda view: fork_attention(q, q, q, view), **options)
    with runtime.backend(backend):
        for length in (3, 5, 8, 21):
            view = CacheView.of(k, v, [[(0, length)], [(40, length)]])
            torch.testing.assert_close(attend(view), fork_attention(q, q, q, view), rtol=1e-5, atol=1e-6)
    assert len(compiled) == times


@pytest.mark.parametrize(("options", "times"), [({}, 2), ({"dynamic": True}, 1)])
def test_a_pair_that_grows_is_compiled_at_most_twice(options: dict[str, Any], times: int) -> None:
    q = INPUTS["q4"]
    attend, compiled = counted(lambda k, v: fork_attention(q, q, q, (k, v)), **options)
    with runtime.backend("torch"):
        for length in (3, 5, 8, 21):
            past = INPUTS["past_k"].repeat(1, 9, 1, 1)[:, :length]
            torch.testing.assert_close(attend(past, past), fork_attention(q, q, q, (past, past)))
    assert len(compiled) == times
