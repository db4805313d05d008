"""The evaluation protocol (ALGORITHM.md section 7): scores of videos to a table with intervals.

Methods make the same prompts' videos from the same noise, and every set's videos are seen by every judge, so
the i-th scores of one set belong together across methods and judges: the bootstrap draws videos, not scores, and
where a prompt has several videos (seeds), which then stand together, it draws prompts: `per_prompt` is their number.
A missing score (NaN) is dropped from its mean and counted, never read as 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tempact.files import reading, write_atomic

BASELINE = "step-prompt"  # untrained planner and executor; relative changes are against it
TRAINED = "+ TempAct"  # both trained
AVERAGE = "average"  # the set, and the judge, of the mean over all cells
PICTURE_QUALITY, DUPLICATES, PICKSCORE = "picture quality", "duplicates", "PickScore"
NOT_TEMPORAL = (PICTURE_QUALITY, DUPLICATES, PICKSCORE)  # judged beside temporal order, not part of its average
EVALUATION, SCORES, COMPARISONS = "evaluation.json", "evaluation_scores.jsonl", "comparisons.json"


@dataclass(frozen=True)
class MethodScores:
    """One score a video, in [0, 1] but for PickScore, NaN where it is missing; videos are in the order of the set."""

    method: str
    set: str
    judge: str
    scores: Sequence[float]

    @property
    def missing(self) -> int:
        return sum(math.isnan(score) for score in self.scores)


@dataclass(frozen=True)
class Row:
    """A cell of the table: mean score, its 95% interval, and the number of videos that have a score."""

    method: str
    set: str
    judge: str
    score: float
    ci95: tuple[float, float]
    n: int


@dataclass(frozen=True)
class Comparison:
    """`method` minus `baseline` over the `n` videos that have both scores, and the change relative to it."""

    method: str
    baseline: str
    set: str
    judge: str
    difference: float
    ci95: tuple[float, float]
    relative: float
    relative_ci95: tuple[float, float]
    n: int


def bootstrap_ci(scores: Sequence[float], resamples: int, seed: int) -> tuple[float, float]:
    """95% percentile interval of the mean; NaN scores are left out, no score gives (NaN, NaN)."""
    return _interval(_resampled_means([np.asarray(scores, float)[None]], resamples, seed, 1))


def relative_change(value: float, base: float) -> float:
    """0.5 against 0.4 is +0.25; NaN when there is no base to compare with."""
    return value / base - 1 if base else float("nan")


def evaluation_rows(scores: Sequence[MethodScores], resamples: int, seed: int, *, per_prompt: int = 1) -> list[Row]:
    """A row for every method, set and judge, then the averages: over all cells of temporal order (set and judge
    "average"; the paper's plain mean of set x judge), and over sets for quality and duplicates."""
    rows = []
    for method in _unique(one.method for one in scores):
        own = [one for one in scores if one.method == method]
        rows += [_row(method, one.set, one.judge, [one], resamples, seed, per_prompt) for one in own]
        groups = [(AVERAGE, [one for one in own if one.judge not in NOT_TEMPORAL])]
        groups += [(judge, [one for one in own if one.judge == judge]) for judge in NOT_TEMPORAL]
        rows += [_row(method, AVERAGE, judge, group, resamples, seed, per_prompt) for judge, group in groups if group]
    return rows


def compare(
    scores: Sequence[MethodScores], resamples: int, seed: int, baseline: str = BASELINE, *, per_prompt: int = 1
) -> list[Comparison]:
    """Every other method against `baseline`, video by video: each cell, then the average of temporal order."""
    base = {(one.set, one.judge): one for one in scores if one.method == baseline}
    comparisons = []
    for method in _unique(one.method for one in scores if one.method != baseline):
        own = [one for one in scores if one.method == method and (one.set, one.judge) in base]
        groups = [(one.set, one.judge, [one]) for one in own]
        groups.append((AVERAGE, AVERAGE, [one for one in own if one.judge not in NOT_TEMPORAL]))
        for set_name, judge, group in groups:
            if group:
                pairs = [(one, base[one.set, one.judge]) for one in group]
                cell = set_name, judge, pairs
                comparisons.append(_comparison(method, baseline, *cell, resamples, seed, per_prompt))
    return comparisons


def write_evaluation(run_folder: Path, scores: Sequence[MethodScores], resamples: int, seed: int) -> list[Row]:
    """Writes evaluation.json (the rows), comparisons.json (paired differences) and evaluation_scores.jsonl (one
    line a method, set and judge, in the order of the set's videos, null where missing); returns the rows."""
    rows = evaluation_rows(scores, resamples, seed)
    lines = [json.dumps(_plain({**asdict(one), "scores": list(one.scores)})) for one in scores]
    write_atomic(Path(run_folder) / SCORES, "\n".join(lines) + "\n")
    comparisons = [_plain(asdict(one)) for one in compare(scores, resamples, seed)]
    write_atomic(Path(run_folder) / COMPARISONS, json.dumps(comparisons, indent=1) + "\n")
    write_atomic(Path(run_folder) / EVALUATION, json.dumps([_plain(asdict(row)) for row in rows], indent=1) + "\n")
    return rows


def read_evaluation(run_folder: Path) -> list[Row]:
    """Rows of evaluation.json, none if the run has not been evaluated."""
    path = Path(run_folder) / EVALUATION
    with reading(path):
        rows = json.loads(path.read_text()) if path.is_file() else []
        return [Row(**{**row, "score": _number(row["score"]), "ci95": _pair(row["ci95"])}) for row in rows]


def read_scores(run_folder: Path) -> list[MethodScores]:
    """Scores of every video, none if the run has not been evaluated."""
    path = Path(run_folder) / SCORES
    with reading(path):
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        return [MethodScores(**{**row, "scores": [_number(score) for score in row["scores"]]}) for row in rows]


def read_comparisons(run_folder: Path) -> list[Comparison]:
    """Paired differences, none if the run has not been evaluated."""
    path = Path(run_folder) / COMPARISONS
    numbers, pairs = ("difference", "relative"), ("ci95", "relative_ci95")
    with reading(path):
        rows = json.loads(path.read_text()) if path.is_file() else []
        return [
            Comparison(**{**row, **{k: _number(row[k]) for k in numbers}, **{k: _pair(row[k]) for k in pairs}})
            for row in rows
        ]


def _row(
    method: str, set_name: str, judge: str, group: list[MethodScores], resamples: int, seed: int, per_prompt: int
) -> Row:
    sets = _by_set(group)
    videos = sum(int((~np.isnan(values)).any(0).sum()) for values in sets)
    interval = _interval(_resampled_means(sets, resamples, seed, per_prompt))
    return Row(method, set_name, judge, _mean(sets), interval, videos)


def _comparison(
    method: str,
    baseline: str,
    set_name: str,
    judge: str,
    pairs: list[tuple[MethodScores, MethodScores]],
    resamples: int,
    seed: int,
    per_prompt: int,
) -> Comparison:
    own, base = _by_set([one for one, _ in pairs]), _by_set([other for _, other in pairs])
    for a, b in zip(own, base, strict=True):
        assert a.shape == b.shape, f"{method} and {baseline} were judged on different videos"
        a[np.isnan(b)], b[np.isnan(a)] = np.nan, np.nan
    # one seed draws the same videos for both
    own_means = _resampled_means(own, resamples, seed, per_prompt)
    base_means = _resampled_means(base, resamples, seed, per_prompt)
    relative = np.divide(own_means, base_means, out=np.full(resamples, np.nan), where=base_means != 0) - 1
    return Comparison(
        method,
        baseline,
        set_name,
        judge,
        _mean(own) - _mean(base),
        _interval(own_means - base_means),
        relative_change(_mean(own), _mean(base)),
        _interval(relative),
        sum(int((~np.isnan(values)).any(0).sum()) for values in own),
    )


def _by_set(group: list[MethodScores]) -> list[np.ndarray]:
    """[judges, videos] for every set."""
    names = _unique(one.set for one in group)
    return [np.array([one.scores for one in group if one.set == name], float) for name in names]


def _mean(sets: list[np.ndarray]) -> float:
    """Plain mean over the cells' means; NaN if a cell has no score, for the mean of fewer is another quantity."""
    return float(np.concatenate([_cell_means(values) for values in sets]).mean())


def _resampled_means(sets: list[np.ndarray], resamples: int, seed: int, per_prompt: int) -> np.ndarray:
    """[resamples]: `_mean` with each set's prompts drawn anew with replacement, alike for all its judges, each with
    all of its videos."""
    rng = np.random.default_rng(seed)
    cells = []
    for values in sets:
        prompts, rest = divmod(values.shape[1], per_prompt)
        assert not rest, f"{values.shape[1]} videos of prompts with {per_prompt} each"
        if not prompts:
            cells.append(np.full((len(values), resamples), np.nan))
            continue
        drawn = rng.integers(0, prompts, (resamples, prompts))
        videos = (drawn[..., None] * per_prompt + np.arange(per_prompt)).reshape(resamples, -1)
        cells.append(_cell_means(values[:, videos]))
    return np.concatenate(cells).mean(0)


def _cell_means(values: np.ndarray) -> np.ndarray:
    """Means over the last axis of the scores that are there; NaN where none is."""
    present = ~np.isnan(values)
    count = present.sum(-1)
    total = np.where(present, values, 0.0).sum(-1)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _interval(means: np.ndarray) -> tuple[float, float]:
    means = means[np.isfinite(means)]
    if not len(means):
        return float("nan"), float("nan")
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _plain(value: object) -> object:
    """JSON without NaN, six digits."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _pair(values: Sequence[float | None]) -> tuple[float, float]:
    return _number(values[0]), _number(values[1])
