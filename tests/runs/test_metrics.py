"""metrics.jsonl survives kills and resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tempact.config import HISTOGRAM_BINS
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


def test_bins_of_a_histogram_are_one_list_that_a_resumed_run_keeps(tmp_path: Path) -> None:
    shares = [round(i / 210, 6) for i in range(HISTOGRAM_BINS)]
    bins = {f"executor/ratio_histogram/{i:02d}{at}": share for i, share in enumerate(shares) for at in ("", "@2")}
    logger = MetricsLogger(tmp_path)
    logger.log(1, bins | {"executor/kl": 0.5, "planner/advantage_histogram/00": float("nan")})
    logger.close()
    logger = MetricsLogger(tmp_path, resumed_step=1)
    logger.close()
    (row,) = read_metrics(tmp_path)
    assert row["executor/ratio_histogram"] == row["executor/ratio_histogram@2"] == shares and row["executor/kl"] == 0.5
    assert row["planner/advantage_histogram"] is None and len(row) == 6
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == row
