"""The executor on Triton's kernels against the executor on the torch path."""

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
    dim=64, ffn_dim=96, freq_dim=16, text_dim=8, text_len=4, heads=2, layers=1, in_dim=3, out_dim=3, patch=(1, 4, 4)
)
CONFIG = ExecutorConfig(
    weights="",
    lora=LoraConfig(2, 2, ("self_attn.q", "self_attn.k", "self_attn.v", "cross_attn.q", "ffn.0", "ffn.2")),
    optim=OptimConfig(1e-3),
    frames=6,
    continuations=2,
    timesteps=(1000, 500),  # the interpreter takes its time
)
PLAN = Plan("i", (Step(0, 3, "one"), Step(3, 6, "two")))


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Words(torch.nn.Module):
    def encode(self, prompts: list[str]) -> Tensor:
        rows = [torch.randn(4, 8, generator=torch.Generator().manual_seed(len(prompt))) for prompt in prompts]
        return torch.stack(rows).to(DEVICE)


def made(backend: str, config: ExecutorConfig) -> tuple[Tensor, dict[str, float], dict[str, Tensor]]:
    """A rollout, the metrics of an update on it and the update's gradient."""
    torch.manual_seed(0)
    model = WanTransformer(WAN)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    executor = Executor(model.to(DEVICE), Words(), PixelCodec(), config, (8, 8))
    for name, parameter in executor.parameters().items():  # past the start, where the reference is elsewhere
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator(DEVICE).manual_seed(len(name)))
    with runtime.backend(backend):
        latents, transition = executor.roll_out([PLAN], [3], gaussian_noise(1, executor.noise_shape(1, 2), DEVICE))
        advantage, mask = torch.tensor([[1.0, -0.5]]), torch.ones(1, 2, dtype=torch.bool)
        batch = Batch(torch.zeros(1), torch.ones(1, dtype=torch.bool), advantage, mask, None, transition)
        metrics = executor.update(batch, [0])
    return latents, metrics, {name: p.grad for name, p in executor.parameters().items() if p.grad is not None}


@pytest.mark.parametrize(
    ("window", "text_switch"),
    [pytest.param("tempact-self-forcing", "cross_attention", marks=pytest.mark.slow), ("longlive", "recache")],
)
def test_videos_and_gradients_are_those_of_the_torch_path(window: str, text_switch: str) -> None:
    config = replace(CONFIG, window=window, text_switch=text_switch)
    (plain, metrics, gradient), (kernels, other, own) = made("torch", config), made("triton", config)
    torch.testing.assert_close(kernels, plain, rtol=0, atol=1e-4)
    assert metrics["kl"] > 1e-6 and other["kl"] == pytest.approx(metrics["kl"], rel=1e-3)
    assert gradient.keys() == own.keys() and len(own) > 10
    for name, grad in gradient.items():
        assert (own[name] - grad).abs().max() <= 1e-3 * grad.abs().max() + 1e-9, name
