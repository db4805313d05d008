"""Which of two adapters a server samples with, told from log-probs that all round."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tempact.planner.canary import EARLIER, Told

COUNT = 16 * 21  # tokens of a canary, and the likeliest at each
ROUNDING = 0.01  # nats, as in bf16


def drawn(apart: float, *, stale: bool, alike: float, seed: int) -> Told:
    """A server with the trained adapter, or a stale one with that before, whose log-probs are `apart` nats from it.

    alike: share of the rounding that all tokens have in common.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def rounded(values: Tensor) -> Tensor:
        return values + ROUNDING * (alike**0.5 * normal(1) + (1 - alike) ** 0.5 * normal(COUNT))

    before = normal(COUNT)
    after = before + apart * normal(COUNT)
    return Told(rounded(before if stale else after), rounded(after), {EARLIER: rounded(before)})


@pytest.mark.parametrize("alike", [0.0, 0.5])
@pytest.mark.parametrize("stale", [False, True])
def test_rounding_alone_tells_no_adapters_apart(stale: bool, alike: float) -> None:
    for seed in range(200):
        for apart in (0.0, ROUNDING / 3):
            assert not drawn(apart, stale=stale, alike=alike, seed=seed).telling(EARLIER)[0]


@pytest.mark.parametrize("alike", [0.0, 0.5])
@pytest.mark.parametrize("stale", [False, True])
def test_a_step_beyond_rounding_tells_whose_log_probs_they_are(stale: bool, alike: float) -> None:
    for seed in range(200):
        assert drawn(12 * ROUNDING, stale=stale, alike=alike, seed=seed).telling(EARLIER) == (True, stale)


def test_exact_log_probs_tell_the_smallest_step() -> None:
    values = torch.randn(COUNT, dtype=torch.float64)
    assert Told(values, values, {EARLIER: values}).telling(EARLIER) == (False, False)
    assert Told(values, values, {EARLIER: values + 1e-6}).telling(EARLIER) == (True, False)
    assert Told(values + 1e-6, values, {EARLIER: values + 1e-6}).telling(EARLIER) == (True, True)
