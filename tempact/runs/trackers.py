"""Trackers: programs in which users watch runs beside each other. `Tracker` is the interface, TRACKERS has one of each.

Each is fed by a process of its own, `python -m tempact.runs.trackers NAME FOLDER PROJECT ID PID STEP|videos`, which
follows metrics.jsonl until the end mark, or until the run that started it is gone: no tracker can stop or slow a run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import yaml

from tempact.config import HISTOGRAM_BINS, HISTOGRAM_REACH
from tempact.files import write_atomic
from tempact.reporting import METRICS

log = logging.getLogger(__name__)

TRACKER_ID, WANDB_ID = "tracker_id", "wandb_id"  # the second in runs of version 0.1
POLL_S, ORPHAN_S = 0.5, 60.0  # between looks at the file, and what a tracker has left when the run is gone
NICENESS = 10  # of a tracker's process: the run's own goes first
FINISHED = {"finished": True}  # last row, tells a tracker that no more will come
VIDEOS = "videos"  # what is sent in place of rows
SENT = "tracker_sent_{}"  # file in a run's folder: the last row that the tracker of this name was sent


class Shown(NamedTuple):
    """A video to show: its method's place in the tracker, number and text of its prompt, and its files."""

    key: str
    number: int
    prompt: str
    mp4: Path
    gif: Path


@dataclass(frozen=True)
class Tracked:
    """The run that is tracked. identity: the same for a run that is resumed. step: the last row that the tracker keeps
    of those it has, 0 for a new run; None where videos alone are sent."""

    folder: Path
    project: str
    identity: str
    step: int | None
    config: dict[str, Any]


class Tracker(Protocol):
    """Made with a `Tracked`, in a process of its own. What it raises ends it in one line.

    purges: rows beyond `Tracked.step` that it has already, of a run that was killed after its checkpoint, give way to
    those that are sent now; else they stay, and are not sent once more.
    """

    purges: bool

    def log(self, step: int, values: dict[str, float], histograms: dict[str, list[float]]) -> None:
        """An iteration's metrics; histograms: shares of the bins between `edges`."""
        ...

    def show(self, videos: Sequence[Shown]) -> None: ...

    def finish(self) -> None: ...


def edges(name: str) -> list[float]:
    """Of the bins of a histogram of metrics.jsonl."""
    reach = HISTOGRAM_REACH[name.rpartition("/")[2].partition("@")[0]]
    return [reach * (2 * i / HISTOGRAM_BINS - 1) for i in range(HISTOGRAM_BINS + 1)]


class TensorBoard:
    """Event files in the run's own folder `tensorboard`: `tensorboard --logdir runs` shows all runs."""

    purges = True

    def __init__(self, run: Tracked):
        from torch.utils.tensorboard import SummaryWriter

        folder, self.step = run.folder / "tensorboard", run.step or 0
        if run.step == 0:  # another run in the same folder, whose metrics are gone too
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
        self.writer: Any
        purge = None if run.step is None else run.step + 1  # what a killed run has sent beyond its checkpoint
        self.writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=10)
        if run.step is not None:
            told = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
            self.writer.add_text("config", "\n".join(f"    {line}" for line in told.splitlines()), run.step)

    def log(self, step: int, values: dict[str, float], histograms: dict[str, list[float]]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        for name, shares in histograms.items():
            bins = edges(name)
            middles = [(low + high) / 2 for low, high in pairwise(bins)]
            total, squares = (
                sum(share * at**power for share, at in zip(shares, middles, strict=True)) for power in (1, 2)
            )
            self.writer.add_histogram_raw(name, bins[0], bins[-1], sum(shares), total, squares, bins[1:], shares, step)

    def show(self, videos: Sequence[Shown]) -> None:
        """GIFs, as `add_video` writes them, which would make them anew with moviepy."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for video in videos:
            picture = Summary.Image(encoded_image_string=video.gif.read_bytes(), colorspace=3)
            value = Summary.Value(tag=f"{video.key}/{video.number:02d} {video.prompt}", image=picture)
            self.writer.file_writer.add_summary(Summary(value=[value]), self.step)

    def finish(self) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases, or any package of its interface."""

    package, purges = "wandb", False

    def __init__(self, run: Tracked):
        self.module = __import__(self.package)
        self.run = self.opened(run)

    def opened(self, run: Tracked) -> Any:
        return self.module.init(
            project=run.project, name=run.folder.name, dir=run.folder, id=run.identity, resume="allow",
            config=run.config,
        )  # fmt: skip

    def log(self, step: int, values: dict[str, float], histograms: dict[str, list[float]]) -> None:
        drawn = {k: self.module.Histogram(np_histogram=(shares, edges(k))) for k, shares in histograms.items()}
        self.run.log(values | drawn, step=step)

    def show(self, videos: Sequence[Shown]) -> None:
        shown: dict[str, list] = {}
        for video in videos:
            one = self.module.Video(str(video.mp4), caption=video.prompt, format="mp4")
            shown.setdefault(video.key, []).append(one)
        self.run.log(shown)

    def finish(self) -> None:
        self.run.finish()


class Trackio(Wandb):
    """Trackio, whose runs are known by their names and take one video a key."""

    package = "trackio"

    def opened(self, run: Tracked) -> Any:
        name = f"{run.folder.name}-{run.identity}"
        return self.module.init(project=run.project, name=name, resume="allow", config=run.config)

    def show(self, videos: Sequence[Shown]) -> None:
        films = {
            f"{video.key}/{video.number:02d}": self.module.Video(str(video.mp4), caption=video.prompt, format="mp4")
            for video in videos
        }
        self.run.log(films)


TRACKERS: dict[str, type[TensorBoard] | type[Wandb]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


@dataclass(frozen=True)
class Started:
    """The processes of a run's trackers, by name."""

    processes: dict[str, subprocess.Popen]

    @classmethod
    def of(cls, folder: Path, names: Sequence[str], project: str, step: int | None) -> Started:
        """Starts them; step: as `Tracked.step`. One that cannot be started is told in a warning."""
        found: dict[str, subprocess.Popen] = {}
        if names:
            identity = tracker_id(folder, new=step == 0)
        for name in dict.fromkeys(names):
            what = VIDEOS if step is None else str(step)
            run = str(os.getpid())  # it may be gone before the tracker has begun
            command = [sys.executable, "-m", __name__, name, str(folder.absolute()), project, identity, run, what]
            try:
                # a session of its own: Ctrl-C goes to the run, which then closes the tracker in order
                found[name] = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
                )
            except OSError as error:
                log.warning("%s cannot be started (%s); metrics are in %s only", name, error, folder)
        return cls(found)

    def finish(self, deadline_s: float) -> None:
        """Waits that long, for all of them together, until they have sent everything; then they are stopped."""
        ends = time.monotonic() + deadline_s
        for name, process in self.processes.items():
            try:
                code = process.wait(max(0.0, ends - time.monotonic()))
                if code < 0 or code > 1:  # 1: it has said why
                    log.warning("%s ended with code %d; all is in the run's folder", name, code)
            except subprocess.TimeoutExpired:
                log.warning("%s did not finish in %.0f s and is stopped; all is in the run's folder", name, deadline_s)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with what the tracker has started itself
                process.wait()


def tracker_id(folder: Path, *, new: bool = False) -> str:
    """The run's identity at its trackers, kept in its folder: a resumed run is the same run there."""
    file, old = folder / TRACKER_ID, folder / WANDB_ID
    if new:
        old.unlink(missing_ok=True)
    if new or not file.is_file():
        known = old.read_text(encoding="utf-8").strip() if old.is_file() else uuid.uuid4().hex[:12]
        write_atomic(file, known + "\n")
    return file.read_text(encoding="utf-8").strip()


def track_videos(folder: Path, names: Sequence[str], project: str, deadline_s: float = 120.0) -> None:
    """Sends the run's held-out videos to these trackers and waits that long at most."""
    Started.of(folder, names, project, None).finish(deadline_s)


def track(name: str, folder: Path, project: str, identity: str, run: str, what: str) -> int:
    """A tracker's process; its exit code. run: number of the run's process. what: the step that the run went on from, 0
    for a new one, or VIDEOS."""
    logging.basicConfig(format="%(levelname)s %(message)s")
    parent = int(run)
    threading.Thread(target=_end_alone, args=(parent,), daemon=True).start()
    try:
        os.nice(NICENESS)
        file = folder / "config.yaml"
        config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
        sent = folder / SENT.format(name)
        step = None if what == VIDEOS else _kept(TRACKERS[name], sent, int(what))
        tracker = TRACKERS[name](Tracked(folder, project, identity, step, config))
        if step is None:
            tracker.show(list(_shown(folder / "videos" / "index.json")))
        else:
            for row in follow(folder / METRICS, parent):
                if row["step"] > step:
                    _send(tracker, row)
                    write_atomic(sent, f"{row['step']}\n")
        tracker.finish()
    except ImportError as error:
        log.warning('%s: %s (pip install "tempact[%s]"); metrics are in %s only', name, error, name, folder)
        return 1
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever a tracker raises is one line
        told = " ".join(f"{type(error).__name__}: {error}".split())
        log.warning("%s failed (%s); metrics are in %s only from here on", name, told, folder)
        return 1
    return 0


def _end_alone(parent: int) -> None:
    """Ends this process some time after the run that has started it, whatever it waits for."""
    while os.getppid() == parent:
        time.sleep(POLL_S)
    time.sleep(ORPHAN_S)
    if os.getpgrp() == os.getpid():  # it leads a session of its own, with what the package has started
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def _kept(kind: type[TensorBoard] | type[Wandb], sent: Path, resumed: int) -> int:
    """The last row that a tracker keeps of a run that went on from row `resumed`, 0 if the run is new.

    sent: a file with the number of the last row that the tracker was sent; none where it was not asked for before.
    """
    if not resumed or not sent.is_file():
        return 0
    known = int(sent.read_text(encoding="utf-8"))
    return min(known, resumed) if kind.purges else known


def _send(tracker: Tracker, row: dict[str, Any]) -> None:
    values = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
    tracker.log(row["step"], values, {key: value for key, value in row.items() if isinstance(value, list)})


def _shown(index: Path) -> Iterator[Shown]:
    entries = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else []
    for number, entry in enumerate(entries):
        for video in entry["videos"]:
            files = index.with_name(video["mp4"]), index.with_name(video["gif"])
            yield Shown(f"videos/{video['title']}", number, entry["prompt"], *files)


def follow(path: Path, parent: int) -> Iterator[dict]:
    """Rows as they are written; ends at the mark that `MetricsLogger.close` writes or when the process `parent` dies,
    once all that it wrote is read."""
    with path.open(encoding="utf-8") as file:
        line, alone = "", False
        while True:
            line += file.readline()
            if line.endswith("\n"):
                row, line = json.loads(line), ""
                if "finished" in row:
                    return
                yield row
            elif alone:
                return
            elif os.getppid() != parent:
                alone = True  # and once more, for what came before its end
            else:
                time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(track(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]))
