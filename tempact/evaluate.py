"""`python -m tempact.evaluate PRESET|RUN [--suite temporal-order|shapeworld] [--section.field value ...]`: tables.

The Temporal Order Benchmark's videos are scored by judges behind servers (environment: TEMPACT_JUDGE_..., and
TEMPACT_JUDGE_HELD_OUT_... for the held-out one); ShapeWorld's suite brings its own judges. The same command given again
goes on where a killed evaluation was; nothing is scored twice.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from tempact import callable_command
from tempact.cli import guarded, parse_run
from tempact.config import RunConfig
from tempact.errors import UserError
from tempact.evaluation.options import SHAPEWORLD, order_options, parser, shapeworld_counts
from tempact.presets import PRESETS
from tempact.worlds import world_of

PROGRAM = "python -m tempact.evaluate"


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 bad input, 3 a judge that was silent for too long (what was scored is kept)."""
    return guarded(lambda: _evaluate(*_parser().parse_known_args(argv)))


def _parser() -> argparse.ArgumentParser:
    return parser(PROGRAM, __doc__)


def _evaluate(arguments: argparse.Namespace, options: list[str]) -> int:
    undotted = [word for word in options if word.startswith("--") and "." not in word.partition("=")[0]]
    if undotted:
        _parser().error(f"unrecognized arguments: {' '.join(undotted)}")
    config, run = _configured(arguments, options)
    world = world_of(config)
    if world.chosen_suite(arguments.suite) == SHAPEWORLD:
        config = replace(config, evaluation=replace(config.evaluation, **shapeworld_counts(arguments)))

        from tempact.runs.evaluation import evaluate_shapeworld

        return evaluate_shapeworld(config, run)
    asked = order_options(arguments, config, trained=run is not None, real_video=world.real_video)

    from tempact.runs.evaluation import evaluate_benchmark

    return evaluate_benchmark(config, run, asked, arguments.output)


def _configured(arguments: argparse.Namespace, options: list[str]) -> tuple[RunConfig, Path | None]:
    """The configuration of the preset or run with the command line's values, and the run's folder if it is one."""
    run = Path(arguments.target)
    known = (run / "config.yaml").is_file()
    if not known and arguments.target not in PRESETS:
        presets = ", ".join(PRESETS)
        raise UserError(f"{run}: holds no config.yaml; accepted: the folder of a training run, or a preset: {presets}")
    source = ["--config", str(run / "config.yaml")] if known else [arguments.target]
    own = {"evaluation.seed": arguments.seed, "device": arguments.device}
    given = [word for key, value in own.items() if value is not None for word in (f"--{key}", str(value))]
    return parse_run([*source, *options, *given], PROGRAM)[0], run if known else None


callable_command(__name__)

if __name__ == "__main__":
    sys.exit(main())
