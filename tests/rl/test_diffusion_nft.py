"""DiffusionNFT's gradient against autograd of the published form, its invariants, and that it learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tempact.rl.diffusion_nft import diffusion_nft_gradient

ROWS, ELEMENTS, MOST = 6, 40, 2.0
MASK = torch.tensor([True, True, False, True, True, True])


def rows(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Velocity, old, reference, clean chunk, noise, sigma and advantage, some of which is beyond the clip."""
    generator = torch.Generator().manual_seed(0)
    v, clean, noise = torch.randn(3, ROWS, 5, 8, generator=generator)
    old, reference = (v + 0.1 * torch.randn(v.shape, generator=generator) for _ in range(2))
    sigma = torch.tensor([1.0, 0.9, 0.5, 0.625, 0.3, 0.8])
    advantage = torch.tensor([0.7, -1.3, 0.4, 3.0, -3.0, 0.0])
    return tuple(t.to(dtype) for t in (v, old, reference, clean, noise, sigma, advantage))


def published(
    v: Tensor,
    old: Tensor,
    reference: Tensor,
    clean: Tensor,
    noise: Tensor,
    sigma: Tensor,
    advantage: Tensor,
    beta: float,
) -> Tensor:
    """The loss of each row, from noised chunks and predictions of the clean one."""
    level = sigma[:, None, None]
    noised = (1 - level) * clean + level * noise
    r = (advantage.clamp(-MOST, MOST) / MOST + 1) / 2
    total = 0
    for policy, share in ((beta * v + (1 - beta) * old, r), ((1 + beta) * old - beta * v, 1 - r)):
        error = noised - level * policy - clean
        total = total + share * (error**2).mean((1, 2)) / error.abs().mean((1, 2)).detach() * MOST / beta
    return total + 0.1 * ((v - reference) ** 2).mean((1, 2))


def found(
    v: Tensor, old: Tensor, reference: Tensor, clean: Tensor, noise: Tensor, sigma: Tensor, advantage: Tensor,
    beta: float = 0.7, mask: Tensor = MASK, kl_weight: float = 0.1, terms: int = 5,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    return diffusion_nft_gradient(
        v, old, reference, noise - clean, sigma, advantage, mask, beta=beta, advantage_clip=MOST, kl_weight=kl_weight,
        terms=terms,
    )  # fmt: skip


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
def test_gradient_and_loss_are_those_of_the_published_form(beta: float) -> None:
    given = rows(torch.float64)
    v = given[0].clone().requires_grad_()
    expected = published(v, *given[1:], beta)[MASK].sum() / 5
    expected.backward()
    gradient, metrics = found(*given, beta=beta)
    torch.testing.assert_close(gradient, v.grad, rtol=1e-9, atol=1e-12)
    assert metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-9)
    v, old, reference, clean, noise, sigma, _ = given
    noised = (1 - sigma[:, None, None]) * clean + sigma[:, None, None] * noise
    errors = (noised - sigma[:, None, None] * v - clean).abs().mean((1, 2))
    assert metrics["clean_error"].item() == pytest.approx(errors[MASK].mean().item(), rel=1e-9)
    assert metrics["kl"].item() == pytest.approx((v - reference).square().mean((1, 2))[MASK].mean().item(), rel=1e-9)
    assert metrics["velocity_change"].item() == pytest.approx((v - old).square().mean((1, 2))[MASK].mean().item())


def test_on_policy_the_gradient_is_flow_matching_weighted_by_the_advantage() -> None:
    """2 sigma A e / (D mean|e|) with e = v - target: whatever beta, 0 for an advantage of 0, and against the target
    where the advantage is negative."""
    v, _, _, clean, noise, sigma, advantage = rows()
    error = v - (noise - clean)
    worth = (2 * sigma * advantage.clamp(-MOST, MOST))[:, None, None] / ELEMENTS / error.abs().mean((1, 2), True)
    for beta in (0.1, 1.0):
        gradient, metrics = found(v, v, v, clean, noise, sigma, advantage, beta=beta)
        torch.testing.assert_close(gradient, worth * error * MASK[:, None, None] / 5, rtol=1e-4, atol=1e-8)
        assert metrics["kl"] == 0.0 and metrics["velocity_change"] == 0.0
        assert not gradient[5].any() and gradient[:2].any()


def test_off_policy_an_advantage_of_0_pulls_back_to_the_old_velocity() -> None:
    v, old, _, clean, noise, sigma, _ = rows()
    gradient, _ = found(v, old, v, clean, noise, sigma, torch.zeros(ROWS), kl_weight=0.0)
    assert ((gradient * (v - old)).sum((1, 2))[MASK] > 0).all()


def test_rows_outside_the_mask_count_for_nothing_and_micro_batches_add_up() -> None:
    given = rows()
    whole, metrics = found(*given)
    dirty = [torch.where(MASK.view(-1, *[1] * (t.ndim - 1)), t, math.nan) for t in given]
    parts = [found(*(t[own] for t in dirty), mask=MASK[own]) for own in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(torch.cat([part for part, _ in parts]), whole, rtol=1e-5, atol=1e-9)
    assert not whole[2].any() and whole[MASK].flatten(1).any(1).all()
    for name, value in metrics.items():
        assert value.item() == pytest.approx(sum(own[name].item() for _, own in parts), rel=1e-5), name


def test_a_perfect_prediction_leaves_the_gradient_finite() -> None:
    _, _, _, clean, noise, sigma, advantage = rows()
    target = noise - clean
    gradient, metrics = found(target, target, target, clean, noise, sigma, advantage)
    assert not gradient.any() and metrics["loss"] == 0.0


def test_a_sampler_learns_what_is_rewarded() -> None:
    """The clean value is a shift plus part of the noise; higher values are rewarded: the shift rises steadily."""
    generator = torch.Generator().manual_seed(0)
    shift = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.SGD([shift], lr=0.02)
    seen = []
    for _ in range(30):
        noise = torch.randn(32, 1, 16, generator=generator)
        clean = (shift + 0.5 * noise).detach()
        reward = clean.mean((1, 2))
        advantage = (reward - reward.mean()) / reward.std(correction=0)
        fresh = torch.randn(32, 1, 16, generator=generator)
        sigma = torch.tensor([1.0, 0.625]).repeat(16)
        level = sigma[:, None, None]
        noised = (1 - level) * clean + level * fresh
        velocity = (noised - (shift + 0.3 * (noised - shift))) / level
        gradient, _ = diffusion_nft_gradient(
            velocity, velocity, velocity, fresh - clean, sigma, advantage, torch.ones(32, dtype=torch.bool), beta=1.0,
            advantage_clip=MOST, kl_weight=0.0, terms=32,
        )  # fmt: skip
        optimizer.zero_grad()
        velocity.backward(gradient)
        optimizer.step()
        seen.append(shift.item())
    assert seen[9] > 0 and seen[19] > seen[9] and seen[29] > seen[19]
