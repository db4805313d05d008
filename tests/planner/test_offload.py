"""A planner whose frozen weights wait on the host: the same bits, and nothing on the device meanwhile."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from tempact.models.wan.checkpoints.files import visiting
from tempact.planner import planner as module
from tempact.planner.planner import Planner
from tempact.types import Batch, Prompt

PROMPTS = [Prompt("a", "A red circle jumps."), Prompt("b", "The square grows.")]
ADVANTAGE = torch.tensor([0.9, -0.4, 0.2, -1.0])


def iteration(planner: Planner) -> list[Tensor]:
    """Everything that uses the weights: plans, log-probs before the update, gradients of two micro-batches."""
    plans = planner.sample(PROMPTS, 2, seed=4)
    batch = Batch(ADVANTAGE, torch.ones(4, dtype=torch.bool), torch.empty(0), torch.empty(0), plans.tokens, None)
    old = planner.old_log_probs(batch, planner.units(batch, [0, 1, 2, 3]))
    planner.update(batch, [0, 1, 2, 3], None)
    gradients = [p.grad for p in planner.parameters().values()]
    canary = planner.canary(PROMPTS[0].text)
    return [plans.tokens.input_ids, plans.tokens.log_probs, *old.values(), *gradients, *canary]


def frozen(planner: Planner) -> list[nn.Parameter]:
    return [p for name, p in planner.peft.named_parameters() if ".lora_" not in name]


def test_weights_visit_a_device_and_stay_where_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [nn.Parameter(torch.ones(2), requires_grad=False), torch.zeros(3)]
    places = [weight.data_ptr() for weight in weights]
    with visiting(weights, None):
        assert [weight.data_ptr() for weight in weights] == places
    monkeypatch.setattr(torch.Tensor, "to", lambda own, device, non_blocking: own + 1)  # a copy that shows
    with pytest.raises(KeyError), visiting(weights, torch.device("cuda")):
        assert torch.equal(weights[0], 2 * torch.ones(2)) and torch.equal(weights[1], torch.ones(3))
        raise KeyError
    assert [weight.data_ptr() for weight in weights] == places and torch.equal(weights[0], torch.ones(2))


@pytest.mark.parametrize("settings", [{}, {"micro_batch": 2, "checkpoint_activations": True}])
def test_all_that_uses_the_weights_fetches_them(make_planner, monkeypatch: pytest.MonkeyPatch, settings: dict) -> None:
    """Waiting weights are NaN here, and a CPU's tensors for once are a device's."""
    expected, planner = iteration(make_planner(**settings)), make_planner(**settings)
    kept = [weight.detach().clone() for weight in frozen(planner)]
    visits = []

    @contextmanager
    def fetched(weights: Sequence[Tensor], device: torch.device) -> Iterator[None]:
        assert device == planner.device
        before = [weight.data for weight in weights]
        for weight, own in zip(weights, kept, strict=True):
            weight.data = own
        yield
        for weight, own in zip(weights, before, strict=True):
            weight.data = own
        visits.append(len(weights))

    planner.waiting = frozen(planner)
    for weight in planner.waiting:
        weight.data = torch.full_like(weight, math.nan)
    monkeypatch.setattr(module, "visiting", fetched)
    found = iteration(planner)
    assert all(torch.equal(ours, right) for ours, right in zip(found, expected, strict=True))
    assert set(visits) == {len(kept)} and all(weight.isnan().all() for weight in planner.waiting)


def test_without_a_gpu_nothing_waits(make_planner) -> None:
    assert make_planner(offload=True).waiting == []


@pytest.mark.gpu
def test_weights_wait_on_the_host_between_calls(make_planner) -> None:
    def on_gpu(offload: bool) -> Planner:
        built = make_planner().peft.unload()
        return Planner(built.cuda(), make_planner().tokenizer, make_planner(offload=offload).config, 24, 3)

    plain, waits = on_gpu(False), on_gpu(True)
    size = sum(weight.nbytes for weight in frozen(waits))
    assert waits.waiting and all(weight.is_pinned() for weight in waits.waiting)
    assert waits.device.type == "cuda" and not plain.waiting
    for p, other in zip(waits.parameters().values(), plain.parameters().values(), strict=True):
        p.data.copy_(other.data)

    def allocated() -> int:
        torch._C._cuda_clearCublasWorkspaces()
        return torch.cuda.memory_allocated()

    before = allocated()
    for ours, right in zip(iteration(waits), iteration(plain), strict=True):
        assert torch.equal(ours, right)
    gradients = 2 * sum(p.nbytes for p in plain.parameters().values())
    assert allocated() < before + gradients + size
    assert all(weight.device.type == "cpu" for weight in waits.waiting)
