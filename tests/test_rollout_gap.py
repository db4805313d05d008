"""Roll-out and training must compute the same log-probs: nothing is learned, and the run stops, where they do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tempact import train
from tempact.cli import EXIT_ABORTED
from tempact.executor.executor import Executor
from tempact.planner.planner import Planner
from tempact.policies import build_policies, build_trainer
from tempact.presets import get_preset
from tempact.reporting import read_metrics
from tempact.runs import run as run_module
from tempact.runs.checkpoint import verify
from tempact.trainer import RolloutGapTooWide, Trainer
from tempact.updates import too_wide

SIGMAS = ("1.000", "0.938", "0.833")
SMOKE = ["shapeworld-smoke", "--device", "cpu", "--trainer.iterations", "2", "--trainer.checkpoint_every", "50"]


pytestmark = pytest.mark.usefixtures("log_handlers")


@pytest.fixture
def another_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Videos are made by other weights than those that are trained."""
    rollout = Executor.rollout

    def moved(self: Executor, *given):
        made = rollout(self, *given)
        with torch.no_grad():
            self.model.head.head.bias.add_(0.3)
        return made

    monkeypatch.setattr(Executor, "rollout", moved)


def trainer() -> Trainer:
    """Of two updates an iteration: the second one has no gap of its own."""
    base = get_preset("shapeworld-smoke")
    config = replace(
        base, device="cpu", trainer=replace(base.trainer, updates_per_iteration=2),
        planner=replace(base.planner, max_sampling_gap=0.1),
    )  # fmt: skip
    return build_trainer(config, build_policies(config))


def gaps(metrics: dict[str, float]) -> list[float]:
    return [metrics[f"executor/rollout_gap/{sigma}"] for sigma in SIGMAS]


def test_the_gap_of_a_sound_run_is_rounding() -> None:
    own = trainer()
    (one, _) = own.iterations(lambda phase: None)
    assert max(gaps(one.metrics)) < 2e-3 and one.metrics["executor/ratio_deviation"] < 1e-3 and own.wide_gap == ""


def test_a_wide_gap_leaves_the_executor_as_it_was(another_policy: None) -> None:
    own = trainer()
    before = {name: p.detach().clone() for name, p in own.executor_policy.parameters.items()}
    iterations = own.iterations(lambda phase: None)
    assert min(gaps(next(iterations).metrics)) > 1.0
    assert all(torch.equal(before[name], p) for name, p in own.executor_policy.parameters.items())
    assert not own.executor_policy.gradient.flat.any() and own.ema.updates == 0
    with pytest.raises(RolloutGapTooWide, match="executor.max_rollout_gap: .* clips at sigma 1.000, .*at most 1$"):
        next(iterations)


def test_the_run_is_saved_and_ends_with_its_own_exit_code(
    tmp_path: Path, another_policy: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_module, "evaluate", lambda *given, **more: None)
    folder = tmp_path / "run"
    assert train.main([*SMOKE, "--output", str(folder)]) == EXIT_ABORTED == 3
    told = " ".join(capsys.readouterr().err.split())
    assert "executor.max_rollout_gap: log-probs of roll-out and training differ by" in told
    assert "saved after iteration 1" in told
    (row,) = read_metrics(folder)
    assert min(gaps(row)) > 1.0
    state = verify(folder / "checkpoints" / "step-000001").state
    assert state["done"] == 1 and state["ema"]["updates"] == 0
    # what was wrong is set right, or allowed: the run goes on
    assert train.main([*SMOKE, "--output", str(folder), "--executor.max_rollout_gap", "1e6"]) == 0
    assert [row["step"] for row in read_metrics(folder)] == [1, 2]


@pytest.fixture
def another_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are sampled from another adapter than the one that is trained."""
    sample = Planner.sample

    def moved(self: Planner, *given, **named):
        made = sample(self, *given, **named)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters().values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        return made

    monkeypatch.setattr(Planner, "sample", moved)


def test_plans_are_trained_with_the_log_probs_that_they_were_sampled_with() -> None:
    own = trainer()
    (one, _) = own.iterations(lambda phase: None)
    assert one.metrics["planner/sampling_gap"] < 1e-5 and abs(one.metrics["planner/sampling_k3"]) < 1e-6
    assert "planner/sampling_gap@2" not in one.metrics


def test_plans_of_another_planner_leave_both_policies_as_they_were(another_planner: None) -> None:
    own = trainer()
    executor = {name: p.detach().clone() for name, p in own.executor_policy.parameters.items()}
    iterations = own.iterations(lambda phase: None)
    one = next(iterations)
    assert one.metrics["planner/sampling_gap"] > 0.1 and one.metrics["planner/sampling_k3"] > 0.01
    assert "planner/grad_norm" not in one.metrics and own._before is None
    assert all(torch.equal(executor[name], p) for name, p in own.executor_policy.parameters.items())
    assert not own.planner_policy.gradient.flat.any()
    with pytest.raises(
        RolloutGapTooWide, match="planner.max_sampling_gap: .* sampling .* nats a token; .*at most 0.1$"
    ):
        next(iterations)


def test_a_missing_number_is_no_gap() -> None:
    config = get_preset("shapeworld-smoke")
    gaps = {"rollout_gap/1.000": float("nan"), "rollout_gap/0.938": 1.0, "kl": 9.0}
    assert too_wide({"executor": gaps, "planner": {"sampling_gap": float("nan"), "sampling_k3": 9.0}}, config) == ""
    assert too_wide({"executor": {"rollout_gap/1.000": 2.0, "rollout_gap/0.938": 0.5}}, config).count("sigma") == 1
    both = too_wide({"executor": {"rollout_gap/1.000": 2.0}, "planner": {"sampling_gap": 0.3}}, config)
    assert both.count("accepted") == 2 and "differ by 0.3 nats a token; accepted: at most 0.2" in both
