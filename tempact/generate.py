"""`python -m tempact.generate [PRESET|RUN] --prompt TEXT [--section.field value ...]`: videos and their plans.

File names hold the seed, and a hash of plan and settings: no video replaces another one.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tempact.cli import (
    CONFIG,
    EXIT_ABORTED,
    RunOptions,
    callable_command,
    check_whole,
    lora_options,
    of_ranks,
    parse_run,
    preset_or_run,
    refuse_named,
)
from tempact.config import RunConfig, keys_of
from tempact.errors import LineParser, UserError
from tempact.presets import backbone_inference

if TYPE_CHECKING:
    from tempact.distributed import Ranks
    from tempact.planner.plans import Request

PROGRAM = "python -m tempact.generate"


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 bad input, 3 a judge that was silent for too long, 130 stopped; of several processes also
    1, an unexpected exception."""
    return of_ranks(lambda: _generate(sys.argv[1:] if argv is None else argv))


def parser() -> argparse.ArgumentParser:
    asked = "(--prompt TEXT | --prompts FILE | --again FILE)"
    usage = f"{PROGRAM} [PRESET|RUN] {asked} [option ...] [--section.key value ...]"
    made = LineParser(prog=PROGRAM, usage=usage, description=__doc__, allow_abbrev=False)
    source = made.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the instruction")
    source.add_argument(
        "--prompts", type=Path, help="CSV, TSV, JSONL, parquet or text: prompt, and category, prompt_id, plan, seed"
    )
    source.add_argument(
        "--again", type=Path, metavar="FILE",
        help="a video's JSON: its instruction, plan, seed and chosen continuations make it again, unscored",
    )  # fmt: skip
    made.add_argument("--plan", type=Path, help="a plan (JSON: steps with start, end, prompt) instead of the planner's")
    made.add_argument("--adapter", type=Path, help="a PEFT folder of the executor, in the place of a run's")
    made.add_argument(
        "--plans", type=int, metavar="N",
        help="plans sampled for a video; the best one makes it (default: 8 in ShapeWorld, which rates plans)",
    )  # fmt: skip
    made.add_argument(
        "--best-of", type=int, default=1, metavar="N",
        help="continuations made at each switch of a plan; the one that rewards rate best goes on (default: 1; keys "
        "best_of.*). How many plans are sampled is --plans",
    )  # fmt: skip
    made.add_argument(
        "--inference", choices=("training", "backbone"), default="training",
        help="videos as in training (default), or as the backbone's authors make them: prompts as given, own window",
    )  # fmt: skip
    made.add_argument("--frames", metavar="N", help="latent frames of every video, as --executor.frames")
    made.add_argument("--output", type=Path, default=Path("videos"), help="folder for videos, film strips and plans")
    made.add_argument("--seed", type=int, default=0, help="of the first video; each further one has the next")
    made.add_argument("--gpus", metavar="N", help=keys_of(RunOptions)["gpus"].about)
    made.add_argument("--count", type=int, default=1, help="videos of a prompt, each with its noise and plan")
    return made


def _generate(argv: Sequence[str]) -> int:
    named = [word for word in argv[:1] if not word.startswith("-")]
    arguments, options = parser().parse_known_args(argv[len(named) :])
    arguments.prompt = arguments.prompt and _typed(arguments.prompt)
    refuse_named(options, PROGRAM)
    source, run = preset_or_run(named[0]) if named else ([], None)
    config, others = _configured(arguments, options, source, run)
    if others.gpus or others.max_restarts:
        from tempact.distributed.launch import launched

        code = launched("tempact.generate", [*argv], config.device, others.gpus, others.max_restarts)
        if code is not None:
            return code

    from tempact.runs.logs import starting

    starting()
    from tempact.runs import together

    act = partial(_made, config, arguments, run or arguments.adapter)
    return together(config, arguments.output, act, "what is written stays")


def _made(config: RunConfig, arguments: argparse.Namespace, source: Path | None, ranks: Ranks) -> int:
    """Makes the videos; prints their paths, on rank 0."""
    from tempact.rewards.judges import JudgeOutage
    from tempact.runs.generation import Asked, make_videos

    requests = ranks.from_first(partial(_requests, config, arguments))
    asked = Asked(arguments.seed, arguments.count, arguments.plans, arguments.best_of, arguments.output)
    try:
        for path in make_videos(config, requests, asked, source, ranks):
            sys.stdout.write(f"{path}\n")
    except JudgeOutage as error:
        if not ranks.alone:
            raise
        sys.stderr.write(f"stopped: {error}; what is written stays\n")
        return EXIT_ABORTED
    return 0


def _requests(config: RunConfig, arguments: argparse.Namespace) -> list[Request]:
    from tempact.planner.plans import Request, read_made, read_plan, read_requests
    from tempact.types import Prompt

    executor = config.executor
    lengths = executor.frames, executor.chunk_frames, executor.switch_rounding
    if arguments.again:
        return [read_made(arguments.again, *lengths)]
    if arguments.prompts:
        return read_requests(arguments.prompts, *lengths)
    plan = read_plan(arguments.plan, arguments.prompt, *lengths) if arguments.plan else None
    return [Request("--prompt", Prompt("", arguments.prompt), plan)]


def _typed(text: str) -> str:
    """A word of the command line as it was typed: in a locale without UTF-8 its bytes have not been decoded."""
    try:
        return os.fsencode(text).decode("utf-8", "replace")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode("utf-8")


def _configured(
    arguments: argparse.Namespace, options: Sequence[str], source: Sequence[str], run: Path | None
) -> tuple[RunConfig, RunOptions]:
    """The preset's or the run's values, with a PEFT folder's and the command line's over them; other options."""
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise UserError("--prompt: found an empty text; accepted: an instruction")
    if arguments.prompts and arguments.plan:
        raise UserError("--plan: found beside --prompts; accepted: a column `plan` in that file")
    if arguments.again:
        _check_again(arguments)
    for name in ("count", "plans", "best_of"):
        if (found := getattr(arguments, name)) is not None and found < 1:
            raise UserError(f"--{name.replace('_', '-')}: found {found}; accepted: at least 1")
    if arguments.adapter is not None:
        if run is not None:
            raise UserError(f"--adapter: found beside the run {run}, which has its own; accepted: one of the two")
        if not (arguments.adapter / CONFIG).is_file():
            accepted = f"a PEFT folder; a run is the first word: {PROGRAM} RUN ..."
            raise UserError(f"--adapter: found no {CONFIG} in {arguments.adapter}; accepted: {accepted}")
        source = [*source, *lora_options(arguments.adapter, "executor")]
    frames = ["--executor.frames", arguments.frames] if arguments.frames else []
    untrained = ["--planner.train", "false", "--executor.train", "false"]  # any sampling setting may be tried
    processes = ["--gpus", arguments.gpus] if arguments.gpus is not None else []
    config, others = parse_run([*source, *frames, *options, *untrained, *processes], PROGRAM)
    check_whole(config)
    return backbone_inference(config) if arguments.inference == "backbone" else config, others


def _check_again(arguments: argparse.Namespace) -> None:
    """UserError for options that a video's own JSON has in their place."""
    others = {"--plan": arguments.plan, "--plans": arguments.plans, "--seed": arguments.seed or None}
    others |= {"--count": arguments.count != 1 or None, "--best-of": arguments.best_of != 1 or None}
    given = next((name for name, value in others.items() if value is not None), None)
    if given is not None:
        raise UserError(f"{given}: found beside --again; accepted: --again alone, whose file tells plan and seed")


callable_command(__name__, "tempact.runs.generation")

if __name__ == "__main__":
    sys.exit(main())
