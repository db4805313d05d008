"""metrics.jsonl survives kills and resumes; trackers cannot hurt a run."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tempact.errors import UserError
from tempact.reporting import read_environment, read_metrics
from tempact.runs.logs import MetricsLogger


def test_rows_are_there_at_once_and_nan_is_null(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path)
    logger.log(1, {"reward": 0.5, "kl": float("nan"), "ratio": float("inf")})
    line = (tmp_path / "metrics.jsonl").read_text()  # before closing
    row = json.loads(line, parse_constant=pytest.fail)
    assert row["step"] == 1 and row["reward"] == 0.5 and row["kl"] is None and row["ratio"] is None
    assert 0 <= row["time_s"] < 60
    logger.close()


def test_a_resumed_run_cuts_what_it_does_again(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path)
    for step in range(1, 6):
        logger.log(step, {"reward": step / 10})
    logger.close()
    path = tmp_path / "metrics.jsonl"
    rows = path.read_text().splitlines()
    rows[2] = json.dumps(json.loads(rows[2]) | {"time_s": 100.0})
    path.write_text("\n".join(rows) + '\n{"step": 6, "rew')  # killed while writing
    logger = MetricsLogger(tmp_path, resumed_step=3)
    logger.log(4, {"reward": 0.9})
    logger.close()
    assert [(row["step"], row["reward"]) for row in read_metrics(tmp_path)] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.9)]
    assert 100.0 <= read_metrics(tmp_path)[-1]["time_s"] < 160.0
    assert [session.from_step for session in read_environment(tmp_path)] == [0, 3]


def test_a_new_run_starts_empty(tmp_path: Path) -> None:
    for _ in range(2):
        logger = MetricsLogger(tmp_path)
        logger.log(1, {"reward": 1.0})
        logger.close()
    assert len(read_metrics(tmp_path)) == 1 and len(read_environment(tmp_path)) == 1


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path)
    logger._file.close()
    logger._file = Path("/dev/full").open("w")  # noqa: SIM115 - the logger's to close
    with pytest.raises(UserError, match="no space left"):
        logger.log(1, {"reward": 1.0})


def fake_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(body)
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'modules'}:{root}")
    run = tmp_path / "run"
    run.mkdir()
    return run


def test_a_tracker_is_given_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """
from pathlib import Path
class Run:
    def log(self, row, step): self.file.write(f"{step} {row['reward']} {sorted(row)}\\n")
    def finish(self): self.file.close()
def init(project, name, dir):
    run = Run()
    run.file = open(Path(dir) / f"sent-{project}-{name}", "w")
    return run
"""
    run = fake_wandb(tmp_path, monkeypatch, body)
    logger = MetricsLogger(run, wandb_project="films")
    for step in range(1, 4):
        logger.log(step, {"reward": step / 2, "kl": float("nan")})
    logger.close(tracker_deadline_s=30)
    sent = (run / "sent-films-run").read_text().splitlines()
    assert sent == [f"{step} {step / 2} ['reward', 'step', 'time_s']" for step in range(1, 4)]
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3]


@pytest.mark.parametrize("body", ["import time\ndef init(**k): time.sleep(60)", "raise RuntimeError('no network')"])
def test_a_hanging_or_failing_tracker_does_not_hold_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    run = fake_wandb(tmp_path, monkeypatch, body)
    logger = MetricsLogger(run, wandb_project="films")
    started = time.monotonic()
    for step in range(1, 2001):  # more than a pipe would hold
        logger.log(step, {f"reward/{i}": 0.5 for i in range(10)})
    logger.close(tracker_deadline_s=1.0)
    assert time.monotonic() - started < 6.0 and len(read_metrics(run)) == 2000
