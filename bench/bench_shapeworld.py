"""The ShapeWorld results: seeds of a preset, control runs that learn from shuffled advantages, other test sets.

    python -m bench.bench_shapeworld FOLDER [--preset shapeworld-full] [--seeds 0 1 2] [--together 3] [--threads 5]
    [--test-sets 1 2 3 validation strict] [--save FILE] [--section.key value ...]

Every run is the command of a user, in a process and a folder of its own; each GPU has `together` runs at a time. The
first seed's checkpoint is evaluated on other test instructions (numbers are seeds) and on the validation split as soon
as it is there, every seed's on the stricter sets. Other keys of the configuration go to every run. FILE, as
bench/baselines/shapeworld-full.json, is written whenever a command has ended. The same command given again goes on
where a killed one was: what has ended stays, runs resume, and seconds are the sum of their parts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import report
from tempact.errors import guarded
from tempact.evaluation.statistics import Comparison, Row, plain, read_evaluation, read_origin
from tempact.files import write_atomic
from tempact.reporting import read_environment, read_metrics

ROOT = Path(__file__).parents[1]
CONTROL = ("--rewards.shuffle_advantages", "true")
VALIDATION, STRICT = "validation", "strict"
NOTES = (
    "seconds_all_in is the wall time of the command beside the others on its GPU, evaluation and report included.",
    "evaluation and comparisons are the files of those names of the run, comparisons the paired differences from "
    "step-prompt over the same videos; 95% bootstrap intervals over videos.",
    "other_test_sets: the checkpoint of the first seed on other test instructions, the same weights throughout; that "
    "of every seed on the stricter sets, with the rows that tell overfitting to prompts.",
)


@dataclass
class Job:
    """A command and the folder of its results. after: the run whose checkpoint it evaluates. parts: seconds so far."""

    name: str
    folder: Path
    command: list[str]
    after: Job | None = None
    parts: list[float] = field(default_factory=list)
    code: int | None = None

    @property
    def record(self) -> Path:
        return self.folder.with_suffix(".json")

    def read(self) -> None:
        """How an earlier try of the job went."""
        if self.record.is_file():
            noted = json.loads(self.record.read_text(encoding="utf-8"))
            self.parts, self.code = noted["parts"], 0 if noted["code"] == 0 else None  # a failed one is tried again

    def write(self) -> None:
        write_atomic(self.record, json.dumps({"parts": self.parts, "code": self.code}) + "\n")

    @property
    def ready(self) -> bool:
        return self.code is None and (self.after is None or self.after.code == 0)

    def start(self, gpu: str | None) -> subprocess.Popen[bytes]:
        if self.after is not None:  # a copy, because a run's folder is used by one command at a time
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.copytree(self.after.folder, self.folder)
        environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
        with self.folder.with_suffix(".log").open("ab") as output:
            return subprocess.Popen(self.command, env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)


def jobs_of(given: argparse.Namespace, keys: Sequence[str]) -> list[Job]:
    """Runs, controls and evaluations, in the order of their start."""
    threads = ["--threads", str(given.threads)]
    python, found = [sys.executable, "-m"], []
    for kind, more in (("seed", ()), ("control", CONTROL)):
        for seed in given.seeds:
            folder = given.folder / f"{kind}-{seed}"
            command = [*python, "tempact.train", given.preset, "--seed", str(seed), *threads, *keys, *more]
            found.append(Job(f"{kind} {seed}", folder, [*command, "--output", str(folder)]))
    trained = dict(zip(given.seeds, found, strict=False))
    for name in given.test_sets:
        for seed, run in trained.items() if name == STRICT else [("", found[0])]:
            folder = given.folder / "-".join(filter(None, ("test-set", name, str(seed))))
            chosen, told = _test_set(name)
            command = [*python, "tempact.evaluate", str(folder), *chosen, *threads]
            found.append(Job(f"{told}, {run.name}" if name == STRICT else told, folder, command, run))
    return found


def _test_set(name: str) -> tuple[list[str], str]:
    """Options of an evaluation, and what it is called."""
    if name == VALIDATION:
        return ["--split", VALIDATION], f"{VALIDATION} split"
    if name == STRICT:
        return ["--suite", "shapeworld-strict"], "stricter sets"
    return ["--seed", name], f"test split, seed {name}"


def carry_out(jobs: Sequence[Job], gpus: Sequence[str | None], together: int, ended: Callable[[Job], None]) -> None:
    """Runs all jobs, at most `together` on each GPU (None: the CPU); `ended` gets each job that has ended."""
    running: list[tuple[Job, str | None, subprocess.Popen[bytes], float]] = []
    waiting = [job for job in jobs if job.code is None]
    try:
        while running or any(job.ready for job in waiting):
            for gpu in gpus:
                free = together - sum(used == gpu for _, used, *_ in running)
                for job in [job for job in waiting if job.ready][: max(0, free)]:
                    waiting.remove(job)
                    running.append((job, gpu, job.start(gpu), time.monotonic()))
            time.sleep(0.2)
            for entry in [entry for entry in running if entry[2].poll() is not None]:
                running.remove(entry)
                job, _, process, began = entry
                job.parts.append(time.monotonic() - began)
                job.code = process.returncode
                job.write()
                ended(job)
    finally:
        for job, _, process, began in running:
            process.terminate()
            process.wait()
            job.parts.append(time.monotonic() - began)
            job.write()


def table(folder: Path, kind: type[Row] | type[Comparison]) -> list[dict[str, Any]]:
    return [plain(row) for row in read_evaluation(folder, kind)]


def rows_on_lines(value: Any, indent: str = "") -> str:
    """JSON in which a row of a table, an object in a list without objects in it, takes one line."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        nested = any("{" in json.dumps(item)[1:] for item in value)
        items = [rows_on_lines(item, indent + " ") if nested else json.dumps(item) for item in value]
        return "[\n" + ",\n".join(f"{indent} {item}" for item in items) + f"\n{indent}]"
    if isinstance(value, dict):
        items = [f"{indent} {json.dumps(key)}: {rows_on_lines(item, indent + ' ')}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    return json.dumps(value)


def results(given: argparse.Namespace, jobs: Sequence[Job]) -> dict[str, Any]:
    """Everything that has ended, as the results file has it."""
    runs, sets = [], []
    for job in jobs:
        if job.code != 0:
            continue
        if job.after is not None:
            (own,) = (job.folder / "evaluations").iterdir()
            comparisons = table(own, Comparison)
            origin = plain(read_origin(own))
            sets.append(
                {"test_set": job.name, "origin": origin, "evaluation": table(own, Row), "comparisons": comparisons}
            )
            continue
        runs.append({
            "run": job.name,
            "iterations": int(read_metrics(job.folder)[-1]["step"]),
            "seconds_all_in": round(sum(job.parts)),
            "parts": len(job.parts),
            "evaluation": table(job.folder, Row),
            "comparisons": table(job.folder, Comparison),
        })  # fmt: skip
    found = [read_environment(job.folder)[-1] for job in jobs if job.after is None and job.code == 0]
    session = found[0] if found else None
    return {
        "command": report.command("bench.bench_shapeworld"),
        "commit": report.commit(),
        "gpus": session.gpus * len(devices()) if session else [],  # a run sees its own
        "hardware": f"{session.cpu} ({session.cores} cores), {session.memory_gib:.0f} GiB memory" if session else "",
        "together_on_a_gpu": given.together,
        "versions": session.versions if session else {},
        "notes": list(NOTES),
        "runs": runs,
        "other_test_sets": sets,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="shapeworld-full")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--test-sets", nargs="*", default=["1", "2", "3", VALIDATION, STRICT], help="seeds, validation or strict"
    )
    parser.add_argument("--together", type=int, default=3, help="runs on a GPU at a time")
    parser.add_argument("--threads", type=int, default=5, help="CPU threads of a run")
    parser.add_argument("--save", type=Path, help="results file")
    given, keys = parser.parse_known_args(argv)
    given.folder.mkdir(parents=True, exist_ok=True)
    given.folder = given.folder.resolve()
    jobs = jobs_of(given, keys)
    for job in jobs:
        job.read()

    def ended(job: Job) -> None:
        print(f"{job.name}: exit code {job.code} after {sum(job.parts):.0f} s", flush=True)
        if given.save:
            write_atomic(given.save, rows_on_lines(results(given, jobs)) + "\n")

    carry_out(jobs, devices(), given.together, ended)
    return max((job.code or 0 for job in jobs), default=0) if all(job.code is not None for job in jobs) else 1


def devices() -> list[str | None]:
    """Every GPU by the number that CUDA_VISIBLE_DEVICES takes; the CPU where there is none."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return list(named.split(",") if named else map(str, range(count))) if count else [None]


if __name__ == "__main__":
    sys.exit(guarded(main))  # a signal is an exception, and `finally` ends what was started
