from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tempact.errors import UserError
from tempact.rl import EMA


def parameters(*values: float, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    return {f"p{i}": nn.Parameter(torch.full((2,), value, dtype=dtype)) for i, value in enumerate(values)}


def put(target: dict[str, nn.Parameter], *values: float) -> None:
    with torch.no_grad():
        for parameter, value in zip(target.values(), values, strict=True):
            parameter.fill_(value)


def first(average: dict[str, Tensor]) -> list[float]:
    return [value[0].item() for value in average.values()]


def test_warm_up_then_decay():
    p, decay = parameters(1.0), 0.5
    ema = EMA(p, decay)
    expected = 1.0
    for n in range(20):
        put(p, float(n * n))
        ema.update(p)
        d = min((1 + n) / (10 + n), decay)
        expected += (1 - d) * (n * n - expected)
        assert first(ema.average) == pytest.approx([expected], rel=1e-5), n
    assert d == decay  # the loop has passed the warm-up


def test_first_update_takes_nine_tenths_of_the_way():
    p = parameters(0.0, 2.0)
    ema = EMA(p, 0.99)
    put(p, 1.0, 4.0)
    ema.update(p)
    assert first(ema.average) == pytest.approx([0.9, 3.8])


def test_average_swaps_in_and_the_same_bits_come_back():
    p = parameters(0.1, 0.3)
    ema = EMA(p, 0.99)
    put(p, 1.1, 1.3)
    own = {name: value.detach().clone() for name, value in p.items()}
    with pytest.raises(RuntimeError, match="inside"), ema.applied(p):
        assert first(p) == pytest.approx([0.1, 0.3])
        assert torch.is_grad_enabled()
        raise RuntimeError("inside")
    assert all(torch.equal(p[name], own[name]) and p[name].requires_grad for name in p)
    assert first(ema.average) == pytest.approx([0.1, 0.3])


def test_small_steps_survive_half_precision_parameters():
    p = parameters(1.0, dtype=torch.bfloat16)
    ema = EMA(p, 0.99)
    ema.updates = 10_000
    put(p, 1.0078125)
    for _ in range(10):
        ema.update(p)
    # each step is below half a bfloat16 unit at 1
    assert first(ema.average) == pytest.approx([1 + 0.0078125 * (1 - 0.99**10)], rel=1e-6)
    with ema.applied(p):
        assert p["p0"].dtype == torch.bfloat16


def test_saved_state_continues_bit_for_bit(tmp_path: Path):
    p = parameters(0.1, 0.3)
    ema = EMA(p, 0.9)
    for n in range(5):
        put(p, 0.37 * n, 1 / (n + 1))
        ema.update(p)
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    other = EMA(parameters(5.0, 6.0), 0.9)
    other.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    put(p, 9.0, 8.0)
    ema.update(p)
    other.update(p)
    assert all(torch.equal(ema.average[name], other.average[name]) for name in p)
    assert ema.updates == other.updates == 6


def test_state_of_other_parameters_is_refused_and_changes_nothing():
    ema = EMA(parameters(0.1, 0.3), 0.9)
    state = EMA(parameters(1.0, 2.0), 0.9).state_dict()
    for average, message in (
        ({"p0": state["average"]["p0"]}, "missing tensor p1"),
        (state["average"] | {"q": torch.zeros(2)}, "unexpected tensor q"),
        (state["average"] | {"p1": torch.zeros(1)}, r"p1 has shape \(1,\); accepted: \(2,\)"),
    ):
        with pytest.raises(UserError, match=message):
            ema.load_state_dict({"updates": 3, "average": average})
    assert first(ema.average) == pytest.approx([0.1, 0.3]) and ema.updates == 0
