"""Whole training iterations at the published sizes, on this machine.

    PYTHONPATH=tests python -m bench.bench_iteration
    [--prompts 16] [--plans 4] [--continuations 8] [--frames 30] [--iterations 2] [--save [FILE]] [--memory-only]
    [--gpus 1] [--tiny] [--folder FOLDER] [--judge-delay 1.0] [--section.key value ...]

Runs `python -m tempact.train self-forcing` on random weights of the real sizes (bench/weights.py, written to the folder
once, 25 GB), loaded by the product's own loaders. Plans come from a script (bench/stories.py): the planner samples all
its tokens, and the text that is read as a plan is exchanged. Judges are a fake one in a process of its own, which
answers every question with marks of its own after a second. Prompts are from a file that is written here. Whatever
other keys of the configuration are given go to the product as they are.

For each iteration: seconds and peak memory of each phase, the latter beside the dry run's plan of the same
configuration, judge calls, gaps between sampling and training, memory of the host. The last one is the result: the
first records CUDA graphs and compiles. --save writes everything to FILE (bench/baselines/iteration-<gpu>.json) after
each iteration, so that a run that is cut off leaves those that it finished. --memory-only measures memory in minutes
(what it leaves out: bench/stories.py); its seconds mean nothing. --gpus N starts a process a GPU by torchrun.
--tiny: small models on the CPU.

Runs in the background with `setsid`, its output in a file; SIGTERM ends it and everything that it has started.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rewards.fault_proxy import Apart, Behaviour

from bench import report, stories
from bench.harness import Bench
from tempact.cli import parse_run
from tempact.config import RunConfig, keys_of
from tempact.diagnostics.dry_run import run_of
from tempact.diagnostics.memory import GIB, needs_of, total
from tempact.errors import UserError, guarded
from tempact.files import write_atomic
from tempact.reporting import read_environment, read_metrics

ROOT = Path(__file__).parents[1]
REAL = {"prompts": 16, "plans": 4, "continuations": 8, "frames": 30, "iterations": 2}
TINY = REAL | {"prompts": 2, "plans": 2, "continuations": 2, "frames": 15}
TINY_KEYS = {
    "device": "cpu", "executor.video_size": (16, 32), "executor.lora.rank": "4", "planner.lora.rank": "4",
    "planner.max_new_tokens": "6", "planner.sampled_together": "2", "executor.rollout_videos": "2",
}  # fmt: skip
ROOM_GIB = 75.0  # of a GPU's memory that the real sizes need
WEIGHTS, MADE = "weights", "made"  # folders: the one is kept for the next time, the other begins empty
PHASES = ("plan", "rollout", "rewards", "update")
NOTE = "\n  cut short: of its figures only the GPU's memory is that of a run"
UPDATES = "update"  # end of the dry run's names for the phases of that one; others but "plan" are parts of the roll-out


@dataclass(frozen=True)
class Work:
    """What is run. given: further keys of the configuration; sizes: as REAL; gpus: processes."""

    sizes: dict[str, int]
    gpus: int
    tiny: bool
    memory_only: bool
    judge_delay_s: float
    given: Sequence[str]

    def arguments(self, folder: Path) -> list[str]:
        """The command line of the run, behind `python -m tempact.train`."""
        size, weights, made = self.sizes, folder / WEIGHTS, folder / MADE
        keys = {
            "data.prompts": made / "prompts.csv", "data.prompts_per_iteration": size["prompts"],
            "planner.plans_per_prompt": size["plans"], "executor.continuations": size["continuations"],
            "executor.frames": size["frames"], "trainer.iterations": size["iterations"],
            "planner.weights": weights / "planner", "executor.weights": weights / "executor",
            "executor.wan_folder": weights / "release", "judges.aesthetics_weights": weights / "scorer",
            "judges.aesthetics_processor": weights / "scorer", "judges.cache": made / "judges.sqlite",
            "executor.text_cache": made / "text", "output": made / "run",
        } | (TINY_KEYS if self.tiny else {})  # fmt: skip
        # gaps of random weights end no run here; they are reported
        keys |= {name: 1e9 for name in keys_of(RunConfig) if name.endswith("_gap")}
        options = [(f"--{key}", *(value if isinstance(value, tuple) else (value,))) for key, value in keys.items()]
        return ["self-forcing", *(str(word) for option in options for word in option), *self.given]

    def config(self, folder: Path) -> RunConfig:
        """UserError for numbers and keys that are not accepted."""
        return parse_run(self.arguments(folder), "python -m tempact.train")[0]

    def plan(self, folder: Path) -> dict[str, float]:
        """Peak GiB of each phase by the dry run."""
        config = self.config(folder)
        needs = needs_of(run_of(config, on_gpu=not self.tiny))
        peaks: dict[str, float] = {}
        for phase in needs.phases:
            own = "update" if phase.name.endswith(UPDATES) else "plan" if phase.name == "plan" else "rollout"
            peaks[own] = max(peaks.get(own, 0.0), (total(needs.kept) + phase.bytes) / GIB)
        return peaks


def measured(row: dict[str, Any], before_s: float, host_gib: float, gpus: int = 1) -> dict[str, Any]:
    """What a row of metrics.jsonl tells; before_s: `time_s` of the row before."""
    judges = [name.split("/")[1] for name in row if name.startswith("judge/") and name.endswith("/calls")]
    calls = {role: round(row[f"judge/{role}/calls"]) for role in judges}
    seconds = {name.partition("/")[2]: value for name, value in row.items() if name.startswith("timing_s/")}
    peaks = {name.partition("/")[2]: value for name, value in row.items() if name.startswith("memory/")}
    return {
        "iteration": row["step"],
        "seconds": seconds | {"all": sum(seconds.values()), "between rows": row["time_s"] - before_s},
        "gpu_hours": gpus * sum(seconds.values()) / 3600,
        "peak_gib": {name.removesuffix("_gib"): value for name, value in peaks.items()},
        "host_gib": host_gib,
        "judge_calls": sum(calls.values()),
        "judge_missing": round(sum(calls[role] * row[f"judge/{role}/missing"] for role in judges)),
        "usable_plans": row["rewards/format_score/mean"],
        "gaps": {name: value for name, value in row.items() if "_gap" in name},
        "missing": {who: row[f"{who}/missing"] for who in ("planner", "executor")},
        "grad_norm": {who: row.get(f"{who}/grad_norm") for who in ("planner", "executor")},
        "idle": {name: value for name, value in row.items() if name.startswith("ranks/idle")},
    }


def table(found: dict[str, Any], planned: dict[str, float]) -> str:
    """An iteration's figures as lines; peaks hold what CUDA graphs keep, too."""
    lines = [f"iteration: number {found['iteration']}", f"  {'phase':<12}{'s':>9}{'peak GiB':>10}{'dry run':>9}{'':>8}"]
    graphs = found["peak_gib"].get("graphs", 0.0)
    peaks = {name: value + graphs * (name in PHASES) for name, value in found["peak_gib"].items()}
    names = dict.fromkeys((*PHASES, *found["seconds"], *peaks))
    for name in names:
        seconds, peak, plan = found["seconds"].get(name), peaks.get(name), planned.get(name)
        more = f"{peak / plan - 1:+.1%}" if peak and plan else ""
        cells = ("" if value is None else f"{value:.1f}" for value in (seconds, peak, plan))
        lines.append("  {:<12}{:>9}{:>10}{:>9}{:>8}".format(name, *cells, more).rstrip())
    groups = {"missing rewards": "missing", "gradient norms": "grad_norm", "gaps": "gaps"}
    lines += [
        f"  {found['gpu_hours']:.3f} GPU-hours; host {found['host_gib']:.1f} GiB at most; judges: "
        f"{found['judge_calls']} calls, {found['judge_missing']} missing; usable plans {found['usable_plans']:.0%}",
    ]
    for title, group in groups.items():
        told = (f"{name} {'none' if value is None else f'{value:.3g}'}" for name, value in found[group].items())
        lines.append(f"  {title}: {', '.join(told)}")
    return "\n".join(lines)


def most_memory_gib(process: int) -> float:
    """Most host memory that a process and those that it has started have had, pages of mapped files included; 0 once it
    is gone."""
    most = 0.0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                most += int(line.split()[1]) * 1024 / GIB
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        most += sum(most_memory_gib(int(child)) for child in children)
    return most


def rows_of(process: subprocess.Popen[bytes], run: Path) -> Iterator[tuple[dict[str, Any], float]]:
    """Every row of the run's metrics as soon as it is there, with the memory of the process until then."""
    seen, memory = 0, 0.0
    while True:
        ended = process.poll() is not None
        memory = max(memory, most_memory_gib(process.pid))
        rows = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
        for row in rows[seen:]:
            yield row, memory
        seen = len(rows)
        if ended:
            return
        time.sleep(0.2)


def run(work: Work, folder: Path, save: Callable[[dict[str, Any]], None], write: Callable[[str], None]) -> int:
    """Runs the work in the folder; returns the exit code of the product. `save` gets all results after each row."""
    work.config(folder)
    if not work.tiny and not torch.cuda.is_available():
        raise UserError("bench_iteration: found no GPU; accepted: one of 80 GB or more, --tiny")
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    python, tiny = (sys.executable, "-m"), ["--tiny"] * work.tiny
    began = time.monotonic()
    subprocess.run([*python, "bench.weights", str(folder / WEIGHTS), *tiny], env=environment, check=True)
    write(f"weights are there after {time.monotonic() - began:.0f} s")
    made = folder / MADE
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    with (made / "prompts.csv").open("w", newline="", encoding="utf-8") as file:
        numbers = range(work.sizes["prompts"] * work.sizes["iterations"])
        csv.writer(file).writerows([["prompt"], *([stories.instruction(number)] for number in numbers)])
    server = Apart(Behaviour(delay_s=work.judge_delay_s, verdicts=True))
    environment |= {"TEMPACT_JUDGE_BASE_URL": server.url, "TEMPACT_JUDGE_MODEL": "fake"}
    options = ["--memory-only"] * work.memory_only + work.arguments(folder)
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(work.gpus), "-m"] * (work.gpus > 1)
    process = subprocess.Popen([*python, *several, "bench.stories", *options], env=environment)
    try:
        planned = work.plan(folder)
        found: list[dict[str, Any]] = []
        before_s = 0.0
        for row, memory in rows_of(process, made / "run"):
            found.append(measured(row, before_s, memory, work.gpus))
            before_s = row["time_s"]
            write(table(found[-1], planned) + NOTE * work.memory_only)
            save(about(work, made / "run") | {"dry_run_peak_gib": planned, "measured": found})
        return process.wait()
    finally:
        (process.terminate if several else process.kill)()  # told to stop a run would finish the iteration
        process.wait()
        server.stop()


def about(work: Work, run: Path) -> dict[str, Any]:
    """What was run, on what; run: its folder."""
    session = read_environment(run)[-1]
    return {
        "command": f"PYTHONPATH=tests {report.command('bench.bench_iteration')}",
        "commit": report.commit(),
        "device": "cpu" if work.tiny else ", ".join(session.gpus),
        "hardware": f"{session.cpu} ({session.cores} cores), {session.memory_gib:.0f} GiB memory",
        "versions": session.versions,
        "memory_only": work.memory_only,
        "videos": work.sizes["prompts"] * work.sizes["plans"] * work.sizes["continuations"],
        "judge_delay_s": work.judge_delay_s,
        "processes": work.gpus,
        **work.sizes,
    }


def printed(text: str) -> None:
    print(text, flush=True)


def main(argv: list[str] | None = None, write: Callable[[str], None] = printed) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for name, value in REAL.items():
        parser.add_argument(f"--{name}", type=int, help=f"{value}; {TINY[name]} of --tiny")
    parser.add_argument("--gpus", type=int, default=1, help="processes, each with a GPU of its own")
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU")
    parser.add_argument("--memory-only", action="store_true", help="cut short in time, not in memory")
    parser.add_argument("--judge-delay", type=float, default=1.0, help="seconds of a judge's reply")
    parser.add_argument("--folder", type=Path, help="of weights, which it keeps for the next time, and of the run")
    parser.add_argument("--save", type=Path, nargs="?", const=Path(), help="results file")
    own, given = parser.parse_known_args(argv)
    usual = TINY if own.tiny else REAL
    sizes = {name: value if (asked := getattr(own, name)) is None else asked for name, value in usual.items()}
    if own.save is not None:
        own.save.parent.mkdir(parents=True, exist_ok=True)
    work = Work(sizes, own.gpus, own.tiny, own.memory_only, own.judge_delay, given)

    def save(results: dict[str, Any]) -> None:
        if own.save is not None:
            usual = ROOT / "bench" / "baselines" / f"iteration-{report.slug(results['device'])}.json"
            write_atomic(usual if own.save == Path() else own.save, json.dumps(results, indent=1) + "\n")

    with contextlib.ExitStack() as opened:
        folder = own.folder or Path(opened.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        return run(work, folder, save, write)


@pytest.mark.timeout(1800)
def test_iteration(bench: Bench, tmp_path: Path) -> None:
    """Two iterations of one prompt, on a GPU with room for them; else of tiny models."""
    real = bench.timed and bench.real and torch.cuda.get_device_properties(0).total_memory > ROOM_GIB * GIB
    options = ["--prompts", "1"] if real else ["--tiny", "--judge-delay", "0"]
    assert main([*options, "--folder", str(tmp_path)], bench.write) == 0


if __name__ == "__main__":
    sys.exit(guarded(main))  # a signal is an exception, and `finally` ends what was started
