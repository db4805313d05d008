"""Curves of a run's metrics as one SVG.

One offline HTML file that shows a run, also one that is still going, or the benchmark's results.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import yaml
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tempact.cli import dotted
from tempact.config import RunConfig, sections_of
from tempact.errors import UserError
from tempact.evaluation import BOTH, STEP
from tempact.evaluation.harness import Evaluation
from tempact.evaluation.judges import COMBINED
from tempact.evaluation.statistics import (
    AVERAGE,
    PICTURE_QUALITY,
    Comparison,
    MethodScores,
    Row,
    read_evaluation,
    relative_change,
)
from tempact.evaluation.tables import METRICS as BENCHMARK_METRICS
from tempact.evaluation.tables import Results, Table, build_table, gained, percent, write_tables
from tempact.files import reading, write_atomic
from tempact.reporting import METRICS, SAMPLES, Session, duration, read_environment, read_metrics
from tempact.reporting.strips import EXTREMES, INDEX, VIDEOS, StripRow, film_strip

SMOOTHING = 0.15  # weight of the newest value in the thick line
COLUMNS = 3
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
RC = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "tempact"}


@dataclass(frozen=True)
class Panel:
    """A chart of one or several metrics. A line is (label, metric names); several names are added up."""

    title: str
    lines: tuple[tuple[str, tuple[str, ...]], ...]
    stacked: bool = False


PANELS = (
    Panel("Reward that is optimised", (("executor", ("executor/reward",)), ("planner", ("planner/reward",)))),
    Panel(
        "Raw rewards",
        tuple(
            (name.replace("_", " "), (f"rewards/{name}/mean",))
            for name in ("temporal_following", "step_following", "aesthetics", "plan_quality", "format_score")
        ),
    ),
    Panel("KL to the start", (("executor", ("executor/kl",)), ("planner", ("planner/kl",)))),
    Panel(
        "Clipped fraction",
        tuple((who, (f"{who}/clip_ratio/low", f"{who}/clip_ratio/high")) for who in ("executor", "planner")),
    ),
    Panel(
        "Groups without reward differences",
        tuple((who, (f"{who}/frac_reward_zero_std",)) for who in ("executor", "planner")),
    ),
    Panel(
        "Seconds an iteration",
        tuple((phase, (f"timing_s/{phase}",)) for phase in ("plan", "rollout", "rewards", "update")),
        stacked=True,
    ),
)


def curves_svg(rows: Sequence[dict]) -> bytes | None:
    """The PANELS that `rows` (of `read_metrics`) have values for; None when there is not one."""
    panels = [panel for panel in PANELS if any(np.isfinite(line).any() for line in _lines(panel, rows).values())]
    if not panels:
        return None
    height = -(-len(panels) // COLUMNS)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(4 * COLUMNS, 2.7 * height), layout="constrained")
        axes = figure.subplots(height, COLUMNS, squeeze=False).flatten()
        for axis, panel in zip(axes, panels, strict=False):
            _draw(axis, panel, rows)
        for axis in axes[len(panels) :]:
            axis.remove()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _draw(axis: Axes, panel: Panel, rows: Sequence[dict]) -> None:
    steps = np.array([row["step"] for row in rows])
    lines = {label: values for label, values in _lines(panel, rows).items() if np.isfinite(values).any()}
    if panel.stacked:
        axis.stackplot(steps, np.nan_to_num(list(lines.values())), labels=list(lines), colors=COLOURS, alpha=0.85)
    else:
        for colour, (label, values) in zip(COLOURS, lines.items(), strict=False):
            axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8, marker="." if len(steps) < 3 else "")
            axis.plot(steps, smooth(values), color=colour, linewidth=1.8, label=label)
    axis.set_title(panel.title, loc="left", fontweight="bold", fontsize=10)
    axis.set_xlabel("iteration")
    axis.grid(alpha=0.25, linewidth=0.5)
    axis.legend(frameon=panel.stacked, fontsize=8)


def smooth(values: np.ndarray) -> np.ndarray:
    """Exponential mean without the bias of its start; a NaN leaves the mean where it was."""
    total = weight = 0.0
    means = []
    for value in values:
        if np.isfinite(value):
            total = (1 - SMOOTHING) * total + SMOOTHING * value
            weight = (1 - SMOOTHING) * weight + SMOOTHING
        means.append(total / weight if weight else np.nan)
    return np.array(means)


def _lines(panel: Panel, rows: Sequence[dict]) -> dict[str, np.ndarray]:
    return {
        label: np.array([sum(_value(row, name) for name in names) for row in rows], float)
        for label, names in panel.lines
    }


def _value(row: dict, name: str) -> float:
    value = row.get(name)
    return float("nan") if value is None else value


REPORT, CONFIG, RESULTS = "report.html", "config.yaml", "temporal-order.html"
# keys of weights, and values in whose place random weights stand
WEIGHTS, RANDOM = ("planner.weights", "executor.weights"), ("random", "random-tiny")
MIME = {".png": "image/png", ".gif": "image/gif", ".svg": "image/svg+xml"}
# config keys worth a place in the header, and their labels
SUMMARY = {
    "preset": "preset",
    "seed": "seed",
    "data.prompts_per_iteration": "prompts an iteration",
    "planner.plans_per_prompt": "plans a prompt (M)",
    "executor.continuations": "continuations a plan (N)",
    "executor.frames": "latent frames",
    "executor.window": "window",
    "planner.optim.lr": "planner learning rate",
    "executor.optim.lr": "executor learning rate",
}


@dataclass(frozen=True)
class Tile:
    """A number at the top of the page."""

    value: str
    label: str
    detail: str = ""
    coloured: bool = False  # a gain has the colour of gains


@dataclass(frozen=True)
class Section:
    """A table, the comparisons of its averages and the text below it."""

    title: str
    table: Table | None
    comparisons: Sequence[Comparison]
    text: str = ""


def write_report(run_folder: Path | str) -> Path:
    """Writes report.html into a run folder. Parts that the run has not made yet are said to be missing.

    UserError if the folder holds neither config.yaml nor metrics.jsonl, or a file that is not as the run wrote it.
    """
    run = Path(run_folder)
    if not (run / CONFIG).is_file() and not (run / METRICS).is_file():
        raise UserError(f"{run}: is no run folder; accepted: a folder with {CONFIG} or {METRICS}")
    config, metrics = _config(run), read_metrics(run)
    rows, comparisons = read_evaluation(run, Row), read_evaluation(run, Comparison)
    curves = curves_svg(metrics)
    of_all = f" of {config['trainer.iterations']}" if "trainer.iterations" in config else ""
    done = metrics[-1]["step"] if metrics else 0
    random = ", ".join(f"{key}: {config[key]}" for key in WEIGHTS if config.get(key) in RANDOM)
    note = Markup("<strong>Random weights</strong> ({}): plans and videos made with them mean nothing.")
    text = "All methods start from the same noise. Duplicates: share of frames with an extra or misplaced shape, lower "
    text += "is better."
    section = Section("Temporal order on held-out prompts", build_table(rows) if rows else None, comparisons, text)
    return _write_page(
        run / REPORT,
        name=run.resolve().name,
        subtitle=f"TempAct run, {done}{of_all} iterations. Report of {datetime.now(UTC):%Y-%m-%d %H:%M UTC}.",
        note=note.format(random) if random else "",
        tiles=_tiles(rows, comparisons, metrics),
        sections=[section],
        missing=[one for one in read_evaluation(run, MethodScores) if one.missing],
        showcase=_showcase(run),
        facts=[(label, config[key]) for key, label in SUMMARY.items() if key in config],
        run={
            "curves": _data_uri(curves, ".svg") if curves else None,
            "missing_rewards": _missing_rewards(metrics),
            "timings": _timings(metrics),
            "samples": _samples(run),
            "sessions": [(session, _hardware(session)) for session in read_environment(run)],
            "config": config,
        },
    )


def write_results(evaluation: Evaluation, results: Results, strips: int) -> list[Path]:
    """Writes temporal-order.json, .md and .html of a finished evaluation of the benchmark; returns their paths.

    strips: prompts of each set that are shown with their film strips.
    """
    sections = [
        Section(title, build_table(results.rows[metric]), results.comparisons[metric])
        for metric, title in BENCHMARK_METRICS.items()
    ]
    return [
        *write_tables(evaluation.folder, results),
        _write_page(
            evaluation.folder / RESULTS,
            name="Temporal Order Benchmark",
            subtitle="",
            note=results.note,
            tiles=(),
            sections=sections,
            missing=results.missing,
            showcase=list(_benchmark_strips(evaluation, strips)),
            facts=results.about.items(),
            run=None,
        ),
    ]


def _write_page(path: Path, **parts: object) -> Path:
    """Renders the template. Everything is escaped: prompts and plans come from outside."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["score"] = lambda value: "missing" if value is None else f"{value:.2f}"
    environment.filters |= {"percent": percent, "gained": gained}
    write_atomic(path, environment.get_template("report.html.j2").render(own=BOTH, average=AVERAGE, **parts))
    return path


def _benchmark_strips(evaluation: Evaluation, count: int) -> Iterator[dict[str, Any]]:
    """The first `count` prompts of each set with a film strip: a row for every method, which shows the first seed's
    video and its scores."""
    for videos in evaluation.samples(count):
        rows = []
        for video in videos:
            told = []
            for judge in evaluation.suite.judges:
                score = evaluation.score(video.prompt.prompt_id, video.method, 0, judge.name, COMBINED)
                told.append(f"{judge.name} {'missing' if math.isnan(score) else format(score, '.2f')}")
            rows.append(StripRow(f"{video.method.name}: {', '.join(told)}", video.frames, video.steps))
        file = io.BytesIO()
        prompt = videos[0].prompt
        film_strip(rows, prompt.text).save(file, "PNG", optimize=True)
        yield {"prompt": prompt.text, "strip": _data_uri(file.getvalue(), ".png"), "steps": prompt.steps, "videos": ()}


def _config(run: Path) -> dict[str, object]:
    """Dotted keys of config.yaml."""
    if not (run / CONFIG).is_file():
        return {}
    with reading(run / CONFIG):
        return dict(dotted(yaml.safe_load((run / CONFIG).read_text()) or {}, sections_of(RunConfig)))


def _tiles(rows: Sequence[Row], comparisons: Sequence[Comparison], metrics: Sequence[dict]) -> list[Tile]:
    found = {(row.method, row.judge): row for row in rows if row.set == AVERAGE}
    tiles = []
    before, after = found.get((STEP, AVERAGE)), found.get((BOTH, AVERAGE))
    if before and after and not math.isnan(after.score - before.score):
        low_high = [one.relative_ci95 for one in comparisons if (one.method, one.set) == (BOTH, AVERAGE)]
        detail = f"95% interval {percent(low_high[0][0])} to {percent(low_high[0][1])}" if low_high else ""
        change = percent(relative_change(after.score, before.score))
        tiles.append(Tile(change, "temporal order, against step-prompt", detail, coloured=True))
        tiles.append(Tile(f"{before.score:.3f} \u2192 {after.score:.3f}", "average score, before and after"))
    before, after = found.get((STEP, PICTURE_QUALITY)), found.get((BOTH, PICTURE_QUALITY))
    if before and after:
        detail = f"{before.score:.3f} \u2192 {after.score:.3f}"
        tiles.append(Tile(percent(relative_change(after.score, before.score)), "picture quality", detail))
    if metrics:
        tiles.append(Tile(duration(metrics[-1]["time_s"]), "training time", f"{metrics[-1]['step']} iterations"))
    return tiles


def _missing_rewards(metrics: Sequence[dict]) -> list[tuple[str, float]]:
    """(reward, mean share that was missing) of the rewards that were ever missing."""
    shares = []
    for key in sorted({key for row in metrics for key in row}):
        if key.startswith("rewards/") and key.endswith("/missing"):
            values = [row[key] for row in metrics if row.get(key) is not None]
            if sum(values) > 0:
                shares.append((key.split("/")[1].replace("_", " "), sum(values) / len(values)))
    return shares


def _timings(metrics: Sequence[dict]) -> list[tuple[str, float, float]]:
    """(phase, mean seconds an iteration, share of the phases' time)."""
    names = list(dict.fromkeys(key for row in metrics for key in row if key.startswith("timing_s/")))
    totals = {name: sum(row.get(name) or 0.0 for row in metrics) for name in names}
    everything = sum(totals.values()) or 1.0
    return [(name.split("/", 1)[1], total / len(metrics), total / everything) for name, total in totals.items()]


def _showcase(run: Path) -> list[dict]:
    """Entries of videos/index.json with their pictures inlined; a picture that is gone is left out."""
    index = run / VIDEOS / INDEX
    if not index.is_file():
        return []
    with reading(index):
        entries = json.loads(index.read_text())
        for entry in entries:
            entry["steps"] = ()  # as their plans show them
            entry["strip"] = _picture(run / VIDEOS / Path(entry["strip"]).name)
            for video in entry["videos"]:
                video["gif"] = _picture(run / VIDEOS / Path(video["gif"]).name)
    return entries


def _samples(run: Path) -> dict | None:
    """Worst and best continuations of the newest sample table, with their film strips where the run made them."""
    tables = sorted((run / SAMPLES).glob("step-*.jsonl"))
    if not tables:
        return None
    with reading(tables[-1]):
        rows = [json.loads(line) for line in tables[-1].read_text().splitlines()]
        scored = [row for row in rows if row["temporal_following"] is not None]
        scored.sort(key=lambda row: row["temporal_following"])
    if not scored:
        return None
    shown = min(EXTREMES, max(1, len(scored) // 2))
    parts = [
        (name, part, _picture(tables[-1].with_name(f"{tables[-1].stem}-{name}.png")))
        for name, part in (("worst", scored[:shown]), ("best", scored[::-1][:shown]))
    ]
    return {"step": rows[0]["step"], "unscored": len(rows) - len(scored), "parts": parts}


def _hardware(session: Session) -> str:
    return ", ".join([*session.gpus, f"{session.cpu} ({session.cores} cores)", f"{session.memory_gib:.0f} GiB memory"])


def _picture(path: Path) -> str | None:
    return _data_uri(path.read_bytes(), path.suffix) if path.is_file() else None


def _data_uri(data: bytes, suffix: str) -> str:
    return f"data:{MIME[suffix]};base64,{base64.b64encode(data).decode()}"
