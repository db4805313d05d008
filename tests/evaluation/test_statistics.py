"""Intervals, paired differences, averages and what a missing score does."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tempact.evaluation.statistics import (
    Bootstrap,
    Comparison,
    MethodScores,
    Origin,
    Row,
    read_evaluation,
    read_origin,
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
    rows, comparisons = write_evaluation(tmp_path, scores, Bootstrap(100, 0))
    listed = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert all(set(row) == {"method", "set", "judge", "score", "ci95", "n"} for row in listed)
    assert listed[0] == {
        "method": "step-prompt", "set": "simple", "judge": "verifier", "score": 0.4, "ci95": [0.4, 0.4], "n": 7,
    }  # fmt: skip
    assert found(read_evaluation(tmp_path, Row), method="+ TempAct", set="average").score == pytest.approx(0.45)
    assert len(read_evaluation(tmp_path, Row)) == len(rows) == 10 and read_origin(tmp_path) is None
    assert [one.n for one in read_evaluation(tmp_path, Comparison)] == [one.n for one in comparisons]
    assert [one.missing for one in read_evaluation(tmp_path, MethodScores)] == [one.missing for one in scores]
    assert found(read_evaluation(tmp_path, Comparison), set="simple", judge="verifier").difference == pytest.approx(0.2)
    assert read_evaluation(tmp_path / "absent", Row) == []


ORIGIN = Origin("test", 7, {"simple": 8, "hard": 8}, "step-000040", "0123456789ab", "ba9876543210")


def test_every_row_says_what_it_was_obtained_with(tmp_path: Path) -> None:
    scores = cells("step-prompt", 0.4, 0.4, 0.2, 0.2) + cells("+ TempAct", 0.6, 0.5, 0.3, 0.4)
    write_evaluation(tmp_path, scores, Bootstrap(100, 0), ORIGIN)
    listed = [json.loads((tmp_path / name).read_text()) for name in ("evaluation.json", "comparisons.json")]
    listed.append([json.loads(line) for line in (tmp_path / "evaluation_scores.jsonl").read_text().splitlines()])
    for row in (row for rows in listed for row in rows):
        assert (row["split"], row["seed"], row["videos"]) == ("test", 7, {"simple": 8, "hard": 8})
        assert (row["checkpoint"], row["weights"], row["suite"]) == ("step-000040", "0123456789ab", "ba9876543210")
    assert read_origin(tmp_path) == ORIGIN and read_origin(tmp_path / "absent") is None
    assert read_evaluation(tmp_path, MethodScores) == [replace(one, scores=tuple(one.scores)) for one in scores]
    assert len(read_evaluation(tmp_path, Row)) == 10 and len(read_evaluation(tmp_path, Comparison)) == 5


def test_comparisons_of_an_older_version_are_read(tmp_path: Path) -> None:
    scores = cells("step-prompt", 0.4, 0.4, 0.2, 0.2) + cells("+ TempAct", 0.6, 0.5, 0.3, 0.4)
    write_evaluation(tmp_path, scores, Bootstrap(100, 0))
    file = tmp_path / "comparisons.json"
    file.write_text(
        json.dumps([{k: v for k, v in row.items() if k != "means"} for row in json.loads(file.read_text())])
    )
    one = found(read_evaluation(tmp_path, Comparison), set="average")
    assert one.relative == pytest.approx(0.5) and all(map(math.isnan, one.means))


def made_up(method: str, level: float, rng: np.random.Generator) -> list[MethodScores]:
    """Two judges of order and one of quality; 3 prompts simple and 5 hard with two seeds each, a tenth missing."""
    scores = []
    for name, videos in (("simple", 6), ("hard", 10)):
        for judge in ("verifier", "matcher", "picture quality"):
            own = level + rng.uniform(size=videos)
            own[rng.uniform(size=videos) < 0.1] = NAN
            scores.append(MethodScores(method, name, judge, own.tolist()))
    return scores


def by_hand(base: list[MethodScores], own: list[MethodScores], resamples: int, seed: int) -> dict[str, list[float]]:
    """The bootstrap of the averages as loops: means of `own`, and changes against `base` of the videos of both."""
    rng, sets = np.random.default_rng(seed), {}
    for one in own:
        sets.setdefault(one.set, len(one.scores) // 2)
    drawn = {name: rng.integers(0, prompts, (resamples, prompts)) for name, prompts in sets.items()}

    def mean(scores: list[MethodScores], left_out: list[MethodScores], i: int) -> float:
        cells = []
        for one, other in zip(scores, left_out, strict=True):
            videos = [2 * prompt + s for prompt in drawn[one.set][i] for s in (0, 1)]
            some = [one.scores[v] for v in videos if not math.isnan(one.scores[v] + other.scores[v])]
            cells.append(sum(some) / len(some) if some else NAN)
        return sum(cells) / len(cells)

    pairs = [(mean(base, own, i), mean(own, base, i)) for i in range(resamples)]
    return {
        "rows": [mean(own, own, i) for i in range(resamples)],
        "differences": [b - a for a, b in pairs],
        "changes": [b / a - 1 for a, b in pairs],
    }


@pytest.mark.parametrize("judge", ["average", "picture quality"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_bootstrap_draws_each_prompt_with_its_seeds_alike_for_judges_and_methods(seed: int, judge: str) -> None:
    rng = np.random.default_rng(3)
    base, own = made_up("step-prompt", 0.4, rng), made_up("+ TempAct", 0.6, rng)
    bootstrap = Bootstrap(200, seed, 2)
    row = found(bootstrap.rows(base + own), method="+ TempAct", set="average", judge=judge)
    one = found(bootstrap.compare(base + own), set="average", judge=judge)
    chosen = [[s for s in scores if (s.judge == "picture quality") == (judge != "average")] for scores in (base, own)]
    expected = by_hand(*chosen, 200, seed)

    def ends(values: list[float]) -> tuple[float, float]:
        some = np.array(values)[~np.isnan(values)]
        return tuple(np.percentile(some, [2.5, 97.5]))  # type: ignore[return-value]

    assert row.ci95 == pytest.approx(ends(expected["rows"]), abs=1e-12)
    assert one.ci95 == pytest.approx(ends(expected["differences"]), abs=1e-12)
    assert one.relative_ci95 == pytest.approx(ends(expected["changes"]), abs=1e-12)
    other = Bootstrap(200, seed + 1, 2).compare(base + own)
    assert found(other, set="average", judge=judge).ci95 != one.ci95
    assert one.n == sum(
        any(not math.isnan(a.scores[v] + b.scores[v]) for a, b in zip(*chosen, strict=True) if a.set == name)
        for name, videos in (("simple", 6), ("hard", 10))
        for v in range(videos)
    )


def test_quality_is_compared_beside_temporal_order_not_in_it() -> None:
    def both(method: str, order: float, quality: float) -> list[MethodScores]:
        judged = {"verifier": order, "picture quality": quality, "clearness": quality, "duplicates": 1 - quality}
        return [
            MethodScores(method, name, judge, [v] * 4) for name in ("simple", "hard") for judge, v in judged.items()
        ]

    found_ones = Bootstrap(50, 0).compare(both("step-prompt", 0.4, 0.9) + both("+ TempAct", 0.6, 0.45))
    averages = {one.judge: one for one in found_ones if one.set == "average"}
    assert set(averages) == {"average", "picture quality", "clearness", "duplicates"}
    assert averages["average"].relative == pytest.approx(0.5) and averages["average"].n == 8
    assert averages["average"].means == pytest.approx((0.4, 0.6))
    assert averages["picture quality"].relative == averages["clearness"].relative == pytest.approx(-0.5)


def test_with_missing_scores_change_and_interval_are_both_those_of_the_pairs() -> None:
    """The unpaired means fall by 55% although every video that both have gains 25%."""
    base = MethodScores("step-prompt", "simple", "verifier", [0.2, 0.2, 0.9, 0.9])
    own = MethodScores("+ TempAct", "simple", "verifier", [0.25, 0.25, NAN, NAN])
    one = found(Bootstrap(200, 0).compare([base, own]), set="average")
    assert one.relative == pytest.approx(0.25) and one.relative_ci95 == pytest.approx((0.25, 0.25))
    assert one.means == pytest.approx((0.2, 0.25)) and one.n == 2


def judged(method: str, verifier: list[float], matcher: list[float], name: str = "simple") -> list[MethodScores]:
    return [MethodScores(method, name, "verifier", verifier), MethodScores(method, name, "matcher", matcher)]


def test_the_share_that_the_held_out_judge_confirms_is_that_of_the_gains() -> None:
    """0.12 of 0.20 in one set and 0.10 of 0.10 in the other: together 0.22 of 0.30."""
    base = judged("step-prompt", [0.3, 0.5], [0.4, 0.4]) + judged("step-prompt", [0.2, 0.2], [0.3, 0.3], "hard")
    own = judged("+ TempAct", [0.5, 0.7], [0.5, 0.54]) + judged("+ TempAct", [0.3, 0.3], [0.4, 0.4], "hard")
    compared = Bootstrap(400, 0).compare(base + own)
    share = {(one.set, one.judge): one.confirmed for one in compared if not np.isnan(one.confirmed)}
    assert share == pytest.approx(
        {("simple", "matcher"): 0.6, ("hard", "matcher"): 1.0, ("average", "average"): 0.22 / 0.3}
    )
    ends = found(compared, set="simple", judge="matcher").confirmed_ci95
    assert ends == pytest.approx((0.5, 0.7))  # each of the two videos alone
    assert found(compared, set="average", judge="average").confirmed_ci95 == pytest.approx((2 / 3, 0.8))


def test_without_a_gain_there_is_nothing_to_confirm() -> None:
    base = judged("step-prompt", [0.3, 0.5, 0.4], [0.4, 0.4, 0.4])
    unsure = judged("+ TempAct", [0.2, 0.9, 0.4], [0.5, 0.5, 0.5])
    assert all(np.isnan(one.confirmed) for one in Bootstrap(400, 0).compare(base + unsure))
    gained = judged("+ TempAct", [0.4, 0.6, 0.5], [0.5, 0.5, 0.5])
    assert found(Bootstrap(400, 0).compare(base + gained), set="average").confirmed == pytest.approx(1.0)
    alone = [one for one in base + gained if one.judge == "matcher"]
    assert all(np.isnan(one.confirmed) for one in Bootstrap(400, 0).compare(alone))


def test_only_videos_that_both_judges_have_scored_of_both_methods_count() -> None:
    base = judged("step-prompt", [0.3, 0.3, 0.3], [0.4, NAN, 0.4])
    own = judged("+ TempAct", [0.5, 0.9, NAN], [0.5, 0.9, 0.4])
    one = found(Bootstrap(100, 0).compare(base + own), set="average")
    assert one.confirmed == pytest.approx(0.5) and one.confirmed_ci95 == pytest.approx((0.5, 0.5))


def test_served_judges_confirm_each_other_too_and_the_share_is_written(tmp_path: Path) -> None:
    def both(method: str, rewarded: float, held_out: float) -> list[MethodScores]:
        judges = {"in-domain": rewarded, "held-out": held_out}
        return [MethodScores(method, "simple", judge, [value] * 4) for judge, value in judges.items()]

    scores = both("step-prompt", 0.4, 0.5) + both("+ TempAct", 0.8, 0.6)
    _, compared = write_evaluation(tmp_path, scores, Bootstrap(50, 0))
    assert found(compared, set="average").confirmed == pytest.approx(0.25)
    again = read_evaluation(tmp_path, Comparison)
    assert found(again, set="average").confirmed == pytest.approx(0.25) and found(
        again, set="average"
    ).confirmed_ci95 == (pytest.approx((0.25, 0.25)))


def test_rows_of_overfitting_are_against_their_own_untrained_ones() -> None:
    levels = {"step-prompt": 0.5, "single-prompt": 0.2, "single-prompt, trained executor": 0.3, "reworded steps": 0.4,
              "reworded steps, trained executor": 0.6}  # fmt: skip
    scores = [MethodScores(name, "long", "verifier", [level] * 3) for name, level in levels.items()]
    compared = {one.method: one for one in Bootstrap(20, 0).compare(scores) if one.set == "average"}
    assert {name: one.baseline for name, one in compared.items()} == {
        "single-prompt": "step-prompt", "single-prompt, trained executor": "single-prompt",
        "reworded steps": "step-prompt", "reworded steps, trained executor": "reworded steps",
    }  # fmt: skip
    assert compared["single-prompt, trained executor"].relative == pytest.approx(0.5)
    assert compared["reworded steps, trained executor"].relative == pytest.approx(0.5)


def test_draws_without_a_gain_have_no_upper_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """2% of the draws have none: they are the largest shares, not the smallest."""
    rewarded = np.concatenate([np.linspace(-0.01, 0.0, 20), np.linspace(0.02, 0.1, 980)])
    drawn = np.stack([np.full(1000, 0.06), rewarded])
    monkeypatch.setattr(Bootstrap, "_drawn", lambda self, gains: [drawn])
    scores = [
        MethodScores(method, "simple", judge, [level, level + 0.1])
        for method, levels in (("step-prompt", (0.2, 0.3)), ("+ TempAct", (0.26, 0.36)))
        for judge, level in zip(("verifier", "matcher"), levels, strict=True)
    ]
    one = next(one for one in Bootstrap(1000, 0).compare(scores) if (one.set, one.judge) == ("simple", "matcher"))
    assert one.confirmed == pytest.approx(1.0)
    low, high = one.confirmed_ci95
    assert low == pytest.approx(0.06 / rewarded[975], rel=0.01) and high == pytest.approx(0.06 / rewarded[25], rel=0.03)
