"""What an evaluation of the benchmark found: the paper's table as JSON, Markdown and one offline HTML file."""

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

from tempact.infra.files import write_atomic
from tempact.infra.video import StripRow, film_strip
from tempact.temporal_order.conditions import Method
from tempact.temporal_order.frames import read_video
from tempact.temporal_order.judging import COMBINED, CUT, TEMPORAL_ORDER
from tempact.temporal_order.ledger import Ledger
from tempact.temporal_order.making import Maker
from tempact.temporal_order.options import SEEDS
from tempact.temporal_order.prompts import OrderPrompt
from tempact.temporal_order.protocol import (
    AVERAGE,
    BASELINE,
    PICKSCORE,
    Comparison,
    MethodScores,
    Row,
    compare,
    evaluation_rows,
)
from tempact.temporal_order.suite import SETTINGS, Suite
from tempact.temporal_order.table import Table, build_table, markdown_table, percent
from tempact.types import Step

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
