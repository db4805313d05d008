"""The fused policy loss against naive.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import assert_as_good, compiled_kernels
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from csrc_triton import flow_policy_loss, runtime
from csrc_triton.flow_policy_loss import FlowPolicyTerms, flow_policy_loss_and_grad

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CHUNK = (3, 16, 60, 104)
CLIP = 0.02
TERMS = ("loss", "kl", "ratio", "log_ratio")


def make_inputs(
    device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, apart: float = 0.1
) -> tuple[Tensor, ...]:
    """v, v_old, v_ref, noise and advantage; on the log-ratio the rows lie on both sides of a clip of CLIP."""
    generator = torch.Generator().manual_seed(0)
    v, away, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
    wide = (-1, *(1,) * (len(shape) - 1))
    targets = torch.tensor([-2.0, 2.0, -0.5, 0.5, 0.0, 3.0], device=device).repeat(shape[0])[: shape[0]] * CLIP
    along = noise / noise.square().flatten(1).mean(1).view(wide)
    v_old = v + targets.view(wide) * along
    advantage = torch.tensor([1.5, 1.2, 0.0, -0.7, -1.0], device=device).repeat(shape[0])[: shape[0]]
    return *(t.to(dtype) for t in (v, v_old, v + apart * away, noise)), advantage


def doubled(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.double() for t in tensors)


def differentiated(backend: str, tensors: tuple[Tensor, ...], on_policy: bool = False, clip: float = CLIP):
    """Terms, and the gradient in v of a weighted sum of all of them."""
    v = tensors[0].detach().requires_grad_()
    with runtime.backend(backend):
        terms = flow_policy_loss(v, v.detach() if on_policy else tensors[1], *tensors[2:], clip=clip)
    rows = torch.linspace(1, 2, len(v), device=v.device, dtype=terms.loss.dtype)
    total = (rows * (terms.loss + 0.3 * terms.kl + 0.2 * terms.ratio - 0.1 * terms.log_ratio)).sum()
    return terms, torch.autograd.grad(total, v)[0]


def grad_atol(dtype: torch.dtype, device: torch.device, exact: Tensor) -> float:
    """Triton's interpreter truncates to bfloat16 where a GPU rounds."""
    truncates = dtype == torch.bfloat16 and device.type == "cpu"
    return 1e-6 + (2**-8 * exact.abs().max().item() if truncates else 0.0)


def assert_close_in_norm(grad: Tensor, exact: Tensor) -> None:
    """Where gradients are about 1 / D, an absolute bound says little."""
    within = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-2}[grad.dtype]  # fp16: subnormals
    assert (grad.double() - exact).norm() <= within * exact.norm()


def assert_loss_as_good(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, on_policy: bool = False):
    tensors = make_inputs(device, *shape, dtype=dtype)
    got, got_grad = differentiated("triton", tensors, on_policy)
    same, same_grad = differentiated("torch", tensors, on_policy)
    exact, exact_grad = differentiated("torch", doubled(tensors), on_policy)
    for name in TERMS:
        assert_as_good(name, *(getattr(terms, name) for terms in (got, same, exact)))
    assert torch.equal(got.clipped, exact.clipped)
    assert_as_good("dv", got_grad, same_grad, exact_grad, atol=grad_atol(dtype, device, exact_grad))
    if exact_grad.abs().max() > 1e-4 or dtype != torch.float16:
        assert_close_in_norm(got_grad, exact_grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 63), (6, 500), (12, 3, 1560)])
@pytest.mark.parametrize("on_policy", [False, True])
def test_every_dtype_and_size_is_as_good_as_torch(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], on_policy: bool
):
    assert_loss_as_good(device, shape, dtype, on_policy)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 8, 24, 72])
def test_chunks_of_wan_are_as_good_as_torch(device: torch.device, dtype: torch.dtype, batch: int):
    for on_policy in (False, True):
        assert_loss_as_good(device, (batch, *CHUNK), dtype, on_policy)
        assert_loss_as_good(device, (batch, 1560 * 7 + 1), dtype, on_policy)


def test_rows_are_clipped_on_both_sides_and_on_neither(device: torch.device):
    tensors = make_inputs(device, 30, 200)
    terms, _ = differentiated("triton", tensors)
    high, low = terms.clipped & (tensors[4] > 0), terms.clipped & (tensors[4] < 0)
    assert high.any() and low.any() and (~terms.clipped & (tensors[4] != 0)).any()
    outside = terms.log_ratio.abs() > CLIP
    assert (outside & ~terms.clipped).any()  # the pessimistic side stays


@pytest.mark.parametrize("dtype", DTYPES)
def test_ratio_is_exactly_one_where_the_policy_has_not_moved(device: torch.device, dtype: torch.dtype):
    v, _, _, noise, advantage = make_inputs(device, 6, 3000, dtype=dtype)
    for old in (v, v.clone(), v.detach()):
        with runtime.backend("triton"):
            terms = flow_policy_loss(v, old, v, noise, advantage, clip=1e-5)
        assert torch.equal(terms.log_ratio, torch.zeros_like(terms.log_ratio))
        assert torch.equal(terms.ratio, torch.ones_like(terms.ratio))
        assert torch.equal(terms.kl, torch.zeros_like(terms.kl)) and not terms.clipped.any()
        assert torch.equal(terms.loss, -advantage)


def test_fp32_is_as_good_as_exact_for_the_clip(device: torch.device):
    generator = torch.Generator().manual_seed(3)
    v, noise, delta = (torch.randn(4, *CHUNK, generator=generator).to(device) for _ in range(3))
    tensors = v, v - 0.01 * delta, None, noise, torch.ones(4, device=device)
    with runtime.backend("triton"):
        z = flow_policy_loss(*tensors, clip=1e-5).log_ratio
    exact = -(noise.double() * (v.double() - tensors[1].double())).flatten(1).mean(1)
    assert (z.double() - exact).abs().max().item() < 1e-9


def test_small_clips_are_decided_finer_than_an_fp32_ratio_could(device: torch.device):
    noise, v_old = torch.ones(2, 4, device=device), torch.zeros(2, 4, device=device)
    v = torch.tensor([[-0.99e-6], [-1.01e-6]], device=device).expand(2, 4)
    with runtime.backend("triton"):
        terms = flow_policy_loss(v, v_old, v_old, noise, torch.ones(2, device=device), clip=1e-6)
    assert terms.clipped.tolist() == [False, True]


def test_what_is_not_finite_shows(device: torch.device):
    for position, on_policy in ((0, True), (0, False), (1, False), (3, True), (3, False)):
        tensors = list(make_inputs(device, 2, 100))
        tensors[position][1, 7] = float("nan")
        terms, _ = differentiated("triton", tuple(tensors), on_policy)
        for value in (terms.loss, terms.ratio, terms.log_ratio):
            assert torch.isfinite(value[0]) and torch.isnan(value[1])
        assert not terms.clipped[1]


def test_without_a_reference_the_kl_is_nothing(device: torch.device):
    v, v_old, v_ref, noise, advantage = make_inputs(device, 5, 100)
    for backend in ("torch", "triton"):
        leaf = v.detach().requires_grad_()
        with runtime.backend(backend):
            with_ref = flow_policy_loss(leaf, v_old, v_ref, noise, advantage, clip=CLIP)
            without = flow_policy_loss(leaf, v_old, None, noise, advantage, clip=CLIP)
        assert torch.equal(without.kl, torch.zeros_like(without.kl)) and torch.equal(without.loss, with_ref.loss)
        grads = (torch.autograd.grad((t.loss + t.kl).sum(), leaf)[0] for t in (without, with_ref))
        policy, both = grads
        torch.testing.assert_close(both - policy, 2 * (v - v_ref) / 100, rtol=1e-4, atol=1e-7)


def test_each_term_has_its_own_gradient(device: torch.device):
    tensors = make_inputs(device, 5, 100)
    leaf = tensors[0].detach().requires_grad_()
    results = []
    for backend in ("triton", "torch"):
        with runtime.backend(backend):
            terms = flow_policy_loss(leaf, *tensors[1:], clip=CLIP)
        results.append([torch.autograd.grad(getattr(terms, n).sum(), leaf, retain_graph=True)[0] for n in TERMS])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_layouts_and_mixed_dtypes_are_followed(device: torch.device):
    v, v_old, v_ref, noise, advantage = make_inputs(device, 4, 6, 10)
    plain, plain_grad = differentiated("triton", (v, v_old, v_ref, noise, advantage))
    turned = v_old.transpose(1, 2).contiguous().transpose(1, 2)
    apart = torch.stack([noise, noise], dim=1)[:, 1]
    spread = torch.stack([advantage, advantage], dim=1)[:, 0].double()
    other, other_grad = differentiated("triton", (v, turned, v_ref, apart, spread))
    assert torch.equal(plain_grad, other_grad)
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    mixed = v, v_old.half(), v_ref.bfloat16(), noise.half(), advantage
    got, got_grad = differentiated("triton", mixed)
    exact, exact_grad = differentiated("torch", doubled(mixed))
    for name in TERMS:
        torch.testing.assert_close(getattr(got, name).double(), getattr(exact, name), rtol=1e-6, atol=1e-6)
    assert_close_in_norm(got_grad, exact_grad)


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [(1.0, 0.3), (0.5, 0.0), None])
def test_terms_and_gradient_at_once(
    device: torch.device, dtype: torch.dtype, on_policy: bool, weights: tuple[float, float] | None
):
    tensors = make_inputs(device, 7, 3001, dtype=dtype)
    loss_weight, kl_weight = weights or (torch.linspace(0, 1, 7, device=device), torch.linspace(2, 1, 7, device=device))

    def at_once(backend: str, given: tuple[Tensor, ...]) -> tuple[FlowPolicyTerms, Tensor]:
        v = given[0].detach().requires_grad_()
        with runtime.backend(backend):
            return flow_policy_loss_and_grad(
                v, v if on_policy else given[1], *given[2:], clip=CLIP, loss_weight=loss_weight, kl_weight=kl_weight
            )

    (got, got_grad), (same, same_grad), (exact, exact_grad) = (
        at_once(*call) for call in (("triton", tensors), ("torch", tensors), ("torch", doubled(tensors)))
    )
    for name in TERMS:
        assert_as_good(name, *(getattr(terms, name) for terms in (got, same, exact)))
        assert not getattr(got, name).requires_grad and not getattr(same, name).requires_grad
    assert torch.equal(got.clipped, exact.clipped)
    assert_as_good("dv", got_grad, same_grad, exact_grad, atol=grad_atol(dtype, device, exact_grad))
    assert_close_in_norm(got_grad, exact_grad)
    leaf = doubled(tensors)[0].requires_grad_()
    terms = flow_policy_loss(leaf, leaf if on_policy else tensors[1].double(), *doubled(tensors)[2:], clip=CLIP)
    (loss_weight * terms.loss + kl_weight * terms.kl).sum().backward()
    torch.testing.assert_close(exact_grad, leaf.grad, rtol=1e-12, atol=0)


def test_equal_calls_give_equal_bits(device: torch.device):
    tensors = make_inputs(device, 3, 9000)
    (first, grad), (second, again) = (differentiated("triton", tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and torch.equal(grad, again)


def total(v: Tensor, *rest: Any) -> Tensor:
    terms = flow_policy_loss(v, *rest, clip=CLIP)
    return terms.loss + 0.3 * terms.kl


def test_works_under_compile_and_checkpoint(device: torch.device):
    v, *rest = make_inputs(device, 5, 600)
    v.requires_grad_()
    with runtime.backend("triton"):
        plain = total(v, *rest)
        (expected,) = torch.autograd.grad(plain.sum(), v)
        compiled = torch.compile(total, backend="aot_eager")(v, *rest)
        saved = checkpoint(total, v, *rest, use_reentrant=False)
        for other in (compiled, saved):
            assert torch.equal(other, plain)
            assert torch.equal(torch.autograd.grad(other.sum(), v)[0], expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("v", torch.zeros(2, 3, dtype=torch.float64), r"flow_policy_loss: .*cannot serve: torch\.float64"),
        ("v_ref", torch.zeros(2, 3, dtype=torch.float64), r"cannot serve: v_ref is torch\.float64"),
        (None, torch.zeros(2, 0), r"cannot serve: v has no elements"),
    ],
)
def test_a_forced_kernel_says_why_it_cannot_serve(name: str | None, value: Tensor, message: str):
    names = ("v", "v_old", "v_ref", "noise")
    tensors = {each: value if name in (each, None) else torch.zeros(2, 3) for each in names}
    with runtime.backend("triton"), pytest.raises(ValueError, match=message):
        flow_policy_loss(**tensors, advantage=torch.zeros(2), clip=CLIP)


def test_weights_of_another_shape_are_refused():
    tensors = make_inputs(torch.device("cpu"), 2, 3)
    with pytest.raises(ValueError, match=r"kl_weight: found shape \(3,\); accepted: a number or \(2,\)"):
        flow_policy_loss_and_grad(*tensors, clip=CLIP, kl_weight=torch.zeros(3))


def test_every_kernel_compiles_ahead_of_time_without_spills():
    rows = compiled_kernels("ahead_flow_policy_loss")
    assert {row["target"] for row in rows} == {80, 90}
    assert not [row for row in rows if row["stack"]], rows
