"""`python -m tempact.generate [--preset NAME] --prompt TEXT [--section.field value ...]`: videos and their plans."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tempact.cli import CONFIG, LineParser, callable_command, guarded, lora_options, parse_run
from tempact.config import RunConfig
from tempact.errors import UserError
from tempact.presets import DEFAULT, backbone_inference

PROGRAM = "python -m tempact.generate"


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 bad input."""
    return guarded(lambda: _generate(*parser().parse_known_args(argv)))


def parser() -> argparse.ArgumentParser:
    made = LineParser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    asked = made.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", help="the instruction")
    asked.add_argument(
        "--prompts", type=Path, help="CSV, JSONL, parquet or text: prompt, and category, prompt_id, plan, seed"
    )
    made.add_argument("--plan", type=Path, help="a plan (JSON: steps with start, end, prompt) instead of the planner's")
    made.add_argument("--adapter", "--run", type=Path, help="a training run, or a PEFT folder of the executor")
    made.add_argument("--preset", help=f"default: {DEFAULT}, or the run's")
    made.add_argument(
        "--inference", choices=("training", "backbone"), default="training",
        help="videos as in training (default), or as the backbone's authors make them: prompts as given, own window",
    )  # fmt: skip
    made.add_argument("--frames", help="latent frames of every video, as --executor.frames")
    made.add_argument("--output", type=Path, default=Path("videos"), help="folder for videos, film strips and plans")
    made.add_argument("--seed", type=int, default=0, help="of the first video; each further one has the next")
    made.add_argument("--count", type=int, default=1, help="videos of a prompt, each with its noise and plan")
    return made


def _generate(arguments: argparse.Namespace, options: list[str]) -> int:
    config = _configured(arguments, options)

    from tempact.planner.plans import Request, read_plan, read_requests
    from tempact.runs.generation import make_videos
    from tempact.runs.logs import setup_logging
    from tempact.types import Prompt

    setup_logging()
    executor = config.executor
    lengths = executor.frames, executor.chunk_frames, executor.switch_rounding
    if arguments.prompts:
        requests = read_requests(arguments.prompts, *lengths)
    else:
        plan = read_plan(arguments.plan, arguments.prompt, *lengths) if arguments.plan else None
        requests = [Request("--prompt", Prompt("", arguments.prompt), plan)]
    for path in make_videos(config, requests, arguments.seed, arguments.count, arguments.output, arguments.adapter):
        sys.stdout.write(f"{path}\n")
    return 0


def _configured(arguments: argparse.Namespace, options: list[str]) -> RunConfig:
    """The preset's or the run's values, with those of a PEFT folder and of the command line over them."""
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise UserError("--prompt: found an empty text; accepted: an instruction")
    if arguments.prompts and arguments.plan:
        raise UserError("--plan: found beside --prompts; accepted: a column `plan` in that file")
    if arguments.count < 1:
        raise UserError(f"--count: found {arguments.count}; accepted: at least 1")
    adapter, source = arguments.adapter, [arguments.preset] if arguments.preset else []
    if adapter is not None and (adapter / CONFIG).is_file():
        source += lora_options(adapter, "executor")
    elif adapter is not None and (adapter / "config.yaml").is_file():
        source += ["--config", str(adapter / "config.yaml")]
    elif adapter is not None:
        raise UserError(f"--adapter: found no config.yaml or {CONFIG} in {adapter}; accepted: a run, a PEFT folder")
    frames = ["--executor.frames", arguments.frames] if arguments.frames else []
    untrained = ["--planner.train", "false", "--executor.train", "false"]  # any sampling setting may be tried
    config = parse_run([*source, *frames, *options, *untrained], PROGRAM)[0]
    return backbone_inference(config) if arguments.inference == "backbone" else config


callable_command(__name__, "tempact.runs.generation")

if __name__ == "__main__":
    sys.exit(main())
