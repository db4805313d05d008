from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from csrc_triton import flow_sde_step

LEVELS = [(1.0, 0.9375), (0.9375, 2.5 / 3), (2.5 / 3, 0.625)]
KINDS = [("renoise", 1.0), ("cps", 1.0), ("cps", 0.6), ("flow_grpo", 0.7), ("dance_grpo", 0.3)]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, v, noise = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    return x, v, noise


def written_out(x: Tensor, v: Tensor, s: float, n: float, kind: str, eta: float) -> tuple[Tensor, float]:
    """Mean and std by the formulas of docs/algorithm.md 2.1, in terms of predicted data, noise and score."""
    x0, x1, delta = x - s * v, x + (1 - s) * v, s - n
    if kind == "renoise":
        return (1 - n) * x0, n
    if kind == "cps":
        std = n * math.sin(eta * math.pi / 2)
        return (1 - n) * x0 + math.sqrt(n * n - std * std) * x1, std
    if kind == "dance_grpo":
        score = -(x - (1 - s) * x0) / s**2
        return x - delta * v + 0.5 * eta**2 * delta * score, eta * math.sqrt(delta)
    gain = eta * math.sqrt(s / (1 - (n if s == 1 else s)))
    mean = x * (1 - gain**2 * delta / (2 * s)) - v * (1 + gain**2 * (1 - s) / (2 * s)) * delta
    return mean, gain * math.sqrt(delta)


@pytest.mark.parametrize(("kind", "eta"), KINDS)
@pytest.mark.parametrize(("s", "n"), LEVELS)
def test_mean_std_and_sample_are_those_of_the_formulas(kind: str, eta: float, s: float, n: float):
    x, v, noise = draw(3, 2, 5)
    mean, std = written_out(x, v, s, n, kind, eta)
    step = flow_sde_step(x, v, noise, s, n, kind=kind, eta=eta)
    torch.testing.assert_close(step.mean, mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(step.std, torch.full((3,), std, dtype=torch.float64), rtol=1e-13, atol=0)
    torch.testing.assert_close(step.sample, mean + std * noise, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("kind", "eta"), KINDS)
@pytest.mark.parametrize(("s", "n"), LEVELS)
def test_log_prob_and_its_gradient_are_those_of_a_normal(kind: str, eta: float, s: float, n: float):
    x, v, noise = draw(3, 2, 5)
    step = flow_sde_step(x, v.requires_grad_(), noise, s, n, kind=kind, eta=eta)
    ours = torch.autograd.grad(step.log_prob.sum(), v)[0]
    mean, std = written_out(x, v, s, n, kind, eta)
    expected = Normal(mean, std).log_prob(step.sample).flatten(1).mean(1)
    theirs = torch.autograd.grad(expected.sum(), v)[0]
    torch.testing.assert_close(step.log_prob, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours, -step.k[:, None, None] * noise / 10, rtol=1e-12, atol=1e-14)
    assert not step.sample.requires_grad


def test_cps_at_eta_one_is_renoising_and_at_eta_zero_the_euler_step():
    x, v, noise = draw(2, 7)
    for s, n in LEVELS:
        full, fresh = flow_sde_step(x, v, noise, s, n, eta=1.0), flow_sde_step(x, v, noise, s, n, kind="renoise")
        assert all(torch.equal(a, b) for a, b in zip(full, fresh, strict=True))
        torch.testing.assert_close(full.sample, (1 - n) * (x - s * v) + n * noise, rtol=1e-14, atol=1e-14)
        euler = x - (s - n) * v
        torch.testing.assert_close(flow_sde_step(x, v, noise, s, n, eta=0.0).sample, euler, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(flow_sde_step(x, v, noise, s, n, eta=1e-8).sample, euler, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["flow_grpo", "dance_grpo"])
def test_sdes_without_noise_are_the_euler_step(kind: str):
    x, v, noise = draw(2, 7)
    for s, n in LEVELS:
        step = flow_sde_step(x, v, noise, s, n, kind=kind, eta=1e-9)
        torch.testing.assert_close(step.sample, x - (s - n) * v, rtol=0, atol=1e-7)


def test_flow_grpo_is_finite_at_level_one_with_the_next_level_in_the_denominator():
    x, v, noise = draw(2, 7, dtype=torch.float32)
    step = flow_sde_step(x, v, noise, 1.0, 0.9375, kind="flow_grpo", eta=0.7)
    assert all(torch.isfinite(t).all() for t in step)
    assert step.std.tolist() == pytest.approx([0.7 * math.sqrt(1 / (1 - 0.9375)) * math.sqrt(0.0625)] * 2, rel=1e-6)


def test_levels_may_differ_by_sample():
    x, v, noise = draw(3, 2, 5, dtype=torch.float32)
    s, n = (torch.tensor(column) for column in zip(*LEVELS, strict=True))
    for kind, eta in KINDS:
        together = flow_sde_step(x, v, noise, s, n, kind=kind, eta=eta)
        for i, (a, b) in enumerate(LEVELS):
            alone = flow_sde_step(x[i : i + 1], v[i : i + 1], noise[i : i + 1], a, b, kind=kind, eta=eta)
            for ours, theirs in zip(together, alone, strict=True):
                torch.testing.assert_close(ours[i : i + 1], theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_level_of_all_samples_may_be_a_tensor(dtype: torch.dtype):
    x, v, noise = draw(2, 5, dtype=torch.float32)
    for kind, eta in KINDS:
        together = flow_sde_step(x, v, noise, torch.tensor(0.75, dtype=dtype), torch.tensor(0.5), kind=kind, eta=eta)
        by_sample = flow_sde_step(x, v, noise, torch.full((2,), 0.75), torch.full((2,), 0.5), kind=kind, eta=eta)
        assert all(torch.equal(a, b) for a, b in zip(together, by_sample, strict=True))


@pytest.mark.parametrize("integer", [np.int64, np.uint8, np.array])
def test_seeds_and_offsets_may_be_numpys(integer: Any):
    x, v, _ = draw(2, 5, dtype=torch.float32)
    plain = flow_sde_step(x, v, None, 0.9, 0.5, seed=7, offset=3)
    other = flow_sde_step(x, v, None, np.float32(0.9), np.float64(0.5), seed=integer(7), offset=integer(3))
    assert torch.equal(plain.noise, other.noise)
    torch.testing.assert_close(plain.sample, other.sample)


def test_a_deterministic_row_has_no_density_and_spoils_no_gradient():
    x, v, noise = draw(2, 4)
    s, n = torch.tensor([0.8, 0.625]), torch.tensor([0.5, 0.0])
    step = flow_sde_step(x, v.requires_grad_(), noise, s, n)
    torch.testing.assert_close(step.sample[1], (x - 0.625 * v)[1].detach(), rtol=1e-12, atol=1e-12)
    assert torch.isfinite(step.log_prob[0]) and torch.isnan(step.log_prob[1])
    step.log_prob[0].backward()
    assert v.grad[0].abs().min() > 0 and torch.equal(v.grad[1], torch.zeros(4, dtype=v.dtype))


def test_half_precision_inputs_are_computed_in_fp32():
    x, v, noise = draw(2, 1000, dtype=torch.bfloat16)
    step = flow_sde_step(x, v, noise, *LEVELS[1])
    exact = flow_sde_step(x.double(), v.double(), noise.double(), *LEVELS[1])
    assert step.sample.dtype == step.log_prob.dtype == torch.float32
    torch.testing.assert_close(step.sample.double(), exact.sample, rtol=0, atol=2e-6)
    torch.testing.assert_close(step.log_prob.double(), exact.log_prob, rtol=0, atol=1e-6)


def test_the_noise_is_handed_back():
    x, v, noise = draw(2, 7)
    step = flow_sde_step(x, v, noise, 0.9, 0.5)
    assert torch.equal(step.noise, noise)
    drawn = flow_sde_step(x, v, None, 0.9, 0.5, seed=3, offset=2**63 - 15)
    again = flow_sde_step(x, v, drawn.noise, 0.9, 0.5)
    assert drawn.noise.dtype == torch.float32 and drawn.noise.shape == x.shape
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(2, 4)}, r"x, v, noise: found shapes .*\(2, 4\).*accepted: one shape"),
        ({"noise": torch.zeros(2, 3, dtype=torch.int64)}, r"x, v, noise: found .*int64; accepted: floating point"),
        ({"kind": "ddim"}, r"kind: found 'ddim'; accepted: cps, dance_grpo, flow_grpo, renoise"),
        ({"eta": 1.5}, r"eta: found 1\.5; accepted: a finite number in \[0, 1\] for kind 'cps'"),
        ({"kind": "renoise", "eta": 0.5}, r"eta: found 0\.5; accepted: .* \[1, 1\] for kind 'renoise'"),
        ({"kind": "dance_grpo", "eta": -0.1}, r"eta: found -0\.1; accepted: .* \[0, inf\]"),
        ({"kind": "flow_grpo", "eta": math.inf}, r"eta: found inf"),
        ({"sigma": 1.1}, r"sigma: found 1\.1; accepted: a number in \[0, 1\]"),
        ({"sigma_next": -0.1}, r"sigma_next: found -0\.1; accepted: a number in \[0, 1\]"),
        ({"sigma_next": 0.8}, r"sigma_next: found 0\.8; accepted: a level below sigma \(0\.8\)"),
        ({"sigma": torch.ones(3)}, r"sigma: found shape \(3,\); accepted: a number, or a tensor 0-d or \[2\]"),
        ({"x": torch.zeros(2, 3, device="meta")}, r"x, v, noise: found devices meta, cpu, cpu; accepted: one device"),
        ({"noise": None}, r"seed: found None; accepted: an integer in \[0, 2\*\*63\) where noise is None"),
        ({"noise": None, "v": torch.zeros(2, 4), "seed": 0}, r"x, v: found shapes \(2, 3\), \(2, 4\)"),
        ({"noise": None, "seed": 2**63}, r"seed: found 9223372036854775808; accepted: an integer in"),
        ({"noise": None, "seed": -1}, r"seed: found -1; accepted: an integer in"),
        ({"noise": None, "seed": 1.0}, r"seed: found 1\.0; accepted: an integer in"),
        ({"noise": None, "seed": np.ones(2)}, r"seed: found \[1\. 1\.\]; accepted: an integer in"),
        ({"noise": None, "seed": torch.tensor(1)}, r"seed: found 1; accepted: an integer in"),
        ({"noise": None, "seed": np.int64(-1)}, r"seed: found -1; accepted: an integer in"),
        ({"offset": None}, r"offset: found None; accepted: an integer in"),
        ({"seed": 3}, r"seed: found 3; accepted: None where noise is given"),
        ({"offset": -4}, r"offset: found -4; accepted: an integer in \[0, 2\*\*63 - 7\]"),
        ({"noise": None, "seed": 0, "offset": 2**63 - 6}, r"offset: found .*; accepted: an integer in"),
    ],
)
def test_bad_input_names_the_argument(change: dict[str, object], message: str):
    zeros = torch.zeros(2, 3)
    good: dict[str, object] = {"x": zeros, "v": zeros, "noise": zeros, "sigma": 0.8, "sigma_next": 0.5}
    with pytest.raises(ValueError, match=message):
        flow_sde_step(**(good | change))
