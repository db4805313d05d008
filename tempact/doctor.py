"""`python -m tempact.doctor [--json]`: checks this machine for a run. `doctor judges`: asks each judge for a score.
`doctor scaling RUN`: estimates a run's iteration on more GPUs."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from tempact.diagnostics import FAULT, NOTHING, versions
from tempact.errors import EXIT_USER_ERROR, LineParser, guarded
from tempact.presets import DEFAULT, get_preset

JUDGES, SCALING = "judges", "scaling"
MOST_GPUS = 4096  # that are simulated


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 everything needed is there, 2 something is not, or bad input."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == [JUDGES]:
        return guarded(lambda: _judges(judges_parser().parse_args(arguments[1:])))
    if arguments[:1] == [SCALING]:
        return guarded(lambda: _scaling(scaling_parser().parse_args(arguments[1:])))
    return guarded(lambda: _doctor(parser().parse_args(arguments)))


def parser() -> argparse.ArgumentParser:
    made = LineParser(prog="python -m tempact.doctor", description=__doc__)
    made.add_argument("--output", type=Path, default=Path(get_preset(DEFAULT).output), help="folder of runs")
    made.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="cuda: a GPU must be there")
    made.add_argument("--json", action="store_true", help="print a JSON object in the place of lines")
    return made


def judges_parser() -> argparse.ArgumentParser:
    about = "One canned plan and one canned video to every judge of the environment (docs/judges.md)."
    made = LineParser(prog=f"python -m tempact.doctor {JUDGES}", description=about)
    made.add_argument("--timeout", type=_seconds, default=60.0, help="seconds that a judge may take (default 60)")
    return made


def scaling_parser() -> argparse.ArgumentParser:
    about = "Seconds of an iteration on more GPUs, simulated from the phases that a run with one process has measured."
    made = LineParser(prog=f"python -m tempact.doctor {SCALING}", description=about)
    made.add_argument("run", type=Path, help="folder of the run")
    made.add_argument("--gpus", type=_count, nargs="+", required=True, help="numbers of GPUs, at most 4096")
    made.add_argument(
        "--slow-rank", type=_slowness, default=1.0, help="one GPU takes so many times as long (default 1)"
    )
    return made


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MOST_GPUS):
        raise argparse.ArgumentTypeError(f"found {text!r}, accepted: 1 to {MOST_GPUS}")
    return int(text)


def _slowness(text: str) -> float:
    value = _seconds(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, accepted: 1 or more")
    return value


def _scaling(arguments: argparse.Namespace) -> int:
    from tempact.diagnostics.scaling import scaling

    sys.stdout.write("".join(f"{line}\n" for line in scaling(arguments.run, arguments.gpus, arguments.slow_rank)))
    return 0


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}, accepted: a number above 0")
    return value


def _judges(arguments: argparse.Namespace) -> int:
    from tempact.diagnostics.judges import findings

    healthy = True
    for status, line in findings(arguments.timeout):
        sys.stdout.write(f"{status:<5} {line}\n")
        sys.stdout.flush()  # the next judge may take its time
        healthy = healthy and status != FAULT
    return 0 if healthy else EXIT_USER_ERROR


def _doctor(arguments: argparse.Namespace) -> int:
    findings = list(versions())
    if all(finding.found != NOTHING for finding in findings):  # the other checks need the packages
        from tempact.diagnostics.machine import device_of, machine_findings

        findings += machine_findings(device_of(arguments.device), arguments.output)
    healthy = all(finding.status != FAULT for finding in findings)
    if arguments.json:
        report = {"healthy": healthy, "findings": [asdict(finding) for finding in findings]}
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    else:
        sys.stdout.write("".join(f"{finding.line()}\n" for finding in findings))
    return 0 if healthy else EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
