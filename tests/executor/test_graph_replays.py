"""What a replay of a recorded call must share with the call itself; without a GPU with a stand-in for CUDA graphs."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
import torch
from executor.cpu_graphs import CpuGraph, cpu_graphs  # noqa: F401
from executor.test_cuda_graphs import CONFIG, DEVICE, make_executor
from torch import Tensor

from tempact.executor.cuda_graphs import CudaGraphRunner
from tempact.executor.executor import Executor
from tempact.models.wan.transformer import TextKV, WanTransformer

pytestmark = pytest.mark.usefixtures("cpu_graphs")
SHAPE = (2, 3, 3, 8, 8)


@dataclass
class Calls:
    """The same calls with graphs and without: `runner` records each after the first, `plain` none."""

    executor: Executor = field(default_factory=lambda: make_executor(CONFIG))
    sigma: Tensor = field(default_factory=lambda: torch.full((2, 3), 0.5, device=DEVICE))
    words: Tensor = field(default_factory=lambda: torch.randn(2, 4, 8, device=DEVICE))

    def __post_init__(self) -> None:
        self.runner = self.executor.runner
        self.runner.warm_calls, self.runner.graphs = 1, True
        self.plain = CudaGraphRunner(self.runner.model, self.runner.parameters, graphs=False)

    def policy(self, runner: CudaGraphRunner, x: Tensor) -> Tensor:
        index, positions = torch.arange(2, device=DEVICE), torch.arange(3, device=DEVICE)
        return runner.policy_velocity(x, self.sigma, self.words, index, positions, None)

    def velocity(self, runner: CudaGraphRunner, x: Tensor) -> Tensor:
        with torch.no_grad():
            return runner.velocity(x, self.sigma, self.text(), torch.arange(3, device=DEVICE), None)

    def text(self) -> TextKV:
        return self.runner.model.project_text(self.words).select(torch.arange(2, device=DEVICE))

    def gradients(self, use: Callable[[CudaGraphRunner], None], runner: CudaGraphRunner) -> list[Tensor]:
        for parameter in self.runner.parameters():
            parameter.grad = None
        use(runner)
        return [parameter.grad.clone() for parameter in self.runner.parameters() if parameter.grad is not None]

    def recorded(self) -> int:
        return self.runner._recorded()


def draw() -> Tensor:
    return torch.randn(SHAPE, device=DEVICE)


@pytest.fixture
def calls() -> Iterator[Calls]:
    """With the recordings of a call with gradients and of one without."""
    own = Calls()
    for _ in range(2):
        own.policy(own.runner, draw()).sum().backward()
        own.velocity(own.runner, draw())
    assert own.recorded() == 2
    yield own


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) > 3
    for own, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-6)


def test_inputs_are_those_of_the_call(calls: Calls) -> None:
    x = draw()
    first = calls.velocity(calls.runner, x)
    assert torch.equal(first, calls.velocity(calls.plain, x))
    x.mul_(2.0)  # the same tensor, written to
    assert torch.equal(calls.velocity(calls.runner, x), calls.velocity(calls.plain, x))
    calls.sigma = calls.sigma + 0.25  # another tensor
    assert torch.equal(calls.velocity(calls.runner, x), calls.velocity(calls.plain, x))
    assert calls.recorded() == 2
    assert not torch.equal(first, calls.velocity(calls.runner, x))  # an output is the caller's own


@pytest.mark.parametrize("cleared", ["set to none", "zeroed", "kept", "exchanged"])
def test_gradients_add_to_what_the_optimiser_left(calls: Calls, cleared: str) -> None:
    inputs = [draw() for _ in range(3)]

    def use(runner: CudaGraphRunner) -> None:
        for x in inputs:
            for parameter in runner.parameters():
                if parameter.grad is None or cleared == "kept":
                    continue
                if cleared == "exchanged":
                    parameter.grad = parameter.grad.clone().mul_(-1.0)
                elif cleared == "zeroed":
                    parameter.grad.zero_()
                else:
                    parameter.grad = None
            calls.policy(runner, x).square().sum().backward()

    assert_same(calls.gradients(use, calls.runner), calls.gradients(use, calls.plain))


@pytest.mark.parametrize("between", ["the same call", "one without gradient", "one that is recorded then"])
def test_activations_wait_for_their_backward(calls: Calls, between: str) -> None:
    x, other = draw(), draw()

    def use(runner: CudaGraphRunner) -> None:
        loss = calls.policy(runner, x).square().sum()
        if between == "the same call":
            loss = loss + calls.policy(runner, other).square().sum()
        elif between == "one without gradient":
            calls.velocity(runner, other)
        else:
            with torch.no_grad():
                for _ in range(3):
                    calls.policy(runner, other)
        loss.backward()

    assert_same(calls.gradients(use, calls.runner), calls.gradients(use, calls.plain))
    assert calls.recorded() == 2  # nothing is recorded meanwhile


def test_graphs_are_replayed_again_once_activations_are_used_or_dropped(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = draw()
    runs: list[int] = []
    plain = CudaGraphRunner._plain
    monkeypatch.setattr(CudaGraphRunner, "_plain", lambda *given: runs.append(1) or plain(*given))
    velocity = calls.policy(calls.runner, x)
    calls.velocity(calls.runner, x)
    assert len(runs) == 1
    velocity.sum().backward()
    calls.velocity(calls.runner, x)
    velocity = calls.policy(calls.runner, x)
    del velocity  # never differentiated
    calls.velocity(calls.runner, x)
    assert len(runs) == 1


def test_a_second_backward_of_one_call_is_refused(calls: Calls) -> None:
    loss = calls.policy(calls.runner, draw()).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward: found a second one"):
        loss.backward()


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", [RuntimeError("no kernel\nfor this"), KeyboardInterrupt()])
def test_a_recording_that_fails_leaves_plain_calls(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str, error: BaseException
) -> None:
    calls, x = Calls(), draw()
    expected = calls.policy(calls.plain, x).detach()
    calls.policy(calls.runner, x).sum().backward()

    def fail(*_: object, **__: object) -> None:
        if DEVICE.type == "cuda" and torch.cuda.is_current_stream_capturing():
            with suppress(RuntimeError):  # the device refuses, and the recording with it
                torch.cuda.synchronize()
        raise error

    caplog.set_level(logging.WARNING)
    with monkeypatch.context() as patch:
        patch.setattr(*((WanTransformer, "forward") if where == "forward" else (torch.autograd, "backward")), fail)
        if where == "backward" and isinstance(error, Exception):
            assert torch.equal(calls.policy(calls.runner, x), expected)
        else:  # the plain call fails as well, with its own error
            with pytest.raises(type(error)):
                calls.policy(calls.runner, x)
    for _ in range(3):
        assert torch.equal(calls.policy(calls.runner, x), expected)
    assert calls.recorded() == 0 and CpuGraph.drawing and not CpuGraph.underway
    other = draw()  # on the device
    for _ in range(3):
        assert torch.equal(calls.velocity(calls.runner, other), calls.velocity(calls.plain, other))
    assert calls.recorded() == 1
    said = [record.getMessage() for record in caplog.records]
    assert said == (
        ["no CUDA graph for a shape of call, which runs without one: no kernel"] * isinstance(error, Exception)
    )


@pytest.mark.parametrize("step", ["capture_begin", "capture_end"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_recording_that_the_device_refuses_at_its_begin_or_end(
    monkeypatch: pytest.MonkeyPatch, step: str, number: int
) -> None:
    """That of the forward or of the backward; the graph that was recorded before stays."""
    calls, x = Calls(), draw()
    for _ in range(2):
        calls.velocity(calls.runner, x)
    assert calls.recorded() == 1
    expected = calls.policy(calls.plain, x).detach()
    calls.policy(calls.runner, x).sum().backward()
    told, act = [], getattr(torch.cuda.CUDAGraph, step)

    def refused(*given: object, **more: object) -> None:
        told.append(step)
        if len(told) == number:
            raise RuntimeError("operation not permitted")
        act(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda.CUDAGraph, step, refused)
        assert torch.equal(calls.policy(calls.runner, x), expected)
    assert calls.recorded() == 1 and len(told) >= number
    assert CpuGraph.drawing and not CpuGraph.underway
    other, known = draw(), calls.velocity(calls.plain, x)
    assert torch.equal(calls.velocity(calls.runner, x), known)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(calls.policy(calls.runner, other), calls.policy(calls.plain, other))
    assert calls.recorded() == 2
    calls.runner.forget()
    gc.collect()
    assert not any(CpuGraph.uses.values())


def test_the_adapter_is_part_of_the_key(calls: Calls) -> None:
    x = draw()
    own = calls.velocity(calls.runner, x)
    with calls.executor.reference():
        expected = calls.velocity(calls.plain, x)
        assert not torch.allclose(expected, own, atol=1e-3)
        for _ in range(3):
            assert torch.equal(calls.velocity(calls.runner, x), expected)
    assert torch.equal(calls.velocity(calls.runner, x), own)
    assert calls.recorded() == 3


def test_autocast_is_part_of_the_key(calls: Calls) -> None:
    """Of a call whose inputs are the same under autocast and without."""
    x = draw()
    with torch.no_grad():
        full = calls.policy(calls.plain, x)
        for _ in range(3):
            assert torch.equal(calls.policy(calls.runner, x), full)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast(DEVICE.type, dtype):
                expected = calls.policy(calls.plain, x)
                assert not torch.equal(expected, full)
                for _ in range(3):
                    assert torch.equal(calls.policy(calls.runner, x), expected)
        assert torch.equal(calls.policy(calls.runner, x), full)
    assert calls.recorded() == 5


def test_autocast_keeps_no_weights_of_a_recording() -> None:
    """Autocast's copies of weights belong to its block: a recording must make its own."""
    calls, x = Calls(), draw()
    for _ in range(3):
        with torch.autocast(DEVICE.type, torch.bfloat16), torch.enable_grad():
            calls.policy(calls.plain, x)  # autocast keeps copies of the weights now
            calls.policy(calls.runner, x).sum().backward()
    with torch.no_grad():
        for parameter in calls.runner.parameters():
            parameter.mul_(-2.0)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(calls.policy(calls.runner, x), calls.policy(calls.plain, x))


@pytest.mark.parametrize("moves", [False, True])
def test_graphs_are_forgotten_where_the_pools_move(moves: bool) -> None:
    calls, x = Calls(), draw()
    executor = calls.executor
    tokens = 3 * executor.frame_tokens
    branch = executor.cache.new_branch()
    expected = executor.cache.new_branch()

    def write(runner: CudaGraphRunner, branch: int) -> None:
        with torch.no_grad(), executor.cache.reserve([branch], tokens) as rows:
            one = slice(0, 1)
            text = calls.text().row(0)
            runner.write_context(
                x[one], calls.sigma[one], text, torch.arange(3, device=DEVICE), None, executor.cache, rows
            )
            rows.mark_written()  # a replay asks for no rows
            executor.cache.commit(rows)

    for _ in range(3):
        write(calls.runner, branch)
    assert calls.recorded() == 1
    if moves:
        executor.cache.grow(executor.cache.rows_total + 8 * tokens)
    executor.cache.release(branch)
    branch = executor.cache.new_branch()
    write(calls.runner, branch)
    assert calls.recorded() == (0 if moves else 1)
    write(calls.plain, expected)
    ours, theirs = (executor.cache.views([each], [(0, tokens)]) for each in (branch, expected))
    for own, plain in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own.gather(), plain.gather(), strict=True))
