"""Progress of a run: a live bar on a terminal, plain log lines elsewhere. Its metrics, for trackers too."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from tempact.errors import UserError
from tempact.files import disk_full, write_atomic
from tempact.reporting import METRICS, duration, finite_or_none, folded, read_metrics, record_environment
from tempact.runs.trackers import FINISHED, Started

log = logging.getLogger(__name__)

LINE_EVERY_S = 5.0  # plain lines come at most this often
SMOOTHING = 0.2  # weight of the newest iteration in the mean that the ETA uses
console = Console(stderr=True)


def setup_logging(level: int = logging.INFO) -> None:
    """Log lines on stderr, above the bar on a terminal; ranks other than 0 only warn, with their rank."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 and console.is_terminal:
        handler: logging.Handler = RichHandler(console=console, show_path=False, omit_repeated_times=False)
        handler.setFormatter(logging.Formatter("%(message)s", datefmt="[%X]"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        who = f"rank {rank} " if rank else ""
        handler.setFormatter(logging.Formatter(f"%(asctime)s {who}%(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=level if rank == 0 else max(level, logging.WARNING), handlers=[handler], force=True)


def starting() -> None:
    """`setup_logging`, and on a terminal a line for the seconds until torch is there."""
    setup_logging()
    if console.is_terminal:  # elsewhere a refusal stays a single line
        log.info("starting: torch and the models' code")


class Progress:
    """Shows `total` iterations or other units (0: only phases), `done` of them already behind; the first line comes on
    entering.

    On a terminal: a bar with the phase, rewards and the time left. Otherwise: a log line for the first
    and last iteration and at most every LINE_EVERY_S between.
    """

    def __init__(self, title: str, total: int, done: int = 0, live: bool | None = None, unit: str = "iterations"):
        self.title, self.total, self.done, self.unit = title, total, done, unit
        self._live = console.is_terminal if live is None else live
        self._mean_s: float | None = None
        self._last_step = self._last_line = time.monotonic()
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[eta]}  {task.fields[shown]}  [dim]{task.fields[phase]}"),
        )
        self._bar = Bar(*columns, console=console, disable=not self._live)
        self._task = self._bar.add_task(title, total=total or None, completed=done, eta="", shown="", phase="starting")

    def __enter__(self) -> Progress:
        self._bar.start()
        if self.total:
            done = f", {self.done} already done" if self.done else ""
            log.info("%s: %d %s%s", self.title, self.total, self.unit, done)
        else:
            log.info("%s: started", self.title)
        self._last_step = time.monotonic()
        self._last_line = self._last_step - LINE_EVERY_S
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def phase(self, name: str) -> None:
        """What is being done now; seen on a terminal only."""
        self._bar.update(self._task, phase=name)

    def tell(self, text: str) -> None:
        """What is being done now, worth a line of its own in a log."""
        self.phase(text)
        if not self._live:
            log.info("%s: %s", self.title, text)

    def step(self, metrics: Mapping[str, float], count: int = 1) -> None:
        """`count` iterations are done; shows their `metrics` in the order given."""
        now = time.monotonic()
        took, self._last_step = (now - self._last_step) / count, now
        self._mean_s = took if self._mean_s is None else (1 - SMOOTHING) * self._mean_s + SMOOTHING * took
        self.done += count
        shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        self._bar.update(self._task, completed=self.done, eta=f"{duration(self.left_s)} left", shown=shown)
        if not self._live and (now - self._last_line >= LINE_EVERY_S or self.done >= self.total):
            self._last_line = now
            log.info(
                "%s: %d/%d  %.1f s each, %s left  %s",
                self.title, self.done, self.total, self._mean_s, duration(self.left_s), shown,
            )  # fmt: skip

    @property
    def left_s(self) -> float:
        """Seconds that the remaining iterations will take at the recent pace; NaN before the first."""
        return float("nan") if self._mean_s is None else self._mean_s * max(0, self.total - self.done)


class MetricsLogger:
    """Appends one JSON object a step to `run_folder`/metrics.jsonl, flushed at once.

    Rows beyond `resumed_step` (0 for a new run) are those of iterations that the resumed run does again: they
    are cut off. Non-finite values are written as null. trackers: names of those that are started, for `project`. Also
    notes in environment.json what the run goes on.
    """

    def __init__(self, run_folder: Path, resumed_step: int = 0, trackers: Sequence[str] = (), project: str = ""):
        self.path = Path(run_folder) / METRICS
        self.kept = [row for row in read_metrics(run_folder) if row["step"] <= resumed_step]
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in self.kept))
        record_environment(run_folder, resumed_step)
        self._before_s = max((row["time_s"] for row in self.kept), default=0.0)
        self._started = time.monotonic()
        self._file = self.path.open("a", encoding="utf-8")
        self._trackers = Started.of(self.path.parent, trackers, project, resumed_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a row; `time_s` counts over resumed parts. UserError when the disk is full."""
        elapsed = round(self._before_s + time.monotonic() - self._started, 3)
        values = {key: finite_or_none(value) for key, value in metrics.items()}
        self._write({"step": step, "time_s": elapsed, **folded(values)})

    def close(self, tracker_deadline_s: float = 10.0) -> None:
        """Closes the file, and gives the trackers that long to finish before they are stopped."""
        if self._trackers.processes:
            self._write(FINISHED)
            self._trackers.finish(tracker_deadline_s)
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
