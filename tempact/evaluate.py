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

from tempact.cli import guarded, parse_run, to_yaml
from tempact.config import RunConfig
from tempact.errors import UserError
from tempact.presets import PRESETS
from tempact.temporal_order.options import ORDER_ONLY, SHAPEWORLD, SUITES, order_options, parser

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
    suite = arguments.suite or (SHAPEWORLD if config.executor.weights == SHAPEWORLD else SUITES[0])
    return _shapeworld(arguments, config, run) if suite == SHAPEWORLD else _order(arguments, config, run)


def _configured(arguments: argparse.Namespace, options: list[str]) -> tuple[RunConfig, Path | None]:
    """The configuration of the preset or run with the command line's values, and the run's folder if it is one."""
    run = Path(arguments.target)
    known = (run / "config.yaml").is_file()
    if not known and arguments.target not in PRESETS:
        presets = ", ".join(PRESETS)
        raise UserError(f"{run}: holds no config.yaml; accepted: the folder of a training run, or a preset: {presets}")
    source = ["--config", str(run / "config.yaml")] if known else [arguments.target]
    config = parse_run([*source, *options], PROGRAM)[0]
    evaluation = config.evaluation if arguments.seed is None else replace(config.evaluation, seed=arguments.seed)
    return replace(config, evaluation=evaluation, device=arguments.device or config.device), run if known else None


def _shapeworld(arguments: argparse.Namespace, config: RunConfig, run: Path | None) -> int:
    given = next((name for name in ORDER_ONLY if getattr(arguments, name) is not None), None)
    if given is not None:
        raise UserError(
            f"--{given.replace('_', '-')}: is not for --suite shapeworld; accepted: --simple, --hard, --seed"
        )
    counts = {name: getattr(arguments, name) for name in ("simple", "hard") if getattr(arguments, name) is not None}
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"--{name}: found {count}; accepted: at least 1")
    config = replace(config, evaluation=replace(config.evaluation, **counts))

    from tempact.build import build_policies
    from tempact.infra.files import claim_run_folder, write_atomic
    from tempact.infra.progress import setup_logging
    from tempact.run import evaluate, trained_policies
    from tempact.temporal_order.cells import CellStore
    from tempact.temporal_order.command import evaluation_name, untrained_folder, weights_of
    from tempact.temporal_order.conditions import METHODS

    setup_logging()
    with claim_run_folder(run or untrained_folder(config)) as folder:
        policies = trained_policies(config, run) if run else build_policies(config)
        if run is None:
            write_atomic(folder / "config.yaml", to_yaml(config))  # for the report
        store = CellStore(folder / "evaluation" / evaluation_name(config, weights_of(run)), config.evaluation.seed)
        evaluate(config, folder, policies, store, [method for method in METHODS if run or not method.trained])
    return 0


def _order(arguments: argparse.Namespace, config: RunConfig, run: Path | None) -> int:
    options = order_options(arguments, config, trained=run is not None)

    from tempact.build import build_policies, is_random
    from tempact.executor.rollout import gaussian_noise
    from tempact.infra.files import claim_run_folder
    from tempact.infra.progress import Progress, setup_logging
    from tempact.rewards.judge_types import JudgeOutage
    from tempact.run import EXIT_ABORTED, trained_policies
    from tempact.temporal_order import command

    setup_logging()
    target = arguments.output or (run or command.untrained_folder(config)) / SUITES[0]
    with claim_run_folder(target) as folder, command.served_judges(options.judges, folder / "judges.sqlite") as judges:
        policies = trained_policies(config, run) if run else build_policies(config)
        judges = [*judges, *command.load_pickscore(options, policies.executor.device)]
        weights = "random weights" if is_random(config.executor.weights) else command.weights_of(run)
        try:
            with Progress("evaluation", 0) as progress:
                paths = command.evaluate_order(
                    folder, options, config, policies,
                    noise=gaussian_noise, judges=judges, weights=weights, tell=progress.tell,
                )  # fmt: skip
        except JudgeOutage as error:
            sys.stderr.write(f"stopped: {error}; the same command goes on from here\n")
            return EXIT_ABORTED
    sys.stdout.write("".join(f"{path}\n" for path in paths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
