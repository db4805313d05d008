"""`python -m tempact.report RUN`: one offline report.html of a run, finished or not."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tempact.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 2 for a folder that is no run."""
    parser = argparse.ArgumentParser("python -m tempact.report", description="Writes report.html into a run folder.")
    parser.add_argument("run", type=Path, help="a run folder, also of a run still going")
    options = parser.parse_args(arguments)
    from tempact.infra.report import write_report  # late: --help must not wait for matplotlib and torch

    try:
        print(write_report(options.run))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
