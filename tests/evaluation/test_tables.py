"""The printed table."""

from __future__ import annotations

import re

from tempact.evaluation import METHODS, OVERFITTING
from tempact.evaluation.statistics import Bootstrap, Comparison, MethodScores, Row
from tempact.evaluation.tables import average_change, build_table, confirmed_text, markdown_table, narrow_table

LEVELS = {"executor only": 0.5, "shuffled": 0.4, "+ TempAct": 0.6, "single-prompt": 0.3, "step-prompt": 0.4}
NAN = float("nan")
JUDGES = ("verifier", "matcher", "picture quality")


def measured() -> tuple[list[Row], list[Comparison]]:
    scores = [
        MethodScores(method, name, judge, [level + (0.1 if name == "simple" else 0.0)] * 4)
        for method, level in LEVELS.items()
        for name in ("hard", "simple")
        for judge in JUDGES
        if (method, judge) != ("shuffled", "picture quality")
    ]
    return Bootstrap(50, 0).rows(scores), Bootstrap(50, 0).compare(scores)


def test_layout_of_the_paper() -> None:
    table = build_table(*measured())
    assert table.columns == (
        "simple, verifier", "hard, verifier", "simple, matcher", "hard, matcher", "average", "picture quality",
    )  # fmt: skip
    assert [name for name, _ in table.rows] == [
        "single-prompt",
        "step-prompt",
        "+ TempAct",
        "executor only",
        "shuffled",
    ]
    cells = dict(table.rows)
    assert [cell.score for cell in cells["+ TempAct"]] == ["0.700", "0.600", "0.700", "0.600", "0.650", "0.650"]
    assert cells["+ TempAct"][4].change == "+44.4%" and cells["single-prompt"][4].change == "-22.2%"
    assert cells["step-prompt"][4].change == "" and cells["+ TempAct"][5].change == ""
    assert cells["shuffled"][5].score == "\u2013"


def test_markdown_is_aligned_and_carries_interval_and_change() -> None:
    lines = markdown_table(*measured()).splitlines()
    assert len(lines) == 2 + len(LEVELS) and len({len(line) for line in lines}) == 1
    assert "| 0.650 [0.650, 0.650] +44.4% |" in lines[4] and lines[4].startswith("| + TempAct ")


def test_without_baseline_there_is_no_change() -> None:
    alone = [row for row in measured()[0] if row.method == "+ TempAct"]
    assert "%" not in markdown_table(alone)


def scored(**levels: list[float]) -> tuple[list[Row], list[Comparison]]:
    methods = {"step": "step-prompt", "own": "+ TempAct"}
    scores = [MethodScores(methods[name], "simple", "verifier", own) for name, own in levels.items()]
    return Bootstrap(50, 0).rows(scores), Bootstrap(50, 0).compare(scores)


def test_the_change_is_that_of_the_videos_that_both_have() -> None:
    """The means of the table, 0.55 and 0.25, would say -54.5%."""
    table = markdown_table(*scored(step=[0.2, 0.2, 0.9, 0.9], own=[0.25, 0.25, NAN, NAN]))
    assert "0.250 [0.250, 0.250] +25.0%" in table and "-54.5%" not in table


def test_what_nobody_scored_is_a_dash_without_numbers() -> None:
    rows, comparisons = scored(step=[0.2, 0.3], own=[NAN, NAN])
    table = markdown_table(rows, comparisons)
    assert re.search(r"\+ TempAct .*\| \u2013 +\| \u2013 +\|", table) and "nan" not in table and "[]" not in table
    assert average_change(comparisons, "+ TempAct") is None
    # scores of either, none of both
    rows, comparisons = scored(step=[0.2, NAN], own=[NAN, 0.4])
    assert average_change(comparisons, "+ TempAct") is None and "%" not in markdown_table(rows, comparisons)


def test_many_methods_stand_in_parts_and_sets_in_their_order() -> None:
    methods = [method.name for method in (*METHODS, *OVERFITTING)]
    scores = [
        MethodScores(method, name, judge, [0.3 + 0.05 * i] * 4)
        for i, method in enumerate(methods)
        for name in ("crowded", "long", "paraphrase")
        for judge in ("verifier", "matcher")
    ]
    rows, comparisons = Bootstrap(50, 0).rows(scores), Bootstrap(50, 0).compare(scores)
    lines = narrow_table(rows, comparisons)
    assert max(map(len, lines)) <= 80 and sum(line.startswith("average") for line in lines) == 2
    table = build_table(rows, comparisons)
    assert table.columns[:3] == ("paraphrase, verifier", "long, verifier", "crowded, verifier")
    assert [name for name, _ in table.rows][-3:] == [method.name for method in OVERFITTING]
    changes = {name: cells[6].change for name, cells in table.rows}
    assert (
        changes["single-prompt, trained executor"] == "+83.3%"
        and changes["reworded steps, trained executor"] == "+8.3%"
    )
    assert lines[-1] == "Of the gain by verifier, matcher confirms 100% [100%, 100%]."


def test_nothing_is_said_to_be_confirmed_without_a_gain() -> None:
    scores = [
        MethodScores(method, "simple", judge, [0.4] * 4)
        for method in ("step-prompt", "+ TempAct")
        for judge in ("verifier", "matcher")
    ]
    assert confirmed_text(Bootstrap(50, 0).compare(scores)) == [] == confirmed_text([])
