"""The table of the paper: methods by sets and judges, their average and what it gained, picture quality.

What an evaluation of the benchmark found: the paper's table as JSON, Markdown and one offline HTML file.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2

from tempact.evaluation.harness import SETTINGS, Maker, Suite
from tempact.evaluation.judges import COMBINED, CUT, TEMPORAL_ORDER, read_video
from tempact.evaluation.ledger import Ledger
from tempact.evaluation.methods import Method
from tempact.evaluation.options import SEEDS
from tempact.evaluation.statistics import (
    AVERAGE,
    BASELINE,
    NOT_TEMPORAL,
    PICKSCORE,
    TRAINED,
    Comparison,
    MethodScores,
    Row,
    compare,
    evaluation_rows,
    relative_change,
)
from tempact.evaluation.temporal_order.prompts import OrderPrompt
from tempact.files import write_atomic
from tempact.types import Step
from tempact.video import StripRow, film_strip

# rows in the paper's order, then whatever else was evaluated
METHODS = ("single-prompt", BASELINE, TRAINED, "planner only", "executor only")
SETS = ("simple", "hard")


@dataclass(frozen=True)
class Cell:
    """Texts of a cell; `change` is set on averages of methods that have a baseline to compare with."""

    score: str
    interval: str = ""
    change: str = ""

    @property
    def gained(self) -> bool:
        """Is there a change, and is it better, as it is shown?"""
        return gained(self.change)


@dataclass(frozen=True)
class Table:
    """`columns` head the cells of every row."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def build_table(rows: Sequence[Row]) -> Table:
    """Columns: simple and hard under each judge, the average with its change against step-prompt, quality and
    duplicates averaged over the sets. A cell that nobody measured is a dash."""
    judges = [judge for judge in dict.fromkeys(row.judge for row in rows) if judge not in (AVERAGE, *NOT_TEMPORAL)]
    sets = _ordered([row.set for row in rows if row.set != AVERAGE], SETS)
    keys = [(name, judge) for judge in judges for name in sets] + [(AVERAGE, AVERAGE)]
    keys += [(AVERAGE, judge) for judge in NOT_TEMPORAL if any(row.judge == judge for row in rows)]
    found = {(row.method, row.set, row.judge): row for row in rows}
    base = found.get((BASELINE, AVERAGE, AVERAGE))
    lines = []
    for method in _ordered([row.method for row in rows], METHODS):
        cells = [_cell(found.get((method, *key)), base if key == (AVERAGE, AVERAGE) else None) for key in keys]
        lines.append((method, tuple(cells)))
    return Table(tuple(_heading(*key) for key in keys), tuple(lines))


def markdown_table(rows: Sequence[Row]) -> str:
    """Markdown with aligned columns, readable as plain text; the average carries interval and change."""
    table = build_table(rows)
    lines = [["method", *table.columns]]
    for method, cells in table.rows:
        shown = []
        for column, cell in zip(table.columns, cells, strict=True):
            parts = (cell.score, f"[{cell.interval}]" if column == AVERAGE and cell.interval else "", cell.change)
            shown.append(" ".join(part for part in parts if part))
        lines.append([method, *shown])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [_markdown_line([cell.ljust(width) for cell, width in zip(line, widths, strict=True)]) for line in lines]
    rule = _markdown_line(["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)])
    return "\n".join([text[0], rule, *text[1:]])


def _cell(row: Row | None, base: Row | None) -> Cell:
    if row is None or math.isnan(row.score):
        return Cell("\u2013")
    low, high = row.ci95
    change = "" if base is None or base is row else percent(relative_change(row.score, base.score))
    return Cell(f"{row.score:.3f}", f"{low:.3f}, {high:.3f}", change)


def percent(change: float) -> str:
    """ "+20.8%"; nothing for NaN."""
    return "" if math.isnan(change) else f"{change:+.1%}"


def gained(change: str) -> bool:
    """Is what `percent` shows above zero?"""
    return change.startswith("+") and change != percent(0.0)


def _heading(set_name: str, judge: str) -> str:
    if judge == AVERAGE:
        return AVERAGE
    return judge if set_name == AVERAGE else f"{set_name}, {judge}"


def _ordered(names: Sequence[str], first: Sequence[str]) -> list[str]:
    """Unique names, those of `first` in its order before the others."""
    return sorted(dict.fromkeys(names), key=lambda name: first.index(name) if name in first else len(first))


def _markdown_line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


JSON, MARKDOWN, HTML = "temporal-order.json", "temporal-order.md", "temporal-order.html"
RANDOM_WEIGHTS = "random weights"  # in the name of policies that have no others
# which of the two the published table shows is not known (ALGORITHM.md section 7): both are reported
METRICS = {COMBINED: "Combined score", TEMPORAL_ORDER: "Temporal order alone"}


@dataclass(frozen=True)
class Dropped:
    """Videos without a score, which are left out of the means."""

    method: str
    set: str
    judge: str
    missing: int
    videos: int


@dataclass(frozen=True)
class Findings:
    """One metric: the cells and averages, every condition against step prompts, and what was left out."""

    metric: str
    rows: list[Row]
    comparisons: list[Comparison]


@dataclass(frozen=True)
class Results:
    """cut: prompts of which PickScore did not read the end."""

    findings: list[Findings]
    dropped: list[Dropped]
    cut: int


def gather(suite: Suite, ledger: Ledger, resamples: int, seed: int) -> Results:
    """The tables of a finished evaluation; intervals are over prompts, each drawn with all of its seeds."""
    findings, dropped = [], []
    for metric in METRICS:
        scores = []
        for method in suite.methods:
            for name, prompts in suite.prompts.items():
                for judge in suite.judges:
                    field = PICKSCORE if judge.name == PICKSCORE else metric
                    scores.append(_scores(ledger, method, name, prompts, suite.seeds, judge.name, field))
        findings.append(
            Findings(
                metric,
                evaluation_rows(scores, resamples, seed, per_prompt=suite.seeds),
                compare(scores, resamples, seed, per_prompt=suite.seeds),
            )
        )
        dropped = [Dropped(one.method, one.set, one.judge, one.missing, len(one.scores)) for one in scores]
    cut = {row["prompt_id"] for row in ledger if (row["scores"] or {}).get(CUT)}
    chosen = {prompt.prompt_id for prompts in suite.prompts.values() for prompt in prompts}
    return Results(findings, dropped, len(cut & chosen))


def _scores(
    ledger: Ledger, method: Method, name: str, prompts: Sequence[OrderPrompt], seeds: int, judge: str, field: str
) -> MethodScores:
    """Scores of a cell, prompt by prompt, each with its seeds; NaN where the verdict is missing."""
    found = []
    for prompt in prompts:
        for seed in range(seeds):
            row = ledger.get((prompt.prompt_id, method.name, seed, judge))
            assert row is not None, f"{prompt.prompt_id}, {method.name}, {seed}, {judge}: not evaluated"
            found.append(math.nan if row["scores"] is None else row["scores"][field])
    return MethodScores(method.name, name, judge, found)


def write_results(
    folder: Path, suite: Suite, maker: Maker, ledger: Ledger, results: Results, strips: int
) -> list[Path]:  # fmt: skip
    """Writes the three files; `strips` prompts of each set are shown with their film strips. Returns their paths."""
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    about = _about(suite, settings, results)
    plain = {
        "suite": "temporal-order",
        "about": about,
        "settings": settings,
        "tables": {one.metric: [_plain(row) for row in one.rows] for one in results.findings},
        "comparisons": {one.metric: [_plain(row) for row in one.comparisons] for one in results.findings},
        "dropped": [asdict(one) for one in results.dropped],
    }
    paths = [folder / name for name in (JSON, MARKDOWN, HTML)]
    write_atomic(paths[0], json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
    write_atomic(paths[1], markdown(results, about))
    write_atomic(paths[2], _page(results, about, film_strips(folder, suite, maker, ledger, strips)))
    return paths


def markdown(results: Results, about: Mapping[str, str]) -> str:
    """The tables, what was left out, and how it was measured."""
    parts = ["# Temporal Order Benchmark", _note(about)]
    for one in results.findings:
        parts += [f"## {METRICS[one.metric]}", markdown_table(one.rows), _changes(one.comparisons)]
    parts += ["## Left out of the means", dropped_text(results.dropped)]
    if about:
        parts += ["## How it was measured", "\n".join(f"- {key}: {value}" for key, value in about.items())]
    return "\n\n".join(part for part in parts if part) + "\n"


def dropped_text(dropped: Sequence[Dropped]) -> str:
    """One line a cell that misses scores."""
    lines = [
        f"- {one.judge}: {one.missing} of {one.videos} videos ({one.method}, {one.set})"
        for one in dropped
        if one.missing
    ]
    return "\n".join(lines) or f"None of {sum(one.videos for one in dropped)} scores."


def _changes(comparisons: Sequence[Comparison]) -> str:
    """Every condition's average against step prompts, video by video."""
    return "\n".join(
        f"{one.method} against {one.baseline}, video by video: {one.difference:+.3f} [{one.ci95[0]:+.3f}, "
        f"{one.ci95[1]:+.3f}], {percent(one.relative)} [{percent(one.relative_ci95[0])}, "
        f"{percent(one.relative_ci95[1])}], {one.n} videos.\n"
        for one in comparisons
        if one.set == AVERAGE
    ).strip()


def _about(suite: Suite, settings: Mapping[str, Any], results: Results) -> dict[str, str]:
    prompts = sum(len(prompts) for prompts in suite.prompts.values())
    pickscore = f"{settings['frames.PickScore']} frames, first and last included, against the whole prompt; "
    pickscore += f"{results.cut} of {prompts} prompts are longer than what CLIP reads and were cut"
    sets = (f"{len(prompts)} {name} ({suite.frames[name]} latent frames)" for name, prompts in suite.prompts.items())
    return {
        "prompts": ", ".join(sets),
        "seeds": f"{suite.seeds} a prompt from {settings['seed']}; all conditions share noise"
        + (f"; the protocol has {SEEDS} or more" if suite.seeds < SEEDS else ""),
        "policies": str(settings["policies"]),
        "judges": "; ".join(f"{judge.name}: {judge.version}" for judge in suite.judges) or "none",
        "judged frames": ", ".join(f"{settings[f'judged_frames.{name}']} ({name})" for name in suite.prompts)
        + ", evenly spread, first and last included",
        **({PICKSCORE: pickscore} if any(judge.name == PICKSCORE for judge in suite.judges) else {}),
        "intervals": f"95%, bootstrap over prompts; changes are against {BASELINE}",
    }


def _note(about: Mapping[str, str]) -> str:
    """What no reader of the tables may miss; "" if there is nothing."""
    return "Random weights: the videos are noise." if RANDOM_WEIGHTS in about.get("policies", "") else ""


def film_strips(folder: Path, suite: Suite, maker: Maker, ledger: Ledger, count: int) -> list[dict[str, Any]]:
    """The first `count` prompts of each set: text, annotated steps, and a PNG with a row for every condition, which
    shows the first seed's video and its combined scores."""
    shown = []
    for prompts in suite.prompts.values():
        for prompt in prompts[:count]:
            rows = []
            for method in suite.methods:
                video = maker.video(method, prompt, 0)
                assert video is not None, (prompt.prompt_id, method.name)
                steps = tuple(Step(**step) for step in video["steps"])
                title = f"{method.name}: {_scores_told(suite, ledger, method, prompt)}"
                rows.append(StripRow(title, read_video(folder / video["file"]), steps))
            file = io.BytesIO()
            film_strip(rows, prompt.text).save(file, "PNG", optimize=True)
            uri = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
            shown.append({"prompt": prompt, "strip": uri})
    return shown


def _scores_told(suite: Suite, ledger: Ledger, method: Method, prompt: OrderPrompt) -> str:
    """The first seed's scores, judge by judge."""
    told = []
    for judge in suite.judges:
        row = ledger.get((prompt.prompt_id, method.name, 0, judge.name))
        scores = (row and row["scores"]) or {}
        score = scores.get(PICKSCORE if judge.name == PICKSCORE else COMBINED)
        told.append(f"{judge.name} {'missing' if score is None else format(score, '.2f')}")
    return ", ".join(told)


def _page(results: Results, about: Mapping[str, str], strips: list[dict[str, Any]]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    tables: list[tuple[str, Table, list[str]]] = [
        (METRICS[one.metric], build_table(one.rows), _changes(one.comparisons).splitlines()) for one in results.findings
    ]
    left_out = [one for one in results.dropped if one.missing]
    return environment.get_template("results.html.j2").render(
        tables=tables, about=about, note=_note(about), left_out=left_out, strips=strips
    )


def _plain(row: Row | Comparison) -> dict[str, Any]:
    """JSON without NaN."""

    def value(found: Any) -> Any:
        if isinstance(found, list | tuple):
            return [value(one) for one in found]
        if isinstance(found, float):
            return round(found, 6) if math.isfinite(found) else None
        return found

    return {key: value(found) for key, found in asdict(row).items()}
