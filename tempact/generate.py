"""`python -m tempact.generate --prompt TEXT`: one video and its plan."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tempact.cli import LineParser, from_yaml, guarded
from tempact.errors import UserError
from tempact.presets import DEFAULT, get_preset


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 bad input."""
    return guarded(lambda: _generate(parser().parse_args(argv)))


def parser() -> argparse.ArgumentParser:
    made = LineParser(prog="python -m tempact.generate", description=__doc__)
    made.add_argument("--prompt", required=True, help="the instruction")
    made.add_argument("--run", type=Path, help="folder of a training run; without it the untrained policies")
    made.add_argument("--preset", default=DEFAULT)
    made.add_argument("--output", type=Path, default=Path("videos"), help="folder for video, film strip and plan")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return made


def _generate(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from tempact.shapeworld.grammar import parse_instruction

    if not arguments.prompt.strip():
        raise UserError("--prompt: found an empty text; accepted: an instruction")
    parse_instruction(arguments.prompt)  # before anything is loaded or written
    if arguments.run is not None and not (arguments.run / "config.yaml").is_file():
        raise UserError(f"--run: {arguments.run} holds no config.yaml; accepted: the folder of a training run")
    config = from_yaml(arguments.run / "config.yaml") if arguments.run else get_preset(arguments.preset)
    config = replace(config, device=arguments.device)

    from tempact.build import build_policies
    from tempact.infra.files import claim_run_folder
    from tempact.infra.progress import setup_logging
    from tempact.infra.showcase import write_video
    from tempact.run import trained_policies

    setup_logging()
    with claim_run_folder(arguments.output) as folder:
        policies = trained_policies(config, arguments.run) if arguments.run else build_policies(config)
        plan, frames = policies.make_video(arguments.prompt, arguments.seed)
        for path in write_video(folder, plan, frames):
            sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
