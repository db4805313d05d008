"""`python -m tempact.evaluate RUN`: the held-out table of a training run."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from tempact.cli import LineParser, from_yaml, guarded
from tempact.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 bad input."""
    return guarded(lambda: _evaluate(parser().parse_args(argv)))


def parser() -> argparse.ArgumentParser:
    made = LineParser(prog="python -m tempact.evaluate", description=__doc__)
    made.add_argument("run", type=Path, help="folder of a training run")
    made.add_argument("--simple", type=int, help="videos of the simple set (default: as the run)")
    made.add_argument("--hard", type=int, help="videos of the hard set (default: as the run)")
    made.add_argument("--seed", type=int, help="of prompts, plans and noise (default: as the run)")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: as the run")
    return made


def _evaluate(arguments: argparse.Namespace) -> int:
    file = arguments.run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{arguments.run}: holds no config.yaml; accepted: the folder of a training run")
    config = from_yaml(file)
    asked = {key: getattr(arguments, key) for key in ("simple", "hard", "seed") if getattr(arguments, key) is not None}
    for key in ("simple", "hard"):
        if asked.get(key, 1) < 1:
            raise UserError(f"--{key}: found {asked[key]}; accepted: at least 1")
    config = replace(config, evaluation=replace(config.evaluation, **asked), device=arguments.device or config.device)

    from tempact.infra.files import claim_run_folder
    from tempact.infra.progress import setup_logging
    from tempact.run import evaluate, trained_policies

    setup_logging()
    with claim_run_folder(arguments.run) as folder:
        evaluate(config, folder, trained_policies(config, folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
