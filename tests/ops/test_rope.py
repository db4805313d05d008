"""RoPE tables against their definition, and against the complex tables of Wan's code."""

from __future__ import annotations

import cmath
from typing import Any

import pytest
import torch
from torch import Tensor

import csrc_triton
from csrc_triton.qk_norm_rope import rope_tables, rope_tables_from_complex, rotate

WAN_PAIRS = {128: (22, 21, 21), 64: (12, 10, 10), 24: (4, 4, 4), 32: (6, 5, 5), 4: (2, 0, 0)}


def angle(head_dim: int, pair: int, position: tuple[int, int, int], theta: float = 1e4) -> float:
    """Of one channel pair of the token at (time, row, column)."""
    for pairs, at in zip(WAN_PAIRS[head_dim], position, strict=True):
        if pair < pairs:
            return at * theta ** (-pair / pairs)
        pair -= pairs
    raise IndexError(pair)


def params(count: int, dims: int, theta: float = 1e4) -> Tensor:
    """exp(i * angle) of positions [0, count), as Wan's code holds them: complex128 [count, dims / 2]."""
    angles = torch.outer(torch.arange(count), 1 / torch.pow(theta, torch.arange(0, dims, 2).double().div(dims)))
    return torch.polar(torch.ones_like(angles), angles)


def wan_freqs(head_dim: int, count: int = 1024) -> Tensor:
    return torch.cat([params(count, 2 * pairs) for pairs in WAN_PAIRS[head_dim]], dim=1)


@pytest.mark.parametrize("head_dim", WAN_PAIRS)
@pytest.mark.parametrize("theta", [1e4, 256.0])
def test_every_axis_has_its_pairs_and_rates(head_dim: int, theta: float) -> None:
    height, width, positions = 2, 3, [5, 1000]
    cos, sin = rope_tables(head_dim, torch.tensor(positions), height, width, theta=theta)
    assert cos.shape == sin.shape == (12, head_dim // 2) and cos.dtype == sin.dtype == torch.float32
    tokens = [(time, row, column) for time in positions for row in range(height) for column in range(width)]
    for token, at in enumerate(tokens):
        exact = torch.tensor(
            [cmath.exp(1j * angle(head_dim, pair, at, theta)) for pair in range(head_dim // 2)],
            dtype=torch.complex128,
        )
        # half a step of fp32, and what fp64 leaves of an angle of 1000
        assert (cos[token].double() - exact.real).abs().max() <= 2**-25 + 1e-12
        assert (sin[token].double() - exact.imag).abs().max() <= 2**-25 + 1e-12


def test_positions_may_lie_between_integers() -> None:
    cos, sin = rope_tables(4, torch.tensor([0.5], dtype=torch.float64), 1, 1)
    expected = torch.tensor([[0.5, 0.5 * 1e4**-0.5]], dtype=torch.float64)
    assert torch.equal(cos, expected.cos().float()) and torch.equal(sin, expected.sin().float())


def test_scores_depend_on_relative_positions() -> None:
    q, k = torch.randn(2, 1, 1, 1, 24)

    def turned(x: Tensor, position: int) -> Tensor:
        return rotate(x, *rope_tables(24, torch.tensor([position]), 1, 1))

    torch.testing.assert_close((turned(q, 3) * turned(k, 1)).sum(), (turned(q, 9) * turned(k, 7)).sum())


@pytest.mark.parametrize("head_dim", [128, 64])
def test_complex_tables_give_the_same_bits(head_dim: int) -> None:
    for positions in (torch.arange(3), torch.tensor([1023, 7]), torch.arange(240, 243, dtype=torch.int32)):
        real = rope_tables(head_dim, positions, 4, 6)
        read = csrc_triton.rope_tables_from_complex(wan_freqs(head_dim), positions, 4, 6)
        assert all(torch.equal(a, b) and b.is_contiguous() for a, b in zip(real, read, strict=True))


def test_complex_tables_rotate_as_a_product_of_complex_numbers() -> None:
    """x as complex numbers times the table in fp64, which is how Wan's code rotates; start, not 0."""
    freqs, start, frames, height, width = wan_freqs(64), 17, 2, 3, 4
    x = torch.randn(1, frames * height * width, 2, 64, dtype=torch.float64)
    time, rows, columns = freqs.split(WAN_PAIRS[64], dim=1)
    shape = frames, height, width, -1
    table = torch.cat(
        [
            time[start : start + frames].view(frames, 1, 1, -1).expand(shape),
            rows[:height].view(1, height, 1, -1).expand(shape),
            columns[:width].view(1, 1, width, -1).expand(shape),
        ],
        dim=-1,
    ).reshape(-1, 1, 32)
    product = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * table
    expected = torch.view_as_real(product).flatten(-2)
    tables = rope_tables_from_complex(freqs, torch.arange(start, start + frames), height, width)
    torch.testing.assert_close(rotate(x, *tables), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("of_complex", [False, True])
def test_tables_under_compile(of_complex: bool) -> None:
    freqs = wan_freqs(64)

    def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
        return rope_tables_from_complex(freqs, positions, 2, 3) if of_complex else rope_tables(64, positions, 2, 3)

    positions = torch.arange(9, 12)
    compiled = torch.compile(tables, backend="aot_eager", fullgraph=True)(positions)
    assert all(torch.equal(a, b) for a, b in zip(compiled, tables(positions), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 7}, r"^head_dim: found 7; accepted: an even number of at least 2$"),
        ({"head_dim": 0}, r"^head_dim: found 0; accepted"),
        ({"positions": torch.zeros(1, 2)}, r"^positions: found \(1, 2\) torch.float32 on cpu; accepted: \[F\]"),
        ({"positions": torch.tensor([True])}, r"^positions: found \(1,\) torch.bool on cpu"),
        ({"height": 0}, r"^height, width: found 0, 3; accepted: at least 1$"),
        ({"theta": 0.0}, r"^theta: found 0.0; accepted: a number above 0$"),
        ({"freqs": torch.zeros(9, 4)}, r"^freqs: found \(9, 4\) torch.float32 on cpu; accepted: complex"),
        ({"freqs": wan_freqs(64), "positions": torch.ones(2)}, r"^positions: .*accepted: integers \[F\] on cpu$"),
        ({"freqs": wan_freqs(64), "positions": torch.tensor([5, 1024])}, r"^positions: found 5 to 1024; .*\[0, 1024\)"),
        ({"freqs": wan_freqs(64), "positions": torch.tensor([-1])}, r"^positions: found -1 to -1;"),
        ({"freqs": wan_freqs(64, 6), "width": 7}, r"^height, width: found 2, 7; accepted: at most 6, the rows of"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    given = {"head_dim": 64, "positions": torch.arange(3), "height": 2, "width": 3} | change
    if "freqs" in given:
        del given["head_dim"]
    with pytest.raises(ValueError, match=message):
        (rope_tables_from_complex if "freqs" in given else rope_tables)(**given)
