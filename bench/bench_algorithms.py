"""The algorithm table: each choice of the method on seeds of one preset, at equal samples and at equal seconds.

    python -m bench.bench_algorithms FOLDER [--preset shapeworld-full] [--rows NAME ...] [--seeds 0 1 2] [--together 3]
    [--own NAME KEYS ...] [--threads 5] [--equal-seconds] [--save FILE] [--section.key value ...]
    python -m bench.bench_algorithms --show FILE

Every row is the preset with the keys of ROWS over it, trained for as many iterations as the preset has (equal samples)
and evaluated on the test set, and on the validation split, on which choices are made. With `--equal-seconds` rows whose
iterations take other time than the default's are trained again, for as many iterations as the default's seconds hold.
Runs are those of `bench.bench_shapeworld`: commands of a user, `together` on a GPU; the same command given again goes
on where a killed one was. A results file that exists is gone on with, on other machines too: the runs in it stay and
are not made again; one whose preset had other values is refused. `--own "larger steps" "--executor.optim.lr 5e-4"` adds
a row that ROWS lacks; `--rows` alone leaves those of ROWS out. `--show` prints the table of a results file and draws it
beside the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from statistics import mean, median
from typing import Any, cast

from bench import report
from bench.bench_shapeworld import VALIDATION, Job, carry_out, devices, rows_on_lines, table
from tempact.cli import parse_run
from tempact.config import flatten
from tempact.errors import LineParser, UserError, guarded
from tempact.evaluation import BOTH, STEP
from tempact.evaluation.statistics import AVERAGE, CLEARNESS, DUPLICATES, NOT_TEMPORAL, PICTURE_QUALITY, Comparison
from tempact.evaluation.statistics import Row as Cell
from tempact.files import reading, write_atomic
from tempact.reporting import read_environment, read_metrics

DEFAULT = "default"
TREE = ("--executor.forks", "tree", "--executor.branching", "2", "4")
ROWS: dict[str, tuple[str, ...]] = {
    DEFAULT: (),
    # the executor's loss
    "DiffusionNFT": ("--executor.loss", "diffusion_nft"),
    "no ratio norm": ("--executor.ratio_norm", "false"),
    "no ratio norm, weights 1/k": ("--executor.ratio_norm", "false", "--executor.reweight", "true"),
    "one level, drawn": ("--executor.levels", "drawn"),
    "one level, in turn": ("--executor.levels", "sliding"),
    "executor: group's std": ("--executor.advantage_std", "group"),
    "executor: no std": ("--executor.advantage_std", "none"),
    # where its continuations begin, and from what
    "tree of 2 x 4": TREE,
    "tree of 2 x 4, by depth": (*TREE, "--executor.compared", "depth"),
    "one switch": ("--executor.forks", "one"),
    "seed groups": ("--executor.seed_group", "true"),
    # the planner's
    "GRPO": ("--planner.loss", "grpo", "--planner.clip_low", "0.2", "--planner.clip_high", "0.2"),
    "RLOO": ("--planner.loss", "rloo", "--planner.advantage_std", "none"),
    "planner: group's std": ("--planner.advantage_std", "group"),
    "planner: no std": ("--planner.advantage_std", "none"),
    # what the method consists of
    "planner alone": ("--executor.train", "false"),
    "executor alone": ("--planner.train", "false"),
    "in turn": ("--trainer.alternate", "1"),
    "no shared context": ("--executor.forks", "none"),
    "all chunks of the step": ("--executor.trained_chunks", "step"),
    "all chunks of the video": ("--executor.trained_chunks", "video"),
    "no KL": ("--planner.kl_weight", "0", "--executor.kl_weight", "0"),
    "no smoothing": ("--executor.smooth_prompts", "false"),
    "equal spans": ("--planner.spans", "uniform"),
}
QUALITIES = {"quality": PICTURE_QUALITY, "clearness": CLEARNESS}
ALIKE = 0.1  # share of the default's seconds an iteration below which a row's are the same
NOTES = (
    "gain: change of the trained score against step prompts of the same run; average of sets and judges with its 95% "
    "bootstrap interval over videos, then by judge, means of sets. Rows that change plans or prompts change both.",
    "validation: the average gain on the validation split, on which choices are made.",
    "seconds_an_iteration: median, beside the other runs on its GPU.",
)


@dataclass
class Trained:
    """A run of a row, and the evaluation of its checkpoint on the validation split."""

    name: str
    seed: int
    run: Job
    validation: Job

    @property
    def seconds(self) -> float:
        """Median seconds of an iteration."""
        times = [row["time_s"] for row in read_metrics(self.run.folder)]
        return median(later - sooner for sooner, later in pairwise(times)) if len(times) > 1 else times[0]


def runs_of(
    given: argparse.Namespace,
    keys: Sequence[str],
    kept: Sequence[dict[str, Any]] = (),
    iterations: dict[str, int] | None = None,
) -> list[Trained]:
    """The runs of every row and seed, seed by seed, but for those of kept rows.

    iterations: of the rows that are trained again, and no others.
    """
    equal = "samples" if iterations is None else "seconds"
    there = {(row["row"], run["seed"]) for row in kept if row["equal"] == equal for run in row["runs"]}
    python, threads, found = [sys.executable, "-m"], ["--threads", str(given.threads)], []
    for seed in given.seeds:
        for name in given.rows if iterations is None else iterations:
            if (name, seed) in there:
                continue
            more = [] if iterations is None else ["--trainer.iterations", str(iterations[name])]
            told = f"{name}, seed {seed}" + (f", {more[1]} iterations" if more else "")
            folder = given.folder / report.slug(told)
            changed = [*threads, *keys, *given.known[name], *more, "--output", str(folder)]
            run = Job(told, folder, [*python, "tempact.train", given.preset, "--seed", str(seed), *changed])
            own = folder.with_name(f"{folder.name}-{VALIDATION}")
            judged = [*python, "tempact.evaluate", str(own), "--split", VALIDATION, *threads]
            found.append(Trained(name, seed, run, Job(f"{told}, {VALIDATION}", own, judged, run)))
    return found


def again(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Iterations of rows that are to take the seconds of the default; none for rows whose iterations take as long."""
    runs = {row["row"]: row["runs"] for row in rows if row["equal"] == "samples"}
    if DEFAULT not in runs:
        raise UserError(f"--equal-seconds: found no row {DEFAULT!r}; accepted: {DEFAULT!r} among --rows")
    seconds = {name: mean(run["seconds_an_iteration"] for run in own) for name, own in runs.items()}
    count = runs[DEFAULT][0]["iterations"]
    shares = {name: seconds[DEFAULT] / own for name, own in seconds.items()}
    return {name: max(1, round(count * share)) for name, share in shares.items() if abs(share - 1) > ALIKE}


def result(own: Trained) -> dict[str, Any]:
    """A run in a line of the results file."""
    cells, changes = table(own.run.folder, Cell), table(own.run.folder, Comparison)
    judges = dict.fromkeys(cell["judge"] for cell in cells if cell["judge"] not in (*NOT_TEMPORAL, AVERAGE))
    (folder,) = (own.validation.folder / "evaluations").iterdir()

    def change(rows: list[dict[str, Any]], judge: str) -> dict[str, Any]:
        return next(r for r in rows if (r["method"], r["set"], r["judge"]) == (BOTH, AVERAGE, judge))

    def score(method: str, judge: str) -> float:
        return mean(cell["score"] for cell in cells if (cell["method"], cell["judge"]) == (method, judge))

    average = change(changes, AVERAGE)
    return {
        "seed": own.seed,
        "commit": report.commit(),
        "iterations": int(read_metrics(own.run.folder)[-1]["step"]),
        "seconds_an_iteration": round(own.seconds, 3),
        "score": average["means"][1],
        "gain": average["relative"],
        "ci95": average["relative_ci95"],
        **{f"gain_{judge}": round(score(BOTH, judge) / score(STEP, judge) - 1, 6) for judge in judges},
        "validation": change(table(folder, Comparison), AVERAGE)["relative"],
        **{name: change(changes, judge)["relative"] for name, judge in QUALITIES.items()},
        "duplicates": change(changes, DUPLICATES)["means"],
    }


def results(
    given: argparse.Namespace, keys: Sequence[str], done: Sequence[Trained], kept: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Everything that has ended, as the results file has it: rows with their runs, kept ones first. keys: of all runs;
    what is said of the machine is of the latest session."""
    rows = {(row["row"], row["equal"]): list(row["runs"]) for row in kept}
    for own in done:
        if own.validation.code == 0:
            equal = "seconds" if own.run.name.endswith("iterations") else "samples"
            rows.setdefault((own.name, equal), []).append(result(own))

    by_seed = itemgetter("seed")

    def place(row: tuple[tuple[str, str], Any]) -> tuple[str, int]:
        (name, equal), _ = row
        return equal, list(given.known).index(name)

    sessions = [read_environment(own.run.folder)[-1] for own in done if own.run.code == 0]
    told = sessions[0] if sessions else None
    return {
        "command": report.command("bench.bench_algorithms"),
        "preset": given.preset,
        "keys": " ".join(keys),
        "configuration": configuration(given.preset, keys),
        "gpus": told.gpus * len(devices()) if told else [],
        "hardware": f"{told.cpu} ({told.cores} cores), {told.memory_gib:.0f} GiB memory" if told else "",
        "together_on_a_gpu": given.together,
        "versions": told.versions if told else {},
        "notes": list(NOTES),
        "rows": [
            {"row": name, "keys": " ".join(given.known[name]), "equal": equal, "runs": sorted(own, key=by_seed)}
            for (name, equal), own in sorted(rows.items(), key=place)
        ],
    }


def configuration(preset: str, keys: Sequence[str]) -> dict[str, Any]:
    """Every value of the default's configuration, as JSON has it."""
    values = flatten(parse_run([preset, *keys], "python -m bench.bench_algorithms")[0])
    return cast(dict[str, Any], json.loads(json.dumps(values)))


def earlier(given: argparse.Namespace, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the results file, where it exists. Raises UserError for one of another preset, of other keys, or of other
    values of a preset that has changed since."""
    if given.save is None or not given.save.is_file():
        return []
    with reading(given.save):
        found = json.loads(given.save.read_text(encoding="utf-8"))
        made = found["preset"], found["keys"]
        values, rows = found["configuration"], found["rows"]
    asked = given.preset, " ".join(keys)
    if made != asked:
        found, accepted = (f"preset {preset} with keys {words!r}" for preset, words in (made, asked))
        raise UserError(f"--save: found a file of {found} at {given.save}; accepted: one of {accepted}")
    for key, value in configuration(given.preset, keys).items():
        if values.get(key, value) != value:  # a key that came later has its default's meaning in earlier runs
            told = f"found a file made with {key} {values[key]} at {given.save}"
            raise UserError(f"--save: {told}; accepted: one made with {value}, or a new file")
    for row in rows:
        wanted = given.known.get(row["row"])
        if wanted != tuple(row["keys"].split()):
            accepted = f"{' '.join(wanted)!r}" if wanted is not None else f"a row of ROWS, or --own {row['row']!r}"
            raise UserError(f"{given.save}: found row {row['row']!r} with keys {row['keys']!r}; accepted: {accepted}")
    return list(rows)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of results: means over seeds, gains with the lowest and the highest seed's."""
    head = ["row", "equal", "seeds", "s/iteration", "score", "gain", "verifier", "matcher", "validation", "quality",
            "clearness", "duplicates"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for row in rows:
        runs = row["runs"]

        def told(name: str, form: Callable[[float], str] = "{:+.1%}".format, runs: list[dict[str, Any]] = runs) -> str:
            values = [run[name] for run in runs if run.get(name) is not None]
            return form(mean(values)) if values else ""

        gains = [run["gain"] for run in runs]
        spread = f" [{min(gains):+.1%}, {max(gains):+.1%}]" if len(gains) > 1 else ""
        before, after = (mean(run["duplicates"][i] for run in runs) for i in (0, 1))
        lines.append([
            row["row"], row["equal"], str(len(runs)), told("seconds_an_iteration", "{:.2f}".format),
            told("score", "{:.3f}".format), told("gain") + spread, told("gain_verifier"), told("gain_matcher"),
            told("validation"), told("quality"), told("clearness"), f"{before:.3f} to {after:.3f}",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A PNG: the average gain of each row, a dot a seed and a bar their mean, the default's mean as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    figure, panel = pyplot.subplots(figsize=(8, 1.2 + 0.32 * len(rows)), layout="constrained")
    names = [row["row"] + (" (equal seconds)" if row["equal"] == "seconds" else "") for row in rows]
    for place, (name, row) in enumerate(zip(names, rows, strict=True)):
        gains = [run["gain"] for run in row["runs"]]
        panel.barh(place, mean(gains), color="#d1495b" if name == DEFAULT else "#9aa5b1", height=0.65)
        panel.plot(gains, [place] * len(gains), "o", color="#22272e", markersize=3.5)
        if name == DEFAULT:
            panel.axvline(mean(gains), color="#d1495b", linewidth=0.8)
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.invert_yaxis()
    panel.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panel.set_xlabel("average gain over step prompts: mean of seeds, a dot each", fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def show(path: Path) -> None:
    with reading(path):
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    print(markdown(rows))
    if rows:
        draw(path.with_suffix(".png"), rows)


def main(argv: list[str] | None = None) -> int:
    parser = LineParser("python -m bench.bench_algorithms", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, nargs="?", help="folder of the runs")
    parser.add_argument("--preset", default="shapeworld-full")
    parser.add_argument("--rows", nargs="*", choices=tuple(ROWS), default=list(ROWS), metavar="NAME", help="of ROWS")
    parser.add_argument(
        "--own", nargs=2, action="append", default=[], metavar=("NAME", "KEYS"), help="a further row, and its keys"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--together", type=int, default=3, help="runs on a GPU at a time")
    parser.add_argument("--threads", type=int, default=5, help="CPU threads of a run")
    parser.add_argument("--equal-seconds", action="store_true", help="rows of other speed are trained again")
    parser.add_argument("--save", type=Path, help="results file")
    parser.add_argument("--show", type=Path, metavar="FILE", help="prints a results file and draws it")
    given, keys = parser.parse_known_args(argv)
    if given.show:
        show(given.show)
        return 0
    if given.folder is None:
        raise UserError("FOLDER: found nothing; accepted: a folder for the runs, or --show FILE")
    given.known = ROWS | {name: tuple(words.split()) for name, words in given.own}
    given.rows += [name for name, _ in given.own if name not in given.rows]
    given.folder.mkdir(parents=True, exist_ok=True)
    given.folder = given.folder.resolve()
    done: list[Trained] = []
    kept = earlier(given, keys)

    def carried(more: list[Trained]) -> bool:
        done.extend(more)
        jobs = [job for own in more for job in (own.run, own.validation)]
        for job in jobs:
            job.read()
        carry_out(jobs, devices(), given.together, ended)
        return all(job.code == 0 for job in jobs)

    def ended(job: Job) -> None:
        print(f"{job.name}: exit code {job.code} after {sum(job.parts):.0f} s", flush=True)
        if given.save:
            write_atomic(given.save, rows_on_lines(results(given, keys, done, kept)) + "\n")

    whole = carried(runs_of(given, keys, kept))
    if whole and given.equal_seconds:
        whole = carried(runs_of(given, keys, kept, again(results(given, keys, done, kept)["rows"])))
    if given.save and given.save.is_file():
        show(given.save)
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(guarded(main))  # a signal is an exception, and `finally` ends what was started
