"""The passes between a decoder's convolutions against the formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from interpreter import rounds_to_nearest  # noqa: F401 - used by every test here
from kernel_checks import assert_as_good, compiled_kernels
from torch import Tensor

from csrc_triton import runtime
from csrc_triton.feature_maps import enlarge, norm_silu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def inputs(device: torch.device, batch: int, positions: int, channels: int, dtype: torch.dtype) -> dict[str, Tensor]:
    maps = {name: draw(device, batch, positions, channels, dtype=dtype, seed=i) for i, name in enumerate("xu")}
    vectors = {name: draw(device, channels, dtype=dtype, seed=5 + i) for i, name in enumerate("bg")}
    return {"x": maps["x"], "update": maps["u"], "bias": vectors["b"], "gamma": 1 + vectors["g"]}


def normed(backend: str, given: dict[str, Tensor], names: tuple[str, ...], width: int = 0) -> dict[str, Tensor]:
    """out of `width` channels, and the total where there is something to add; NaN where nothing is written."""
    x = given["x"]
    out = x.new_empty(*x.shape[:2], max(width, x.shape[2]))
    rest = {name: given[name] for name in names if name in ("update", "bias")}
    total = torch.empty_like(x) if "total" in names else None
    with runtime.backend(backend):
        norm_silu(x, given["gamma"] if "gamma" in names else None, out=out, total=total, **rest)
    return {"out": out} if total is None else {"out": out, "total": total}


CASES = [
    ("gamma",), ("gamma", "bias"), ("gamma", "update", "bias", "total"), ("gamma", "update", "total"), ("bias",),
    ("update", "bias"),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", CASES)
def test_norms_are_as_good_as_torchs(device: torch.device, names: tuple[str, ...], dtype: torch.dtype) -> None:
    for batch, positions, channels, width in ((2, 35, 96, 128), (1, 7, 24, 24), (3, 130, 192, 192), (1, 1, 1000, 1000)):
        given = inputs(device, batch, positions, channels, dtype)
        got, same = (normed(backend, given, names, width) for backend in ("triton", "torch"))
        exact = normed("torch", {name: tensor.double() for name, tensor in given.items()}, names, width)
        for name, wanted in exact.items():
            assert_as_good(name, got[name], same[name], wanted)
        assert not got["out"][..., channels:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", [(), ("bias",), ("update", "bias")])
def test_maps_are_enlarged_bit_for_bit(device: torch.device, names: tuple[str, ...], dtype: torch.dtype) -> None:
    for shape, parts in (((2, 3, 5, 48), 2), ((1, 1, 7, 24), 1), ((3, 2, 2, 384), 1), ((1, 4, 3, 1024), 2)):
        x, update = (draw(device, *shape, dtype=dtype, seed=seed) for seed in (1, 2))
        given = {"update": update, "bias": draw(device, shape[-1], dtype=dtype, seed=3)}
        found = []
        for backend in ("triton", "torch"):
            with runtime.backend(backend):
                found.append(enlarge(x, parts=parts, **{name: given[name] for name in names}))
        assert found[0].shape == (shape[0] * parts, 2 * shape[1], 2 * shape[2], shape[3] // parts)
        assert torch.equal(*found)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_values(device: torch.device, backend: str) -> None:
    """Written out, for a position of its own length, one of zeros, and the order of enlarged parts."""
    x = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]], device=device)
    out, gamma = torch.empty(1, 2, 3, device=device), torch.tensor([1.0, -1.0], device=device)
    with runtime.backend(backend):
        norm_silu(x, gamma, out=out)
        large = enlarge(torch.arange(8.0, device=device).view(1, 1, 2, 4), parts=2)
    ahead = torch.tensor([0.6, -0.8], device=device) * 2**0.5
    torch.testing.assert_close(out[0, 0, :2], ahead * ahead.sigmoid(), rtol=1e-6, atol=1e-6)
    assert not out[0, 1].any() and not out[..., 2].any()
    rows = [[[0, 1], [0, 1], [4, 5], [4, 5]], [[2, 3], [2, 3], [6, 7], [6, 7]]]
    assert large.tolist() == [[row, row] for row in rows]


def test_a_slice_of_a_longer_buffer_is_filled_alone(device: torch.device) -> None:
    """As a convolution's input, whose first frames are remembered ones."""
    given = inputs(device, 3, 10, 96, torch.float32)
    buffer = torch.full((3, 14, 128), 7.0, device=device)
    with runtime.backend("triton"):
        norm_silu(given["x"], given["gamma"], out=buffer[:, 4:])
    assert (buffer[:, :4] == 7).all()
    assert torch.equal(buffer[:, 4:], normed("triton", given, ("gamma",), 128)["out"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_maps_of_wan(device: torch.device, dtype: torch.dtype) -> None:
    for positions, channels, width in ((12 * 480 * 832, 96, 128), (6 * 120 * 208, 384, 384)):
        given = inputs(device, 1, positions, channels, dtype)
        for names in (("gamma", "bias"), ("gamma", "update", "bias", "total")):
            got, same = (normed(backend, given, names, width) for backend in ("triton", "torch"))
            part = {name: tensor if tensor.ndim == 1 else tensor[:, -5000:] for name, tensor in given.items()}
            exact = normed("torch", {name: tensor.double() for name, tensor in part.items()}, names, width)
            for name, wanted in exact.items():
                assert_as_good(name, got[name][:, -5000:], same[name][:, -5000:], wanted)


def maps(**changes: object) -> Callable[[], None]:
    x = torch.zeros(2, 6, 8)
    given = {"x": x, "gamma": torch.ones(8), "out": torch.zeros_like(x)} | changes
    rest = {name: tensor for name, tensor in given.items() if name not in ("x", "gamma")}
    return lambda: norm_silu(given["x"], given["gamma"], **rest)


def large(x: Tensor, **rest: object) -> Callable[[], Tensor]:
    return lambda: enlarge(x, **rest)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (maps(x=torch.zeros(6, 8)), r"^x: found \(6, 8\).*accepted: floating point \[b, positions, C\]"),
        (maps(x=torch.zeros(2, 8, 6).mT), r"^x: found strides .*accepted: contiguous batch rows"),
        (maps(gamma=torch.ones(4)), r"^gamma: found \(4,\).*accepted: contiguous \(8,\)"),
        (maps(bias=torch.ones(8, device="meta")), r"^bias: found .* on meta; accepted"),
        (maps(out=torch.zeros(2, 6, 4)), r"^out: found \(2, 6, 4\).*accepted: \[b, positions, at least 8\]"),
        (maps(out=torch.zeros(2, 6, 8).half()), r"^out: found .*float16.*accepted: .*float32"),
        (maps(update=torch.zeros(2, 5, 8)), r"^update: found \(2, 5, 8\).*accepted: .*\(2, 6, 8\)"),
        (maps(total=torch.zeros(2, 6, 9)), r"^total: found \(2, 6, 9\)"),
        (large(torch.zeros(2, 6, 8)), r"^x: found \(2, 6, 8\).*accepted: contiguous floating point \[n, H, W"),
        (large(torch.zeros(1, 2, 3, 8), parts=3), r"^parts: found 3; accepted: a divisor of the 8 channels"),
        (large(torch.zeros(1, 2, 3, 8), update=torch.zeros(1, 2, 3, 4)), r"^update: found \(1, 2, 3, 4\).*as x"),
        (large(torch.zeros(1, 2, 3, 8), bias=torch.zeros(4)), r"^bias: found \(4,\).*accepted: contiguous \(8,\)"),
    ],
)
def test_bad_input_is_named(backend: str, call: Callable[[], None], message: str) -> None:
    with runtime.backend(backend), pytest.raises(ValueError, match=message):
        call()


def test_a_forced_kernel_says_why_it_cannot_serve() -> None:
    x = torch.zeros(1, 2, 8, dtype=torch.float64)
    with (
        runtime.backend("triton"),
        pytest.raises(ValueError, match=r"norm_silu: .*cannot serve: a vector is torch\.float64"),
    ):
        norm_silu(x, torch.ones(8, dtype=torch.float64), out=torch.zeros_like(x))
    with runtime.backend("triton"), pytest.raises(ValueError, match="cannot serve: x has no elements"):
        norm_silu(x.float()[:, :0], torch.ones(8), out=x.float()[:, :0])


def test_every_kernel_compiles_ahead_of_time_without_a_spill() -> None:
    rows = compiled_kernels("ahead_feature_maps")
    assert len(rows) == 12 and all(row["stack"] == 0 and row["registers"] <= 128 for row in rows)
