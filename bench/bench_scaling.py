"""Training on 1, 2, 4, ... GPUs of this machine: the same bits, seconds by phase, and what is lost to waiting.

    PYTHONPATH=tests python -m bench.bench_scaling FOLDER [--gpus 1 2 4] [--preset shapeworld-full] [--iterations 10]
    [--weak] [--real] [--save FILE] [--section.key value ...]

Every count of GPUs runs the same command; the first count is what the others are compared with. Strong scaling divides
the prompts of one count among more GPUs, and the results must have equal bits (`--deterministic`). --weak multiplies
the prompts by the number of GPUs instead. --real takes whole iterations at the published sizes, two of them, in the
place of a preset of ShapeWorld (bench/bench_iteration.py, whose other options may be given here too). The first
iteration, which compiles kernels and records CUDA graphs, is not counted.

FILE is written after each count: seconds of an iteration and of its phases (medians), the share of it that processes
wait for each other, peak memory of a GPU, and the efficiency: GPU-seconds of the first count over GPU-seconds of this
one (strong), or the ratio of their seconds (weak).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import report
from tempact.errors import UserError, guarded
from tempact.files import write_atomic
from tempact.presets import get_preset
from tempact.reporting import read_environment, read_metrics

ROOT = Path(__file__).parents[1]
OF_PROCESSES = ("time_s", "timing_s/", "memory/", "ranks/")  # metrics that are those of processes, not of the training


def first_difference(one: Path, two: Path) -> str | None:
    """The first number of two runs' metrics and adapters that is not the same; None where all are."""
    from safetensors.torch import load_file

    for own, other in zip(read_metrics(one), read_metrics(two), strict=True):
        for name in own.keys() | other.keys():
            if not name.startswith(OF_PROCESSES) and own.get(name) != other.get(name):
                return f"iteration {own['step']}, {name}: {own.get(name)} and {other.get(name)}"
    last = f"checkpoints/step-{read_metrics(one)[-1]['step']:06}"
    for policy in ("planner", "executor"):
        weights, others = (load_file(run / last / policy / "adapter_model.safetensors") for run in (one, two))
        for name, weight in weights.items():
            if not weight.equal(others[name]):
                return f"{policy}: {name} differs by up to {(weight.float() - others[name].float()).abs().max():.1e}"
    return None


def of_preset(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the iterations of a run but the first."""
    rows = rows[1:]

    def median(name: str) -> float:
        return statistics.median(row[name] for row in rows)

    phases = {name.partition("/")[2]: median(name) for name in rows[0] if name.startswith("timing_s/")}
    return {
        "seconds": sum(phases.values()),
        "phases": phases,
        "idle": {name: median(name) for name in rows[0] if name.startswith("ranks/idle")},
        "peak_gib": max((row.get("memory/peak_gib", 0.0) for row in rows), default=0.0),
    }


def of_real(results: dict[str, Any]) -> dict[str, Any]:
    """The last iteration of bench/bench_iteration.py's results."""
    last = results["measured"][-1]
    phases = {name: value for name, value in last["seconds"].items() if name not in ("all", "between rows")}
    return {
        "seconds": last["seconds"]["all"], "phases": phases, "idle": last["idle"], "peak_gib": last["peak_gib"]["peak"]
    }  # fmt: skip


def efficiency(first: dict[str, Any], own: dict[str, Any], weak: bool) -> float:
    """1 where nothing is lost; first, own: of two counts of GPUs."""
    ratio = first["seconds"] / own["seconds"]
    return ratio if weak else ratio * first["gpus"] / own["gpus"]


def measure(given: argparse.Namespace, keys: Sequence[str], gpus: int) -> dict[str, Any]:
    """One count of GPUs.

    Raises:
        UserError: a run ended with an exit code other than 0.
    """
    python, times = [sys.executable, "-m"], gpus if given.weak else 1
    folder = given.folder / f"gpus-{gpus}"
    if given.real:
        save = folder.with_suffix(".json")
        command = [*python, "bench.bench_iteration", "--gpus", str(gpus), "--prompts", str(given.prompts * times),
                   "--folder", str(given.folder), "--save", str(save), *keys]  # fmt: skip
    else:
        prompts = given.prompts or get_preset(given.preset).data.prompts_per_iteration
        shutil.rmtree(folder, ignore_errors=True)
        command = [*python, "tempact.train", given.preset, "--gpus", str(gpus), "--deterministic",
                   "--trainer.iterations", str(given.iterations), "--trainer.checkpoint_every", str(given.iterations),
                   "--data.prompts_per_iteration", str(prompts * times), "--evaluation.simple", "1",
                   "--evaluation.hard", "1", "--output", str(folder), *keys]  # fmt: skip
    print("+", " ".join(command[1:]), flush=True)
    code = subprocess.run(command, cwd=ROOT, env=os.environ).returncode
    if code:
        raise UserError(f"bench_scaling: found exit code {code} of {' '.join(command[2:])}; accepted: 0")
    if given.real:
        results = json.loads(save.read_text(encoding="utf-8"))
        return {"gpus": gpus, "device": results["device"], "versions": results["versions"], **of_real(results)}
    session = read_environment(folder)[-1]
    found = {"gpus": gpus, "device": ", ".join(session.gpus) or "cpu", "versions": session.versions}
    found |= of_preset(read_metrics(folder))
    if not given.weak and gpus != given.gpus[0]:
        found["first_difference"] = first_difference(given.folder / f"gpus-{given.gpus[0]}", folder)
    return found


def told(own: dict[str, Any]) -> str:
    phases = ", ".join(f"{name} {value:.2f}" for name, value in own["phases"].items())
    same = "" if "first_difference" not in own else f"; first difference: {own['first_difference'] or 'none'}"
    idle = own["idle"].get("ranks/idle")
    waits = "" if idle is None else f", waiting {idle:.1%}"
    return f"{own['gpus']} GPUs: {own['seconds']:.2f} s ({phases}){waits}, efficiency {own['efficiency']:.1%}{same}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--preset", default="shapeworld-full")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--prompts", type=int, help="of an iteration, of one GPU with --weak (the preset's own; 4)")
    parser.add_argument("--weak", action="store_true", help="as many prompts a GPU on all counts")
    parser.add_argument("--real", action="store_true", help="the published sizes, random weights")
    parser.add_argument("--save", type=Path, help="results file")
    given, keys = parser.parse_known_args(argv)
    if given.iterations < 2:
        raise UserError(f"--iterations: found {given.iterations}; accepted: 2 or more, the first is not counted")
    given.prompts = given.prompts or (4 if given.real else None)
    given.folder = given.folder.resolve()
    given.folder.mkdir(parents=True, exist_ok=True)
    counts: list[dict[str, Any]] = []
    for gpus in given.gpus:
        own = measure(given, keys, gpus)
        own["efficiency"] = efficiency(counts[0] if counts else own, own, given.weak)
        counts.append(own)
        print(told(own), flush=True)
        if given.save:
            command = f"PYTHONPATH=tests {report.command('bench.bench_scaling')}"
            results = {"command": command, "commit": report.commit(), "weak": given.weak, "counts": counts}
            write_atomic(given.save, json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
