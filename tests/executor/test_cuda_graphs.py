"""The executor's CUDA graphs against the same calls without them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from csrc_triton import runtime
from tempact.config import ExecutorConfig, LoraConfig, OptimConfig
from tempact.executor.executor import Executor
from tempact.executor.sampler import gaussian_noise
from tempact.models.wan.codec import PixelCodec
from tempact.models.wan.transformer import WanConfig, WanTransformer
from tempact.types import Batch, Plan, Step

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


def make_executor(config: ExecutorConfig) -> Executor:
    torch.manual_seed(0)
    model = WanTransformer(WAN)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    executor = Executor(model.to(DEVICE), Words(), PixelCodec(), config, (8, 8))
    for parameter in executor.parameters().values():
        torch.nn.init.normal_(parameter, std=0.1)
    return executor


def trained(config: ExecutorConfig, iterations: int) -> tuple[list[Tensor], Executor]:
    """Videos and gradients of a few iterations of rollout, update and optimiser step."""
    executor = make_executor(config)
    executor.runner.warm_calls = 1
    optimiser = torch.optim.SGD(executor.parameters().values(), lr=0.05)
    found: list[Tensor] = []
    for i in range(iterations):
        latents, transition = executor.roll_out(PLANS, STARTS, gaussian_noise(i, executor.noise_shape(2, 2), DEVICE))
        advantage = torch.tensor([[1.0, -0.5], [0.3, -1.0]])
        batch = Batch(
            torch.zeros(2), torch.ones(2, dtype=torch.bool), advantage, torch.ones(2, 2, dtype=torch.bool), None,
            transition,
        )  # fmt: skip
        executor.update(batch, [0, 1])
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
def test_a_cache_that_grows_and_too_many_shapes_end_in_plain_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    from tempact.executor import cuda_graphs as graphs
    from tempact.executor import kv_history as context

    monkeypatch.setattr(context, "FIRST_FRAMES", 3)
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 3)
    with runtime.backend("triton"):
        plain, _ = trained(replace(CONFIG, cuda_graphs=False), 2)
        recorded, executor = trained(CONFIG, 2)
    assert executor.runner._recorded() == 3
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(recorded, plain, strict=True))


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
