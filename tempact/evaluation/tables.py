"""Tables of an evaluation as text: methods by sets and judges, their average and its change, picture quality; and the
Temporal Order Benchmark's results as JSON and Markdown.

Videos named as VBench reads them.

VBench's own prompts: `<prompt>-<index>.mp4`, five of each prompt. A prompt that no file name can hold (too long, or
with a slash) or that stands in another set too gets its prompt_id instead; for such prompts, and for any others,
`<condition>-prompts.json` maps every file to its prompt, as VBench's mode `custom_input` takes it with `--prompt_file`.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempact.evaluation import (
    BASELINES,
    BOTH,
    EXECUTOR_ONLY,
    OVERFITTING,
    PLANNER_ONLY,
    SEEDS,
    SINGLE,
    STEP,
)
from tempact.evaluation.harness import SETTINGS, Evaluation
from tempact.evaluation.judges import COMBINED, CUT, TEMPORAL_ORDER, Suite
from tempact.evaluation.prompts import SETS
from tempact.evaluation.statistics import (
    AVERAGE,
    CONFIRMS,
    NOT_TEMPORAL,
    PICKSCORE,
    Bootstrap,
    Comparison,
    MethodScores,
    Origin,
    Row,
    plain,
)
from tempact.files import safe_name, write_atomic
from tempact.shapeworld import STRICT_SETS

log = logging.getLogger(__name__)

# of the paper's rows, then those of overfitting; whatever else was evaluated follows
ORDER = (SINGLE, STEP, BOTH, PLANNER_ONLY, EXECUTOR_ONLY, *(method.name for method in OVERFITTING))
JSON, MARKDOWN = "temporal-order.json", "temporal-order.md"
NAME_WIDTH, METHOD_WIDTH = 20, 9  # columns of a table in a terminal
MOST_METHODS = 6  # side by side there
RANDOM_WEIGHTS = "random weights"  # in the name of policies that have no others
# the published table does not say which of the two it shows (docs/algorithm.md section 7): both are reported
METRICS = {COMBINED: "Combined score", TEMPORAL_ORDER: "Temporal order alone"}


@dataclass(frozen=True)
class Cell:
    """Texts of a cell; `change` is set on averages of methods that have a baseline to compare with."""

    score: str
    interval: str = ""
    change: str = ""


@dataclass(frozen=True)
class Table:
    """`columns` head the cells of every row; a row is a method's name and its cells."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def build_table(rows: Sequence[Row], comparisons: Sequence[Comparison] = ()) -> Table:
    """Columns: simple and hard under each judge, the average with its change against step-prompt, or the method's own
    baseline of BASELINES, quality and duplicates averaged over the sets. A cell that nobody measured is a dash.

    Changes are those of the paired `comparisons`: over the videos that both methods have scores of.
    """
    judges = [judge for judge in dict.fromkeys(row.judge for row in rows) if judge not in (AVERAGE, *NOT_TEMPORAL)]
    sets = _ordered([row.set for row in rows if row.set != AVERAGE], (*SETS, *STRICT_SETS))
    keys = [(name, judge) for judge in judges for name in sets] + [(AVERAGE, AVERAGE)]
    keys += [(AVERAGE, judge) for judge in NOT_TEMPORAL if any(row.judge == judge for row in rows)]
    found = {(row.method, row.set, row.judge): row for row in rows}
    lines = []
    for method in _ordered([row.method for row in rows], ORDER):
        change = average_change(comparisons, method)
        gain = percent(change.relative) if change else ""
        cells = (_cell(found.get((method, *key)), gain if key == (AVERAGE, AVERAGE) else "") for key in keys)
        lines.append((method, tuple(cells)))
    headings = (judge if name == AVERAGE else f"{name}, {judge}" for name, judge in keys)
    return Table(tuple(headings), tuple(lines))


def narrow_table(rows: Sequence[Row], comparisons: Sequence[Comparison]) -> list[str]:
    """Lines of at most 80 characters: a column for every method, the mean scores by set and judge below; in parts where
    there are more than MOST_METHODS."""
    table = build_table(rows, comparisons)
    size = math.ceil(len(table.rows) / math.ceil(len(table.rows) / MOST_METHODS))
    parts = [table.rows[first : first + size] for first in range(0, len(table.rows), size)]
    shown = [line for part in parts for line in _side_by_side(table.columns, part)]
    one = average_change(comparisons, BOTH)
    if one is not None:
        change = ranged(percent(one.relative), span(one.relative_ci95, percent))
        if math.isnan(one.relative):  # of a baseline of 0
            change = ranged(f"{one.difference:+.3f}", span(one.ci95, "{:+.3f}".format))
        shown.append(f"{BOTH} against {one.baseline}, video by video: {change}")
    baselines = {name: BASELINES.get(name, STEP) for name, _ in table.rows}
    others = [f"{name}: change against {baseline}" for name, baseline in baselines.items() if baseline != STEP]
    return [*shown, *others, *confirmed_text(comparisons)]


def _side_by_side(columns: Sequence[str], rows: Sequence[tuple[str, tuple[Cell, ...]]]) -> list[str]:
    """Lines of `narrow_table`, of some of its methods."""
    heads = [textwrap.wrap(method, METHOD_WIDTH) for method, _ in rows]
    depth = max(map(len, heads))
    lines = [("", *column) for column in zip(*([""] * (depth - len(head)) + head for head in heads), strict=True)]
    for i, column in enumerate(columns):
        lines.append((column, *(cells[i].score for _, cells in rows)))
        if any(cells[i].change for _, cells in rows):
            lines.append(("  change", *(cells[i].change for _, cells in rows)))
    return [f"{line[0]:<{NAME_WIDTH}}" + "".join(f"{cell:>{METHOD_WIDTH + 1}}" for cell in line[1:]) for line in lines]


def confirmed_text(comparisons: Sequence[Comparison], method: str = BOTH) -> list[str]:
    """A sentence on the share of a method's gain that the held-out judge confirms; none where there is no gain, or no
    such judge."""
    one = average_change(comparisons, method)
    if one is None or math.isnan(one.confirmed):
        return []
    judge = next(each.judge for each in comparisons if each.method == method and each.judge in CONFIRMS)
    share = ranged(f"{one.confirmed:.0%}", span(one.confirmed_ci95, "{:.0%}".format))
    return [f"Of the gain by {CONFIRMS[judge]}, {judge} confirms {share}."]


def average_change(comparisons: Sequence[Comparison], method: str, judge: str = AVERAGE) -> Comparison | None:
    """The paired comparison of a method's average with step prompts, or with its own baseline of BASELINES.

    It is of temporal order, or of a judge of NOT_TEMPORAL. None where there is none, also for want of a video that both
    have scores of.
    """
    keys = (method, AVERAGE, judge)
    against = BASELINES.get(method, STEP)
    found = (one for one in comparisons if (one.method, one.set, one.judge) == keys and one.baseline == against)
    return next((one for one in found if not math.isnan(one.difference)), None)


def markdown_table(rows: Sequence[Row], comparisons: Sequence[Comparison] = ()) -> str:
    """Markdown with aligned columns, readable as plain text; the average carries interval and change."""
    table = build_table(rows, comparisons)
    lines = [["method", *table.columns]]
    for method, cells in table.rows:
        shown = []
        for column, cell in zip(table.columns, cells, strict=True):
            score = ranged(cell.score, cell.interval if column == AVERAGE else "")
            shown.append(f"{score} {cell.change}".strip())
        lines.append([method, *shown])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines.insert(1, rule)
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )


def origin_text(origin: Origin) -> str:
    """What a table was obtained with, as a sentence."""
    videos = " and ".join(f"{count} {name}" for name, count in origin.videos.items())
    weights = f"{origin.checkpoint} (weights {origin.weights})".strip()
    tests = f", instructions and judges {origin.tests}" if origin.tests else ""
    return f"{origin.split.capitalize()} split, seed {origin.seed}, {videos} videos of each method, {weights}{tests}."


def percent(change: float) -> str:
    """ "+20.8%"; nothing for NaN."""
    return "" if math.isnan(change) else f"{change:+.1%}"


def gained(change: str) -> bool:
    """Whether the number that `percent` shows is above zero."""
    return change.startswith("+") and change != percent(0.0)


def span(low_high: tuple[float, float], form: Callable[[float], str]) -> str:
    """An interval's ends as `form` writes them, "low, high"; nothing where there is no interval."""
    return "" if math.isnan(sum(low_high)) else ", ".join(map(form, low_high))


def ranged(number: str, interval: str) -> str:
    """A number with its interval, as `span` writes it, in brackets."""
    return f"{number} [{interval}]" if interval else number


def _cell(row: Row | None, change: str) -> Cell:
    if row is None or math.isnan(row.score):
        return Cell("\u2013")
    return Cell(f"{row.score:.3f}", span(row.ci95, "{:.3f}".format), change)


def _ordered(names: Sequence[str], first: Sequence[str]) -> list[str]:
    """Unique names, those of `first` in its order before the others."""
    return sorted(dict.fromkeys(names), key=lambda name: first.index(name) if name in first else len(first))


@dataclass(frozen=True)
class Results:
    """An evaluation of the benchmark: scores, table rows and comparisons with step prompts by metric, and how it was
    measured."""

    scores: dict[str, list[MethodScores]]
    rows: dict[str, list[Row]]
    comparisons: dict[str, list[Comparison]]
    settings: dict[str, Any]
    about: dict[str, str]

    @property
    def missing(self) -> list[MethodScores]:
        """The cells that miss scores."""
        return [one for one in self.scores[COMBINED] if one.missing]

    @property
    def note(self) -> str:
        """A warning above the tables; "" if there is none."""
        return "Random weights: the videos are noise." if RANDOM_WEIGHTS in self.about["policies"] else ""


def gather(evaluation: Evaluation, resamples: int) -> Results:
    """The tables of a finished evaluation; intervals are over prompts, each drawn with all of its seeds."""
    suite = evaluation.suite
    bootstrap = Bootstrap(resamples, suite.seed, suite.seeds)
    scores = {metric: evaluation.method_scores(metric) for metric in METRICS}
    rows = {metric: bootstrap.rows(own) for metric, own in scores.items()}
    comparisons = {metric: bootstrap.compare(own) for metric, own in scores.items()}
    cut = {row["prompt_id"] for row in evaluation.scores if (row["scores"] or {}).get(CUT)}
    cut &= {prompt.prompt_id for prompt in suite.all_prompts}
    known = json.loads((evaluation.folder / SETTINGS).read_text(encoding="utf-8"))
    settings = {key: known[key] for key in suite.settings(known["policies"])}  # the folder may hold more than this
    return Results(scores, rows, comparisons, settings, _about(suite, settings, len(cut)))


def write_tables(folder: Path, results: Results) -> list[Path]:
    """Writes temporal-order.json and temporal-order.md; returns their paths."""
    content = {
        "suite": "temporal-order",
        "about": results.about,
        "settings": results.settings,
        "tables": plain(results.rows),
        "comparisons": plain(results.comparisons),
        "dropped": [
            {"method": s.method, "set": s.set, "judge": s.judge, "missing": s.missing, "videos": len(s.scores)}
            for s in results.scores[COMBINED]
        ],
    }
    write_atomic(folder / JSON, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    measured = "\n".join(f"- {key}: {value}" for key, value in results.about.items())
    write_atomic(folder / MARKDOWN, f"{markdown(results)}\n\n## How it was measured\n\n{measured}\n")
    return [folder / JSON, folder / MARKDOWN]


def markdown(results: Results) -> str:
    """The tables, and how many scores the means leave out."""
    parts = ["# Temporal Order Benchmark", results.note]
    for metric, title in METRICS.items():
        parts += [f"## {title}", _table(results, metric), _changes(results.comparisons[metric])]
    missing = [
        f"- {one.judge}: {one.missing} of {len(one.scores)} videos ({one.method}, {one.set})" for one in results.missing
    ]
    nothing = f"None of {sum(len(one.scores) for one in results.scores[COMBINED])} scores."
    return "\n\n".join(part for part in [*parts, "## Left out of the means", "\n".join(missing) or nothing] if part)


def _table(results: Results, metric: str) -> str:
    return markdown_table(results.rows[metric], results.comparisons[metric])


def _changes(comparisons: Sequence[Comparison]) -> str:
    """Every method's average against step prompts, video by video."""
    lines = []
    for method in dict.fromkeys(one.method for one in comparisons):
        one, told = average_change(comparisons, method), ["no video has the scores of both"]
        if one is not None:
            told = [ranged(f"{one.difference:+.3f}", span(one.ci95, "{:+.3f}".format)),
                    ranged(percent(one.relative), span(one.relative_ci95, percent)), f"{one.n} videos"]  # fmt: skip
        sentence = f"{method} against {BASELINES.get(method, STEP)}, video by video: {', '.join(filter(None, told))}."
        lines.append(" ".join([sentence, *confirmed_text(comparisons, method)]))
    return "\n\n".join(lines)


def _about(suite: Suite, settings: Mapping[str, Any], cut: int) -> dict[str, str]:
    """How it was measured. cut: prompts of which PickScore did not read the end."""
    pickscore = f"{settings['frames.PickScore']} frames, first and last included, against the whole prompt; "
    pickscore += f"{cut} of {len(suite.all_prompts)} prompts are longer than what CLIP reads and were cut"
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
        "intervals": f"95%, bootstrap over prompts; changes are against {STEP}",
    }


FOLDER, PROMPTS = "vbench", "prompts.json"
NAME_BYTES = 255  # longest file name of usual file systems
SAMPLES = 5  # videos of a prompt that VBench's standard mode wants


def export_vbench(evaluation: Evaluation) -> list[Path]:
    """Copies the videos of a finished evaluation to vbench/<condition>/; returns these folders."""
    suite = evaluation.suite
    if suite.seeds != SAMPLES:
        log.warning("vbench: %d videos of a prompt; VBench's standard mode wants --seeds %d", suite.seeds, SAMPLES)
    made, renamed, ids = [], 0, {prompt.prompt_id for prompt in suite.all_prompts}
    for method in suite.methods:
        target = evaluation.folder / FOLDER / safe_name(method.name)
        target.mkdir(parents=True, exist_ok=True)
        told: dict[str, str] = {}
        for prompt in suite.all_prompts:
            for seed in range(suite.seeds):
                video = evaluation.video(method, prompt, seed)
                assert video is not None, (prompt.prompt_id, method.name, seed)
                name = f"{prompt.text}-{seed}.mp4"
                unwritable = "/" in name or "\0" in name or name.startswith(".") or len(name.encode()) > NAME_BYTES
                if unwritable or name in told or prompt.text in ids:
                    name, renamed = f"{prompt.prompt_id}-{seed}.mp4", renamed + 1
                # beside the folder, as the list below: VBench takes every file in it for a video
                partial = target.parent / f".{target.name}-{prompt.prompt_id}-{seed}.partial"
                shutil.copyfile(evaluation.folder / video["file"], partial)
                partial.replace(target / name)
                told[name] = prompt.text
        write_atomic(target.parent / f"{target.name}-{PROMPTS}", json.dumps(told, indent=1, ensure_ascii=False))
        made.append(target)
    if renamed:
        log.warning("vbench: %d videos are not named by their prompts; evaluate with --prompt_file", renamed)
    return made
