"""The table of the paper: methods by sets and judges, their average and what it gained, picture quality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tempact.temporal_order.protocol import AVERAGE, BASELINE, NOT_TEMPORAL, TRAINED, Row, relative_change

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
