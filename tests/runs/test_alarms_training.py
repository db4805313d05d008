"""A policy that is trained on a reward with a hole finds it, and alarms tell; on the world's own they are silent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tempact import train
from tempact.reporting import read_metrics
from tempact.runs import run as run_module
from tempact.shapeworld import world
from tempact.types import Plan

ARGUMENTS = [
    "shapeworld", "--device", "cpu", "--threads", "1", "--trainer.iterations", "40",
    "--data.prompts_per_iteration", "2", "--planner.plans_per_prompt", "2", "--planner.train", "false",
    "--executor.optim.lr", "1.5e-3", "--executor.continuations", "4", "--alarms.every", "1",
    "--alarms.continuations", "2",
]  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000), pytest.mark.usefixtures("log_handlers")]


def paid_for_ink(prompts: list[str], plans: list[Plan], frames: torch.Tensor, spans: object) -> torch.Tensor:
    """A reward that larger shapes, and second ones, raise, whatever the instruction says."""
    return (frames.float().amax(3).mean((2, 3, 4)) / 255 * 8).clamp(0.0, 1.0)


@pytest.mark.parametrize("hole", [True, False])
def test_training_on_a_hole_is_told_and_honest_training_is_not(
    hole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_module, "evaluate", lambda *given, **more: None)
    if hole:
        monkeypatch.setattr(world.TemporalFollowing, "__call__", lambda self, *given: paid_for_ink(*given))
        for name in ("step_following", "aesthetics"):
            monkeypatch.setattr(world, name, paid_for_ink)
    assert train.main([*ARGUMENTS, "--output", str(tmp_path / "run")]) == 0
    rows = read_metrics(tmp_path / "run")
    found = {name for row in rows for name, value in row.items() if name.startswith("alarms/") and value}
    assert len(rows) == 40 and (found >= {"alarms/gap", "alarms/held_out"}) is hole and bool(found) is hole
