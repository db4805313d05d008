"""A stopped run that is resumed ends with the bits of an unbroken one; two runs of one seed are equal
(docs/algorithm.md 6, item 29)."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from runs.same_run import assert_same_run, metrics, start

from tempact.errors import EXIT_STOPPED
from tempact.runs import run as run_module


def test_a_terminated_run_saves_and_goes_on_with_the_same_bits(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = run_module.shown

    def terminate_after_the_first(iteration: run_module.Iteration) -> dict[str, float]:
        if iteration.number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return shown(iteration)

    monkeypatch.setattr(run_module, "shown", terminate_after_the_first)
    assert start(tmp_path) == EXIT_STOPPED
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert not (tmp_path / "evaluation.json").exists()
    monkeypatch.setattr(run_module, "shown", shown)
    assert start(tmp_path) == 0
    assert_same_run(unbroken, tmp_path)


@pytest.mark.slow
def test_two_runs_of_one_seed_are_equal_and_another_seed_differs(unbroken: Path, tmp_path: Path) -> None:
    assert start(tmp_path / "again") == 0
    assert_same_run(unbroken, tmp_path / "again")
    assert start(tmp_path / "other", "--seed", "1", "--trainer.iterations", "1") == 0
    assert metrics(tmp_path / "other")[0] != metrics(unbroken)[0]


def test_a_changed_configuration_is_not_resumed(unbroken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(unbroken, "--executor.optim.lr", "0.5") == 2
    message = capsys.readouterr().err
    assert "executor.optim.lr" in message and message.count("error:") == 1
    assert len(metrics(unbroken)) == 3
