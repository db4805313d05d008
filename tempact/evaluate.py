"""`python -m tempact.evaluate PRESET|RUN [--suite SUITE] [--section.field value ...]`: tables.

The Temporal Order Benchmark's videos are scored by judges behind servers (environment: TEMPACT_JUDGE_..., and
TEMPACT_JUDGE_HELD_OUT_... for the held-out one); ShapeWorld's suite brings its own judges. The same command given again
goes on where a killed evaluation was; no score that was written down is asked for again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempact.cli import RunOptions, callable_command, check_whole, of_ranks, parse_run, preset_or_run, refuse_named
from tempact.config import RunConfig, check_exact, keys_of
from tempact.errors import LineParser, Stopped, UserError
from tempact.evaluation import (
    BOTH,
    CONDITIONS,
    PAPER_FRAMES,
    ROLES,
    SEEDS,
    SINGLE,
    STEP,
    BenchmarkOptions,
    Method,
    with_best_of,
)
from tempact.evaluation.prompts import SETS, choose_prompts
from tempact.worlds import SHAPEWORLD, STRICT, world_of

if TYPE_CHECKING:
    from tempact.distributed import Ranks
    from tempact.policies import PolicyPair

PROGRAM = "python -m tempact.evaluate"
KEPT = "what is done is kept; the same command goes on from here"
TEMPORAL_ORDER = "temporal-order"
STRICTER = ("strict",)  # option of the stricter suite, in the place of the options SETS
ORDER_ONLY = ("judge", "pickscore", "prompts", "seeds", "frames", "conditions", "export", "retry_missing", "output")


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 bad input, 3 a judge that was silent for too long, 130 stopped (what was done is kept)."""
    return of_ranks(lambda: _goes_on(sys.argv[1:] if argv is None else list(argv)))


def _goes_on(argv: list[str]) -> int:
    try:
        return _evaluate(argv)
    except Stopped:
        sys.stderr.write(f"{KEPT}\n")
        raise


def _parser() -> argparse.ArgumentParser:
    """The options of both suites; None for options that were not given."""
    made = LineParser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    made.add_argument("target", metavar="PRESET|RUN", help="a preset's untrained policies, or a training run's folder")
    suites = (TEMPORAL_ORDER, SHAPEWORLD, STRICT)
    made.add_argument("--suite", choices=suites, help="default: shapeworld for its executor, else temporal-order")
    made.add_argument("--simple", type=int, help="videos of the simple set (default: as the run, or all prompts)")
    made.add_argument("--hard", type=int, help="videos of the hard set (default: as the run, or all prompts)")
    made.add_argument("--strict", type=int, help=f"videos of each set of {STRICT} (default: as the run)")
    made.add_argument("--seed", type=int, help="of prompts, plans and noise (default: as the run)")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: as the run")
    made.add_argument("--threads", type=int, help="CPU threads (default: as the run)")
    made.add_argument("--gpus", metavar="N", help=keys_of(RunOptions)["gpus"].about)
    made.add_argument(
        "--best-of", type=int, default=1, metavar="N",
        help="further rows: step prompts and both trained policies with the best of N continuations at every switch",
    )  # fmt: skip
    made.add_argument("--split", choices=("test", "validation"), help="of ShapeWorld's instructions (default: test)")
    order = made.add_argument_group(TEMPORAL_ORDER)
    order.add_argument("--output", type=Path, help="folder (default: temporal-order in the run's or preset's own)")
    order.add_argument("--judge", nargs="*", choices=tuple(ROLES), help="default: in-domain")
    order.add_argument(
        "--pickscore", choices=("yes", "no"), help="default: yes where judges are (--judges.aesthetics_)"
    )
    order.add_argument("--prompts", nargs="+", metavar="SET=FILE", help="CSV, JSONL or text (default: the own prompts)")
    order.add_argument("--seeds", type=int, help=f"videos of a prompt and condition (default: {SEEDS})")
    order.add_argument("--frames", nargs="+", metavar="SET=N", help="latent frames (default: simple=36 hard=60)")
    order.add_argument("--conditions", nargs="+", choices=CONDITIONS, help="default: single-prompt step-prompt trained")
    order.add_argument("--export", choices=("vbench",), help="copies of the videos, named as VBench reads them")
    order.add_argument("--retry-missing", action="store_true", default=None, help="asks again for missing scores")
    return made


def _evaluate(argv: list[str]) -> int:
    arguments, options = _parser().parse_known_args(argv)
    refuse_named(options, PROGRAM)
    undotted = [word for word in options if word.startswith("--") and "." not in word.partition("=")[0]]
    if undotted:
        _parser().error(f"unrecognized arguments: {' '.join(undotted)}")
    config, run, processes = _configured(arguments, options)
    if arguments.best_of < 1:
        raise UserError(f"--best-of: found {arguments.best_of}; accepted: at least 1")
    world = world_of(config)
    asked = None
    if world.chosen_suite(arguments.suite) != TEMPORAL_ORDER:
        suite = arguments.suite or config.evaluation.suite
        counts = _shapeworld_counts(arguments, suite)
        config = replace(config, evaluation=replace(config.evaluation, suite=suite, **counts))
    else:
        for name in ("split", *STRICTER):
            if getattr(arguments, name) is not None:
                raise UserError(f"--{name}: is not for --suite temporal-order; accepted there: --prompts SET=FILE")
        asked = _benchmark_options(arguments, config, real_video=world.real_video, trained=run is not None)
    if processes:
        from tempact.distributed.launch import launched

        code = launched("tempact.evaluate", argv, config.device, processes)
        if code is not None:
            return code

    from tempact.runs import together
    from tempact.runs.evaluation import untrained_folder

    act = partial(_together, config, run, asked, arguments.output, arguments.best_of)
    return together(config, arguments.output or run or untrained_folder(config), act, KEPT)


def _together(
    config: RunConfig, run: Path | None, asked: BenchmarkOptions | None, output: Path | None, best_of: int, ranks: Ranks
) -> int:
    """The benchmark as it is asked for, else ShapeWorld's own suite."""
    from tempact.runs.evaluation import evaluate_benchmark, evaluate_shapeworld
    from tempact.runs.run import judged_here

    load = partial(_load, config, run, ranks)
    if asked is None:
        return evaluate_shapeworld(config, run, load, ranks, best_of)
    return evaluate_benchmark(judged_here(config, ranks), run, load, asked, output, ranks)


def _load(config: RunConfig, run: Path | None, ranks: Ranks) -> tuple[PolicyPair, str]:
    """A run's policies and the name of its newest checkpoint, or a preset's own."""
    from tempact.policies import build_policies
    from tempact.runs.ending import quiet
    from tempact.runs.run import load_adapters, newest, use_newest

    # a run without a checkpoint is refused before weights are loaded
    found = None if run is None else ranks.from_first(lambda: newest(run))
    with quiet(not ranks.first):
        policies = build_policies(config)
    if run is None or found is None:
        return policies, "untrained"
    return policies, use_newest(run, found, partial(load_adapters, policies)).name


def _configured(arguments: argparse.Namespace, options: list[str]) -> tuple[RunConfig, Path | None, int]:
    """The configuration of the preset or run with the command line's values, the run's folder if it is one, and how
    many processes are asked for."""
    source, run = preset_or_run(arguments.target)
    own = {"evaluation.seed": arguments.seed, "evaluation.split": arguments.split}
    own |= {"device": arguments.device, "threads": arguments.threads, "gpus": arguments.gpus}
    given = [word for key, value in own.items() if value is not None for word in (f"--{key}", str(value))]
    config, others = parse_run([*source, *options, *given], PROGRAM)
    return check_exact(check_whole(config)), run, others.gpus


def _shapeworld_counts(arguments: argparse.Namespace, suite: str) -> dict[str, Any]:
    """How many videos of each set were asked for. UserError for options that a suite of ShapeWorld lacks."""
    own, others = (STRICTER, SETS) if suite == STRICT else (SETS, STRICTER)
    given = next((name for name in (*ORDER_ONLY, *others) if getattr(arguments, name) is not None), None)
    if given is not None:
        accepted = ", ".join(f"--{name}" for name in (*own, "seed", "split"))
        raise UserError(f"--{given.replace('_', '-')}: is not for --suite {suite}; accepted: {accepted}")
    counts = {name: getattr(arguments, name) for name in own if getattr(arguments, name) is not None}
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"--{name}: found {count}; accepted: at least 1")
    return counts


def _benchmark_options(
    arguments: argparse.Namespace, config: RunConfig, *, real_video: bool, trained: bool
) -> BenchmarkOptions:
    """Reads the prompts and checks the other options; UserError for one that cannot be followed.

    real_video: videos may have the benchmark's lengths. trained: the target is a run.
    """
    seeds = SEEDS if arguments.seeds is None else arguments.seeds
    if seeds < 1:
        raise UserError(f"--seeds: found {seeds}; accepted: at least 1")
    usual = () if arguments.export else ("in-domain",)
    judges = tuple(dict.fromkeys(usual if arguments.judge is None else arguments.judge))
    pickscore = bool(judges) if arguments.pickscore is None else arguments.pickscore == "yes"
    if not judges and not pickscore and not arguments.export:
        raise UserError("--judge: found none, and neither --pickscore nor --export; accepted: one of them")
    prompts = choose_prompts(arguments.prompts or (), {"simple": arguments.simple, "hard": arguments.hard})
    usual_frames = PAPER_FRAMES if real_video else {}
    frames = {name: usual_frames.get(name, config.executor.frames) for name in prompts}
    return BenchmarkOptions(
        prompts=prompts,
        frames=_lengths(arguments.frames or (), frames, config.executor.chunk_frames),
        methods=_methods(list(dict.fromkeys(arguments.conditions or ())), trained, arguments.best_of),
        seeds=seeds,
        judges=judges,
        pickscore=pickscore,
        export=bool(arguments.export),
        retry_missing=bool(arguments.retry_missing),
    )


def _methods(named: list[str], trained: bool, best_of: int) -> list[Method]:
    untaught = next((name for name in named if CONDITIONS[name].trained and not trained), None)
    if untaught is not None:
        accepted = "single-prompt, step-prompt; the others need the folder of a training run"
        raise UserError(f"--conditions: found {untaught!r} for an untrained preset; accepted: {accepted}")
    usual = (SINGLE, STEP, BOTH) if trained else (SINGLE, STEP)
    methods = [CONDITIONS[name] for name in named] or [one for one in CONDITIONS.values() if one.name in usual]
    if best_of == 1:
        return methods
    forked = with_best_of(methods, best_of)
    if len(forked) == len(methods):
        raise UserError(f"--best-of: found {best_of}; accepted: with --conditions step-prompt or trained")
    return forked


def _lengths(given: Sequence[str], usual: dict[str, int], chunk: int) -> dict[str, int]:
    """Latent frames of each set."""
    lengths = dict(usual)
    for one in given:
        name, _, number = one.partition("=")
        if name not in lengths or not number.isdecimal() or int(number) < 1 or int(number) % chunk:
            accepted = f"SET=NUMBER with a set of {', '.join(lengths)} and a positive multiple of {chunk} latent frames"
            raise UserError(f"--frames: found {one!r}; accepted: {accepted}")
        lengths[name] = int(number)
    return lengths


callable_command(__name__, "tempact.runs.evaluation")

if __name__ == "__main__":
    sys.exit(main())
