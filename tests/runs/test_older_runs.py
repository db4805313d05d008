"""A run that version 0.1 made (tests/runs/run-0.1) can be read, reported, evaluated and gone on with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import tempact
from tempact import evaluate, report, train
from tempact.config import ExecutorConfig
from tempact.errors import EXIT_USER_ERROR
from tempact.reporting import read_metrics
from tempact.runs import run as run_module
from tempact.runs.checkpoint import latest

OLD = Path(__file__).with_name("run-0.1")
ARGUMENTS = [
    "shapeworld-smoke", "--device", "cpu", "--planner.lora.rank", "1", "--executor.lora.rank", "1",
    "--planner.lora.targets", "q_proj", "--executor.lora.targets", "self_attn.q", "--evaluation.simple", "1",
    "--evaluation.hard", "1",
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("log_handlers")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    shutil.copytree(OLD, tmp_path / "run")
    return tmp_path / "run"


def test_it_goes_on(old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run_module, "evaluate", lambda *given, **more: None)
    assert train.main([*ARGUMENTS, "--output", str(old), "--trainer.iterations", "3"]) == 0
    assert [row["step"] for row in read_metrics(old)] == [1, 2, 3]
    told = capsys.readouterr().err
    assert "resumed from" in told and "trainer.iterations (2 -> 3)" in told
    assert latest(old).state["done"] == 3 and latest(old).course == ""
    assert not (old / "checkpoints" / "aside").exists()


def test_what_differs_is_still_refused(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = train.main([*ARGUMENTS, "--output", str(old), "--trainer.iterations", "3", "--executor.eta", "0.5"])
    assert code == EXIT_USER_ERROR and "executor.eta (1.0 -> 0.5);" in capsys.readouterr().err


@pytest.mark.slow
def test_its_policies_load_and_its_report_and_table_can_be_made_anew(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policies = tempact.load_policies(old, device="cpu")
    stored = torch.load(latest(old).path / "state" / "state.pt", weights_only=True)["ema"]["average"]
    assert all(torch.equal(value, stored[name]) for name, value in policies.executor.parameters().items())
    assert report.main([str(old)]) == 0 and (old / "report.html").is_file()
    assert evaluate.main([str(old), "--simple", "2", "--hard", "1"]) == 0


def test_keys_that_this_version_has_no_more_are_named_and_passed_over(
    old: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    config = old / "config.yaml"
    text = config.read_text().replace("trainer:\n", "trainer:\n  gone: 3\n") + "old_section:\n  key: 1\n"
    config.write_text(text)
    policies = tempact.load_policies(old, device="cpu")
    assert "passed over, as this version has no such keys: old_section, trainer.gone" in caplog.text
    assert policies.executor.config.prompt_separator == ExecutorConfig.prompt_separator
    (old.parent / "mine.yaml").write_text(text)  # a file of one's own, in which that is a mistake
    code = train.main(["--config", str(old.parent / "mine.yaml"), "--output", str(old / "new")])
    assert code == EXIT_USER_ERROR and "trainer.gone: unknown key" in capsys.readouterr().err
