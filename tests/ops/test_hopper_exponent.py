"""The powers of 2 of the Hopper kernels that a polynomial gives, by a model of their PTX. No GPU is needed."""

from __future__ import annotations

import re

import numpy as np
import pytest

from csrc_triton.fork_attention.hopper.exponent import assembly


def bits(number: np.float32) -> int:
    return int(np.float32(number).view(np.uint32))


def number(word: int) -> np.float32:
    return np.uint32(word & 0xFFFFFFFF).view(np.float32)


def run(text: str, x: np.ndarray) -> np.ndarray:
    """What the PTX makes of eight fp32 numbers; the exponent unit is numpy's, rounded to fp32."""
    names = {f"${i + 8}": np.float32(value) for i, value in enumerate(x)}

    def value(name: str) -> np.float32:
        return number(int(name[2:], 16)) if name.startswith("0f") else names[name]

    for line in filter(str.strip, re.sub(r"\.reg[^;]*;", "", text.strip("{} ")).split(";")):
        op, rest = line.strip().split(None, 1)
        target, *sources = (part.strip() for part in rest.split(","))
        match op:
            case "ex2.approx.ftz.f32":
                names[target] = np.float32(np.exp2(np.float64(value(sources[0]))))
            case "max.f32":
                names[target] = max(value(sources[0]), value(sources[1]))
            case "add.rn.f32":
                names[target] = np.float32(value(sources[0]) + value(sources[1]))
            case "sub.rn.f32":
                names[target] = np.float32(value(sources[0]) - value(sources[1]))
            case "fma.rn.f32":
                a, b, c = (np.float64(value(source)) for source in sources)
                names[target] = np.float32(a * b + c)
            case "mov.f32" | "mov.b32":
                names[target] = value(sources[0])
            case "shl.b32":
                names[target] = number(bits(value(sources[0])) << int(sources[1]))
            case "add.s32":
                names[target] = number(bits(value(sources[0])) + bits(value(sources[1])))
            case _:
                raise AssertionError(f"no model of {op}")
    return np.array([names[f"${i}"] for i in range(8)], np.float32)


def test_the_polynomial_is_as_good_as_bf16_weights_need() -> None:
    text = assembly(8)
    x = np.concatenate([-np.linspace(0, 30, 801), [-125.3, -126.0, -80.5, -1e-8, -0.5, -1.5, -2.5]]).astype(np.float32)
    for chunk in x.reshape(-1, 8):
        exact = np.exp2(chunk.astype(np.float64))
        assert (np.abs(run(text, chunk) - exact) / exact).max() < 3.2e-6
    whole = -np.arange(8, dtype=np.float32) * 17
    assert (run(text, whole) == np.exp2(whole)).all()
    low = np.array([-np.inf, -1e30, -127, -200, -1000, -126.4, -np.inf, -3e4], np.float32)
    assert (run(text, low) <= 2.0**-125.9).all()


@pytest.mark.parametrize("share", range(1, 9))
def test_a_share_comes_by_the_polynomial(share: int) -> None:
    text = assembly(share)
    assert text.count("ex2.approx") == 8 - share and text.count("shl.b32") == share
    x = -np.arange(8, dtype=np.float32) / 3
    np.testing.assert_allclose(run(text, x), np.exp2(x), rtol=3.2e-6)
