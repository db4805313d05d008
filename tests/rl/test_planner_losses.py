"""GRPO and RLOO beside GSPO: numbers by hand, what the three share, and that each of them learns."""

from __future__ import annotations

import math

import pytest
import torch
from rl.test_gspo import ADVANTAGE, EVERY, sequences
from torch import Tensor

from tempact.config import PlannerConfig, keys_of
from tempact.rl.advantages import PLAN_EPS, group_advantages
from tempact.rl.planner_losses import LEAVE_ONE_OUT, LOSSES

CLIP = {"clip_low": 0.2, "clip_high": 0.3}


def by_hand(name: str, moves: list[float], distances: list[float], advantage: float, kl: float) -> tuple[float, float]:
    """Loss and kl of one sequence in plain numbers."""
    k3 = [math.exp(d) - d - 1 for d in distances]
    mean, whole = sum(k3) / len(k3), sum(k3)

    def policy(ratio: float) -> float:
        return -min(ratio * advantage, max(0.8, min(1.3, ratio)) * advantage)

    if name == "gspo":
        return policy(math.exp(sum(moves) / len(moves))) + kl * mean, mean
    if name == "grpo":
        return sum(policy(math.exp(move)) for move in moves) / len(moves) + kl * mean, mean
    return policy(math.exp(sum(moves))) + kl * whole, mean


@pytest.mark.parametrize("advantage", [0.7, -0.7])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_known_numbers(name: str, advantage: float) -> None:
    """The middle token is beyond either clip, and so is the sum of the moves, but not their mean."""
    moves, distances = [0.1, 0.5 * math.copysign(1, advantage), 0.02], [0.3, -0.4, 0.1]
    old = torch.tensor([[-9.0, -1.0, -2.0, -1.5]])
    log_probs = old + torch.tensor([[7.0, *moves]])
    mask, reference = torch.tensor([[False, True, True, True]]), log_probs + torch.tensor([[5.0, *distances]])
    loss, metrics = LOSSES[name](
        log_probs, old, reference, mask, torch.tensor([advantage]), torch.tensor([True]), **CLIP, kl_weight=0.1
    )
    expected, kl = by_hand(name, moves, distances, advantage, 0.1)
    assert loss.item() == pytest.approx(expected, rel=1e-5) and metrics["kl"] == pytest.approx(kl, rel=1e-5)
    side = "high" if advantage > 0 else "low"
    assert metrics[f"clip_ratio/{side}"] == pytest.approx({"gspo": 0, "grpo": 1 / 3, "rloo": 1}[name], abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_the_first_gradient_is_the_policy_gradient_of_tokens_or_sequences(name: str) -> None:
    log_probs, _, _, mask = sequences()
    log_probs.requires_grad_()
    loss, metrics = LOSSES[name](log_probs, log_probs, log_probs, mask, ADVANTAGE, EVERY, **CLIP, kl_weight=0.5)
    loss.backward()
    assert metrics["ratio"] == 1.0 and metrics["ratio_deviation"] == 0.0 and metrics["kl"] == 0.0
    per = 1 if name == "rloo" else mask.sum(1, keepdim=True)
    torch.testing.assert_close(log_probs.grad, -ADVANTAGE[:, None] * mask / per / 4, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_the_clip_stops_the_gradient_on_its_own_side_alone(name: str) -> None:
    old = torch.full((2, 3), -1.0)
    for move, clipped in ((1.0, ADVANTAGE[:2].gt(0)), (-1.0, ADVANTAGE[:2].lt(0))):
        log_probs = (old + move).requires_grad_()
        loss, _ = LOSSES[name](
            log_probs, old, old, old < 0, ADVANTAGE[:2], EVERY[:2], **CLIP, kl_weight=0.0
        )  # fmt: skip
        loss.backward()
        assert torch.equal((log_probs.grad == 0).all(1), clipped)


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up_and_what_does_not_count_is_never_read(name: str) -> None:
    log_probs, old, reference, mask = sequences()
    counted = torch.tensor([True, True, False, True])
    whole = log_probs.clone().requires_grad_()
    loss, metrics = LOSSES[name](whole, old, reference, mask, ADVANTAGE, counted, **CLIP, kl_weight=0.1)
    loss.backward()
    keep = mask & counted[:, None]
    dirty = [
        t.masked_fill(~keep, value) for t, value in zip((log_probs, old, reference), (1e4, -1e4, math.nan), strict=True)
    ]
    parts, losses, found = dirty[0].requires_grad_(), [], []
    worth = torch.where(counted, ADVANTAGE, math.nan)
    for rows in (slice(0, 1), slice(1, 4)):
        each = [x[rows] for x in (parts, *dirty[1:], mask, worth, counted)]
        share, own = LOSSES[name](*each, **CLIP, kl_weight=0.1, terms=3)
        share.backward()
        losses.append(share.item())
        found.append(own)
    assert sum(losses) == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-5, atol=1e-9)
    for key, value in metrics.items():
        assert value == pytest.approx(sum(own[key] for own in found), rel=1e-5, abs=1e-9), key


@pytest.mark.parametrize("name", LOSSES)
def test_a_sequence_without_tokens_has_ratio_one_and_no_gradient(name: str) -> None:
    log_probs, old, reference, mask = sequences()
    log_probs.requires_grad_()
    loss, metrics = LOSSES[name](log_probs, old, reference, mask & False, ADVANTAGE, EVERY, **CLIP, kl_weight=0.1)
    loss.backward()
    assert metrics["ratio"] == 1.0 and metrics["kl"] == 0.0 and not log_probs.grad.any()


def test_metrics_of_tokens_are_means_over_sequences() -> None:
    log_probs, _, reference, mask = sequences()
    moves = 0.5 * torch.randn(4, 12, generator=torch.Generator().manual_seed(3))
    _, found = LOSSES["grpo"](log_probs, log_probs - moves, reference, mask, ADVANTAGE, EVERY, **CLIP, kl_weight=0.0)
    ratios = [moves[row][mask[row]].double().exp() for row in range(4)]
    assert found["ratio"] == pytest.approx(sum(r.mean().item() for r in ratios) / 4, rel=1e-5)
    assert found["ratio_deviation"] == pytest.approx(sum((r - 1).abs().mean().item() for r in ratios) / 4, rel=1e-5)
    low = sum((r < 0.8).double().mean().item() for r, a in zip(ratios, ADVANTAGE.tolist(), strict=True) if a < 0) / 4
    high = sum((r > 1.3).double().mean().item() for r, a in zip(ratios, ADVANTAGE.tolist(), strict=True) if a > 0) / 4
    assert (found["clip_ratio/low"], found["clip_ratio/high"]) == pytest.approx((low, high)) and low * high > 0


def test_every_loss_is_a_value_of_the_key() -> None:
    rule = keys_of(PlannerConfig)["loss"].rules[0]
    assert [name for name in (*LOSSES, "ppo", "") if rule.good(name)] == [*LOSSES] and set(LEAVE_ONE_OUT) < {*LOSSES}


@pytest.mark.parametrize("std", ["global", "group", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_policy_over_sequences_learns(name: str, std: str) -> None:
    """Of 5 tokens a place, the first is rewarded: from one in five to most, with two updates an iteration."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(6, 5, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    lengths = torch.tensor([6, 3] * 8)
    mask = torch.arange(6) < lengths[:, None]

    def log_probs(tokens: Tensor) -> Tensor:
        return logits.log_softmax(-1)[torch.arange(6), tokens]

    rewards = []
    for _ in range(40):
        drawn = torch.stack([row.multinomial(16, True, generator=generator) for row in logits.detach().softmax(-1)], 1)
        reward = ((drawn == 0) & mask).sum(1) / lengths
        groups = torch.cat([reward[lengths == 6].view(1, -1), reward[lengths == 3].view(1, -1)])
        advantage = torch.zeros(16)
        worth = group_advantages(groups, 2.0, PLAN_EPS, std=std, leave_one_out=name in LEAVE_ONE_OUT)[0]
        advantage[lengths == 6], advantage[lengths == 3] = worth
        old = log_probs(drawn).detach()
        for _ in range(2):
            loss, _ = LOSSES[name](
                log_probs(drawn), old, old, mask, advantage, torch.ones(16, dtype=torch.bool), **CLIP, kl_weight=0.0
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rewards.append(reward.mean().item())
    assert sum(rewards[:5]) / 5 < 0.4 and sum(rewards[-5:]) / 5 > 0.8
