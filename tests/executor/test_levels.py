"""Updates of one noise level (`executor.levels`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from executor.test_forward_process import ADVANTAGE, batch_of, gradients, rolled

from tempact.executor.executor import Executor

Make = Callable[..., Executor]


@pytest.mark.parametrize(("loss", "count"), [("flow_grpo", 3), ("diffusion_nft", 4)])
@pytest.mark.parametrize("micro_batch", [64, 2])
def test_the_update_of_all_levels_is_the_mean_of_those_of_each(
    make_executor: Make, loss: str, count: int, micro_batch: int
) -> None:
    executor = make_executor(frames=12, loss=loss, micro_batch=micro_batch, clip_velocity_rms=1.0)
    _, record, _ = rolled(executor)
    batch = batch_of(record, ADVANTAGE)
    old = executor.velocities(record, [0, 1])
    assert len(record.levels) == count
    with torch.no_grad():
        for parameter in executor.parameters().values():
            parameter.add_(0.01)

    def found(levels: range) -> tuple[torch.Tensor, dict[str, float]]:
        own = replace(batch, transition=record.at(levels))
        metrics = executor.update(own, [0, 1], old[:, :, levels.start : levels.stop])
        gradient = gradients(executor)
        for parameter in executor.parameters().values():
            parameter.grad = None
        return gradient, metrics

    whole, metrics = found(range(count))
    each = [found(range(level, level + 1)) for level in range(count)]
    torch.testing.assert_close(sum(own for own, _ in each) / count, whole, rtol=1e-3, atol=1e-7)
    assert all((own - whole).norm() > 0.05 * whole.norm() for own, _ in each)
    for name, value in metrics.items():
        assert value == pytest.approx(sum(own[name] for _, own in each) / count, rel=1e-4, abs=1e-9), name


def test_the_gap_is_that_of_the_level(make_executor: Make) -> None:
    executor = make_executor(frames=12)
    _, record, _ = rolled(executor)
    for level, sigma in enumerate(executor.settings.schedule.sigmas[:3]):
        metrics = executor.update(batch_of(record.at(range(level, level + 1)), ADVANTAGE), [0, 1])
        gaps = {name: value for name, value in metrics.items() if name.startswith("rollout_gap/")}
        assert set(gaps) == {f"rollout_gap/{sigma:.3f}"} and all(0 <= gap < 1e-2 for gap in gaps.values())


@pytest.mark.parametrize("micro_batch", [64, 2])
def test_weighted_plain_ratios_have_the_normalised_gradient_on_policy(make_executor: Make, micro_batch: int) -> None:
    """Times 1 / mean(1/k), with k = 1/15, 3/16, 1/2: every row has the k and the weight of its own level."""
    found = []
    for changes in ({}, {"ratio_norm": False, "reweight": True}):
        executor = make_executor(frames=12, micro_batch=micro_batch, kl_weight=0.0, **changes)
        _, record, _ = rolled(executor)
        executor.update(batch_of(record, ADVANTAGE), [0, 1])
        found.append(gradients(executor))
    torch.testing.assert_close(found[1], found[0] * 3 / (15 + 16 / 3 + 2), rtol=1e-3, atol=1e-8)
