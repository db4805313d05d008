"""A stopped run that is resumed ends with the bits of an unbroken one; two runs of one seed are equal
(docs/algorithm.md 6, item 29)."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tempact.cli import EXIT_STOPPED
from tempact.runs import run as run_module
from tempact.train import main

ARGUMENTS = ["shapeworld-smoke", "--trainer.iterations", "3", "--trainer.checkpoint-every", "3"]
SHORT_EVALUATION = ["--evaluation.simple", "1", "--evaluation.hard", "1"]


def train(folder: Path, *more: str) -> int:
    return main([*ARGUMENTS, *SHORT_EVALUATION, "--output", str(folder), *more])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    assert train(folder) == 0
    return folder


def metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if "time" not in key and "timing" not in key} for row in rows]


def equal(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return a == b


def assert_same_run(one: Path, two: Path) -> None:
    last = Path("checkpoints") / "step-000003"
    for policy in ("planner", "executor"):
        file = last / policy / "adapter_model.safetensors"
        assert equal(load_file(one / file), load_file(two / file)), policy
    states = [torch.load(folder / last / "state" / "state.pt", weights_only=True) for folder in (one, two)]
    assert equal(*states)
    assert metrics(one) == metrics(two)
    assert json.loads((one / "evaluation.json").read_text()) == json.loads((two / "evaluation.json").read_text())


def test_a_terminated_run_saves_and_goes_on_with_the_same_bits(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = run_module.shown

    def terminate_after_the_first(iteration: run_module.Iteration) -> dict[str, float]:
        if iteration.number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return shown(iteration)

    monkeypatch.setattr(run_module, "shown", terminate_after_the_first)
    assert train(tmp_path) == EXIT_STOPPED
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert not (tmp_path / "evaluation.json").exists()
    monkeypatch.setattr(run_module, "shown", shown)
    assert train(tmp_path) == 0
    assert_same_run(unbroken, tmp_path)


def test_two_runs_of_one_seed_are_equal_and_another_seed_differs(unbroken: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "again") == 0
    assert_same_run(unbroken, tmp_path / "again")
    assert train(tmp_path / "other", "--seed", "1", "--trainer.iterations", "1") == 0
    assert metrics(tmp_path / "other")[0] != metrics(unbroken)[0]


def test_a_changed_configuration_is_not_resumed(unbroken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(unbroken, "--executor.optim.lr", "0.5") == 2
    message = capsys.readouterr().err
    assert "executor.optim.lr" in message and message.count("error:") == 1
    assert len(metrics(unbroken)) == 3
