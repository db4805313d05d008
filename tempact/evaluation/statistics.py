"""From scores of videos to means with intervals and to paired differences (docs/algorithm.md section 7).

The i-th scores of one set belong to the same video for every judge, and to the same prompt and noise for every method.
So the bootstrap draws videos, not scores. Where a prompt has several videos (seeds), they stand next to each other and
the bootstrap draws prompts, each with all of its videos. A missing score (NaN) is left out of its mean and counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tempact.evaluation import BASELINES, STEP
from tempact.files import reading, write_atomic

AVERAGE = "average"  # the set, and the judge, of the mean over all cells
PICTURE_QUALITY, CLEARNESS, DUPLICATES, PICKSCORE = "picture quality", "clearness", "duplicates", "PickScore"
# judged beside temporal order, not part of its average
NOT_TEMPORAL = (PICTURE_QUALITY, CLEARNESS, DUPLICATES, PICKSCORE)
# a judge that no training is rewarded by -> the one that training is rewarded by, both of temporal order
CONFIRMS = {"matcher": "verifier", "held-out": "in-domain"}
T = TypeVar("T")
Sets = list[np.ndarray]  # [judges, videos] of every set
Cell = tuple[str, str, list]  # set, judge, and the MethodScores that the mean is over
NAN = float("nan")


@dataclass(frozen=True)
class MethodScores:
    """Scores of one method, set and judge, one a video in the order of the set.

    Scores are in [0, 1], but PickScore's about 20; NaN where missing.
    """

    method: str
    set: str
    judge: str
    scores: Sequence[float]

    @property
    def missing(self) -> int:
        """How many videos have no score; the mean leaves them out."""
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
    """`method` minus `baseline` over the `n` videos that both have scores of, the relative change, and the `means` of
    baseline and method over these videos.

    confirmed: the share of the rewarded judge's gain that the held-out judge (CONFIRMS) finds too,

        (mean of method - mean of baseline) of the held-out judge / (mean of method - mean of baseline) of the rewarded

    over the videos that both judges have scored of both methods; set on the held-out judge's comparison of a set, and
    on the average of temporal order, for the means over all sets. Above 1 where the held-out judge finds more. NaN
    where the interval of the rewarded judge's gain does not lie above 0: there is no gain to be confirmed.
    """

    method: str
    baseline: str
    set: str
    judge: str
    difference: float
    ci95: tuple[float, float]
    relative: float
    relative_ci95: tuple[float, float]
    n: int
    means: tuple[float, float] = (NAN, NAN)
    confirmed: float = NAN
    confirmed_ci95: tuple[float, float] = (NAN, NAN)


@dataclass(frozen=True)
class Origin:
    """What a table was obtained with; every row of its files says it.

    split: of the prompts. seed: of prompts, plans and noise. videos: how many every set has of a method. checkpoint: as
    "step-000040". weights: hash of both policies' trained weights. suite: hash of all that scores depend on.
    tests: hash of what runs are compared by, the instructions and the judges with their code and weights.
    """

    split: str
    seed: int
    videos: dict[str, int]
    checkpoint: str
    weights: str
    suite: str
    tests: str = ""


@dataclass(frozen=True)
class Bootstrap:
    """Means with 95% percentile intervals; `per_prompt` is the number of videos that each prompt has."""

    resamples: int
    seed: int
    per_prompt: int = 1

    def rows(self, scores: Sequence[MethodScores]) -> list[Row]:
        """Every method, set and judge; then a method's averages: over all cells of temporal order (the plain mean of
        set x judge), and over sets for quality, duplicates and PickScore."""
        rows = []
        for method in _unique(one.method for one in scores):
            for set_name, judge, cell in _cells([one for one in scores if one.method == method]):
                sets = _by_set(cell)
                ci95 = interval(self._means(sets))
                rows.append(Row(method, set_name, judge, _mean(sets), ci95, _videos(sets)))
        return rows

    def compare(self, scores: Sequence[MethodScores], baseline: str = STEP) -> list[Comparison]:
        """Every other method against `baseline`, or its own one of BASELINES, video by video: each cell, then its
        averages as in `rows`."""
        cells = {(one.method, one.set, one.judge): one for one in scores}
        comparisons = []
        for method in _unique(one.method for one in scores if one.method != baseline):
            against = BASELINES.get(method, baseline)
            own = [one for one in scores if one.method == method and (against, one.set, one.judge) in cells]
            for set_name, judge, cell in _cells(own):
                others = [cells[against, one.set, one.judge] for one in cell]
                found = self._comparison((method, against, set_name, judge), cell, others)
                comparisons.append(self._with_confirmed(found, _unique(one.set for one in own), cells))
        return comparisons

    def _with_confirmed(
        self, found: Comparison, sets: list[str], cells: dict[tuple[str, str, str], MethodScores]
    ) -> Comparison:
        """The comparison with `confirmed`, where it has one. sets: all that its method has."""
        average = found.set == found.judge == AVERAGE
        judges = [found.judge] if found.judge in CONFIRMS else [*CONFIRMS] if average else []
        for judge in judges:
            # of each set the scores [held-out, rewarded, held-out before, rewarded before] x videos
            keys = [
                [(who, name, each) for who in (found.method, found.baseline) for each in (judge, CONFIRMS[judge])]
                for name in (sets if average else [found.set])
            ]
            if all(key in cells for own in keys for key in own):
                gains = [_gains(np.array([cells[key].scores for key in own], float)) for own in keys]
                held_out, rewarded = np.mean([_present_mean(values) for values in gains], axis=0)
                drawn = np.mean(self._drawn(gains), axis=0)
                if interval(drawn[1])[0] > 0:
                    share = float(held_out / rewarded)
                    drawn = drawn[:, np.isfinite(drawn).all(0)]
                    # without a gain in a draw its share has no bound; such draws are too few to be an end
                    shares = np.divide(drawn[0], drawn[1], out=np.full_like(drawn[0], np.inf), where=drawn[1] > 0)
                    low, high = np.percentile(shares, [2.5, 97.5], method="lower")
                    return replace(found, confirmed=share, confirmed_ci95=(float(low), float(high)))
        return found

    def _comparison(
        self, names: tuple[str, str, str, str], cell: list[MethodScores], others: list[MethodScores]
    ) -> Comparison:
        own, base = _by_set(cell), _by_set(others)
        for a, b in zip(own, base, strict=True):
            assert a.shape == b.shape, f"{names[0]} and {names[1]} were judged on different videos"
            a[np.isnan(b)], b[np.isnan(a)] = np.nan, np.nan
        own_means, base_means = self._means(own), self._means(base)  # one seed draws the same videos for both
        relative = np.divide(own_means, base_means, out=np.full_like(own_means, np.nan), where=base_means != 0) - 1
        means = _mean(base), _mean(own)
        differences = means[1] - means[0], interval(own_means - base_means)
        return Comparison(*names, *differences, relative_change(*means[::-1]), interval(relative), _videos(own), means)

    def _means(self, sets: Sets) -> np.ndarray:
        """[resamples]: `_mean` with each set's prompts drawn anew with replacement, alike for all its judges."""
        return np.concatenate(self._drawn(sets)).mean(0)

    def _drawn(self, sets: Sets) -> list[np.ndarray]:
        """[judges, resamples] of each set: its means over the same draws as everywhere."""
        rng = np.random.default_rng(self.seed)
        means = []
        for values in sets:
            prompts, rest = divmod(values.shape[1], self.per_prompt)
            assert not rest, f"{values.shape[1]} videos of prompts with {self.per_prompt} each"
            if not prompts:
                means.append(np.full((len(values), self.resamples), np.nan))
                continue
            drawn = rng.integers(0, prompts, (self.resamples, prompts))
            videos = (drawn[..., None] * self.per_prompt + np.arange(self.per_prompt)).reshape(self.resamples, -1)
            means.append(_present_mean(values[:, videos]))
        return means


def relative_change(value: float, base: float) -> float:
    """0.5 against 0.4 is +0.25; NaN when there is no base to compare with."""
    return value / base - 1 if base else NAN


FILES: dict[type, str] = {
    Row: "evaluation.json",
    Comparison: "comparisons.json",
    MethodScores: "evaluation_scores.jsonl",  # an object a line, the scores in the order of the set's videos
}


def write_evaluation(
    run_folder: Path, scores: Sequence[MethodScores], bootstrap: Bootstrap, origin: Origin | None = None
) -> tuple[list[Row], list[Comparison]]:
    """Writes rows, paired differences and scores into a run folder, under the names of FILES, each with its origin;
    returns rows and differences."""
    rows, comparisons = bootstrap.rows(scores), bootstrap.compare(scores)
    told = plain(origin) if origin is not None else {}
    lines = [json.dumps(plain(one) | told) for one in scores]
    write_atomic(run_folder / FILES[MethodScores], "\n".join(lines) + "\n")
    for kind, found in ((Comparison, comparisons), (Row, rows)):
        write_atomic(run_folder / FILES[kind], json.dumps([plain(one) | told for one in found], indent=1) + "\n")
    return rows, comparisons


def read_evaluation(run_folder: Path, kind: type[T]) -> list[T]:
    """What `write_evaluation` wrote of a kind of FILES; nothing if the run has not been evaluated."""
    path = run_folder / FILES[kind]
    if not path.is_file():
        return []
    with reading(path):
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
        return [_read_as(kind, row) for row in rows]


def read_origin(run_folder: Path) -> Origin | None:
    """What the table of a run folder was obtained with; None where there is none, or one of a version without."""
    path = run_folder / FILES[Row]
    if not path.is_file():
        return None
    with reading(path):
        rows = json.loads(path.read_text(encoding="utf-8"))
        return _read_as(Origin, rows[0]) if rows and "suite" in rows[0] else None


def _read_as(kind: type[T], row: dict[str, Any]) -> T:
    known = {own.name for own in fields(kind)}  # type: ignore[arg-type]
    return kind(**{key: _read_value(value) for key, value in row.items() if key in known})


def plain(value: Any) -> Any:
    """A value or dataclass for JSON: six digits, null for NaN."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def _read_value(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_read_value(inner) for inner in value)
    return NAN if value is None else value


def _cells(own: list[MethodScores]) -> list[Cell]:
    """One method's cells, the average of temporal order, and those of the judges that are no part of it."""
    cells: list[Cell] = [(one.set, one.judge, [one]) for one in own]
    cells.append((AVERAGE, AVERAGE, [one for one in own if one.judge not in NOT_TEMPORAL]))
    cells += [(AVERAGE, judge, [one for one in own if one.judge == judge]) for judge in NOT_TEMPORAL]
    return [cell for cell in cells if cell[2]]


def _by_set(group: list[MethodScores]) -> Sets:
    names = _unique(one.set for one in group)
    return [np.array([one.scores for one in group if one.set == name], float) for name in names]


def _videos(sets: Sets) -> int:
    """How many videos have a score of any judge."""
    return sum(int((~np.isnan(values)).any(0).sum()) for values in sets)


def _mean(sets: Sets) -> float:
    """Plain mean over the cells' means; NaN if a cell has no score, for the mean of fewer is another quantity."""
    return float(np.concatenate([_present_mean(values) for values in sets]).mean())


def _gains(scores: np.ndarray) -> np.ndarray:
    """Two judges' gains [2, videos] from [2 * 2, videos], their scores of a method and of its baseline; NaN where one
    of the four is missing."""
    gains = scores[:2] - scores[2:]
    return np.where(np.isnan(gains).any(0), NAN, gains)


def _present_mean(values: np.ndarray) -> np.ndarray:
    """Means over the last axis of the scores that are there; NaN where none is."""
    present = ~np.isnan(values)
    count = present.sum(-1)
    total = np.where(present, values, 0.0).sum(-1)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def interval(means: np.ndarray) -> tuple[float, float]:
    """The 95% percentile interval of draws; NaN where there are none. Draws that are not finite are left out."""
    means = means[np.isfinite(means)]
    if not len(means):
        return NAN, NAN
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
