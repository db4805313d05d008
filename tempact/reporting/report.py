"""One offline HTML file that shows a run, also one that is still going, or the benchmark's results."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from tempact.cli import dotted
from tempact.config import AlarmConfig, RunConfig, sections_of
from tempact.errors import UserError
from tempact.evaluation import BOTH, STEP
from tempact.evaluation.events import EventRate, read_events
from tempact.evaluation.harness import Evaluation
from tempact.evaluation.judges import COMBINED
from tempact.evaluation.statistics import (
    AVERAGE,
    PICTURE_QUALITY,
    Comparison,
    MethodScores,
    Row,
    read_evaluation,
    read_origin,
)
from tempact.evaluation.tables import METRICS as BENCHMARK_METRICS
from tempact.evaluation.tables import (
    ORDER,
    Cell,
    Results,
    Table,
    average_change,
    build_table,
    confirmed_text,
    gained,
    narrow_table,
    origin_text,
    percent,
    span,
    write_tables,
)
from tempact.files import reading, write_atomic
from tempact.reporting import ENVIRONMENT, METRICS, Session, duration, read_environment, read_metrics
from tempact.reporting.alarms import ALARMS, changes
from tempact.reporting.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, charts, heats
from tempact.reporting.strips import (
    SCORES,
    Film,
    Shown,
    StripRow,
    data_uri,
    read_extremes,
    read_showcase,
    scenes,
    sheet,
)
from tempact.shapeworld.story import KINDS

log = logging.getLogger(__name__)

REPORT, CONFIG, RESULTS = "report.html", "config.yaml", "temporal-order.html"
# keys of weights, and values in whose place random weights stand
WEIGHTS, RANDOM = ("planner.weights", "executor.weights"), ("random", "random-14b", "random-tiny")
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


def is_run(folder: Path) -> bool:
    return (folder / CONFIG).is_file() or (folder / METRICS).is_file()


def write_report(run_folder: Path | str) -> Path:
    """Writes report.html into a run folder. Parts that the run has not made yet are said to be missing.

    UserError if the folder holds neither config.yaml nor metrics.jsonl, or a file that is not as the run wrote it.
    """
    run = Path(run_folder)
    if not is_run(run):
        raise UserError(f"{run}: is no run folder; accepted: a folder with {CONFIG} or {METRICS}")
    config, metrics = _config(run), read_metrics(run)
    rows, comparisons = read_evaluation(run, Row), read_evaluation(run, Comparison)
    of_all = f" of {config['trainer.iterations']}" if "trainer.iterations" in config else ""
    done = metrics[-1]["step"] if metrics else 0
    random = ", ".join(f"{key}: {config[key]}" for key in WEIGHTS if config.get(key) in RANDOM)
    note = Markup("<strong>Random weights</strong> ({}): plans and videos made with them mean nothing.")
    text = "All methods start from the same noise. Duplicates: share of frames with an extra or misplaced shape, lower "
    text += "is better. Picture quality is the training reward itself, clearness is never trained against."
    origin = read_origin(run)
    text = " ".join([text, *confirmed_text(comparisons), *([origin_text(origin)] if origin is not None else [])])
    table = build_table(rows, comparisons) if rows else None
    found_alarms = _alarms(metrics, config)
    section = Section("Temporal order on held-out prompts", table, comparisons, text)
    return _write_page(
        run / REPORT,
        name=run.resolve().name,
        subtitle=f"TempAct run, {done}{of_all} iterations. Report of {datetime.now(UTC):%Y-%m-%d %H:%M UTC}.",
        note=note.format(random) if random else "",
        tiles=_tiles(comparisons, metrics),
        sections=[section],
        missing=[one for one in read_evaluation(run, MethodScores) if one.missing],
        showcase=read_showcase(run),
        facts=[(label, config[key]) for key, label in SUMMARY.items() if key in config],
        alarms=[line for line, _ in found_alarms if line],
        events=_event_table(read_events(run)),
        run={
            "charts": charts(metrics),
            "heats": heats(metrics),
            "alarms": [row for _, row in found_alarms],
            "missing_rewards": _missing_rewards(metrics),
            "timings": _timings(metrics),
            "samples": read_extremes(run),
            "sessions": _sessions(run),
            "config": config,
        },
    )


def leave_report(run_folder: Path | str) -> list[str]:
    """Writes the report of a run that ends, finished or not; lines to end with: its table, if it has one, and where the
    report is. Never raises: without a report there is a warning, for a run that has not begun there is nothing."""
    run = Path(run_folder)
    try:
        if not is_run(run):
            return []
        rows, comparisons = read_evaluation(run, Row), read_evaluation(run, Comparison)
        origin = read_origin(run)
        made_by = [f"table of {origin.checkpoint}"] if origin is not None and origin.checkpoint else []
        return [*([*narrow_table(rows, comparisons), *made_by] if rows else ()), f"report: {write_report(run)}"]
    except Exception as error:  # whatever it is, the run is saved and has an exit code of its own
        log.debug("no report", exc_info=True)
        log.warning("%s: found no way to write the report: %s", run, " ".join(str(error).split()))
        return []


def write_results(evaluation: Evaluation, results: Results, strips: int) -> list[Path]:
    """Writes temporal-order.json, .md and .html of a finished evaluation of the benchmark; returns their paths.

    strips: prompts of each set that are shown with their film strips.
    """
    sections = [
        Section(title, build_table(results.rows[metric], results.comparisons[metric]), results.comparisons[metric])
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
            alarms=(),
            events=None,
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
    environment.filters["picture"] = data_uri
    environment.filters["score"] = lambda value: "missing" if value is None else f"{value:.2f}"
    environment.filters |= {"percent": percent, "gained": gained}
    environment.filters["signed_span"] = lambda ends: span(ends, "{:+.3f}".format)
    environment.filters["percent_span"] = lambda ends: span(ends, percent)
    page = environment.get_template("report.html.j2").render(
        own=BOTH, step=STEP, average=AVERAGE, scores=SCORES, box=(WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM), **parts
    )
    write_atomic(path, page.encode("utf-8", "replace"))  # of texts from outside, half a surrogate pair
    return path


def _benchmark_strips(evaluation: Evaluation, count: int) -> Iterator[Shown]:
    """The first `count` prompts of each set: of every method the first seed's video and its scores."""
    for videos in evaluation.samples(count):
        films = []
        for video in videos:
            told = []
            for judge in evaluation.suite.judges:
                score = evaluation.score(video.prompt.prompt_id, video.method, 0, judge.name, COMBINED)
                told.append(f"{judge.name} {'missing' if math.isnan(score) else format(score, '.2f')}")
            row = StripRow(f"{video.method.name}: {', '.join(told)}", video.frames, video.steps)
            films.append(Film(row.title, scenes(sheet(row), row.steps)))
        yield Shown(videos[0].prompt.text, films, steps=videos[0].prompt.steps)


def _config(run: Path) -> dict[str, object]:
    """Dotted keys of config.yaml."""
    if not (run / CONFIG).is_file():
        return {}
    with reading(run / CONFIG):
        return dict(dotted(yaml.safe_load((run / CONFIG).read_text(encoding="utf-8")) or {}, sections_of(RunConfig)))


def _tiles(comparisons: Sequence[Comparison], metrics: Sequence[dict]) -> list[Tile]:
    tiles = []
    order, quality = (average_change(comparisons, BOTH, judge) for judge in (AVERAGE, PICTURE_QUALITY))
    if order is not None:
        ends = span(order.relative_ci95, percent)
        detail = f"95% interval {ends.replace(', ', ' to ')}" if ends else ""
        tiles.append(Tile(percent(order.relative), "temporal order, against step-prompt", detail, coloured=True))
        if not math.isnan(sum(order.means)):  # a table of an older version has none
            tiles.append(Tile(_before_after(order), "average score, before and after"))
    if quality is not None:
        tiles.append(Tile(percent(quality.relative), "picture quality", _before_after(quality)))
    if metrics:
        tiles.append(Tile(duration(metrics[-1]["time_s"]), "training time", f"{metrics[-1]['step']} iterations"))
    return tiles


def _before_after(one: Comparison) -> str:
    return "{:.3f} \u2192 {:.3f}".format(*one.means)


def _alarms(metrics: Sequence[dict], config: dict[str, object]) -> list[tuple[str, dict[str, Any]]]:
    """Of every signal that can be compared with its start: the alarm in words, if it is one now, and its row."""
    prefix = "alarms."
    given: dict[str, Any] = {key.removeprefix(prefix): v for key, v in config.items() if key.startswith(prefix)}
    rows = []
    for change in changes(metrics, AlarmConfig(**given)):
        steps = [row["step"] for row in metrics if row.get(f"{ALARMS}{change.name}")]
        told = f"iterations {steps[0]} to {steps[-1]}" if steps else "none"
        rows.append((change.line() if change.alarm else "", {"change": change, "alarm": told}))
    return rows


def _event_table(rates: Sequence[EventRate]) -> Table | None:
    """A row for every method, a column for every kind of event; None where nothing is known of events."""
    kinds = {one.kind for one in rates}
    methods = sorted(dict.fromkeys(one.method for one in rates), key=lambda name: (*ORDER, name).index(name))
    found = {(one.method, one.kind): one for one in rates}

    def cell(method: str, kind: str) -> Cell:
        one = found.get((method, kind))
        return Cell(f"{one.share:.2f}", span(one.ci95, "{:.2f}".format)) if one else Cell("\u2013")

    columns = [kind for kind in KINDS if kind in kinds]
    rows = tuple((method, tuple(cell(method, kind) for kind in columns)) for method in methods)
    return Table(tuple(columns), rows) if rates else None


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


def _sessions(run: Path) -> list[tuple[Session, str]]:
    """Every start of the run, and its hardware in words."""
    found = read_environment(run)
    with reading(run / ENVIRONMENT):
        return [
            (one, ", ".join([*one.gpus, f"{one.cpu} ({one.cores} cores)", f"{one.memory_gib:.0f} GiB memory"]))
            for one in found
        ]
