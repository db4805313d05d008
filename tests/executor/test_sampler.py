from __future__ import annotations

import pytest
import torch

from csrc_triton import flow_sde_step
from tempact.executor.sampler import Schedule

TIMESTEPS = (1000, 750, 500, 250)


def test_warped_levels_are_those_of_the_distilled_samplers():
    schedule = Schedule.from_timesteps(TIMESTEPS, shift=5.0)
    assert schedule.sigmas == (1.0, 0.9375, 2.5 / 3, 0.625, 0.0)
    assert schedule.timesteps == pytest.approx((1000.0, 937.5, 2500 / 3, 625.0), rel=1e-15)
    assert schedule.transitions == 3


def test_other_shifts():
    assert Schedule.from_timesteps(TIMESTEPS, shift=8.0).timesteps == pytest.approx(
        (1000.0, 960.0, 888.8889, 727.2727), abs=1e-4
    )
    assert Schedule.from_timesteps(TIMESTEPS, shift=1.0).sigmas == (1.0, 0.75, 0.5, 0.25, 0.0)


def test_noise_gain_of_each_transition():
    schedule = Schedule.from_timesteps(TIMESTEPS, shift=5.0)
    x = torch.zeros(1, 2, dtype=torch.float64)
    levels = zip(schedule.sigmas, schedule.sigmas[1 : 1 + schedule.transitions], strict=False)
    gains = [flow_sde_step(x, x, x, s, n).k.item() for s, n in levels]
    assert gains == pytest.approx([1 / 15, 3 / 16, 1 / 2], rel=1e-14)
