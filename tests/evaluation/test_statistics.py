"""Intervals, paired differences, averages and what a missing score does."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tempact.evaluation.statistics import (
    Bootstrap,
    Comparison,
    MethodScores,
    Row,
    read_evaluation,
    relative_change,
    write_evaluation,
)

NAN = float("nan")
CELLS = [(name, judge) for name in ("simple", "hard") for judge in ("verifier", "matcher")]


def cells(method: str, *levels: float, n: int = 8) -> list[MethodScores]:
    return [MethodScores(method, *cell, [level] * n) for cell, level in zip(CELLS, levels, strict=True)]


def found(rows: list, **keys: str):
    return next(row for row in rows if all(getattr(row, key) == value for key, value in keys.items()))


def interval(scores: list[float], resamples: int, seed: int) -> tuple[float, float]:
    return Bootstrap(resamples, seed).rows([MethodScores("m", "simple", "verifier", scores)])[0].ci95


def test_bootstrap_interval_has_the_width_of_theory() -> None:
    scores = np.random.default_rng(0).normal(0.5, 0.1, 400)
    low, high = interval(scores.tolist(), 4000, 1)
    half = 1.96 * scores.std() / math.sqrt(400)
    assert low == pytest.approx(scores.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(scores.mean() + half, abs=0.1 * half)
    assert interval(scores.tolist(), 4000, 1) == (low, high)


def test_bootstrap_interval_of_few_scores() -> None:
    assert interval([0.3, NAN], 50, 0) == pytest.approx((0.3, 0.3))
    assert all(map(math.isnan, interval([NAN, NAN], 50, 0)))
    assert all(map(math.isnan, interval([], 50, 0)))


def test_the_papers_relative_changes() -> None:
    assert relative_change(0.500, 0.414) == pytest.approx(0.208, abs=5e-4)
    assert relative_change(0.462, 0.400) == pytest.approx(0.155, abs=5e-4)
    assert math.isnan(relative_change(0.4, 0.0))


def test_average_is_the_plain_mean_of_the_four_cells_whatever_their_sizes() -> None:
    scores = [
        MethodScores("m", "simple", "verifier", [0.8] * 2),
        MethodScores("m", "simple", "matcher", [0.6] * 2),
        MethodScores("m", "hard", "verifier", [0.2] * 10),
        MethodScores("m", "hard", "matcher", [0.4] * 10),
        MethodScores("m", "simple", "picture quality", [0.9] * 2),
        MethodScores("m", "hard", "picture quality", [0.7] * 10),
    ]
    rows = Bootstrap(100, 0).rows(scores)
    average = found(rows, set="average", judge="average")
    assert average.score == pytest.approx(0.5) and average.n == 12
    assert found(rows, set="average", judge="picture quality").score == pytest.approx(0.8)


def test_missing_scores_are_dropped_and_counted_never_zero() -> None:
    scores = MethodScores("m", "simple", "verifier", [0.5, NAN, 0.7, NAN])
    row = Bootstrap(100, 0).rows([scores])[0]
    assert row.score == pytest.approx(0.6) and row.n == 2 and scores.missing == 2
    assert 0.5 <= row.ci95[0] <= row.ci95[1] <= 0.7


def test_an_average_without_one_of_its_cells_is_missing() -> None:
    scores = cells("m", 0.5, 0.5, 0.5, 0.5)
    scores[3] = MethodScores("m", *CELLS[3], [NAN] * 8)
    rows = Bootstrap(100, 0).rows(scores)
    assert math.isnan(found(rows, set="average").score) and found(rows, set="hard", judge="matcher").n == 0


def test_videos_not_scores_are_resampled() -> None:
    # two judges that say the same are no more certain than one
    values = np.random.default_rng(0).uniform(size=50).tolist()
    one = [MethodScores("m", "simple", "verifier", values)]
    two = [*one, MethodScores("m", "simple", "matcher", values)]
    averages = [found(Bootstrap(500, 0).rows(scores), set="average") for scores in (one, two)]
    assert averages[0].ci95 == pytest.approx(averages[1].ci95, abs=1e-12)


def test_prompts_not_seeds_are_resampled() -> None:
    # four videos of a prompt that score alike are no more certain than one
    values = np.random.default_rng(0).uniform(size=50)
    one = MethodScores("m", "simple", "verifier", values.tolist())
    four = MethodScores("m", "simple", "verifier", values.repeat(4).tolist())
    rows = [Bootstrap(500, 0).rows([one])[0], Bootstrap(500, 0, 4).rows([four])[0]]
    assert rows[0].ci95 == pytest.approx(rows[1].ci95, abs=1e-12) and (rows[0].n, rows[1].n) == (50, 200)
    single = Bootstrap(500, 0).rows([four])[0]
    width = [row.ci95[1] - row.ci95[0] for row in (rows[1], single)]
    assert width[1] == pytest.approx(width[0] / 2, rel=0.15)
    base = MethodScores("step-prompt", "simple", "verifier", (values.repeat(4) - 0.1 * values.repeat(4)).tolist())
    paired = [Bootstrap(500, 0, 4).compare([base, four])[0], Bootstrap(500, 0).compare([base, four])[0]]
    assert paired[0].ci95[1] - paired[0].ci95[0] > 1.6 * (paired[1].ci95[1] - paired[1].ci95[0])
    with pytest.raises(AssertionError, match="50 videos of prompts with 4 each"):
        Bootstrap(10, 0, 4).rows([one])


def test_paired_difference_does_not_see_how_hard_videos_are() -> None:
    rng = np.random.default_rng(0)
    hardness, gain = rng.uniform(size=60), 0.1 + 0.01 * rng.normal(size=60)
    scores = [
        MethodScores("step-prompt", "simple", "verifier", hardness.tolist()),
        MethodScores("+ TempAct", "simple", "verifier", (hardness + gain).tolist()),
    ]
    one = Bootstrap(1000, 0).compare(scores)[0]
    assert one.difference == pytest.approx(gain.mean()) and one.n == 60
    low, high = one.ci95
    assert low < gain.mean() < high and high - low < 0.01  # unpaired it is about 0.2
    assert one.relative == pytest.approx(gain.mean() / hardness.mean())
    assert one.relative_ci95[0] < one.relative < one.relative_ci95[1]


def test_paired_difference_uses_videos_that_both_have() -> None:
    scores = [
        MethodScores("step-prompt", "simple", "verifier", [0.2, 0.9, 0.4]),
        MethodScores("+ TempAct", "simple", "verifier", [0.3, NAN, 0.6]),
    ]
    one = Bootstrap(100, 0).compare(scores)[0]
    assert one.difference == pytest.approx(0.15) and one.n == 2
    with pytest.raises(AssertionError, match="different videos"):
        Bootstrap(100, 0).compare([scores[0], MethodScores("+ TempAct", "simple", "verifier", [0.5])])


def test_comparison_of_the_average() -> None:
    scores = cells("step-prompt", 0.4, 0.4, 0.2, 0.2) + cells("+ TempAct", 0.6, 0.5, 0.3, 0.4)
    one = found(Bootstrap(100, 0).compare(scores), set="average")
    assert one.difference == pytest.approx(0.15) and one.relative == pytest.approx(0.5)
    assert Bootstrap(100, 0).compare(cells("+ TempAct", 1, 1, 1, 1)) == []


def test_files_hold_what_was_computed(tmp_path: Path) -> None:
    scores = cells("step-prompt", 0.4, 0.4, 0.2, 0.2) + cells("+ TempAct", 0.6, 0.5, 0.3, 0.4)
    scores[0].scores[1] = NAN
    scores[3] = MethodScores("step-prompt", *CELLS[3], [NAN] * 8)
    rows = write_evaluation(tmp_path, scores, Bootstrap(100, 0))
    listed = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert all(set(row) == {"method", "set", "judge", "score", "ci95", "n"} for row in listed)
    assert listed[0] == {
        "method": "step-prompt", "set": "simple", "judge": "verifier", "score": 0.4, "ci95": [0.4, 0.4], "n": 7,
    }  # fmt: skip
    assert found(read_evaluation(tmp_path, Row), method="+ TempAct", set="average").score == pytest.approx(0.45)
    assert len(read_evaluation(tmp_path, Row)) == len(rows) == 10
    assert [one.missing for one in read_evaluation(tmp_path, MethodScores)] == [one.missing for one in scores]
    assert found(read_evaluation(tmp_path, Comparison), set="simple", judge="verifier").difference == pytest.approx(0.2)
    assert read_evaluation(tmp_path / "absent", Row) == []
