"""`python -m tempact.generate [--preset NAME] --prompt TEXT [--section.field value ...]`: videos and their plans."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tempact.cli import LineParser, guarded, parse_run
from tempact.config import RunConfig
from tempact.errors import UserError
from tempact.presets import DEFAULT

PROGRAM = "python -m tempact.generate"


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 bad input."""
    return guarded(lambda: _generate(*parser().parse_known_args(argv)))


def parser() -> argparse.ArgumentParser:
    made = LineParser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    made.add_argument("--prompt", required=True, help="the instruction")
    made.add_argument("--plan", type=Path, help="a plan (JSON: steps with start, end, prompt) instead of the planner's")
    made.add_argument("--run", type=Path, help="folder of a training run; without it the untrained policies")
    made.add_argument("--preset", default=DEFAULT)
    made.add_argument("--output", type=Path, default=Path("videos"), help="folder for videos, film strips and plans")
    made.add_argument("--seed", type=int, default=0, help="of the first video; each further one has the next")
    made.add_argument("--count", type=int, default=1, help="videos, each with noise and a plan of its own")
    return made


def _generate(arguments: argparse.Namespace, options: list[str]) -> int:
    config = _configured(arguments, options)

    from tempact.build import SHAPEWORLD, build_policies, is_random
    from tempact.infra.files import claim_run_folder
    from tempact.infra.progress import setup_logging
    from tempact.infra.showcase import write_video
    from tempact.planner.plan_file import read_plan
    from tempact.run import trained_policies
    from tempact.shapeworld.grammar import parse_instruction

    if config.executor.weights == SHAPEWORLD:
        parse_instruction(arguments.prompt)  # before anything is loaded or written
    lengths = config.executor.frames, config.executor.chunk_frames
    plan = read_plan(arguments.plan, arguments.prompt, *lengths) if arguments.plan else None
    setup_logging()
    with claim_run_folder(arguments.output) as folder:
        policies = trained_policies(config, arguments.run) if arguments.run else build_policies(config)
        note = "random weights" if is_random(config.executor.weights) else ""
        for number in range(arguments.count):
            made, frames = policies.make_video(arguments.prompt, arguments.seed + number, plan)
            for path in write_video(folder, made, frames, note, number if arguments.count > 1 else None):
                sys.stdout.write(f"{path}\n")
    return 0


def _configured(arguments: argparse.Namespace, options: list[str]) -> RunConfig:
    """The preset's or the run's values, with those of the command line over them."""
    if not arguments.prompt.strip():
        raise UserError("--prompt: found an empty text; accepted: an instruction")
    if arguments.count < 1:
        raise UserError(f"--count: found {arguments.count}; accepted: at least 1")
    source = [arguments.preset]
    if arguments.run is not None:
        file = arguments.run / "config.yaml"
        if not file.is_file():
            raise UserError(f"--run: {arguments.run} holds no config.yaml; accepted: the folder of a training run")
        source = ["--config", str(file)]
    return parse_run([*source, *options], PROGRAM)[0]


if __name__ == "__main__":
    sys.exit(main())
