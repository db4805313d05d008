"""Rows rounded to float8_e4m3fn, and linears of them, against arithmetic written out in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from interpreter import rounds_to_nearest  # noqa: F401 - used by every test here
from kernel_checks import compiled_kernels
from torch import Tensor

from csrc_triton import Fp8Rows, fp8_linear, fp8_rows, runtime
from csrc_triton.fp8_linear import why_plain

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
E4M3 = torch.float8_e4m3fn
ROUNDING = 4e-2  # relative error of a linear of normal numbers: two roundings of 2.6e-2 each, by the root of squares


def draw(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def rounded(backend: str, x: Tensor, gelu: bool = False) -> Fp8Rows:
    with runtime.backend(backend):
        return fp8_rows(x, gelu=gelu)


def bits(rows: Fp8Rows) -> Tensor:
    return rows.values.view(torch.uint8)


def nearest(values: Tensor) -> Tensor:
    """Of fp64 values the nearest numbers with three bits behind the leading one, multiples of 2^-9 at least."""
    step = torch.exp2(values.abs().clamp_min(2.0**-6).log2().floor() - 3)
    return (values / step).round() * step


def relative(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_values(device: torch.device, backend: str) -> None:
    """Written out: 448 / 3.5 = 128; 2 x 128 is a number of the format, 1.3 x 128 = 166.4 is not, nor is -0.01 x 128."""
    rows = rounded(backend, torch.tensor([[3.5, 2.0, 1.3, -0.01], [0.0, 0.0, 0.0, 0.0]], device=device))
    assert rows.values.dtype == E4M3 and rows.dtype == torch.float32
    assert rows.values.float().tolist() == [[448.0, 256.0, 160.0, -1.25], [0.0] * 4]
    assert rows.scales[0].item() == 3.5 / 448 and 0 < rows.scales[1].item() < 1e-14


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_are_rounded_to_nearest(device: torch.device, backend: str) -> None:
    x = draw(device, 40, 96) * torch.logspace(-9, 9, 40, device=device)[:, None]
    rows = rounded(backend, x)
    exact = x.double()
    largest = exact.abs().amax(1, keepdim=True)
    torch.testing.assert_close(rows.scales.double(), largest / 448, rtol=1e-7, atol=0)
    off = (rows.values.double() - nearest(exact * 448 / largest)).abs() > 1e-3
    assert off.double().mean() < 1e-3  # halfway between two numbers fp32 may take the other
    assert rows.values.float().abs().amax(1).tolist() == [448.0] * 40


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 5, 96), (70, 24), (3, 1000), (1, 1), (2, 4100)])
def test_the_kernel_has_torchs_bits(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of rows of ordinary numbers, of one that is huge beside the rest, of zeros, and of tiny ones."""
    x = draw(device, *shape, dtype=dtype)
    x.view(-1, shape[-1])[::3] *= 1e-4
    x.view(-1, shape[-1])[0, 0] = 3e4
    x.view(-1, shape[-1])[-1] = 0
    own, theirs = rounded("triton", x), rounded("torch", x)
    assert own.values.shape == shape and own.scales.shape == (*shape[:-1], 1) and own.dtype == dtype
    assert torch.equal(bits(own), bits(theirs)) and torch.equal(own.scales, theirs.scales)


def test_other_layouts_have_the_same_bits(device: torch.device) -> None:
    x = draw(device, 6, 80, 5).mT
    for backend in ("triton", "torch"):
        for own in (x, x[:, ::2], draw(device, 7, 160)[:, 3::2]):
            found, expected = rounded(backend, own), rounded(backend, own.contiguous())
            assert torch.equal(bits(found), bits(expected)) and torch.equal(found.scales, expected.scales)
            assert found.values.is_contiguous()


def test_a_row_does_not_depend_on_those_beside_it(device: torch.device) -> None:
    x = draw(device, 9, 48) * torch.arange(1, 10, device=device)[:, None]
    together, alone = rounded("triton", x), [rounded("triton", row) for row in x]
    assert torch.equal(bits(together), torch.stack([bits(row) for row in alone]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_comes_before_the_rounding(device: torch.device, dtype: torch.dtype) -> None:
    """Up to neighbouring numbers of the format, where fp32 sums differ; very large and very small inputs included."""
    x = 3 * draw(device, 20, 200, dtype=dtype)
    x[0, :4] = torch.tensor([3e4, -3e4, 40.0, -40.0])
    exact = F.gelu(x.double(), approximate="tanh")
    for backend in ("triton", "torch"):
        rows = rounded(backend, x, gelu=True)
        torch.testing.assert_close(rows.scales.double(), exact.abs().amax(1, keepdim=True) / 448, rtol=1e-5, atol=0)
        wanted = nearest(exact / rows.scales.double())
        off = rows.values.double() != wanted
        assert off.double().mean() < 2e-3
        torch.testing.assert_close(rows.values.double(), wanted, rtol=0.13, atol=2**-9)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("odd", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_not_hidden(device: torch.device, backend: str, odd: float) -> None:
    x = draw(device, 3, 40)
    x[1, 7] = odd
    with runtime.backend(backend):
        out = fp8_linear(x, fp8_rows(draw(device, 5, 40, seed=1)), None)
    assert out.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_linear_is_as_good_as_its_rounding(device: torch.device, backend: str, dtype: torch.dtype) -> None:
    shapes = (3, 50, 256), (96, 256), (96,)
    x, weight, bias = (draw(device, *shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes))
    with runtime.backend(backend):
        out = fp8_linear(x, fp8_rows(weight), bias)
        shared = fp8_linear(fp8_rows(x), fp8_rows(weight), bias)
        plain = fp8_linear(x, fp8_rows(weight), None)
    assert out.shape == (3, 50, 96) and out.dtype == dtype and torch.equal(out, shared)
    exact = F.linear(x.double(), weight.double())
    assert 0.03 < relative(plain, exact) < ROUNDING
    assert relative(out, exact + bias.double()) < ROUNDING


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_scales_are_those_of_their_own_rows(device: torch.device, backend: str) -> None:
    """Rows of x and of the weight that differ by nine orders of magnitude have an equal part in the relative error."""
    x, weight = draw(device, 8, 128), draw(device, 16, 128, seed=1)
    of_x, of_weight = (torch.logspace(-5, 4, n, device=device)[:, None] for n in (8, 16))
    with runtime.backend(backend):
        out = fp8_linear(x * of_x, fp8_rows(weight * of_weight), None)
    assert relative(out / (of_x * of_weight.T), F.linear(x.double(), weight.double())) < ROUNDING


def test_autocast_does_not_round_the_sums(device: torch.device) -> None:
    x, weight = draw(device, 6, 64), fp8_rows(draw(device, 5, 64, seed=1))
    expected = fp8_linear(x, weight, None)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(fp8_linear(x, weight, None), expected)


def test_no_rows_give_none(device: torch.device) -> None:
    out = fp8_linear(torch.empty(2, 0, 32, device=device), fp8_rows(draw(device, 7, 32)), None)
    assert out.shape == (2, 0, 7)


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "channels", "reason"),
    [
        ((9, 0), torch.bfloat16, 1536, 8960, None),
        ((10, 0), torch.bfloat16, 64, 16, None),
        ((8, 9), torch.bfloat16, 64, 64, "a GPU older than sm_90"),
        ((9, 0), torch.float16, 64, 64, "rows of torch.float16; accepted: bfloat16"),
        ((9, 0), torch.bfloat16, 24, 64, "a weight of 64 x 24; accepted: multiples of 16"),
        ((9, 0), torch.bfloat16, 64, 24, "a weight of 24 x 64; accepted: multiples of 16"),
    ],
)
def test_the_product_is_chosen_by_device_dtype_and_shape(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, width: int, channels: int,
    reason: str | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(runtime, "_capability", lambda device: capability)
    assert why_plain(torch.device("cuda", 0), dtype, width, channels) == reason
    assert why_plain(torch.device("cpu"), dtype, width, channels) == "tensors on cpu; accepted: NVIDIA GPUs from sm_90"


def test_gpus_without_the_format_round_on_the_torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_capability", lambda device: (8, 6))
    cuda = torch.device("cuda", 0)
    assert runtime.older_than(cuda, (8, 9)) and not runtime.older_than(cuda, (8, 6))
    assert not runtime.older_than(torch.device("cpu"), (8, 9))
    with runtime.shapes_only():
        assert not runtime.older_than(cuda, (8, 9))
    x = torch.randn(3, 32)
    monkeypatch.setattr(runtime, "older_than", lambda device, capability: capability == (8, 9))
    with runtime.backend("triton"), pytest.raises(ValueError, match="a GPU older than sm_89, which has no float8_e4m3"):
        fp8_rows(x)
    with runtime.backend("torch"):
        expected = fp8_rows(x)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(fp8_rows(x)[:2], expected[:2], strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="needs sm_90")
@pytest.mark.parametrize("rows", [1, 17, 4680])
def test_the_gpus_product_equals_torchs(device: torch.device, rows: int) -> None:
    """Within the rounding to bf16 and that of the sums of a fast accumulation; and its bits repeat."""
    x = draw(device, rows, 1536, dtype=torch.bfloat16)
    weight, bias = fp8_rows(draw(device, 8960, 1536, seed=1) / 40), draw(device, 8960, dtype=torch.bfloat16, seed=2)
    with runtime.backend("torch"):
        expected = fp8_linear(x, weight, bias)
    assert why_plain(device, x.dtype, 1536, 8960) is None
    found = fp8_linear(x, weight, bias)
    assert relative(found, expected.double()) < 5e-3
    assert all(torch.equal(fp8_linear(x, weight, bias), found) for _ in range(3))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1536, 8960])
def test_rows_of_wan_have_torchs_bits(device: torch.device, width: int) -> None:
    x = draw(device, 37_440, width, dtype=torch.bfloat16)
    own, theirs = rounded("auto", x), rounded("torch", x)
    assert torch.equal(bits(own), bits(theirs)) and torch.equal(own.scales, theirs.scales)


def call(**changes: object) -> Callable[[], Tensor]:
    given = {"x": torch.zeros(2, 8), "weight": fp8_rows(torch.ones(4, 8)), "bias": torch.zeros(4)} | changes
    return lambda: fp8_linear(given["x"], given["weight"], given["bias"])


ROWS = fp8_rows(torch.ones(4, 8))


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: fp8_rows(torch.ones(4, 8).long()), r"^x: found \(4, 8\) torch.int64.*accepted: floating point"),
        (lambda: fp8_rows(torch.tensor(1.0)), r"^x: found \(\) .*accepted: floating point \[\.\.\., K\]"),
        (lambda: fp8_rows(torch.ones(4, 0)), r"^x: found \(4, 0\).*accepted: rows of at least one element"),
        (call(x=torch.zeros(2, 7)), r"^x: found \(2, 7\).*accepted: \[\.\.\., 8\] on cpu"),
        (call(x=torch.zeros(2, 8, device="meta")), r"^x: found .* on meta; accepted: \[\.\.\., 8\] on cpu"),
        (call(x=ROWS._replace(scales=ROWS.scales[:3])), r"^x: found scales \(3, 1\).*accepted: \(4, 1\) torch.float32"),
        (call(weight=torch.ones(4, 8)), r"^weight: found Tensor; accepted: rows of `fp8_rows`"),
        (call(weight=fp8_rows(torch.ones(8))), r"^weight: found \(8,\).*accepted: rows \[N, K\]"),
        (call(weight=ROWS._replace(values=torch.ones(4, 8))), r"^weight: found values .*float32.*accepted: .*float8"),
        (call(weight=ROWS._replace(scales=ROWS.scales.double())), r"^weight: found scales .*float64.*accepted: \(4, "),
        (call(bias=torch.zeros(8)), r"^bias: found \(8,\).*accepted: \(4,\) on cpu"),
        (call(bias=torch.zeros(4, requires_grad=True)), r"^bias: found a tensor that requires grad; accepted by fp8_l"),
    ],
)  # fmt: skip
def test_bad_input_is_named(refused: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refused()


def test_a_forced_kernel_says_why_it_cannot_serve() -> None:
    with runtime.backend("triton"):
        with pytest.raises(ValueError, match=r"^fp8_rows: .*cannot serve: rows of 16385; accepted: up to 16384"):
            fp8_rows(torch.ones(1, 16_385))
        with pytest.raises(ValueError, match=r"^fp8_rows: .*cannot serve: torch.float64 tensors"):
            fp8_rows(torch.ones(1, 4).double())
    assert fp8_rows(torch.ones(1, 16_385)).values.float().unique().tolist() == [448.0]


def test_every_kernel_compiles_ahead_of_time_without_a_spill() -> None:
    rows = compiled_kernels("ahead_fp8_linear", (89, 90))
    assert len(rows) == 14 and all(row["stack"] == 0 and row["registers"] <= 128 for row in rows)
