"""The fused denoising step against naive.py; and the generator of its noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import assert_as_good, compiled_kernels
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from csrc_triton import flow_sde_step, runtime
from csrc_triton.flow_sde import FlowStep, naive

LEVELS = [(1.0, 0.9375), (0.9375, 2.5 / 3), (2.5 / 3, 0.625)]
KINDS = [("renoise", 1.0), ("cps", 1.0), ("cps", 0.6), ("flow_grpo", 0.7), ("dance_grpo", 0.3)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CHUNK = (3, 16, 60, 104)


def draw(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]


def run(backend: str, *args: Any, **kwargs: Any) -> FlowStep:
    with runtime.backend(backend):
        return flow_sde_step(*args, **kwargs)


def differentiated(backend: str, x: Tensor, v: Tensor, noise: Tensor | None, *levels: Any, **kwargs: Any):
    """A step, and the gradients of x and v of a weighted sum of the log-probabilities and of the mean."""
    x, v = x.detach().requires_grad_(), v.detach().requires_grad_()
    step = run(backend, x, v, noise, *levels, **kwargs)
    weights = torch.linspace(1, 2, len(x), device=x.device, dtype=step.log_prob.dtype)
    pattern = torch.linspace(-1, 1, x.numel(), device=x.device, dtype=step.log_prob.dtype).view_as(x)
    assert step.mean is not None
    total = (weights * step.log_prob).sum() + 1e-3 * (pattern * step.mean).sum()
    return step, torch.autograd.grad(total, (x, v))


def assert_step_as_good(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, *levels: Any, **kwargs: Any):
    x, v, noise = draw(device, *shape, dtype=dtype)
    got, got_grads = differentiated("triton", x, v, noise, *levels, **kwargs)
    same, same_grads = differentiated("torch", x, v, noise, *levels, **kwargs)
    exact, exact_grads = differentiated("torch", x.double(), v.double(), noise.double(), *levels, **kwargs)
    for name in ("sample", "mean", "std", "log_prob", "k"):
        assert_as_good(name, *(getattr(step, name) for step in (got, same, exact)))
    truncates = dtype == torch.bfloat16 and device.type == "cpu"  # Triton's interpreter, where a GPU rounds
    for name, *grads in zip(("dx", "dv"), got_grads, same_grads, exact_grads, strict=True):
        exact_grad = grads[-1]
        assert_as_good(name, *grads, atol=1e-6 + (2**-8 * exact_grad.abs().max().item() if truncates else 0.0))
        # where gradients are about 1 / D, 1e-6 says little
        within = 1e-6 if dtype == torch.float32 else 4e-3
        assert (grads[0].double() - exact_grad).norm() <= within * exact_grad.norm()


@pytest.mark.parametrize(("kind", "eta"), KINDS)
@pytest.mark.parametrize("by_sample", [False, True])
def test_every_kind_is_as_good_as_torch(device: torch.device, kind: str, eta: float, by_sample: bool):
    s, n = (torch.tensor(column, device=device) for column in zip(*LEVELS, strict=True))
    levels = [(s, n)] if by_sample else LEVELS[:2]
    for pair in levels:
        assert_step_as_good(device, (3, 3, 5, 7), torch.float32, *pair, kind=kind, eta=eta)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 63), (2, 500), (3, 1560, 3)])
def test_every_dtype_and_size_is_as_good_as_torch(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]):
    assert_step_as_good(device, shape, dtype, *LEVELS[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 8, 24, 72])
def test_chunks_of_wan_are_as_good_as_torch(device: torch.device, dtype: torch.dtype, batch: int):
    levels = [torch.linspace(*ends, batch, device=device) for ends in ((1.0, 0.5), (0.9, 0.0))]
    assert_step_as_good(device, (batch, *CHUNK), dtype, *levels, kind="cps", eta=0.7)
    assert_step_as_good(device, (batch, 1560 * 7 + 1), dtype, *LEVELS[2], kind="flow_grpo", eta=0.7)


def test_one_level_may_be_a_number_and_levels_may_have_any_dtype_and_stride(device: torch.device):
    x, v, noise = draw(device, 3, 40)
    n = torch.tensor([[0.5, 9.0], [0.25, 9.0], [0.125, 9.0]], device=device)[:, 0]
    for following in (n, n.double(), n.bfloat16(), torch.tensor(0.5), torch.tensor(0.25, device=device)):
        got, same = (run(backend, x, v, noise, 0.75, following, eta=0.6) for backend in ("triton", "torch"))
        for ours, theirs in zip(got, same, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_layouts_are_followed(device: torch.device):
    x, v, noise = draw(device, 4, 6, 10)
    plain = run("triton", x, v, noise, 0.9, 0.5)
    apart = torch.stack([noise, noise], dim=1)[:, 1]  # as a rollout slices its noise
    turned = v.transpose(1, 2).contiguous().transpose(1, 2)
    other = run("triton", x, turned, apart, 0.9, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    shared = run("triton", x[:1].expand(4, 6, 10), v, noise, 0.9, 0.5)
    assert torch.equal(shared.sample, run("triton", x[:1].repeat(4, 1, 1), v, noise, 0.9, 0.5).sample)


def test_the_mean_is_left_out_on_request(device: torch.device):
    x, v, noise = draw(device, 2, 100)
    for backend in ("torch", "triton"):
        with_mean, without = (run(backend, x, v, noise, 0.9, 0.5, return_mean=mean) for mean in (True, False))
        assert without.mean is None and with_mean.mean is not None
        assert torch.equal(with_mean.sample, without.sample) and torch.equal(with_mean.log_prob, without.log_prob)


def test_a_deterministic_row_has_no_density_and_spoils_no_gradient(device: torch.device):
    x, v, noise = draw(device, 2, 4)
    s, n = torch.tensor([0.8, 0.625], device=device), torch.tensor([0.5, 0.0], device=device)
    step = run("triton", x, v.requires_grad_(), noise, s, n)
    assert torch.isfinite(step.log_prob[0]) and torch.isnan(step.log_prob[1]) and step.k[1] == math.inf
    step.log_prob[0].backward()
    assert v.grad[0].abs().min() > 0 and torch.equal(v.grad[1], torch.zeros_like(v.grad[1]))
    euler = run("triton", x, v, noise, 0.8, 0.5, eta=0.0)
    assert euler.log_prob.isnan().all() and (euler.k == math.inf).all() and (euler.std == 0).all()
    torch.testing.assert_close(euler.sample, x - 0.3 * v.detach(), rtol=0, atol=1e-6)


def test_only_log_prob_and_mean_have_gradients_and_only_those_that_are_asked_for(device: torch.device):
    x, v, noise = draw(device, 2, 100)
    step = run("triton", x, v.requires_grad_(), noise, 0.9, 0.5)
    assert not any(t.requires_grad for t in (step.sample, step.std, step.k, step.noise))
    (grad,) = torch.autograd.grad(step.log_prob.sum(), v, retain_graph=True)
    torch.testing.assert_close(grad, -step.k[:, None] * noise / 100, rtol=1e-6, atol=1e-9)
    (grad,) = torch.autograd.grad(step.mean.sum(), v)
    torch.testing.assert_close(grad, torch.full_like(v, -0.45), rtol=1e-6, atol=0)
    with torch.no_grad():
        assert not run("triton", x, v, noise, 0.9, 0.5).log_prob.requires_grad


def test_philox_has_its_published_words():
    def words(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
        return [int(word) for word in naive.philox(tuple(torch.tensor(c) for c in counter), key)]

    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert words((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words((ones,) * 4, (ones, ones)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert words(*pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_noise_is_standard_normal():
    noise = naive.normal_noise(2**62 + 5, 7, 2, 400_001, torch.device("cpu")).double()
    count = noise.numel()
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # spread: variance of z^power
        assert abs(noise.pow(power).mean().item() - moment) < 4 * math.sqrt(spread / count)
    for lag in range(1, 5):
        assert abs((noise[:, lag:] * noise[:, :-lag]).mean().item()) < 4 / math.sqrt(count)
    assert abs((noise[0] * noise[1]).mean().item()) < 4 / math.sqrt(count / 2)
    assert 4.3 < noise.abs().max().item() < 5.7


@pytest.mark.parametrize("offset", [0, 4, 3, 2**34 + 8, 2**40 + 1, 2**62])
@pytest.mark.parametrize("elements", [2100, 63])
def test_both_paths_draw_the_same(device: torch.device, offset: int, elements: int):
    x, v, _ = draw(device, 3, elements)
    for seed in (0, 1, 2**31, 2**63 - 1):
        got, same = (run(backend, x, v, None, 0.9, 0.5, seed=seed, offset=offset) for backend in ("triton", "torch"))
        for ours, theirs in zip(got, same, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1.5e-6)
        assert got.noise.dtype == same.noise.dtype == torch.float32
        again = run("triton", x, v, got.noise, 0.9, 0.5)
        torch.testing.assert_close(again.sample, got.sample, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("elements", [44, 63])
def test_a_draw_depends_on_the_position_in_the_stream_alone(device: torch.device, backend: str, elements: int):
    x, v, _ = draw(device, 4, elements)
    whole = run(backend, x, v, None, 0.9, 0.5, seed=11, offset=8).noise
    for i in range(4):
        part = run(backend, x[i : i + 1], v[i : i + 1], None, 0.9, 0.5, seed=11, offset=8 + i * elements).noise
        torch.testing.assert_close(part[0], whole[i], rtol=0, atol=0)
    halves = run(backend, x.half(), v.half(), None, 0.9, 0.5, seed=11, offset=8).noise
    assert torch.equal(halves, whole)
    other = run(backend, x, v, None, 0.9, 0.5, seed=12, offset=8).noise
    assert (other - whole).abs().min() > 0


def test_drawn_noise_gives_a_log_prob_of_the_noise_alone(device: torch.device):
    x, v, _ = draw(device, 2, 3000)
    first, second = (run("triton", x, velocity, None, 0.9, 0.5, seed=3) for velocity in (v, 50 * v))
    assert torch.equal(first.log_prob, second.log_prob)
    expected = -0.5 * first.noise.double().square().mean(1) - math.log(0.5) - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(first.log_prob.double(), expected, rtol=0, atol=2e-7)


def test_gradient_through_drawn_noise(device: torch.device):
    x, v, _ = draw(device, 2, 300)
    step = run("triton", x, v.requires_grad_(), None, 0.9, 0.5, seed=3)
    (grad,) = torch.autograd.grad(step.log_prob.sum(), v)
    torch.testing.assert_close(grad, -step.k[:, None] * step.noise / 300, rtol=1e-6, atol=1e-9)


def test_equal_calls_give_equal_bits(device: torch.device):
    x, v, noise = draw(device, 2, 5000)
    (first, *grads), (second, *again) = (
        (step, *grads) for step, grads in (differentiated("triton", x, v, noise, 0.9, 0.5) for _ in range(2))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


def log_prob_of(step: Callable[..., FlowStep], x: Tensor, v: Tensor, noise: Tensor | None, seed: int | None) -> Tensor:
    found = step(x, v, noise, 0.9, 0.5, kind="cps", eta=0.6, seed=seed)
    return found.log_prob + found.sample.mean(1)


@pytest.mark.parametrize("drawn", [False, True])
def test_works_under_compile_and_checkpoint(device: torch.device, drawn: bool):
    x, v, noise = draw(device, 2, 600)
    given, seed = (None, 7) if drawn else (noise, None)
    v.requires_grad_()
    with runtime.backend("triton"):
        plain = log_prob_of(flow_sde_step, x, v, given, seed)
        (expected,) = torch.autograd.grad(plain.sum(), v)
        compiled = torch.compile(log_prob_of, backend="aot_eager")(flow_sde_step, x, v, given, seed)
        saved = checkpoint(log_prob_of, flow_sde_step, x, v, given, seed, use_reentrant=False)
        for other in (compiled, saved):
            assert torch.equal(other, plain)
            assert torch.equal(torch.autograd.grad(other.sum(), v)[0], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, dtype=torch.float64)}, r"flow_sde_step: .*cannot serve: torch\.float64"),
        ({"v": torch.zeros(2, 3, dtype=torch.float64)}, r"flow_sde_step: .*cannot serve: v is torch\.float64"),
        ({name: torch.zeros(0, 3) for name in ("x", "v", "noise")}, r"cannot serve: x has no elements"),
    ],
)
def test_a_forced_kernel_says_why_it_cannot_serve(change: dict[str, Tensor], message: str):
    good = {name: torch.zeros(2, 3) for name in ("x", "v", "noise")}
    with pytest.raises(ValueError, match=message):
        run("triton", *(good | change).values(), 0.9, 0.5)


def test_every_kernel_compiles_ahead_of_time_without_spills():
    rows = compiled_kernels("ahead_flow_sde")
    assert {row["target"] for row in rows} == {80, 90}
    assert not [row for row in rows if row["stack"]], rows
