"""The printed table."""

from __future__ import annotations

from tempact.evaluation.statistics import Bootstrap, MethodScores
from tempact.evaluation.tables import build_table, markdown_table

LEVELS = {"executor only": 0.5, "shuffled": 0.4, "+ TempAct": 0.6, "single-prompt": 0.3, "step-prompt": 0.4}
JUDGES = ("verifier", "matcher", "picture quality")


def rows() -> list:
    scores = [
        MethodScores(method, name, judge, [level + (0.1 if name == "simple" else 0.0)] * 4)
        for method, level in LEVELS.items()
        for name in ("hard", "simple")
        for judge in JUDGES
        if (method, judge) != ("shuffled", "picture quality")
    ]
    return Bootstrap(50, 0).rows(scores)


def test_layout_of_the_paper() -> None:
    table = build_table(rows())
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
    lines = markdown_table(rows()).splitlines()
    assert len(lines) == 2 + len(LEVELS) and len({len(line) for line in lines}) == 1
    assert "| 0.650 [0.650, 0.650] +44.4% |" in lines[4] and lines[4].startswith("| + TempAct ")


def test_without_baseline_there_is_no_change() -> None:
    alone = [row for row in rows() if row.method == "+ TempAct"]
    assert "%" not in markdown_table(alone)
