"""Trackers get every metric, histogram and video of a run, resumed or not, and cannot hurt it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tempact.cli import parse_run
from tempact.config import HISTOGRAM_BINS, TRACKERS
from tempact.errors import UserError
from tempact.reporting import read_metrics
from tempact.runs import trackers
from tempact.runs.logs import MetricsLogger
from tempact.runs.trackers import edges, track_videos, tracker_id

SHARES = [0.0] * 10 + [0.75, 0.25] + [0.0] * 9
BINS = {f"executor/ratio_histogram/{i:02d}": share for i, share in enumerate(SHARES)}
GIF = b"GIF89a" + bytes(20)

STAND_IN = """
import json
import os
from pathlib import Path
class Run:
    def log(self, row, step=None): self.file.write(json.dumps([step, row], default=vars) + "\\n")
    def finish(self): self.file.close()
class Video:
    def __init__(self, path, caption, format): self.name, self.caption, self.format = Path(path).name, caption, format
class Histogram:
    def __init__(self, np_histogram): self.shares, self.edges = np_histogram
def init(project, name, resume, config, **more):
    run = Run()
    run.file = open(os.environ["SENT"], "a")
    run.file.write(json.dumps([project, name, resume, config, more], default=str) + "\\n")
    return run
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def stands_in(name: str, body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `body` the package `name` of processes that are started."""
    (tmp_path / "modules").mkdir(exist_ok=True)
    (tmp_path / "modules" / f"{name}.py").write_text(body)
    others = [path for path in os.environ.get("PYTHONPATH", "").split(":") if path]
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path / "modules"), str(Path(__file__).parents[2]), *others]))
    monkeypatch.setenv("SENT", str(tmp_path / "sent"))


def train(run: Path, names: tuple[str, ...], resumed: int, last: int) -> None:
    logger = MetricsLogger(run, resumed, names, "films")
    for step in range(resumed + 1, last + 1):
        logger.log(step, {"reward": step / 2, "kl": float("nan"), **BINS})
    logger.close(tracker_deadline_s=60)


def film(run: Path) -> None:
    (run / "videos").mkdir()
    (run / "videos" / "a.gif").write_bytes(GIF)
    videos = [{"title": title, "mp4": "a.mp4", "gif": "a.gif"} for title in ("before", "after")]
    (run / "videos" / "index.json").write_text(json.dumps([{"prompt": "é", "videos": videos}]))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_is_given_the_configuration_every_row_and_the_videos(
    name: str, tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run is the same run, and a new one in its folder is another."""
    stands_in(name, STAND_IN, tmp_path, monkeypatch)

    def sent() -> list:
        return [json.loads(line) for line in (tmp_path / "sent").read_text().splitlines()]

    (run / "config.yaml").write_text("seed: 3\nplanner: {weights: shapeworld}\n")
    train(run, (name,), 0, 3)
    train(run, (name,), 2, 4)
    film(run)
    track_videos(run, (name,), "films", 60)
    track_videos(run, (), "films")
    first, *rows = sent()
    config, identity = {"seed": 3, "planner": {"weights": "shapeworld"}}, tracker_id(run)
    more = {"dir": str(run), "id": identity} if name == "wandb" else {}
    assert first == ["films", "run" if more else f"run-{identity}", "allow", config, more]
    assert rows.pop(3) == rows.pop(4) == first
    drawn = {"shares": SHARES, "edges": edges("executor/ratio_histogram")}
    assert [step for step, _ in rows[:-1]] == [1, 2, 3, 4]  # row 3 is there, though the run has made it once more
    for step, row in rows[:-1]:
        assert row.keys() == {"time_s", "reward", "executor/ratio_histogram"} and row["reward"] == step / 2
        assert row["executor/ratio_histogram"] == drawn
    told = {"name": "a.mp4", "caption": "é", "format": "mp4"}
    keys = ("videos/before", "videos/after")
    assert rows[-1][1] == ({key: [told] for key in keys} if more else {f"{key}/00": told for key in keys})
    train(run, (name,), 0, 1)
    assert tracker_id(run) != identity and tracker_id(run) in str(sent()[-2]) and sent()[-1][0] == 1


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_that_comes_late_is_sent_what_was_before(
    name: str, tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for when a run is resumed, and again after sessions without it."""
    pytest.importorskip("tensorboard", reason="needs pip install tensorboard")
    train(run, (), 0, 2)
    if name == "wandb":
        stands_in(name, STAND_IN, tmp_path, monkeypatch)
    for resumed, names in ((2, (name,)), (3, ()), (4, (name,))):
        train(run, names, resumed, resumed + 1)
    if name == "wandb":
        rows = [json.loads(line) for line in (tmp_path / "sent").read_text().splitlines()]
        assert [row[0] for row in rows if row[0] != "films"] == [1, 2, 3, 4, 5]
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"), {"scalars": 0}).Reload()
    assert [one.step for one in found.Scalars("reward")] == [1, 2, 3, 4, 5]


def test_tensorboard_shows_a_resumed_run_once_with_histograms_and_films(run: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run / "config.yaml").write_text("seed: 3\n")

    def seen() -> EventAccumulator:
        return EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "images": 0, "histograms": 0}).Reload()

    train(run, ("tensorboard",), 0, 3)
    assert seen().file_version == 2.0
    train(run, ("tensorboard",), 2, 4)
    film(run)
    track_videos(run, ("tensorboard",), "films", 60)
    found = seen()
    assert [(one.step, one.value) for one in found.Scalars("reward")] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    assert "kl" not in found.Tags()["scalars"]
    last = found.Histograms("executor/ratio_histogram")[-1]
    value = last.histogram_value
    assert (last.step, value.min, value.max, value.num) == (4, -3.0, 3.0, 1.0)
    assert value.bucket == SHARES and value.bucket_limit == edges("executor/ratio_histogram")[1:]
    assert value.sum == pytest.approx(0.25 * 2 / 7) and value.sum_squares == pytest.approx(0.25 * (2 / 7) ** 2)
    assert [one.encoded_image_string for one in found.Images("videos/after/00 é")] == [GIF]
    assert "seed: 3" in found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    train(run, ("tensorboard",), 0, 1)  # another run in this folder
    assert [one.step for one in seen().Scalars("reward")] == [1] and "videos" not in str(seen().Tags())


FAULTS = {
    "import time\ndef init(**k): time.sleep(60)": "did not finish in 3 s and is stopped",
    "raise RuntimeError('no\\nnetwork')": "failed (RuntimeError: no network)",
    "import nothing_like_it": "No module named 'nothing_like_it' (pip install \"tempact[{}]\")",
    "import sys\nsys.exit('go away')": "failed (SystemExit: go away)",
    "import os\nos._exit(7)": "ended with code 7",
}


def test_trackers_that_hang_or_fail_are_one_warning_each_and_hold_up_nothing(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """All faults at a time, each of a package of its own."""
    names = [f"package{number}" for number in range(len(FAULTS))]
    child = f"{trackers.__name__}_planted"
    for name, body in zip(names, FAULTS, strict=True):
        stands_in(name, body, tmp_path, monkeypatch)
    kinds = "".join(f"T.TRACKERS[{name!r}] = type({name!r}, (T.Wandb,), {{'package': {name!r}}})\n" for name in names)
    (tmp_path / "modules" / f"{child.rpartition('.')[2]}.py").write_text(
        f"import sys\nfrom pathlib import Path\nimport tempact.runs.trackers as T\n{kinds}"
        "sys.exit(T.track(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]))\n"
    )
    monkeypatch.setattr(trackers, "__name__", child.rpartition(".")[2])
    with caplog.at_level(logging.WARNING):
        logger = MetricsLogger(run, 0, names, "films")
        started = time.monotonic()
        for step in range(1, 2001):  # more than a pipe would hold
            logger.log(step, {f"reward/{i}": 0.5 for i in range(10)})
        logged = time.monotonic() - started
        logger.close(tracker_deadline_s=3.0)
    assert logged < 2.0 and time.monotonic() - started < 8.0 and len(read_metrics(run)) == 2000
    told = [*capfd.readouterr().err.splitlines(), *(record.message for record in caplog.records)]
    told = [line for line in told if "package" in line]
    for name, words in zip(names, FAULTS.values(), strict=True):
        (line,) = (line for line in dict.fromkeys(told) if f"{name}" in line.split("metrics are")[0])
        assert words.format(name) in line


def test_a_tracker_whose_run_is_gone_sends_what_is_there_and_ends(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stands_in("wandb", STAND_IN, tmp_path, monkeypatch)
    code = (
        "import os\nfrom pathlib import Path\nfrom tempact.runs.logs import MetricsLogger\n"
        f"logger = MetricsLogger(Path({str(run)!r}), 0, ('wandb',), 'films')\n"
        "for step in range(1, 501): logger.log(step, {'reward': 0.5})\nos.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not ((sent := tmp_path / "sent").is_file() and "[500, " in sent.read_text()):
        time.sleep(0.2)
    rows = [json.loads(line) for line in (tmp_path / "sent").read_text().splitlines()[1:]]
    assert [step for step, _ in rows] == [*range(1, 501)]


def test_the_bins_have_the_clip_at_an_edge_and_zero_in_the_middle() -> None:
    ratio, advantage = edges("executor/ratio_histogram@2"), edges("planner/advantage_histogram")
    assert len(ratio) == len(advantage) == HISTOGRAM_BINS + 1 and ratio[0] == -3.0 and advantage[-1] == 1.0
    assert min(abs(edge - 1.0) for edge in ratio) < 1e-12 and ratio[10] == -ratio[11]


def test_an_older_run_goes_on_as_the_same_run(run: Path) -> None:
    (run / "wandb_id").write_text("abc123\n")
    assert tracker_id(run) == tracker_id(run) == "abc123" != tracker_id(run, new=True)


def test_names_are_a_list_of_any_subset_and_the_key_of_old_names_those_of_now() -> None:
    config = parse_run(["--trackers", *TRACKERS, "--tracker_project", "films"], "x")[0]
    assert (config.trackers, config.tracker_project) == (TRACKERS, "films") and tuple(trackers.TRACKERS) == TRACKERS
    assert parse_run([], "x")[0].trackers == ()
    with pytest.raises(UserError, match="^--wandb_project: is no option any more; accepted: trackers, with wandb"):
        parse_run(["--wandb_project", "films"], "x")
