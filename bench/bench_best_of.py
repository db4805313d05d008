"""Best-of-N at switches: what it gains over one continuation, by every judge, and what it costs.

    python -m bench.bench_best_of PRESET|RUN [--best-of 8] [--videos 16] [--save FILE] [--section.key value ...]

The table is that of `python -m tempact.evaluate PRESET|RUN --best-of N`, which goes on where a killed one was. Beside
it: every method with N continuations against the same one with one, video by video, and the seconds of `videos` of the
table's videos, each made with one continuation and with N in turn, as `generate` makes them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import report
from bench.bench_shapeworld import rows_on_lines, table
from tempact.cli import from_yaml, preset_or_run
from tempact.config import RunConfig
from tempact.errors import UserError, guarded
from tempact.evaluation import FORKED
from tempact.evaluation.ledger import Ledger
from tempact.evaluation.statistics import (
    AVERAGE,
    NOT_TEMPORAL,
    Bootstrap,
    Comparison,
    MethodScores,
    Row,
    plain,
    read_evaluation,
    read_origin,
)
from tempact.files import write_atomic
from tempact.presets import DEFAULT, get_preset

NOTES = (
    "against_one: the method of N continuations less the method of one, over the same videos; 95% bootstrap intervals. "
    "The verifier is what chooses; the matcher, clearness and duplicates choose nothing.",
    "seconds: of one video, frames on the host; cpu: of this process alone, whatever else the machine does.",
)


def evaluated(target: str, count: int, keys: Sequence[str]) -> Path:
    """The folder of the table with rows of best-of-`count`, which the command of a user makes."""
    command = [sys.executable, "-m", "tempact.evaluate", target, "--best-of", str(count), *keys]
    if code := subprocess.run(command, check=False).returncode:
        raise UserError(f"{target}: found exit code {code} of evaluate; accepted: an evaluation that ends")
    run = preset_or_run(target)[1]
    output = run or Path(f"{get_preset(target).output}-untrained")
    tables = (output / "evaluations").glob(f"*-best-of-{count}/evaluation.json")
    return max(tables, key=lambda file: file.stat().st_mtime).parent


def against_one(folder: Path, count: int, config: RunConfig) -> list[Comparison]:
    """Every method of N continuations against the same one of one: as the table, and the average of each of the judges
    of temporal order by itself."""
    scores, found = read_evaluation(folder, MethodScores), list[Comparison]()
    bootstrap = Bootstrap(config.evaluation.bootstrap, config.evaluation.seed)
    for name in FORKED:
        pair = [one for one in scores if one.method in (name, f"{name}, best of {count}")]
        found += bootstrap.compare(pair, baseline=name)
        for judge in dict.fromkeys(one.judge for one in pair if one.judge not in NOT_TEMPORAL):
            alone = bootstrap.compare([one for one in pair if one.judge == judge], baseline=name)
            found += [replace(one, judge=judge) for one in alone if one.set == AVERAGE]
    return found


def seconds(target: str, folder: Path, count: int, videos: int, config: RunConfig) -> dict[str, Any]:
    """Seconds of the table's plans, spread evenly, made with one continuation and with `count`."""
    from tempact.evaluation.harness import PLANS
    from tempact.executor.sampler import gaussian_noise
    from tempact.policies import build_policies
    from tempact.runs.best_of import selecting
    from tempact.runs.run import load_newest
    from tempact.types import Plan, Step

    run = preset_or_run(target)[1]
    policies = build_policies(config) if run is None else load_newest(config, run)[0]
    executor, who = policies.executor, "start" if run is None else "trained"
    (ledger,) = folder.glob(f"evaluation/*/{PLANS}")
    rows = [row for row in Ledger(ledger, ("prompt_id", "planner", "seed"), ("steps",)) if row["planner"] == who]
    rows = rows[:: max(1, len(rows) // videos)][:videos]
    prompts = {prompt.prompt_id: prompt.text for own in instructions_of(config) for prompt in own}
    told: dict[int, list[tuple[float, float]]] = {1: [], count: []}
    switches = 0
    with selecting(count, config, executor.device) as best, selecting(1, config, executor.device) as one:
        for number, row in enumerate(rows):
            plan = Plan(prompts[row["prompt_id"]], tuple(Step(**step) for step in row["steps"]))
            for selection in (one, best) if number else (one, best, one, best):  # the first of each is not counted
                noise = gaussian_noise(number, executor.noise_shape(1, selection.count), executor.device)
                cpu, wall = time.process_time(), time.perf_counter()
                *_, choices = selection.video(executor, plan, noise)
                told[selection.count].append((time.process_time() - cpu, time.perf_counter() - wall))
            switches += len(choices)
    counted = {n: own[1:] for n, own in told.items()}
    means = {n: [sum(column) / len(own) for column in zip(*own, strict=True)] for n, own in counted.items()}
    return {
        "videos": len(counted[count]),
        "switches_of_a_plan": round(switches / len(rows), 2),
        **{f"cpu_{n}": round(mean[0], 3) for n, mean in means.items()},
        **{f"wall_{n}": round(mean[1], 3) for n, mean in means.items()},
        "cpu_ratio": round(means[count][0] / means[1][0], 2),
        "wall_ratio": round(means[count][1] / means[1][1], 2),
    }


def instructions_of(config: RunConfig) -> list[list[Any]]:
    """ShapeWorld's held-out instructions of the table, set by set."""
    from tempact.runs.evaluation import instructions

    return list(instructions(config.evaluation).values())


def results(given: argparse.Namespace, keys: Sequence[str]) -> dict[str, Any]:
    folder = evaluated(given.target, given.best_of, keys)
    config = from_yaml(folder / "config.yaml")
    before = os.getloadavg()[0]
    cost = seconds(given.target, folder, given.best_of, given.videos, config)
    return {
        "command": report.command("bench.bench_best_of"),
        "commit": report.commit(),
        "hardware": given.hardware,
        "note": given.note,
        "load": [round(before, 1), round(os.getloadavg()[0], 1)],
        "notes": list(NOTES),
        "best_of": plain(config.best_of) | {"continuations": given.best_of},
        "origin": plain(read_origin(folder)),
        "seconds": cost,
        "evaluation": table(folder, Row),
        "against_one": [plain(one) for one in against_one(folder, given.best_of, config)],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("target", nargs="?", default=DEFAULT, metavar="PRESET|RUN")
    parser.add_argument("--best-of", type=int, default=8, help="continuations at a switch")
    parser.add_argument("--videos", type=int, default=16, help="videos whose seconds are taken")
    parser.add_argument("--hardware", default="", help="a line for the results file")
    parser.add_argument("--note", default="", help="what else is to be said in the results file")
    parser.add_argument("--save", type=Path, help="results file")
    given, keys = parser.parse_known_args(argv)
    found = results(given, keys)
    print(json.dumps(found["seconds"]))
    for one in found["against_one"]:
        if one["set"] == AVERAGE:
            print(one["method"], one["judge"], one["difference"], one["ci95"], one["relative"])
    if given.save:
        write_atomic(given.save, rows_on_lines(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
