from __future__ import annotations

import pytest
import torch

from csrc_triton import flow_sde_step
from tempact.executor.sampler import Schedule

TIMESTEPS = (1000, 750, 500, 250)


def test_warped_levels_are_those_of_the_distilled_samplers():
    schedule = Schedule.from_timesteps(TIMESTEPS, shift=5.0)
    assert schedule.sigmas == (1.0, 0.9375, 2.5 / 3, 0.625, 0.0)
    assert (schedule.calls, schedule.transitions) == (4, 3)


def test_other_shifts():
    sigmas = Schedule.from_timesteps(TIMESTEPS, shift=8.0).sigmas
    assert sigmas == pytest.approx((1.0, 0.96, 0.8888889, 0.7272727, 0.0), abs=1e-7)
    assert Schedule.from_timesteps(TIMESTEPS, shift=1.0).sigmas == (1.0, 0.75, 0.5, 0.25, 0.0)


def test_noise_gain_of_each_transition():
    schedule = Schedule.from_timesteps(TIMESTEPS, shift=5.0)
    x = torch.zeros(1, 2, dtype=torch.float64)
    levels = zip(schedule.sigmas, schedule.sigmas[1 : 1 + schedule.transitions], strict=False)
    gains = [flow_sde_step(x, x, x, s, n).k.item() for s, n in levels]
    assert gains == pytest.approx([1 / 15, 3 / 16, 1 / 2], rel=1e-14)
