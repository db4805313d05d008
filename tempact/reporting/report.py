"""One offline HTML file that shows a run, also one that is still going."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import jinja2
import yaml

from tempact.errors import UserError
from tempact.evaluation.statistics import (
    AVERAGE,
    BASELINE,
    PICTURE_QUALITY,
    TRAINED,
    MethodScores,
    Row,
    read_comparisons,
    read_evaluation,
    read_scores,
    relative_change,
)
from tempact.evaluation.tables import build_table, gained, percent
from tempact.files import reading, write_atomic
from tempact.reporting.curves import curves_svg
from tempact.reporting.records import METRICS, SAMPLES, Session, duration, read_environment, read_metrics
from tempact.reporting.strips import EXTREMES, INDEX, VIDEOS

REPORT, CONFIG = "report.html", "config.yaml"
# keys of weights, and values in whose place random weights stand
WEIGHTS, RANDOM = ("planner.weights", "executor.weights"), ("random", "random-tiny")
MIME = {".png": "image/png", ".gif": "image/gif", ".svg": "image/svg+xml"}
# config keys worth a place in the header, with what they are called there
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
    gained: bool = False  # shown in the colour of gains


@dataclass(frozen=True)
class Missing:
    """How many scores a judge did not give."""

    method: str
    set: str
    judge: str
    missing: int
    videos: int


def write_report(run_folder: Path | str) -> Path:
    """Writes report.html into a run folder. Parts that the run has not made yet are said to be missing.

    UserError if the folder holds neither config.yaml nor metrics.jsonl, or a file that is not as the run wrote it.
    """
    run = Path(run_folder)
    if not (run / CONFIG).is_file() and not (run / METRICS).is_file():
        raise UserError(f"{run}: is no run folder; accepted: a folder with {CONFIG} or {METRICS}")
    config, metrics, rows = _config(run), read_metrics(run), read_evaluation(run)
    curves = curves_svg(metrics)
    html = _environment().get_template("report.html.j2").render(
        name=run.resolve().name,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        iterations=config.get("trainer.iterations"),
        done=metrics[-1]["step"] if metrics else 0,
        tiles=_tiles(run, rows, metrics),
        table=build_table(rows) if rows else None,
        comparisons=[one for one in read_comparisons(run) if one.set == AVERAGE],
        missing=_missing(read_scores(run)),
        showcase=_showcase(run),
        curves=_data_uri(curves, ".svg") if curves else None,
        missing_rewards=_missing_rewards(metrics),
        timings=_timings(metrics),
        samples=_samples(run),
        random=[f"{key}: {config[key]}" for key in WEIGHTS if config.get(key) in RANDOM],
        summary=[(label, config[key]) for key, label in SUMMARY.items() if key in config],
        config=config,
        sessions=[(session, _hardware(session)) for session in read_environment(run)],
    )  # fmt: skip
    path = run / REPORT
    write_atomic(path, html)
    return path


def _environment() -> jinja2.Environment:
    """Escapes everything: prompts and plans come from outside."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["score"] = lambda value: "missing" if value is None else f"{value:.2f}"
    environment.filters["percent"] = percent
    return environment


def _config(run: Path) -> dict[str, object]:
    """Dotted keys of config.yaml."""
    if not (run / CONFIG).is_file():
        return {}
    flat: dict[str, object] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            flat[prefix] = value

    with reading(run / CONFIG):
        walk("", yaml.safe_load((run / CONFIG).read_text()) or {})
    return flat


def _tiles(run: Path, rows: Sequence[Row], metrics: Sequence[dict]) -> list[Tile]:
    found = {(row.method, row.judge): row for row in rows if row.set == AVERAGE}
    tiles = []
    before, after = found.get((BASELINE, AVERAGE)), found.get((TRAINED, AVERAGE))
    if before and after and not math.isnan(after.score - before.score):
        detail = ""
        for one in read_comparisons(run):
            if (one.method, one.set) == (TRAINED, AVERAGE):
                detail = f"95% interval {percent(one.relative_ci95[0])} to {percent(one.relative_ci95[1])}"
        change = percent(relative_change(after.score, before.score))
        tiles.append(Tile(change, "temporal order, against step-prompt", detail, gained(change)))
        tiles.append(Tile(f"{before.score:.3f} \u2192 {after.score:.3f}", "average score, before and after"))
    before, after = found.get((BASELINE, PICTURE_QUALITY)), found.get((TRAINED, PICTURE_QUALITY))
    if before and after:
        detail = f"{before.score:.3f} \u2192 {after.score:.3f}"
        tiles.append(Tile(percent(relative_change(after.score, before.score)), "picture quality", detail))
    if metrics:
        tiles.append(Tile(duration(metrics[-1]["time_s"]), "training time", f"{metrics[-1]['step']} iterations"))
    return tiles


def _missing(scores: Sequence[MethodScores]) -> list[Missing]:
    return [Missing(s.method, s.set, s.judge, s.missing, len(s.scores)) for s in scores if s.missing]


def _missing_rewards(metrics: Sequence[dict]) -> list[tuple[str, float]]:
    """(reward, mean share that was missing) of the rewards that were ever missing."""
    shares = []
    for key in sorted(
        {key for row in metrics for key in row if key.startswith("rewards/") and key.endswith("/missing")}
    ):
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
        scored = sorted(
            (row for row in rows if row["temporal_following"] is not None), key=lambda r: r["temporal_following"]
        )
    if not scored:
        return None
    shown = min(EXTREMES, max(1, len(scored) // 2))
    parts = (("worst", scored[:shown]), ("best", scored[::-1][:shown]))
    return {
        "step": rows[0]["step"],
        "unscored": len(rows) - len(scored),
        "parts": [
            (name, part, _picture(tables[-1].with_name(f"{tables[-1].stem}-{name}.png"))) for name, part in parts
        ],
    }


def _hardware(session: Session) -> str:
    return ", ".join([*session.gpus, f"{session.cpu} ({session.cores} cores)", f"{session.memory_gib:.0f} GiB memory"])


def _picture(path: Path) -> str | None:
    return _data_uri(path.read_bytes(), path.suffix) if path.is_file() else None


def _data_uri(data: bytes, suffix: str) -> str:
    return f"data:{MIME[suffix]};base64,{base64.b64encode(data).decode()}"
