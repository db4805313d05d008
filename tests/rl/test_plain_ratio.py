"""Flow-GRPO's plain ratio against densities and autograd, and its weights."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from csrc_triton import flow_sde_step
from tempact.presets import get_preset
from tempact.rl.flow_grpo import FlowGRPO, flow_grpo_gradient
from tempact.rl.plain_ratio import plain_ratio_gradient, rectifying, scales

SIGMAS = (1.0, 0.9375, 0.8333, 0.625, 0.0)
ROWS, SHAPE = 6, (5, 8)
MASK = torch.tensor([True, True, False, True, True, True])
LEVELS = torch.tensor([0, 1, 2, 0, 1, 2])


def rows() -> tuple[Tensor, ...]:
    """States, velocity, old, reference, noise and advantage in fp64."""
    generator = torch.Generator().manual_seed(0)
    x, v, noise = torch.randn(3, ROWS, *SHAPE, generator=generator, dtype=torch.float64)
    old, reference = (v + 0.3 * torch.randn(v.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, v, old, reference, noise, torch.tensor([0.7, -1.3, 0.4, 1.5, -0.5, -0.9], dtype=torch.float64)


def density(x: Tensor, v: Tensor, old: Tensor, noise: Tensor, eta: float) -> Tensor:
    """Mean log-ratio of each row's step, from the two Gaussians."""
    found = []
    for row, level in enumerate(LEVELS.tolist()):
        one = [t[row : row + 1] for t in (x, v, old, noise)]
        sigma = SIGMAS[level : level + 2]
        before = flow_sde_step(one[0], one[2], one[3], *sigma, eta=eta)
        mean = flow_sde_step(one[0], one[1], one[3], *sigma, eta=eta).mean
        gaussians = [Normal(m, before.std.view(1, 1, 1)) for m in (mean, before.mean)]
        found.append((gaussians[0].log_prob(before.sample) - gaussians[1].log_prob(before.sample)).mean())
    return torch.stack(found)


@pytest.mark.parametrize("clip", [0.5, 0.003])
@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_gradient_is_that_of_the_densities_ratio(eta: float, clip: float) -> None:
    x, v, old, reference, noise, advantage = rows()
    leaf = v.clone().requires_grad_()
    k = torch.tensor(scales(SIGMAS, eta), dtype=torch.float64)[LEVELS]
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)[LEVELS]
    ratio = density(x, leaf, old, noise, eta).exp()
    policy = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    loss = weight * policy + 0.1 * (leaf - reference).square().mean((1, 2))
    (loss[MASK].sum() / 5).backward()
    gradient, metrics = plain_ratio_gradient(
        v, old, reference, noise, k, weight, advantage, MASK, clip=clip, kl_weight=0.1, terms=5
    )
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-6, atol=1e-12)
    assert metrics["loss"].item() == pytest.approx((loss[MASK].sum() / 5).item(), rel=1e-8)
    assert metrics["ratio"].item() == pytest.approx(ratio[MASK].mean().item(), rel=1e-8)
    assert metrics["ratio_deviation"].item() == pytest.approx((ratio - 1).abs()[MASK].mean().item(), rel=1e-6)
    for side, stopped in (
        ("low", (ratio < 1 - clip) & (advantage < 0)), ("high", (ratio > 1 + clip) & (advantage > 0)),
    ):  # fmt: skip
        assert metrics[f"clip_ratio/{side}"].item() == pytest.approx(stopped[MASK].double().mean().item())
    assert clip > 0.1 or metrics["clip_ratio/low"] + metrics["clip_ratio/high"] > 0


def test_the_log_ratio_drifts_below_0_by_half_k_squared() -> None:
    """Over fresh noise its mean is -k^2 mean(dv^2) / 2, where the normalised one's is 0."""
    old, noise = torch.randn(2, 4000, 64, generator=torch.Generator().manual_seed(0))
    v, every = old + 0.5, torch.ones(4000, dtype=torch.bool)
    k, ones = torch.full((4000,), 0.5), torch.ones(4000)
    options = {"clip": 0.9, "kl_weight": 0.0, "terms": 4000}
    _, plain = plain_ratio_gradient(v, old, v, noise, k, ones, ones, every, **options)
    expected = math.exp(-0.5 * 0.25 * 0.25 + 0.5 * (0.25 / 8) ** 2)  # of a log-normal with that drift
    assert plain["ratio"].item() == pytest.approx(expected, abs=0.002)
    _, normalised = flow_grpo_gradient(v, old, v, noise, ones, every, **options)
    assert normalised["ratio"].item() == pytest.approx(math.exp(0.5 * (0.5 / 8) ** 2), abs=0.004)


def test_scales_are_those_of_the_schedule_and_weights_undo_them() -> None:
    k = scales((1.0, 0.9375, 5 / 6, 0.625, 0.0), 1.0)
    assert k == pytest.approx([1 / 15, 3 / 16, 1 / 2])
    weights = rectifying(k)
    assert (
        sum(weights) / 3 == pytest.approx(1.0)
        and len({round(w * own, 9) for w, own in zip(weights, k, strict=True)}) == 1
    )


@pytest.mark.parametrize("reweight", [False, True])
def test_on_policy_the_gradient_is_the_normalised_one_times_k_or_alike_for_all_levels(reweight: bool) -> None:
    config = replace(get_preset("shapeworld").executor, ratio_norm=False, reweight=reweight, kl_weight=0.0)
    _, v, _, _, noise, advantage = (t.float() for t in rows())
    given = (v, v, v, noise, LEVELS, advantage, MASK)
    plain, metrics = FlowGRPO(config, SIGMAS)(*given, terms=5)
    normalised, _ = FlowGRPO(replace(config, ratio_norm=True, reweight=False), SIGMAS)(*given, terms=5)
    k = torch.tensor(scales(SIGMAS, 1.0))
    factor = 1 / (1 / k).mean().expand(3) if reweight else k
    torch.testing.assert_close(plain, normalised * factor[LEVELS][:, None, None], rtol=1e-4, atol=1e-9)
    assert metrics["ratio"] == pytest.approx(1.0) and metrics["ratio_deviation"] == 0.0 and plain.any()


def test_rows_outside_the_mask_count_for_nothing_and_micro_batches_add_up() -> None:
    _, *given = rows()
    k, weight = torch.tensor(scales(SIGMAS, 1.0)).double()[LEVELS], torch.ones(ROWS).double()
    tensors = [*given[:4], k, weight, given[4]]
    options = {"clip": 0.5, "kl_weight": 0.1, "terms": 5}
    whole, metrics = plain_ratio_gradient(*tensors, MASK, **options)
    dirty = [torch.where(MASK.view(-1, *[1] * (t.ndim - 1)), t, math.nan) for t in tensors]
    parts = [plain_ratio_gradient(*(t[own] for t in dirty), MASK[own], **options) for own in (slice(2), slice(2, 6))]
    torch.testing.assert_close(torch.cat([part for part, _ in parts]), whole)
    assert not whole[2].any()
    for name, value in metrics.items():
        assert value.item() == pytest.approx(sum(own[name].item() for _, own in parts)), name
