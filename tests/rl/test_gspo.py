from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tempact.rl.gspo import gspo_loss

CLIP = {"clip_low": 3e-4, "clip_high": 4e-4}
ADVANTAGE = torch.tensor([0.9, -0.4, 0.2, -1.0])
EVERY = torch.ones(4, dtype=torch.bool)


def sequences(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log_probs, old, reference and the mask of 4 responses of different lengths behind different prompts."""
    generator = torch.Generator().manual_seed(seed)
    log_probs, first, second = -3 * torch.rand(3, 4, 12, generator=generator)
    mask = torch.zeros(4, 12, dtype=torch.bool)
    for row, (start, end) in enumerate([(2, 12), (4, 7), (1, 2), (5, 11)]):
        mask[row, start:end] = True
    return log_probs, log_probs + 1e-3 * (first + 1.5), log_probs + 0.1 * (second + 1.5), mask


def test_ratio_is_one_and_gradient_the_mean_token_gradient_at_the_first_update():
    log_probs, _, _, mask = sequences()
    log_probs.requires_grad_()
    loss, metrics = gspo_loss(log_probs, log_probs, log_probs, mask, ADVANTAGE, EVERY, **CLIP, kl_weight=0.5)
    loss.backward()
    assert metrics["ratio"] == 1.0 and metrics["ratio_deviation"] == 0.0 and metrics["kl"] == 0.0
    assert metrics["clip_ratio/low"] == metrics["clip_ratio/high"] == 0.0
    assert loss.item() == pytest.approx(-ADVANTAGE.mean().item(), rel=1e-6)
    expected = -ADVANTAGE[:, None] * mask / mask.sum(1, keepdim=True) / 4
    torch.testing.assert_close(log_probs.grad, expected, rtol=1e-6, atol=0)


def test_loss_of_known_numbers():
    log_probs, old, reference = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.2, -1.9]]), torch.tensor([[-1.5, -1.0]])
    mask, every = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, dtype=torch.bool)
    loss, metrics = gspo_loss(
        log_probs, old, reference, mask, torch.tensor([-0.5]), every, clip_low=0.2, clip_high=0.3, kl_weight=0.1
    )
    ratio = math.exp((0.2 - 0.1) / 2)
    kl = ((math.exp(-0.5) + 0.5 - 1) + (math.exp(1.0) - 1.0 - 1)) / 2
    assert metrics["ratio"] == pytest.approx(ratio, rel=1e-6)
    assert metrics["kl"] == pytest.approx(kl, rel=1e-5)
    assert loss.item() == pytest.approx(0.5 * ratio + 0.1 * kl, rel=1e-5)


@pytest.mark.parametrize(
    ("move", "advantage", "stopped"),
    [
        (-2.5e-4, -1.0, False), (-3.5e-4, -1.0, True), (-3.5e-4, 1.0, False),
        (3.5e-4, 1.0, False), (4.5e-4, 1.0, True), (4.5e-4, -1.0, False),
    ],
)  # fmt: skip
def test_clip_is_asymmetric_and_pessimistic(move: float, advantage: float, stopped: bool):
    old = torch.full((1, 3), -1.0)
    log_probs = (old + move).requires_grad_()
    mask, every = torch.ones(1, 3, dtype=torch.bool), torch.ones(1, dtype=torch.bool)
    loss, metrics = gspo_loss(
        log_probs, old, log_probs.detach(), mask, torch.tensor([advantage]), every, **CLIP, kl_weight=0.0
    )
    loss.backward()
    assert bool((log_probs.grad == 0).all()) is stopped
    side = "low" if advantage < 0 else "high"
    assert metrics[f"clip_ratio/{side}"] == float(stopped)
    bound = 1 + 4e-4 if advantage > 0 else 1 - 3e-4
    assert loss.item() == pytest.approx(-advantage * (bound if stopped else math.exp(move)), abs=2e-7)


def test_batch_of_four_equals_four_batches_of_one():
    log_probs, old, reference, mask = sequences()
    whole = log_probs.clone().requires_grad_()
    loss, metrics = gspo_loss(whole, old, reference, mask, ADVANTAGE, EVERY, **CLIP, kl_weight=0.1)
    loss.backward()
    single = log_probs.clone().requires_grad_()
    losses, ones = [], []
    for i in range(4):
        row = slice(i, i + 1)
        part, found = gspo_loss(
            single[row], old[row], reference[row], mask[row], ADVANTAGE[row], EVERY[row], **CLIP, kl_weight=0.1
        )
        (part / 4).backward()
        losses.append(part.item())
        ones.append(found)
    assert loss.item() == pytest.approx(sum(losses) / 4, rel=1e-5)
    torch.testing.assert_close(whole.grad, single.grad, rtol=1e-5, atol=1e-9)
    for name, value in metrics.items():
        assert value == pytest.approx(sum(found[name] for found in ones) / 4, rel=1e-4, abs=1e-9), name


def test_micro_batches_of_known_terms_add_up_whatever_they_leave_out():
    log_probs, old, reference, mask = sequences()
    counted = torch.tensor([True, True, False, True])
    whole = log_probs.clone().requires_grad_()
    loss, metrics = gspo_loss(whole, old, reference, mask, ADVANTAGE, counted, **CLIP, kl_weight=0.1)
    loss.backward()
    parts, losses, found = log_probs.clone().requires_grad_(), [], []
    for rows in (slice(0, 1), slice(1, 4)):
        each = [x[rows] for x in (parts, old, reference, mask, ADVANTAGE, counted)]
        share, own = gspo_loss(*each, **CLIP, kl_weight=0.1, terms=3)
        share.backward()
        losses.append(share.item())
        found.append(own)
    assert sum(losses) == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-6, atol=0)
    for name, value in metrics.items():
        assert value == pytest.approx(sum(own[name] for own in found), rel=1e-6, abs=1e-12), name


def test_padding_and_prompt_tokens_have_no_effect():
    log_probs, old, reference, mask = sequences()
    clean = [t.masked_fill(~mask, 0.0) for t in (log_probs, old, reference)]
    dirty = [t.masked_fill(~mask, value) for t, value in zip(clean, (-math.inf, math.nan, 7.0), strict=True)]
    results = []
    for new, was, start in (clean, dirty):
        new.requires_grad_()
        loss, metrics = gspo_loss(new, was, start, mask, ADVANTAGE, EVERY, **CLIP, kl_weight=0.1)
        loss.backward()
        results.append((loss, new.grad, metrics))
    assert torch.equal(results[0][0], results[1][0]) and results[0][2] == results[1][2]
    assert torch.equal(results[0][1], results[1][1])
    assert (results[1][1][~mask] == 0).all() and (results[1][1][mask] != 0).any()


@pytest.mark.parametrize("advantage", [math.nan, math.inf, -1e30, 0.5])
@pytest.mark.parametrize("log_prob", [None, math.nan, -math.inf, 1e3, -1e3])  # the last two: ratios of 0 and infinity
def test_plans_outside_the_mask_are_as_good_as_absent(advantage: float, log_prob: float | None):
    log_probs, old, reference, mask = sequences()
    keep = torch.tensor([True, False, True, False])
    new = log_probs if log_prob is None else torch.where(keep[:, None], log_probs, log_prob)
    new = new.clone().requires_grad_()
    loss, metrics = gspo_loss(
        new, old, reference, mask, torch.where(keep, ADVANTAGE, advantage), keep, **CLIP, kl_weight=0.1
    )
    loss.backward()
    alone = log_probs[keep].clone().requires_grad_()
    expected, own = gspo_loss(
        alone, old[keep], reference[keep], mask[keep], ADVANTAGE[keep], EVERY[:2], **CLIP, kl_weight=0.1
    )
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6) and metrics == pytest.approx(own, rel=1e-5)
    torch.testing.assert_close(new.grad[keep], alone.grad, rtol=1e-6, atol=0)
    assert (new.grad[~keep] == 0).all()


def test_the_reference_and_the_old_policy_get_no_gradient():
    log_probs, old, reference, mask = (t.requires_grad_() if t.is_floating_point() else t for t in sequences())
    gspo_loss(log_probs, old, reference, mask, ADVANTAGE, EVERY, **CLIP, kl_weight=0.1)[0].backward()
    assert log_probs.grad is not None and log_probs.grad.any() and old.grad is None and reference.grad is None


@pytest.mark.parametrize("sign", [1, -1])
def test_metrics_are_means_over_the_plans_that_count(sign: int):
    log_probs, _, reference, mask = sequences()
    old = log_probs - sign * torch.tensor([1e-3, -1e-3, 0.0, -2e-3])[:, None]
    keep = torch.tensor([True, True, False, True])
    wide = {"clip_low": 4e-4, "clip_high": 6e-4}
    _, found = gspo_loss(log_probs, old, reference, mask, ADVANTAGE, keep, **wide, kl_weight=0.3)
    rows = []
    for new, was, start, own in zip(*(t.double() for t in (log_probs, old, reference)), mask, strict=True):
        gap = (start - new)[own]
        rows.append(((new - was)[own].mean().exp().item(), (gap.exp() - gap - 1).mean().item()))
    ratios, kl = (torch.tensor(own, dtype=torch.float64) for own in zip(*rows, strict=True))
    low, high = (ratios < 1 - 4e-4) & (ADVANTAGE < 0), (ratios > 1 + 6e-4) & (ADVANTAGE > 0)
    clipped = ratios.clamp(1 - 4e-4, 1 + 6e-4)
    loss = -torch.minimum(ratios * ADVANTAGE, clipped * ADVANTAGE) + 0.3 * kl
    expected = {
        "loss": loss, "kl": kl, "ratio": ratios, "ratio_deviation": (ratios - 1).abs(), "clip_ratio/low": low.double(),
        "clip_ratio/high": high.double(),
    }  # fmt: skip
    told = {name: found[name] for name in expected}
    assert told == pytest.approx({name: own[keep].mean().item() for name, own in expected.items()}, rel=1e-4, abs=1e-7)
    stopped = (2 / 3, 1 / 3) if sign > 0 else (0.0, 0.0)
    assert (found["clip_ratio/low"], found["clip_ratio/high"]) == pytest.approx(stopped)


def test_nothing_to_count_gives_zero_loss_and_zero_gradient():
    log_probs, old, reference, mask = sequences()
    log_probs.requires_grad_()
    loss, _ = gspo_loss(log_probs, old, reference, mask, ADVANTAGE, ~EVERY, **CLIP, kl_weight=0.1)
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(log_probs.grad, torch.zeros(4, 12))
    loss, metrics = gspo_loss(log_probs, old, reference, mask & False, ADVANTAGE, EVERY, **CLIP, kl_weight=0.1)
    assert metrics["ratio"] == 1.0 and math.isfinite(loss.item())


@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-5, 1e-3, 0.1, 3.0])
def test_k3_is_never_negative_zero_when_equal_and_right_when_small(size: float):
    log_probs = -torch.rand(256, 8, generator=torch.Generator().manual_seed(0))
    reference = log_probs + size * torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
    mask, every = torch.ones(1, 8, dtype=torch.bool), torch.ones(1, dtype=torch.bool)
    found = []
    for one, start in zip(log_probs.split(1), reference.split(1), strict=True):
        _, metrics = gspo_loss(one, one, start, mask, torch.zeros(1), every, **CLIP, kl_weight=1.0)
        found.append(metrics["kl"])
    assert min(found) >= 0.0
    exact = (reference.double() - log_probs.double()).expm1() - (reference.double() - log_probs.double())
    assert sum(found) == pytest.approx(exact.mean(1).sum().item(), rel=1e-3, abs=1e-12)
    assert size or max(found) == 0.0
