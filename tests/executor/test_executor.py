"""The executor's update (docs/algorithm.md 6, items 5, 16, 20, 26)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from tempact.executor.executor import Executor, micro_batches
from tempact.executor.sampler import gaussian_noise
from tempact.rl.flow_grpo import clip_epsilon
from tempact.types import Batch, Plan, Step

Make = Callable[..., Executor]


def plan(*bounds: int, name: str = "p") -> Plan:
    return Plan("i", tuple(Step(a, b, f"{name} {a}") for a, b in pairwise(bounds)))


PLANS = [plan(0, 3, 9, 18, name="a"), plan(0, 6, 12, 18, name="b"), plan(0, 3, 12, 18, name="c")]


def batch_of(executor: Executor, count: int = 3) -> Batch:
    noise = gaussian_noise(1, executor.noise_shape(3, count), torch.device("cpu"))
    _, transition = executor.roll_out(PLANS, [3, 12, 3], noise)
    advantage = torch.linspace(-1, 1, 3 * count).view(3, count)
    mask = torch.ones(3, count, dtype=torch.bool)
    return Batch(torch.zeros(3), torch.ones(3, dtype=torch.bool), advantage, mask, None, transition)


def gradients(executor: Executor) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in executor.parameters().items() if p.grad is not None}


def test_the_first_update_has_ratio_one_and_kl_zero(make_executor: Make) -> None:
    executor = make_executor()
    metrics = executor.update(batch_of(executor), [0, 1, 2])
    assert metrics["ratio_deviation"] == 0.0 and metrics["kl"] == 0.0
    assert metrics["clip_ratio/low"] == metrics["clip_ratio/high"] == 0.0
    assert any(grad.abs().sum() > 0 for grad in gradients(executor).values())


@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_the_gap_between_rollout_and_training_is_logged(make_executor: Make, eta: float) -> None:
    """Rounding alone makes next to none; weights that have moved since the roll-out show at every sigma."""
    for micro_batch in (64, 2):
        executor = make_executor(eta=eta, micro_batch=micro_batch)
        batch = batch_of(executor)
        names = [f"rollout_gap/{sigma:.3f}" for sigma in executor.settings.schedule.sigmas[:-2]]
        metrics = executor.update(batch, [0, 1, 2])
        assert [name for name in metrics if name.startswith("rollout_gap/")] == names and len(names) == 3
        assert all(0 <= metrics[name] < 1e-2 for name in names)
        with torch.no_grad():
            executor.model.head.head.bias.add_(0.3)
        moved = executor.update(batch, [0, 1, 2])
        noises = batch.transition.noises
        # the head's bias moves every velocity by 0.3
        clip = clip_epsilon(executor.config.clip_velocity_rms, noises[0, 0, 0].numel())
        for t, name in enumerate(names):
            expected = (0.3 * noises[:, :, t]).flatten(2).mean(dim=2).abs().mean().item() / clip
            assert moved[name] == pytest.approx(expected, rel=0.02)
    with torch.no_grad():
        old = executor.velocities(batch.transition, [0, 1, 2])
    assert not any(name.startswith("rollout_gap/") for name in executor.update(batch, [0, 1, 2], old))


def test_prompts_are_encoded_once_while_they_are_in_use(make_executor: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    executor, encoded = make_executor(), []

    def encode(prompts: list[str]) -> torch.Tensor:
        encoded.extend(prompts)
        rows = torch.ones(len(prompts), 4, 8)
        for row, prompt in zip(rows, prompts, strict=True):
            row[int(prompt) :] = 0.0
        return rows

    monkeypatch.setattr(executor.text_encoder, "encode", encode)
    monkeypatch.setattr("tempact.executor.executor.TEXTS_KEPT", 2)
    assert executor.encode(["1", "3", "1"]).sum(dim=(1, 2)).tolist() == [8, 24, 8]
    assert executor.encode(["2"]).shape == (1, 4, 8)  # "3", asked for longest ago, is given up
    executor.encode(["1", "2"])
    executor.encode(["3", "2", "1"])
    assert encoded == ["1", "3", "2", "1", "3"]


@pytest.mark.parametrize("size", [1, 2, 4, 9, 12])
def test_micro_batching_changes_nothing(make_executor: Make, size: int) -> None:
    whole, parts = make_executor(micro_batch=64), make_executor(micro_batch=size)
    for executor in (whole, parts):
        executor.update(batch_of(executor), [0, 1, 2])
    own = gradients(parts)
    for name, grad in gradients(whole).items():
        assert torch.allclose(grad, own[name], atol=1e-7, rtol=1e-3), name


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_recomputed_activations_change_nothing_but_memory(make_executor: Make, precision: torch.dtype) -> None:
    found, kept = [], []
    for again in (False, True):
        executor = make_executor(checkpoint_activations=again)
        executor.model.to(precision)
        batch, held = batch_of(executor), [0]

        def pack(tensor: torch.Tensor, held: list[int] = held) -> torch.Tensor:
            held[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            executor.update(batch, [0, 1, 2])
        found.append(gradients(executor))
        kept.append(held[0])
    assert found[0].keys() == found[1].keys() and len(found[0]) > 5
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(gradient.any() for gradient in found[0].values())
    assert kept[1] < 0.7 * kept[0]


def test_every_pair_is_in_exactly_one_micro_batch() -> None:
    for size in range(1, 30):
        seen = [
            (p, n, t)
            for e in micro_batches([4, 7], 3, 3, size)
            for p in e.plans
            for n in range(e.continuations.start, e.continuations.stop)
            for t in range(e.transitions.start, e.transitions.stop)
        ]
        assert sorted(seen) == [(p, n, t) for p in (4, 7) for n in range(3) for t in range(3)]


def test_masked_continuations_and_plans_have_no_effect(make_executor: Make) -> None:
    one, two = make_executor(), make_executor()
    batch = batch_of(one)
    batch.execution_mask[0, 1] = False
    batch.execution_mask[2] = False
    one.update(batch, [0, 1, 2])
    changed = batch_of(two)
    changed.execution_mask.copy_(batch.execution_mask)
    changed.execution_advantage[0, 1] = 99.0
    changed.execution_advantage[2] = -99.0
    two.update(changed, [0, 1])
    own = gradients(two)
    for name, grad in gradients(one).items():
        assert torch.allclose(grad, own[name], atol=1e-8), name


def test_nothing_scored_means_no_update(make_executor: Make) -> None:
    executor = make_executor()
    batch = batch_of(executor)
    batch.execution_mask[:] = False
    assert executor.update(batch, [0, 1, 2]) == {}
    assert not gradients(executor)


def test_the_reference_stays_when_the_policy_moves(make_executor: Make) -> None:
    executor = make_executor()
    batch = batch_of(executor)
    with executor.reference():
        before = executor.velocities(batch.transition, [0, 1])
    with torch.no_grad():
        for parameter in executor.parameters().values():
            parameter.add_(0.1)
    with executor.reference():
        assert torch.equal(executor.velocities(batch.transition, [0, 1]), before)
    assert not torch.allclose(executor.velocities(batch.transition, [0, 1]), before)
    metrics = executor.update(batch, [0, 1, 2])
    assert metrics["kl"] > 0 and metrics["ratio_deviation"] == 0.0


def test_old_velocities_make_later_updates_off_policy(make_executor: Make) -> None:
    executor = make_executor()
    batch = batch_of(executor)
    old = executor.velocities(batch.transition, [1])
    with torch.no_grad():
        for parameter in executor.parameters().values():
            parameter.add_(0.02)
    metrics = executor.update(batch, [1], old)
    assert metrics["ratio_deviation"] > 0


def test_gradients_flow_through_the_trained_chunk_only(make_executor: Make) -> None:
    """Equals autograd of the same loss with the context's K and V detached: no gradient reaches the prefix."""
    executor = make_executor()
    batch = batch_of(executor)
    batch.transition.prefix.requires_grad_()
    executor.update(batch, [0, 1, 2])
    assert batch.transition.prefix.grad is None
