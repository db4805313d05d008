from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from csrc_triton import flow_policy_loss, runtime
from tempact.rl.flow_grpo import clip_epsilon, flow_grpo_gradient

ROWS, ELEMENTS = 24, 48
CLIP = clip_epsilon(0.0055, ELEMENTS)
MASK = torch.arange(ROWS) % 5 != 3


def transitions(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    v_old, noise, ref, moved = torch.randn(4, ROWS, 3, ELEMENTS // 3, generator=generator)
    advantage = torch.randn(ROWS, generator=generator)
    return v_old + 0.0055 * moved, v_old, v_old + 0.05 * ref, noise, advantage


def numbers(metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in metrics.items()}


def counted() -> int:
    return int(MASK.sum())


@pytest.mark.parametrize("size", [1, 4, 5])
def test_micro_batches_of_any_size_make_the_same_update(size: int):
    v, *rest = transitions()
    whole, metrics = flow_grpo_gradient(v, *rest, MASK, clip=CLIP, kl_weight=0.1, terms=counted())
    pieces, sums = [], dict.fromkeys(metrics, 0.0)
    for i in range(0, ROWS, size):
        rows = slice(i, i + size)
        part, found = flow_grpo_gradient(
            v[rows], *(t[rows] for t in rest), MASK[rows], clip=CLIP, kl_weight=0.1, terms=counted()
        )
        pieces.append(part)
        sums = {name: value + found[name] for name, value in sums.items()}
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-5, atol=1e-9)
    assert numbers(sums) == pytest.approx(numbers(metrics), rel=1e-4, abs=1e-7)
    z, advantage = -(rest[2] * (v - rest[0])).mean((1, 2)), rest[3]
    low, high = (z.exp() < 1 - CLIP) & (advantage < 0) & MASK, (z.exp() > 1 + CLIP) & (advantage > 0) & MASK
    assert 0 < low.sum() != high.sum() > 0
    assert metrics["clip_ratio/low"] == pytest.approx(low.sum().item() / counted())
    assert metrics["clip_ratio/high"] == pytest.approx(high.sum().item() / counted())


@pytest.mark.parametrize("on_policy", [True, False])
def test_the_gradient_has_the_bits_of_the_losses_own_backward(on_policy: bool):
    leaf, v_old, v_ref, noise, advantage = transitions()
    leaf.requires_grad_()
    old = leaf.detach() if on_policy else v_old
    found, metrics = flow_grpo_gradient(leaf, old, v_ref, noise, advantage, MASK, clip=CLIP, kl_weight=0.1, terms=19)
    each = flow_policy_loss(leaf, old, v_ref, noise, torch.where(MASK, advantage, 0.0), clip=CLIP)
    loss = torch.where(MASK, each.loss + 0.1 * each.kl, 0.0).sum() / 19
    loss.backward()
    assert torch.equal(found, leaf.grad) and not found.requires_grad
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_on_policy_the_kernel_reads_every_tensor_once(monkeypatch: pytest.MonkeyPatch):
    from csrc_triton.flow_policy_loss import fused

    launches: list[bool] = []
    launch = fused._launch

    def counted_launch(tensors: Any, partials: Any, dv: Any, *rest: Any) -> None:
        launches.append(tensors[1] is None and partials is not None and dv is not None)
        launch(tensors, partials, dv, *rest)

    monkeypatch.setattr(fused, "_launch", counted_launch)
    leaf, _, v_ref, noise, advantage = transitions()
    leaf.requires_grad_()
    found = {}
    for backend in ("torch", "triton"):
        with runtime.backend(backend):
            found[backend] = flow_grpo_gradient(
                leaf, leaf.detach(), v_ref, noise, advantage, MASK, clip=CLIP, kl_weight=0.1, terms=counted()
            )
    assert launches == [True]  # one pass makes the terms and the gradient
    torch.testing.assert_close(found["triton"][0], found["torch"][0], rtol=1e-5, atol=1e-9)
    assert numbers(found["triton"][1]) == pytest.approx(numbers(found["torch"][1]), rel=1e-5, abs=1e-7)


def test_gradient_is_policy_plus_weighted_kl_over_the_count():
    v, v_old, v_ref, noise, advantage = transitions()
    found, metrics = flow_grpo_gradient(
        v, v_old, v_ref, noise, advantage, MASK, clip=0.5, kl_weight=0.1, terms=counted()
    )
    ratio = (-(noise * (v - v_old)).mean((1, 2))).exp()
    kl = (v - v_ref).square().mean((1, 2))
    policy = (advantage * ratio)[:, None, None] * noise / ELEMENTS
    expected = (policy + 0.1 * 2 * (v - v_ref) / ELEMENTS) * MASK[:, None, None] / counted()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)
    assert metrics["loss"] == pytest.approx(((-advantage * ratio + 0.1 * kl)[MASK].mean()).item(), rel=1e-5)
    assert metrics["kl"] == pytest.approx(kl[MASK].mean().item(), rel=1e-5)
    assert metrics["ratio"] == pytest.approx(ratio[MASK].mean().item(), rel=1e-6)
    assert metrics["ratio_deviation"] == pytest.approx((ratio - 1).abs()[MASK].mean().item(), rel=1e-3)


def test_before_the_first_step_the_ratio_is_one_and_the_kl_zero():
    v, _, _, noise, advantage = transitions()
    found, metrics = flow_grpo_gradient(v, v, v, noise, advantage, MASK, clip=CLIP, kl_weight=0.1, terms=counted())
    assert metrics["ratio"] == 1.0 and metrics["ratio_deviation"] == 0.0 and metrics["kl"] == 0.0
    assert metrics["clip_ratio/low"] == metrics["clip_ratio/high"] == 0.0
    rows, every = [t[:8] for t in (v, v, v, noise, advantage)], torch.ones(8, dtype=torch.bool)
    thirds = [flow_grpo_gradient(*rows, every, clip=CLIP, kl_weight=0.1, terms=24) for _ in range(3)]
    assert sum(each["ratio"] for _, each in thirds) == 1.0
    # a positive advantage pulls the predicted data towards the sampled noise: v falls along it
    expected = (advantage * MASK)[:, None, None] * noise / ELEMENTS / counted()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_rows_outside_the_mask_count_for_nothing_even_without_an_advantage():
    v, v_old, v_ref, noise, advantage = transitions()
    missing = torch.where(MASK, advantage, math.nan)
    some = flow_grpo_gradient(v, v_old, v_ref, noise, missing, MASK, clip=CLIP, kl_weight=0.1, terms=counted())
    rows = [t[MASK] for t in (v, v_old, v_ref, noise, advantage)]
    alone = flow_grpo_gradient(*rows, MASK[MASK], clip=CLIP, kl_weight=0.1, terms=counted())
    torch.testing.assert_close(some[0][MASK], alone[0], rtol=1e-5, atol=1e-9)
    assert (some[0][~MASK] == 0).all()
    assert numbers(some[1]) == pytest.approx(numbers(alone[1]), rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e6, 1e6])
@pytest.mark.parametrize("part", [0, 1, 2, 3])  # velocity, old, reference, noise
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_outside_the_mask_leave_the_gradient_finite(part: int, value: float, backend: str):
    """Whatever their numbers: ratios of 0 and infinity too."""
    tensors = list(transitions())
    shown = MASK[:, None, None]
    clean = [torch.where(shown, t, 0.0) for t in tensors[:4]]
    clean[part] = torch.where(shown, clean[part], value)
    other = 1 if part == 3 else 3
    clean[other] = torch.where(shown, clean[other], 1.0)
    options = {"clip": CLIP, "kl_weight": 0.1, "terms": counted()}
    with runtime.backend(backend):
        found = flow_grpo_gradient(*clean, torch.where(MASK, tensors[4], math.nan), MASK, **options)
        alone = flow_grpo_gradient(*(t[MASK] for t in tensors), MASK[MASK], **options)
    torch.testing.assert_close(found[0][MASK], alone[0], rtol=1e-5, atol=1e-9)
    assert (found[0][~MASK] == 0).all() and numbers(found[1]) == pytest.approx(numbers(alone[1]), rel=1e-5)


def test_zero_advantages_leave_the_kl_gradient_alone():
    v, v_old, v_ref, noise, _ = transitions()
    found, _ = flow_grpo_gradient(v, v_old, v_ref, noise, torch.zeros(ROWS), MASK, clip=CLIP, kl_weight=0.1, terms=ROWS)
    expected = 0.2 * (v - v_ref) / ELEMENTS / ROWS * MASK[:, None, None]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_clip_means_the_same_velocity_change_at_every_resolution():
    shares = []
    for elements in (64, 1024):
        v_old, noise, delta = torch.randn(3, 4000, elements, generator=torch.Generator().manual_seed(elements))
        v, clip = v_old + 0.0055 * delta, clip_epsilon(0.0055, elements)
        ones = torch.ones(4000)
        _, metrics = flow_grpo_gradient(v, v_old, v_old, noise, ones, ones.bool(), clip=clip, kl_weight=0.0, terms=4000)
        shares.append(metrics["clip_ratio/high"])
    # a move of exactly the named rms puts the clip at one standard deviation of z
    assert shares == pytest.approx([0.1587, 0.1587], abs=0.03)


def test_default_clip_at_full_size_is_the_published_one():
    assert clip_epsilon(0.0055, 3 * 16 * 60 * 104) == pytest.approx(1e-5, rel=0.01)
