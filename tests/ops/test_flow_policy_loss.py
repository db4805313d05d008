from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from csrc_triton import flow_policy_loss, flow_sde_step

LEVELS = [(1.0, 0.9375), (0.9375, 2.5 / 3), (2.5 / 3, 0.625)]
KINDS = [("cps", 1.0), ("cps", 0.6), ("flow_grpo", 0.7), ("dance_grpo", 0.3)]


def draw(*shape: int, count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]


def log_ratio(v: Tensor, v_old: Tensor, noise: Tensor) -> Tensor:
    return flow_policy_loss(v, v_old, v_old, noise, torch.zeros(len(v)), clip=0.1).log_ratio


def true_log_ratio(x: Tensor, v: Tensor, v_old: Tensor, noise: Tensor, s: float, n: float, kind: str, eta: float):
    """Mean per-dimension log-ratio of the sample drawn under v_old, by two Gaussian densities; and k."""
    old = flow_sde_step(x, v_old, noise, s, n, kind=kind, eta=eta)
    new = flow_sde_step(x, v, noise, s, n, kind=kind, eta=eta)
    std = old.std.view(-1, *(1,) * (x.ndim - 1))
    gap = Normal(new.mean, std).log_prob(old.sample) - Normal(old.mean, std).log_prob(old.sample)
    return gap.flatten(1).mean(1), old.k


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ratio_is_exactly_one_where_the_policy_has_not_moved(dtype: torch.dtype):
    v, noise = draw(6, 300, count=2, dtype=dtype)
    terms = flow_policy_loss(v, v, v, noise, torch.randn(6), clip=1e-5)
    assert torch.equal(terms.log_ratio, torch.zeros_like(terms.log_ratio))
    assert torch.equal(terms.log_ratio.exp(), torch.ones_like(terms.log_ratio))
    assert torch.equal(terms.kl, torch.zeros_like(terms.kl)) and not terms.clipped.any()


@pytest.mark.parametrize(("kind", "eta"), KINDS)
@pytest.mark.parametrize(("s", "n"), LEVELS)
def test_closed_form_is_the_normalised_log_ratio(kind: str, eta: float, s: float, n: float):
    x, v_old, noise, delta = draw(4, 3, 20, count=4)
    v = v_old + 0.1 * delta
    unnormalised, k = true_log_ratio(x, v, v_old, noise, s, n, kind, eta)
    normalised = (unnormalised + 0.5 * k**2 * (v - v_old).square().flatten(1).mean(1)) / k
    torch.testing.assert_close(log_ratio(v, v_old, noise), normalised, rtol=0, atol=1e-13)
    torch.testing.assert_close(normalised, -(noise * (v - v_old)).flatten(1).mean(1), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("s", "n"), LEVELS)
def test_left_shift_of_the_true_ratio_is_gone_and_its_spread_is_the_same_at_every_transition(s: float, n: float):
    count, elements = 4000, 64
    x, v_old, noise, delta = draw(count, elements, count=4, seed=1)
    v, rms = v_old + delta, delta.square().mean().sqrt().item()
    unnormalised, k = true_log_ratio(x, v, v_old, noise, s, n, "cps", 1.0)
    gain, z = k[0].item(), log_ratio(v, v_old, noise)
    error = rms / math.sqrt(elements * count)  # one standard error of the mean of z
    assert unnormalised.mean().item() == pytest.approx(-0.5 * gain**2 * rms**2, abs=5 * gain * error)
    assert z.mean().item() == pytest.approx(0.0, abs=5 * error)
    assert z.std().item() == pytest.approx(rms / math.sqrt(elements), rel=0.05)
    restored = (unnormalised + 0.5 * gain**2 * delta.square().mean(1)) / gain
    assert restored.std().item() == pytest.approx(rms / math.sqrt(elements), rel=0.05)


def test_gradient_is_advantage_ratio_noise_over_elements_inside_the_clip():
    v_old, noise, v_ref = draw(2, 3, 8, count=3)
    v = (v_old + 1e-3 * noise.flip(0)).requires_grad_()
    advantage = torch.tensor([1.7, -0.4], dtype=torch.float64)
    terms = flow_policy_loss(v, v_old, v_ref, noise, advantage, clip=0.05)
    policy = torch.autograd.grad(terms.loss.sum(), v, retain_graph=True)[0]
    ratio = terms.log_ratio.exp().detach()
    assert (ratio != 1).all() and not terms.clipped.any()
    torch.testing.assert_close(policy, (advantage * ratio)[:, None, None] * noise / 24, rtol=1e-12, atol=0)
    kl = torch.autograd.grad(terms.kl.sum(), v)[0]
    torch.testing.assert_close(kl, 2 * (v.detach() - v_ref) / 24, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.kl, (v - v_ref).square().flatten(1).mean(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("advantage", "push", "stopped"),
    [(1.0, 1.0, True), (1.0, -1.0, False), (-1.0, 1.0, False), (-1.0, -1.0, True)],
)
@pytest.mark.parametrize("clip", [1e-5, 0.2])
def test_clip_stops_only_moves_that_have_gone_far_enough(advantage: float, push: float, stopped: bool, clip: float):
    (noise,) = draw(1, 50, count=1, dtype=torch.float32)
    v_old = torch.zeros(1, 50)
    # z = push * 3 * clip: beyond the clip on the side of `push`
    v = (-push * 3 * clip * noise / noise.square().mean()).requires_grad_()
    terms = flow_policy_loss(v, v_old, v_old, noise, torch.tensor([advantage]), clip=clip)
    terms.loss.sum().backward()
    ratio = math.exp(push * 3 * clip)
    assert terms.clipped.tolist() == [stopped]
    assert (v.grad == 0).all() if stopped else (v.grad != 0).all()
    assert terms.loss.item() == pytest.approx(-advantage * (1 + push * clip if stopped else ratio), rel=1e-6)


def test_small_clips_are_decided_finer_than_an_fp32_ratio_could():
    noise, v_old = torch.ones(2, 4), torch.zeros(2, 4)
    # 1 % below and above a clip of 1e-6: as fp32 ratios both would round to the same number
    v = torch.tensor([[-0.99e-6], [-1.01e-6]]).expand(2, 4)
    terms = flow_policy_loss(v, v_old, v_old, noise, torch.ones(2), clip=1e-6)
    assert terms.clipped.tolist() == [False, True]


def test_fp32_is_as_good_as_exact_for_the_clip():
    v, noise, delta = draw(4, 3 * 16 * 60 * 104, count=3, seed=3, dtype=torch.float32)
    v_old = v - 0.01 * delta
    exact = log_ratio(v.double(), v_old.double(), noise.double())
    assert (log_ratio(v, v_old, noise).double() - exact).abs().max().item() < 1e-9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(6)}, r"v: found .*\(6,\); accepted: floating point \[B, \.\.\.\]"),
        ({"v_old": torch.zeros(2, 4)}, r"v_old: found .*\(2, 4\); accepted: floating point \(2, 3\)"),
        ({"v_ref": torch.zeros(2, 3, dtype=torch.int32)}, r"v_ref: found torch\.int32"),
        ({"noise": torch.zeros(3, 3)}, r"noise: found .*\(3, 3\); accepted: floating point \(2, 3\)"),
        ({"v_ref": torch.zeros(2, 3, device="meta")}, r"v_ref: found on meta; accepted: cpu, the device of v"),
        ({"advantage": torch.zeros(2, device="meta")}, r"advantage: found on meta; accepted: cpu"),
        ({"advantage": torch.zeros(2, 1)}, r"advantage: found shape \(2, 1\); accepted: \(2,\)"),
        ({"clip": 0.0}, r"clip: found 0\.0; accepted: a number in \(0, 1\)"),
        ({"clip": 1.0}, r"clip: found 1\.0"),
    ],
)
def test_bad_input_names_the_argument(change: dict[str, object], message: str):
    z = torch.zeros(2, 3)
    good: dict[str, object] = {
        "v": z, "v_old": z, "v_ref": z, "noise": z, "advantage": torch.zeros(2), "clip": 0.1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        flow_policy_loss(**(good | change))
