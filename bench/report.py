"""Rows of results: a table for people, JSON and a chart beside it for the record."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

COMMIT_VARIABLE = "BENCH_COMMIT"  # names the commit where there is no git repository
OURS = "ours"


@dataclass(frozen=True)
class Row:
    """One implementation of one case.

    ms          median, with the 20th and 80th percentile; None where it was not timed or its error check failed
    tflops      of the work that this implementation has to do; gbps likewise, of the fewest bytes it must move
    mib         memory, where that is what the case measures
    ratio_to    for each other implementation, its ms (or MiB) over this one's: above 1, this one is better
    error       largest absolute difference to the fp64 reference, over all outputs
    """

    op: str
    case: str
    impl: str
    ms: float | None = None
    p20: float | None = None
    p80: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    mib: float | None = None
    ratio_to: dict[str, float] = field(default_factory=dict)
    error: float | None = None
    torch: str = ""
    triton: str = ""
    commit: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.op, self.case, self.impl

    @property
    def cost(self) -> float | None:
        """What is compared: ms, or MiB where memory is measured. Less is better."""
        return self.mib if self.ms is None else self.ms


def table(rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """The rows of one case as text, without empty columns.

    "ours is" says how many times faster (or smaller) ours is than the row's implementation.
    """
    ratios = next((row.ratio_to for row in rows if row.impl == OURS), {})
    columns = {
        "impl": [row.impl for row in rows],
        "ms": [_number(row.ms, "{:.3f}") for row in rows],
        "p20-p80": ["" if row.p20 is None else f"{row.p20:.3f}-{row.p80:.3f}" for row in rows],
        "MiB": [_number(row.mib, "{:.1f}") for row in rows],
        "TFLOP/s": [_number(row.tflops, "{:.0f}") for row in rows],
        "GB/s": [_number(row.gbps, "{:.0f}") for row in rows],
        "ours is": [_number(ratios.get(row.impl), "{:.2f}x") for row in rows],
        "error": [_number(row.error, "{:.1e}") for row in rows],
    }
    wide = {name: max(len(cell) for cell in (name, *cells)) for name, cells in columns.items() if any(cells)}
    lines = [f"{rows[0].op}: {rows[0].case}"]
    for cells in zip(*([name, *columns[name]] for name in wide), strict=True):
        aligned = (cell.rjust(width) for cell, width in zip(cells[1:], list(wide.values())[1:], strict=True))
        lines.append("  ".join(["  " + cells[0].ljust(wide["impl"]), *aligned]).rstrip())
    return "\n".join([*lines, *(f"  {note}" for note in notes)])


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def slug(name: str) -> str:
    """A file name of a device's name: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def command(module: str, arguments: Sequence[str] | None = None) -> str:
    """`python -m MODULE ...` as given, the ends of paths alone where these lead out of the repository."""
    words = []
    for word in sys.argv[1:] if arguments is None else arguments:
        path = Path(word)
        inside = not path.is_absolute() and ".." not in path.parts
        words.append(word if inside else path.name)
    return " ".join(["python", "-m", module, *words])


def commit() -> str:
    """The commit that is measured: BENCH_COMMIT, or what git says, with "+" where files differ from it."""
    named = os.environ.get(COMMIT_VARIABLE, "")
    if named:
        return named
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def load(path: Path) -> list[Row]:
    """Rows of a results file; fields that this version does not know are left out."""
    known = {f.name for f in fields(Row)}
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return [Row(**{name: value for name, value in row.items() if name in known}) for row in rows]


def save(path: Path, rows: Iterable[Row], about: dict[str, Any]) -> None:
    """Writes the rows; those of other cases that the file already holds stay."""
    rows = list(rows)
    measured = {(row.op, row.case) for row in rows}
    kept = [row for row in load(path) if (row.op, row.case) not in measured] if path.exists() else []
    merged = sorted([*kept, *rows], key=lambda row: (row.op, row.case))
    content = {**about, "rows": [asdict(row) for row in merged]}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def chart(path: Path, rows: Sequence[Row], title: str) -> None:
    """One panel a case: a bar an implementation, ours in colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.cost is not None:
            cases.setdefault((row.op, row.case), []).append(row)
    cases = {key: each for key, each in cases.items() if len(each) > 1}
    if not cases:
        return
    columns = min(3, len(cases))
    lines = -(-len(cases) // columns)
    size = (6 * columns, 2.4 * lines + 0.5)
    figure, panels = pyplot.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for panel in panels.flat[len(cases) :]:
        panel.set_visible(False)
    for panel, ((op, case), each) in zip(panels.flat, cases.items(), strict=False):
        ordered = sorted(each, key=lambda row: row.cost or 0.0, reverse=True)
        values = [row.cost or 0.0 for row in ordered]
        colours = ["#d1495b" if row.impl == OURS else "#9aa5b1" for row in ordered]
        bars = panel.barh([row.impl for row in ordered], values, color=colours)
        labels = [f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in values]
        panel.bar_label(bars, labels, padding=2, fontsize=7)
        panel.margins(x=0.15)
        unit = "MiB" if ordered[0].ms is None else "ms"
        panel.set_title(textwrap.fill(f"{op}: {case} [{unit}]", 62), fontsize=8)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
