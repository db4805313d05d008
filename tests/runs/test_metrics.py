"""metrics.jsonl survives kills and resumes; trackers cannot hurt a run."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tempact.errors import UserError
from tempact.reporting import read_environment, read_metrics
from tempact.runs.logs import MetricsLogger, track_videos, tracker_id


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


STAND_IN = """
import json
from pathlib import Path
class Run:
    def log(self, row, step=None): self.file.write(json.dumps([step, row], default=vars) + "\\n")
    def finish(self): self.file.close()
class Video:
    def __init__(self, path, caption, format): self.name, self.caption, self.format = Path(path).name, caption, format
def init(project, name, dir, id, resume, config):
    run = Run()
    run.file = open(Path(dir) / "sent", "a")
    run.file.write(json.dumps([project, name, id, resume, config]) + "\\n")
    return run
"""


def sent(run: Path) -> list:
    return [json.loads(line) for line in (run / "sent").read_text().splitlines()]


def test_a_tracker_is_given_the_configuration_every_row_and_the_videos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run is the same run, and a new one in its folder is another."""
    run = fake_wandb(tmp_path, monkeypatch, STAND_IN)
    (run / "config.yaml").write_text("seed: 3\nplanner: {weights: shapeworld}\n")
    for resumed, last in ((0, 3), (2, 4)):
        logger = MetricsLogger(run, resumed, wandb_project="films")
        for step in range(resumed + 1, last + 1):
            logger.log(step, {"reward": step / 2, "kl": float("nan")})
        logger.close(tracker_deadline_s=60)
    (run / "videos").mkdir()
    (run / "videos" / "index.json").write_text(
        json.dumps([{"prompt": "é", "videos": [{"title": "after", "mp4": "a.mp4"}]}])
    )
    track_videos(run, "films", 60)
    track_videos(run, "")
    first, *rows = sent(run)
    config = {"seed": 3, "planner": {"weights": "shapeworld"}}
    assert first == ["films", "run", tracker_id(run), "allow", config] and rows.pop(3) == rows.pop(5) == first
    assert [step for step, _ in rows[:-1]] == [1, 2, 3, 3, 4]
    assert all(row.keys() == {"step", "time_s", "reward"} and row["reward"] == step / 2 for step, row in rows[:-1])
    assert rows[-1] == [None, {"videos/after": [{"name": "a.mp4", "caption": "é", "format": "mp4"}]}]
    MetricsLogger(run, wandb_project="films").close(tracker_deadline_s=60)
    assert sent(run)[-1][2] == tracker_id(run) != first[2]


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
