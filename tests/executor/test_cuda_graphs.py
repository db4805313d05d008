"""The executor's CUDA graphs against the same calls without them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from csrc_triton import ForkableKVCache, runtime
from tempact.config import ExecutorConfig, LoraConfig, OptimConfig
from tempact.executor.cuda_graphs import CudaGraphRunner
from tempact.executor.executor import Executor
from tempact.executor.sampler import gaussian_noise
from tempact.executor.stream import stream_latents
from tempact.models.wan.codec import PixelCodec
from tempact.models.wan.transformer import WanConfig, WanTransformer
from tempact.types import Batch, Plan, Step, Transition

WAN = WanConfig(
    dim=64, ffn_dim=96, freq_dim=16, text_dim=8, text_len=4, heads=2, layers=2, in_dim=3, out_dim=3, patch=(1, 4, 4)
)
CONFIG = ExecutorConfig(
    weights="",
    lora=LoraConfig(2, 2, ("self_attn.q", "self_attn.v", "cross_attn.k", "ffn.0", "ffn.2")),
    optim=OptimConfig(1e-3),
    frames=18,
    continuations=2,
    micro_batch=2,
)
PLANS = [Plan("i", (Step(0, s, "one"), Step(s, 18, "two"))) for s in (3, 6)]
STARTS = [3, 6]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Words(torch.nn.Module):
    def encode(self, prompts: list[str]) -> Tensor:
        rows = [torch.randn(4, 8, generator=torch.Generator().manual_seed(len(prompt))) for prompt in prompts]
        return torch.stack(rows).to(DEVICE)


def make_executor(config: ExecutorConfig, dtype: torch.dtype = torch.float32) -> Executor:
    torch.manual_seed(0)
    model = WanTransformer(WAN)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    executor = Executor(model.to(DEVICE, dtype), Words(), PixelCodec(), config, (8, 8))
    for parameter in executor.parameters().values():
        torch.nn.init.normal_(parameter, std=0.1)
    return executor


def batch_of(transition: Transition | None) -> Batch:
    advantage, mask = torch.tensor([[1.0, -0.5], [0.3, -1.0]]), torch.ones(2, 2, dtype=torch.bool)
    return Batch(torch.zeros(2), mask[:, 0], advantage, mask, None, transition)


def trained(config: ExecutorConfig, iterations: int) -> tuple[list[Tensor], Executor]:
    """Videos and gradients of a few iterations of rollout, update and optimiser step."""
    executor = make_executor(config)
    executor.runner.warm_calls = 1
    optimiser = torch.optim.SGD(executor.parameters().values(), lr=0.05)
    found: list[Tensor] = []
    for i in range(iterations):
        latents, transition = executor.roll_out(PLANS, STARTS, gaussian_noise(i, executor.noise_shape(2, 2), DEVICE))
        executor.update(batch_of(transition), [0, 1])
        found += [latents, *(p.grad.clone() for p in executor.parameters().values() if p.grad is not None)]
        optimiser.step()
        optimiser.zero_grad(set_to_none=i % 2 == 0)
    return found, executor


@pytest.mark.gpu
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("window", ["full", "longlive", "tempact-self-forcing"])
def test_graphs_give_the_bits_of_plain_calls(window: str, again: bool) -> None:
    config = replace(CONFIG, window=window)
    with runtime.backend("triton"):
        plain, _ = trained(replace(config, cuda_graphs=False), 3)
        recorded, executor = trained(replace(config, checkpoint_activations=again), 3)
    graphs = executor.runner._graphs.values()
    assert sum(graph.forward is not None for graph in graphs) > 4
    assert any(graph.backward is not None for graph in graphs)
    assert len(plain) == len(recorded) > 30
    for i, (ours, theirs) in enumerate(zip(recorded, plain, strict=True)):
        assert torch.equal(ours, theirs), f"tensor {i}: off by {(ours - theirs).abs().max()}"


@pytest.mark.gpu
def test_bits_stay_where_the_cache_grows_and_graphs_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from tempact.executor import cuda_graphs as graphs
    from tempact.executor import executor as module

    monkeypatch.setattr(module, "FIRST_FRAMES", 3)
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 3)
    with runtime.backend("triton"):
        plain, _ = trained(replace(CONFIG, cuda_graphs=False), 2)
        monkeypatch.setattr(ForkableKVCache, "grow", lambda *rows: None)  # it grows while it fills
        recorded, executor = trained(CONFIG, 2)
    assert executor.runner._recorded() == 3
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(recorded, plain, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_graphs_follow_the_adapter_and_stay_near_the_unmerged(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    found, noise = {}, None
    for merged in (True, False):
        if not merged:
            monkeypatch.setattr(Executor, "merged", lambda executor: nullcontext())
        executor = make_executor(CONFIG, dtype)
        noise = noise or gaussian_noise(0, executor.noise_shape(2, 2), DEVICE)
        with runtime.backend("triton"):
            rows = [executor.roll_out(PLANS, STARTS, noise)[0] for _ in range(4)]
            graphs = executor.runner._recorded()
            with torch.no_grad():
                for parameter in executor.parameters().values():
                    parameter.mul_(-1.5)
            rows += [executor.roll_out(PLANS, STARTS, noise)[0] for _ in range(2)]
        assert graphs > 2 and executor.runner._recorded() == graphs  # refilled, not recorded again
        assert torch.equal(rows[3], rows[2]) and torch.equal(rows[5], rows[4])
        found[merged] = rows[3], rows[5]
    (before, after), (plain_before, plain_after) = found[True], found[False]
    moved = (after - before).square().mean().sqrt()
    limit = 1e-3 if dtype == torch.float32 else 0.2
    for own, plain in ((before, plain_before), (after, plain_after)):
        assert (own - plain).square().mean().sqrt() < limit * moved


@pytest.mark.gpu
def test_the_gap_of_merged_weights_is_rounding() -> None:
    executor = make_executor(CONFIG)
    with runtime.backend("triton"):
        noise = gaussian_noise(0, executor.noise_shape(2, 2), DEVICE)
        metrics = executor.update(batch_of(executor.roll_out(PLANS, STARTS, noise)[1]), [0, 1])
    gaps = [value for name, value in metrics.items() if name.startswith("rollout_gap/")]
    assert len(gaps) == 3 and max(gaps) < 0.5


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """The transformer's calls, which compute nothing: their names, and whether the adapter was merged."""
    made: list[tuple[str, bool]] = []

    def note(name: str, runner: CudaGraphRunner) -> None:
        assert runner._adapted is not None
        made.append((name, runner._adapted.mode[-1] is True))

    def velocity(runner: CudaGraphRunner, x: Tensor, *inputs: object) -> Tensor:
        note("velocity", runner)
        return torch.zeros_like(x)

    def policy_velocity(runner: CudaGraphRunner, x: Tensor, *inputs: object) -> Tensor:
        note("policy with gradient" if torch.is_grad_enabled() else "policy", runner)
        return torch.zeros_like(x) + 0.0 * sum(p.sum() for p in runner.parameters())

    monkeypatch.setattr(CudaGraphRunner, "velocity", velocity)
    monkeypatch.setattr(CudaGraphRunner, "policy_velocity", policy_velocity)
    monkeypatch.setattr(CudaGraphRunner, "write_context", lambda runner, *inputs: note("write", runner))
    return made


def test_videos_are_made_with_merged_weights_and_training_is_not(calls: list[tuple[str, bool]]) -> None:
    executor = make_executor(CONFIG)
    noise, one = (gaussian_noise(0, executor.noise_shape(*shape), DEVICE) for shape in ((2, 2), (1, 1)))

    def called(run: Callable[[], object]) -> set[tuple[str, bool]]:
        calls.clear()
        run()
        return set(calls)

    with runtime.backend("triton"):
        transition = executor.roll_out(PLANS, STARTS, noise)[1]
        assert set(calls) == {("velocity", True), ("write", True)}
        assert called(lambda: executor.update(batch_of(transition), [0, 1])) == {
            ("write", False), ("policy", False), ("policy with gradient", False)
        }  # fmt: skip
        assert called(lambda: executor.velocities(transition, [0, 1])) == {("write", False), ("policy", False)}
        made = {("velocity", True), ("write", True)}
        for latents in stream_latents(executor, PLANS[0], one):
            assert executor.runner._adapted is not None and not executor.runner._adapted.mode[-1], latents.shape
        assert called(lambda: [*stream_latents(executor, PLANS[0], one)]) == made
        with executor.reference():
            assert called(lambda: executor.roll_out(PLANS, [0, 0], noise)) == made


def test_the_torch_path_merges_nothing(calls: list[tuple[str, bool]]) -> None:
    executor = make_executor(CONFIG)
    noise = gaussian_noise(0, executor.noise_shape(1, 1), DEVICE)
    with runtime.backend("torch"):
        executor.roll_out(PLANS[:1], [0], noise)
        list(stream_latents(executor, PLANS[0], noise))
    assert not any(merged for _, merged in calls)


@pytest.mark.parametrize("text_switch", ["cross_attention", "recache"])
@pytest.mark.parametrize("window", ["full", "longlive", "tempact-self-forcing"])
def test_a_cache_for_graphs_stays_where_it_is(calls: list[tuple[str, bool]], window: str, text_switch: str) -> None:
    executor = make_executor(replace(CONFIG, window=window, text_switch=text_switch))
    executor.runner.graphs = True
    noise, one = (gaussian_noise(0, executor.noise_shape(*shape), DEVICE) for shape in ((2, 2), (1, 1)))
    list(stream_latents(executor, PLANS[0], one))
    alone = executor.cache.rows_total
    executor.history(2, 2)
    places = executor.cache.addresses
    for forks in ([3, 3], [3, 9], [15, 6]):
        executor.roll_out(PLANS, forks, noise)
        assert executor.cache.addresses == places
    assert executor.cache.rows_total > alone


def test_graphs_give_way_to_shapes_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shape is called twice before it is recorded; with three of them and room for two, the idle one goes."""
    from tempact.executor import cuda_graphs as graphs

    runner = make_executor(CONFIG).runner
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    runner.warm_calls = 2
    recordings: list[str] = []

    def call(name: str) -> None:
        graph = runner._called(name)
        if graph.forward is None and runner._worth_recording(graph):
            graph.forward = object()  # type: ignore[assignment]
            recordings.append(name)

    for name in "aaabbb":
        call(name)
    assert recordings == ["a", "b"]
    for name in "acbacbacb":  # all three are in use
        call(name)
    assert recordings == ["a", "b"]
    for name in "acccc":
        call(name)
    assert recordings == ["a", "b", "c"] and sorted(k for k, g in runner._graphs.items() if g.forward) == ["a", "c"]
    for name in "bbb":  # a was used longest ago
        call(name)
    assert recordings == ["a", "b", "c", "b"] and "a" not in runner._graphs


def test_the_cache_is_empty_after_every_call() -> None:
    with runtime.backend("torch"):
        found, executor = trained(CONFIG, 1)
    cache = executor.cache
    assert len(found) > 10 and (cache.branches, cache.rows_used) == ((), 0)
    velocities = executor._forward(
        executor.roll_out(PLANS, STARTS, gaussian_noise(5, executor.noise_shape(2, 2), DEVICE))[1], [0],
        grad=False,
    )  # fmt: skip
    next(velocities)
    assert cache.rows_used > 0
    velocities.close()  # whoever stops halfway leaves nothing behind either
    assert cache.rows_used == 0
