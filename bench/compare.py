"""`python -m bench.compare OLD NEW`: rows that got slower or larger, or are missing, between two results files.

Ours is compared by its ratios to the other implementations of its case, which a slower machine does not change;
where the files share none, by ms or MiB. The exit code is 1 if anything is worse than the threshold, else 0.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.report import OURS, Row, load

THRESHOLD_PERCENT = 5.0


@dataclass(frozen=True)
class Change:
    """change: how much better the new row is than the old (1 is equal); None if the new file has no figure."""

    row: Row
    change: float | None
    basis: str

    def __str__(self) -> str:
        what = f"{self.row.op}: {self.row.case}"
        return f"{what}: lost ({self.basis})" if self.change is None else f"{what}: {self.change:.3f}x ({self.basis})"


def changes(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """A change for every row of ours that has a figure in `old`."""
    found = {row.key: row for row in new}
    return [_change(row, found.get(row.key)) for row in old if row.impl == OURS and row.cost is not None]


def _change(old: Row, new: Row | None) -> Change:
    if new is None:
        return Change(old, None, "not in the new file")
    if new.cost is None or old.cost is None:
        return Change(old, None, f"no figure, error {new.error}")
    shared = sorted(old.ratio_to.keys() & new.ratio_to.keys())
    if not shared:
        unit = "MiB" if new.ms is None else "ms"
        return Change(old, old.cost / new.cost, f"{old.cost:.3f} -> {new.cost:.3f} {unit}")
    logs = [math.log(new.ratio_to[peer] / old.ratio_to[peer]) for peer in shared]
    peers = f"{shared[0]}" if len(shared) == 1 else f"{len(shared)} peers"
    return Change(old, math.exp(sum(logs) / len(logs)), f"against {peers}; {old.cost:.3f} -> {new.cost:.3f}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="a results file, as in bench/baselines")
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD_PERCENT, metavar="PERCENT", help="%(default)s by default"
    )
    options = parser.parse_args(arguments)
    found = changes(load(options.old), load(options.new))
    limit = 1 - options.threshold / 100
    worse = [change for change in found if change.change is None or change.change < limit]
    for change in worse:
        print(f"REGRESSION {change}")
    better = [change for change in found if change.change is not None and change.change > 1 / limit]
    for change in better:
        print(f"better     {change}")
    print(f"{len(found)} compared, {len(worse)} worse and {len(better)} better by more than {options.threshold:g}%")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
