from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interpreter import rounds_to_nearest  # noqa: F401 - used by every test here
from kernel_checks import assert_as_good, compiled_kernels
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from csrc_triton import _channels, runtime
from csrc_triton._channels import Tiling
from csrc_triton.adaln import (
    adaln,
    fused,
    gated_residual,
    gated_residual_adaln,
    gated_residual_norm,
)

IN_TIME = [] if torch.cuda.is_available() else [pytest.mark.slow]  # the interpreter takes half precision alike
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=IN_TIME)]
EPS = 1e-6
SIZES = [96, 384, 1000, 1536]  # a part of a chunk; chunks with a last one that is not full; Wan-1.3B's

OPS: dict[str, Callable[..., Any]] = {
    "adaln": lambda t: adaln(t["x"], t["shift"], t["scale"], eps=EPS),
    "gated_residual": lambda t: gated_residual(t["x"], t["y"], t["gate"]),
    "gated_residual_adaln": lambda t: gated_residual_adaln(t["x"], t["y"], t["gate"], t["shift"], t["scale"], eps=EPS),
    "residual_adaln": lambda t: gated_residual_adaln(t["x"], t["y"], None, t["shift"], t["scale"], eps=EPS),
    "residual_norm": lambda t: gated_residual_norm(t["x"], t["y"], None, t["weight"], t["bias"], eps=EPS),
    "gated_residual_norm": lambda t: gated_residual_norm(t["x"], t["y"], t["gate"], t["weight"], t["bias"], eps=EPS),
}
USED = {
    "adaln": ("x", "shift", "scale"),
    "gated_residual": ("x", "y", "gate"),
    "gated_residual_adaln": ("x", "y", "gate", "shift", "scale"),
    "residual_adaln": ("x", "y", "shift", "scale"),
    "residual_norm": ("x", "y", "weight", "bias"),
    "gated_residual_norm": ("x", "y", "gate", "weight", "bias"),
}


def draw(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def inputs(
    device: torch.device, batch: int, frames: int, tokens: int, dim: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Rows of x with a mean that is not 0; a frame's vectors are slices of what is drawn for all six."""
    x, y = (draw(device, batch, frames * tokens, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    vectors = draw(device, batch, frames, 6, dim, dtype=dtype, seed=3)
    weight, bias = (draw(device, dim, dtype=dtype, seed=seed) for seed in (4, 5))
    return {
        "x": 2 * x + 1, "y": y, "shift": vectors[:, :, 0], "scale": vectors[:, :, 1], "gate": vectors[:, :, 2],
        "weight": weight, "bias": bias,
    }  # fmt: skip


def run(backend: str, op: str, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    with runtime.backend(backend):
        found = OPS[op](tensors)
    return found if isinstance(found, tuple) else (found,)


def differentiated(
    backend: str, op: str, tensors: dict[str, Tensor], wanted: tuple[str, ...], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The outputs, and the gradients of `wanted` for gradients of the outputs that are drawn in `dtype`."""
    leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in tensors.items()}
    outs = run(backend, op, leaves)
    grads = [draw(out.device, *out.shape, dtype=dtype, seed=7 + i).to(out.dtype) for i, out in enumerate(outs)]
    found = torch.autograd.grad(outs, [leaves[name] for name in wanted], grads)
    return {f"out{i}": out.detach() for i, out in enumerate(outs)} | {
        f"d{name}": gradient for name, gradient in zip(wanted, found, strict=True)
    }


def assert_all_as_good(device: torch.device, op: str, dtype: torch.dtype, *sizes: int):
    tensors = inputs(device, *sizes, dtype=dtype)
    got, same = (differentiated(backend, op, tensors, USED[op], dtype) for backend in ("triton", "torch"))
    exact = differentiated("torch", op, {name: t.double() for name, t in tensors.items()}, USED[op], dtype)
    assert got.keys() == exact.keys()
    for name, theirs in exact.items():
        assert_as_good(name, got[name], same[name], theirs, atol=1e-6 * theirs.abs().max().item())
        gap = (got[name].double() - theirs).norm() / theirs.norm()
        assert gap <= {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 6e-4}[dtype], (name, gap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_every_op_is_as_good_as_torch(device: torch.device, op: str, dtype: torch.dtype):
    assert_all_as_good(device, op, dtype, 2, 3, 3, 64)


@pytest.mark.parametrize("dim", SIZES)
def test_every_size_is_as_good_as_torch(device: torch.device, dim: int):
    assert_all_as_good(device, "gated_residual_adaln", torch.float32, 1, 2, 2, dim)
    assert_all_as_good(device, "gated_residual", torch.float16, 1, 1, 2, dim)


TILINGS = [Tiling(rows=4, lane=4), Tiling(rows=2, steps=4, chunk=32), Tiling(rows=8, steps=16, stages=3, chunk=512)]


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("tokens", [1, 35])
def test_any_length_and_any_tiling(device: torch.device, monkeypatch: pytest.MonkeyPatch, tiling: Tiling, tokens: int):
    monkeypatch.setattr(_channels, "ENOUGH_PROGRAMS", 1)
    for kernel in fused.TILINGS:
        monkeypatch.setitem(fused.TILINGS, kernel, tiling)
    for op in ("gated_residual_norm", "gated_residual"):
        assert_all_as_good(device, op, torch.bfloat16, 1, 2, tokens, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("sizes", [(1, 3, 1560, 1536), (8, 3, 1560, 1536), (24, 1, 63, 1536), (3, 2, 500, 5120)])
def test_chunks_of_wan(device: torch.device, op: str, dtype: torch.dtype, sizes: tuple[int, ...]):
    assert_all_as_good(device, op, dtype, *sizes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_once(device: torch.device, dtype: torch.dtype):
    tensors = inputs(device, 2, 3, 5, 128, dtype)
    for op in ("adaln", "gated_residual"):
        (got,) = run("triton", op, tensors)
        (exact,) = run("torch", op, {name: tensor.double() for name, tensor in tensors.items()})
        half_a_step = exact.abs() * torch.finfo(dtype).eps / 2
        assert ((got.double() - exact).abs() <= half_a_step + 1e-6).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_values(device: torch.device, backend: str):
    """Written out: each frame has its own vectors, and a constant row is its shift."""
    t = inputs(device, 2, 3, 4, 32)
    (out,) = run(backend, "adaln", t)
    (gated,) = run(backend, "gated_residual", t)
    for batch in range(2):
        for token in range(12):
            row, frame = t["x"][batch, token], token // 4
            normed = (row - row.mean()) / (row.var(unbiased=False) + EPS).sqrt()
            expected = normed * (1 + t["scale"][batch, frame]) + t["shift"][batch, frame]
            torch.testing.assert_close(out[batch, token], expected, rtol=1e-5, atol=1e-5)
            expected = row + t["y"][batch, token] * t["gate"][batch, frame]
            torch.testing.assert_close(gated[batch, token], expected, rtol=1e-6, atol=1e-6)
    (flat,) = run(backend, "adaln", t | {"x": torch.full_like(t["x"], 3.0)})
    torch.testing.assert_close(flat, t["shift"].repeat_interleave(4, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_is_the_usual_chain_of_torch_ops(dtype: torch.dtype):
    t = inputs(torch.device("cpu"), 2, 3, 4, 64, dtype)
    normed = F.layer_norm(t["x"], (64,), eps=EPS).unflatten(1, (3, 4))
    expected = (normed * (1 + t["scale"][:, :, None]) + t["shift"][:, :, None]).flatten(1, 2)
    assert torch.equal(run("torch", "adaln", t)[0], expected)
    residual = t["x"] + (t["y"].unflatten(1, (3, 4)) * t["gate"][:, :, None]).flatten(1, 2)
    assert torch.equal(run("torch", "gated_residual", t)[0], residual)
    added, normed = run("torch", "residual_norm", t)
    assert torch.equal(added, t["x"] + t["y"])
    assert torch.equal(normed, F.layer_norm(added, (64,), t["weight"], t["bias"], EPS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_pair_is_its_two_parts(device: torch.device, dtype: torch.dtype):
    t = inputs(device, 2, 3, 4, 96, dtype)
    residual, normed = run("triton", "gated_residual_adaln", t)
    assert torch.equal(residual, run("triton", "gated_residual", t)[0])
    assert torch.equal(normed, run("triton", "adaln", t | {"x": residual})[0])


def test_layouts_are_followed(device: torch.device):
    t = inputs(device, 2, 3, 4, 96)
    joint = draw(device, 2, 12, 3 * 96, seed=8)
    shared = t["gate"][:1].expand(2, 3, 96)  # one for the whole batch
    strided = t | {"x": joint[..., 96:192], "y": joint[..., :96], "gate": shared}
    copies = {name: tensor.contiguous() for name, tensor in strided.items()}
    wanted = USED["gated_residual_adaln"]
    for op in ("gated_residual_adaln", "gated_residual"):
        found = []
        for tensors in (strided, copies):
            leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in tensors.items()}
            outs = run("triton", op, leaves)
            # a gradient of one number, and one with its dimensions turned
            total = outs[0].sum() + (outs[-1].mT.contiguous() * torch.arange(12, device=device)).sum()
            found.append([*outs, *torch.autograd.grad(total, [leaves[name] for name in wanted if name in USED[op]])])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_any_part_of_the_gradients_is_what_it_is_of_the_whole(device: torch.device, op: str):
    t = inputs(device, 2, 1, 3, 64)
    whole = differentiated("triton", op, t, USED[op], torch.float32)
    parts = [(name,) for name in USED[op]] + [USED[op][1:]]
    for wanted in parts:
        for name, found in differentiated("triton", op, t, wanted, torch.float32).items():
            torch.testing.assert_close(found, whole[name], rtol=1e-5, atol=1e-5)


def test_one_output_alone_may_be_used(device: torch.device):
    t = inputs(device, 2, 2, 3, 64)
    for index in (0, 1):
        found = []
        for backend in ("torch", "triton"):
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in t.items()}
            out = run(backend, "gated_residual_adaln", leaves)[index]
            used = ("x", "y", "gate") if index == 0 else USED["gated_residual_adaln"]
            found.append(torch.autograd.grad(out.sin().sum(), [leaves[name] for name in used]))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_nothing_large_is_kept_that_the_backward_does_not_need(device: torch.device):
    t = inputs(device, 1, 1, 8, 64)
    x, y = t["x"].requires_grad_(), t["y"].requires_grad_()
    saved: list[Tensor] = []
    for gate, count in ((t["gate"], 1), (t["gate"].detach().requires_grad_(), 2)):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
            run("triton", "gated_residual_adaln", t | {"x": x, "y": y, "gate": gate})
            assert sum(tensor.shape == x.shape for tensor in saved) == count
            saved.clear()
            run("triton", "gated_residual", t | {"x": x, "y": y, "gate": gate})
            assert sum(tensor.shape == x.shape for tensor in saved) == count - 1


@pytest.mark.parametrize("op", OPS)
def test_vectors_may_be_finer_than_the_tokens(device: torch.device, op: str):
    t = inputs(device, 2, 2, 3, 64)
    t = {name: tensor.half() if name in "xy" else tensor for name, tensor in t.items()}
    for backend in ("torch", "triton"):
        found = differentiated(backend, op, t, USED[op], torch.float16)
        assert all(found[f"d{name}"].dtype == t[name].dtype for name in USED[op])
        assert all(out.dtype == torch.float16 for name, out in found.items() if name.startswith("out"))


@pytest.mark.parametrize("op", ["gated_residual_adaln", "gated_residual"])
def test_equal_calls_give_equal_bits(device: torch.device, op: str):
    t = inputs(device, 2, 2, 7, 64, torch.bfloat16)
    first, second = (differentiated("triton", op, t, USED[op], torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def block(t: dict[str, Tensor]) -> Tensor:
    normed = adaln(t["x"], t["shift"], t["scale"], eps=EPS)
    x, normed = gated_residual_norm(t["x"], normed.sin(), t["gate"], t["weight"], t["bias"], eps=EPS)
    x, normed = gated_residual_adaln(x, normed.cos(), None, t["shift"], t["scale"], eps=EPS)
    return gated_residual(x, normed, t["gate"])


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_works_under_compile_and_checkpoint(device: torch.device, compiler: str):
    t = {name: tensor.detach().requires_grad_() for name, tensor in inputs(device, 1, 2, 2, 64).items()}
    leaves = [t[name] for name in ("x", "shift", "scale", "gate", "weight", "bias")]
    with runtime.backend("triton"):
        plain = block(t)
        expected = torch.autograd.grad(plain.sin().sum(), leaves)
        compiled = torch.compile(block, backend=compiler, fullgraph=True)(t)
        saved = checkpoint(block, t, use_reentrant=False)
        for other in (compiled, saved):
            torch.testing.assert_close(other, plain, rtol=0, atol=1e-5)
            found = torch.autograd.grad(other.sin().sum(), leaves)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("adaln", {"x": torch.zeros(6, 8)}, r"^x: found \(6, 8\).*accepted: floating point \[B, F \* T, dim\]"),
        ("adaln", {"x": torch.zeros(2, 6, 8).long()}, r"^x: found .*int64.*accepted: floating point"),
        ("adaln", {"x": torch.zeros(2, 8, 6).mT}, r"^x: found strides .*accepted: a contiguous last dimension"),
        ("adaln", {"x": torch.zeros(2, 7, 8)}, r"^shift: found 2 frames; accepted: .*divides the 7 tokens"),
        ("adaln", {"shift": torch.zeros(2, 8)}, r"^shift: found \(2, 8\).*accepted: floating point \[2, F, 8\]"),
        ("adaln", {"scale": torch.zeros(2, 3, 8)}, r"^scale: found 3 frames; accepted: one number of frames"),
        ("adaln", {"scale": torch.zeros(2, 2, 8, device="meta")}, r"^scale: found .* on meta; accepted: .* on cpu"),
        ("adaln", {"scale": torch.zeros(2, 8, 2).mT}, r"^scale: found strides"),
        ("gated_residual", {"y": torch.zeros(2, 6, 4)}, r"^y: found \(2, 6, 4\).*accepted: \(2, 6, 8\)"),
        ("gated_residual", {"y": torch.zeros(2, 6, 8).half()}, r"^y: found .*float16.*accepted: .*float32.*as x"),
        ("gated_residual", {"gate": torch.zeros(3, 2, 8)}, r"^gate: found \(3, 2, 8\).*accepted: .*\[2, F, 8\]"),
        ("gated_residual_adaln", {"gate": torch.zeros(2, 1, 8)}, r"^gate: found 1 frames; accepted: one number"),
        ("gated_residual_adaln", {"y": torch.zeros(2, 8, 6).mT}, r"^y: found strides"),
        ("residual_norm", {"weight": torch.zeros(4)}, r"^weight: found \(4,\).*accepted: floating point \(8,\)"),
        ("residual_norm", {"bias": torch.zeros(2, 2, 8)}, r"^bias: found \(2, 2, 8\)"),
    ],
)
def test_bad_input_is_named(backend: str, op: str, change: dict[str, Tensor], message: str):
    good = inputs(torch.device("cpu"), 2, 2, 3, 8)
    with pytest.raises(ValueError, match=message):
        run(backend, op, good | change)


def test_eps_is_checked_and_a_forced_kernel_says_why_it_cannot_serve():
    t = inputs(torch.device("cpu"), 2, 2, 3, 8)
    with pytest.raises(ValueError, match=r"^eps: found -1; accepted"):
        adaln(t["x"], t["shift"], t["scale"], eps=-1)
    for change, reason in (
        ({"x": t["x"].double()}, r"torch\.float64"),
        ({"scale": t["scale"].double()}, r"a vector is torch\.float64"),
        ({"x": t["x"][:, :0]}, "x has no elements"),
    ):
        with pytest.raises(ValueError, match=f"adaln: .*cannot serve: {reason}"):
            run("triton", "adaln", t | change)
        assert run("auto", "adaln", t | change)[0].dtype == (t | change)["x"].dtype


def test_every_kernel_compiles_ahead_of_time_without_spills():
    rows = compiled_kernels("ahead_adaln")
    assert {row["target"] for row in rows} == {80, 90}
    assert not [row for row in rows if row["stack"]], rows
