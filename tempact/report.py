"""`python -m tempact.report RUN`: one offline report.html of a run, finished or not."""

from __future__ import annotations

import sys
from pathlib import Path

from tempact.errors import LineParser, guarded


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 for a folder that is no run or has a damaged file."""
    parser = LineParser("python -m tempact.report", description="Writes report.html into a run folder.")
    parser.add_argument("run", type=Path, help="a run folder, also of a run still going")
    return guarded(lambda: _report(parser.parse_args(argv).run))


def _report(run: Path) -> int:
    from tempact.reporting.report import write_report  # late: --help must not wait for matplotlib and torch

    sys.stdout.write(f"{write_report(run)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
