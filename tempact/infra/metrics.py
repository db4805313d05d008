"""What a run records while it goes: metrics.jsonl and the sample tables.

The local file is the record. Weights & Biases, if asked for, is fed by a process of its own that reads that
file (`wandb_tracker.py`), so that no tracker can slow, hang or fail a run.
"""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tempact.errors import UserError
from tempact.infra.environment import record_environment
from tempact.infra.files import disk_full, write_atomic
from tempact.types import Batch, PlanBatch, Scored

log = logging.getLogger(__name__)

METRICS, SAMPLES = "metrics.jsonl", "samples"
FINISHED = {"finished": True}  # last row, tells a tracker that no more will come


class MetricsLogger:
    """Appends one JSON object a step to `run_folder`/metrics.jsonl, flushed at once.

    Rows beyond `resumed_step` (0 for a new run) are those of iterations that the resumed run does again: they
    are cut off. Non-finite values are written as null. `wandb_project` None starts no tracker. Also notes in
    environment.json what the run goes on.
    """

    def __init__(self, run_folder: Path, resumed_step: int = 0, wandb_project: str | None = None):
        self.path = Path(run_folder) / METRICS
        kept = [row for row in read_metrics(run_folder) if row["step"] <= resumed_step]
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        record_environment(run_folder, resumed_step)
        self._before_s = max((row["time_s"] for row in kept), default=0.0)
        self._started = time.monotonic()
        self._file = self.path.open("a")
        self._tracker = _start_tracker(self.path, wandb_project, resumed_step) if wandb_project else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a row; `time_s` counts over resumed parts. UserError when the disk is full."""
        elapsed = round(self._before_s + time.monotonic() - self._started, 3)
        self._write({"step": step, "time_s": elapsed, **{key: finite_or_none(value) for key, value in metrics.items()}})

    def close(self, tracker_deadline_s: float = 10.0) -> None:
        """Closes the file, and gives the tracker that long to finish before it is stopped."""
        if self._tracker is not None:
            self._write(FINISHED)
            try:
                self._tracker.wait(tracker_deadline_s)
            except subprocess.TimeoutExpired:
                log.warning(
                    "wandb did not finish in %.0f s and is stopped; %s is complete", tracker_deadline_s, self.path
                )
                self._tracker.kill()
                self._tracker.wait()
            self._tracker = None
        self._file.close()

    def _write(self, row: dict) -> None:
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            if not disk_full(error):
                raise
            raise UserError(
                f"{self.path}: no space left on the disk; free some and go on with --resume auto"
            ) from error


def read_metrics(run_folder: Path) -> list[dict]:
    """Rows of metrics.jsonl in order; a last line cut by a kill and a tracker's end mark are left out."""
    path = Path(run_folder) / METRICS
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            log.warning("%s: row %d is not whole and is left out", path, number)
            continue
        if isinstance(row, dict) and "step" in row and "time_s" in row:
            rows.append(row)
    return rows


def write_samples(run_folder: Path, step: int, plans: PlanBatch, scored: Scored, batch: Batch) -> Path:
    """samples/step-000040.jsonl: one row a continuation with its prompt, plan, rewards and advantages.

    Missing rewards and masked advantages are null.
    """
    rows = []
    for p, plan in enumerate(plans.plans):
        prompt = plans.prompt_of(p)
        for n in range(scored.temporal_following.shape[1]):
            rows.append(
                {
                    "step": step,
                    "prompt_id": prompt.prompt_id,
                    "category": prompt.category,
                    "prompt": prompt.text,
                    "plan_index": p,
                    "continuation": n,
                    "plan": [{"start": s.start, "end": s.end, "prompt": s.prompt} for s in plan.steps],
                    "repairs": list(plan.repairs),
                    "format_score": _at(scored.format_score, p),
                    "plan_quality": _at(scored.plan_quality, p),
                    "temporal_following": _at(scored.temporal_following, p, n),
                    "step_following": _at(scored.step_following, p, n),
                    "aesthetics": _at(scored.aesthetics, p, n),
                    "plan_advantage": _at(batch.plan_advantage, p) if batch.plan_mask[p] else None,
                    "execution_advantage": _at(batch.execution_advantage, p, n) if batch.execution_mask[p, n] else None,
                }
            )
    path = Path(run_folder) / SAMPLES / f"step-{step:06d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    return path


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN: null says that there is no value."""
    return value if math.isfinite(value) else None


def _at(values: Tensor, *index: int) -> float | None:
    return finite_or_none(round(values[index].item(), 6))


def _start_tracker(path: Path, project: str, resumed_step: int) -> subprocess.Popen | None:
    command = [sys.executable, "-m", "tempact.infra.wandb_tracker", str(path.absolute()), project, str(resumed_step)]
    try:
        # a session of its own: Ctrl-C goes to the run, which then closes the tracker in order
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        log.warning("wandb cannot be started (%s); metrics are in %s only", error, path)
        return None
