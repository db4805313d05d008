"""The command that makes the ShapeWorld results: order of its jobs, those that fail or are cut off, the file."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import pytest

from bench import bench_shapeworld
from bench.bench_shapeworld import Job, carry_out, jobs_of, rows_on_lines


def job(folder: Path, name: str, code: str, after: Job | None = None) -> Job:
    return Job(name, folder / name, [sys.executable, "-c", code], after)


def done(jobs: list[Job], together: int = 2) -> list[str]:
    ended: list[str] = []
    carry_out(jobs, [None], together, lambda job: ended.append(job.name))
    return ended


def test_commands_are_those_of_a_user(tmp_path: Path) -> None:
    given = argparse.Namespace(
        folder=tmp_path, preset="p", seeds=[4, 5], threads=2, test_sets=["1", "validation", "strict"]
    )
    jobs = jobs_of(given, ["--executor.eta", "0.5"])
    assert [job.name for job in jobs] == [
        "seed 4", "seed 5", "control 4", "control 5", "test split, seed 1", "validation split",
        "stricter sets, seed 4", "stricter sets, seed 5",
    ]  # fmt: skip
    train = ["tempact.train", "p", "--seed", "5", "--threads", "2", "--executor.eta", "0.5"]
    assert jobs[1].command[2:] == [*train, "--output", str(tmp_path / "seed-5")]
    assert jobs[3].command[2:] == [
        *train,
        "--rewards.shuffle_advantages",
        "true",
        "--output",
        str(tmp_path / "control-5"),
    ]
    assert jobs[4].command[2:] == ["tempact.evaluate", str(tmp_path / "test-set-1"), "--seed", "1", "--threads", "2"]
    assert jobs[5].command[4:6] == ["--split", "validation"] and jobs[5].after is jobs[0] is jobs[4].after
    for number in (0, 1):  # of every seed
        strict = jobs[6 + number]
        assert strict.folder == tmp_path / f"test-set-strict-{4 + number}" and strict.after is jobs[number]
        assert strict.command[2:] == [
            "tempact.evaluate", str(strict.folder), "--suite", "shapeworld-strict", "--threads", "2",
        ]  # fmt: skip
    assert len({job.folder for job in jobs}) == len(jobs)


def test_an_evaluation_waits_for_its_run_and_gets_a_copy(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = job(tmp_path, "run", f"import os; os.makedirs({str(folder)!r}); open({str(folder / 'kept')!r}, 'w')")
    copied = job(tmp_path, "copied", f"open({str(tmp_path / 'copied' / 'kept')!r}).close()", run)
    other = job(tmp_path, "other", "pass")
    assert done([run, other, copied])[-1] == "copied" and copied.code == 0


def test_what_has_ended_stays_and_what_failed_is_tried_again(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    code = f"import os, sys; sys.exit(0 if os.path.exists({str(flag)!r}) else 3)"
    bad, good = job(tmp_path, "bad", code), job(tmp_path, "good", "pass")
    waits = job(tmp_path, "waits", "pass", bad)
    assert set(done([bad, good, waits])) == {"bad", "good"} and bad.code == 3 and waits.code is None
    flag.touch()
    (tmp_path / "bad").mkdir()
    again = [job(tmp_path, "bad", code), job(tmp_path, "good", "raise SystemExit(1)")]
    for each in again:
        each.read()
    assert again[1].code == 0 and again[0].code is None
    assert done(again) == ["bad"] and again[0].code == 0 and len(again[0].parts) == 2


def test_a_command_that_is_cut_off_ends_its_runs_and_keeps_their_seconds(tmp_path: Path) -> None:
    quick, long = job(tmp_path, "quick", "pass"), job(tmp_path, "long", "import time; time.sleep(60)")

    def stop(job: Job) -> None:
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        carry_out([quick, long], [None], 2, stop)
    assert time.monotonic() - began < 30
    assert quick.code == 0 and long.code is None and len(long.parts) == 1
    assert json.loads(long.record.read_text()) == {"parts": long.parts, "code": None}


def test_gpus_have_no_more_runs_at_a_time_than_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most: dict[str | None, int] = {}
    now: dict[str | None, int] = {}
    start = Job.start

    def counted(self: Job, gpu: str | None):  # type: ignore[no-untyped-def]
        now[gpu] = now.get(gpu, 0) + 1
        most[gpu] = max(most.get(gpu, 0), now[gpu])
        placed[self.name] = gpu
        return start(self, None)

    placed: dict[str, str | None] = {}
    monkeypatch.setattr(bench_shapeworld.Job, "start", counted)
    jobs = [job(tmp_path, f"job-{i}", "import time; time.sleep(0.3)") for i in range(6)]

    def left(job: Job) -> None:
        now[placed[job.name]] -= 1

    carry_out(jobs, ["0", "1"], 2, left)
    assert most == {"0": 2, "1": 2} and all(job.code == 0 for job in jobs)


def test_rows_of_tables_take_a_line_each() -> None:
    value = {"runs": [{"run": "a", "rows": [{"n": 1, "ci95": [0.0, 1.0]}, {"n": 2}]}], "notes": ["x"], "none": []}
    text = rows_on_lines(value)
    assert json.loads(text) == value and '\n    {"n": 2}\n' in text and '"notes": ["x"]' in text
