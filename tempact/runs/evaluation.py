"""Evaluations of runs and presets: policies, the folder of results, and where a killed evaluation goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from tempact.cli import EXIT_ABORTED, from_yaml, to_yaml
from tempact.config import VIDEO, EvaluationConfig, RunConfig, flatten, keys_of
from tempact.distributed import Ranks
from tempact.errors import UserError
from tempact.evaluation import BOTH, METHODS, OVERFITTING, SINGLE, STEP, BenchmarkOptions, Method, with_best_of
from tempact.evaluation.events import event_rates, write_events
from tempact.evaluation.harness import Evaluation
from tempact.evaluation.judges import Suite, load_pickscore, served_judges, shapeworld_code, shapeworld_judges
from tempact.evaluation.prompts import SETS, OrderPrompt
from tempact.evaluation.statistics import Bootstrap, Origin, plain, write_evaluation
from tempact.evaluation.tables import export_vbench, gather, markdown
from tempact.executor.sampler import gaussian_noise
from tempact.files import claim_run_folder, write_atomic
from tempact.policies import PolicyPair, device_of
from tempact.reporting.report import leave_report, write_report, write_results
from tempact.reporting.strips import write_showcase
from tempact.rewards.judges import JudgeOutage
from tempact.runs.best_of import Selection, selecting
from tempact.runs.logs import Progress, setup_logging
from tempact.shapeworld import STRICT_SETS
from tempact.shapeworld.strict import reword
from tempact.shapeworld.world import held_out_prompts
from tempact.video import LOSSLESS, mp4_format
from tempact.worlds import STRICT, world_of

log = logging.getLogger(__name__)

LATER = ("planner.spans", "executor.fp8_linears")

CONFIG = "config.yaml"
SHOWN = {SINGLE: "single prompt", STEP: "before: step prompts", BOTH: "after: + TempAct"}  # rows of the film strips
Load = Callable[[], tuple[PolicyPair, str]]  # the policies, and the name of their weights


def evaluate_shapeworld(config: RunConfig, run: Path | None, load: Load, ranks: Ranks, best_of: int = 1) -> int:
    """ShapeWorld's own table, beside the run (or, for a preset, beside its runs); returns the exit code.

    best_of: continuations at switches of further rows, which then stand beside those of single and step prompts and of
    both trained policies alone.
    """
    setup_logging()
    policies, weights = load()
    with ExitStack() as opened:
        folder = claimed(run or untrained_folder(config), opened, ranks)
        methods = [method for method in methods_of(config) if run or not method.trained]
        if best_of > 1:
            methods = with_best_of([method for method in methods if method.name in (SINGLE, STEP, BOTH)], best_of)
        table = evaluate(config, folder, policies, weights.partition(" ")[0], methods, ranks)
    if ranks.first:
        sys.stdout.write("".join(f"{line}\n" for line in leave_report(table)))
    ranks.arrive()
    return 0


def claimed(folder: Path, opened: ExitStack, ranks: Ranks) -> Path:
    """The folder, which rank 0 holds for all ranks until `opened` is closed."""
    ranks.from_first(lambda: opened.enter_context(claim_run_folder(folder)) and None)
    return folder


def evaluate(
    config: RunConfig, run: Path, policies: PolicyPair, checkpoint: str = "", methods: Sequence[Method] = (),
    ranks: Ranks | None = None,
) -> Path:  # fmt: skip
    """The held-out table, videos and report of a finished run of ShapeWorld, or of an untrained preset's folder.

    They are written into `run` where the settings are those of its config.yaml, else into a folder of their own in it
    (`table_folder`); returns that folder. The executor holds its averaged weights, of `checkpoint` ("step-000040").
    What is done is kept in a folder whose name differs wherever scores may, so that a killed evaluation goes on there,
    with any number of ranks; all of them make and score videos, rank 0 writes. methods: all of the suite for none.
    """
    ranks = ranks or Ranks()
    methods = methods or methods_of(config)
    count = max(method.best_of for method in methods)
    with selecting(count, replace(config, output=str(run)), policies.executor.device, ranks.size) as selection:
        folder = ranks.from_first(lambda: table_folder(config, run, selection))
        suite = replace(shapeworld_suite(config, policies, methods), best_of=selection.settings)
        weights, settings = adapters_digest(policies), config.evaluation
        known = f"adapters {weights}, settings {policy_digest(config)}"
        own = digest(suite.settings(known))
        evaluation = Evaluation(
            folder / "evaluation" / own, suite, policies.planner, policies.executor, gaussian_noise, LOSSLESS,
            ranks=ranks, best_of=selection.video,
        )  # fmt: skip
        run_shown(evaluation, known)
    if not ranks.first:
        return folder
    sizes = {name: len(prompts) for name, prompts in suite.prompts.items()}
    origin = Origin(settings.split, settings.seed, sizes, checkpoint, weights, own, tests_digest(suite))
    bootstrap = Bootstrap(settings.bootstrap, suite.seed)
    if not (folder / CONFIG).is_file():
        write_atomic(folder / CONFIG, to_yaml(config))  # for the report
    write_evaluation(folder, evaluation.method_scores(), bootstrap, origin)
    rates = event_rates(evaluation.scores, [method.name for method in methods], bootstrap.resamples, bootstrap.seed)
    write_events(folder, rates, plain(origin))
    write_showcase(folder, evaluation.samples(settings.strips), SHOWN)
    write_report(folder)
    log.info("%s", folder / "evaluation.json")
    return folder


def run_shown(evaluation: Evaluation, policies: str) -> None:
    """Runs an evaluation and shows, on rank 0, how far it is. UserError where ranks hold other weights or settings."""
    first = evaluation.ranks.first
    alike(evaluation.ranks, policies)
    total = len(evaluation.suite.all_prompts) * len(evaluation.suite.methods) * evaluation.suite.seeds
    done = total - evaluation.left if first else 0
    with Progress("evaluation", total, done, first and None, "videos") as progress:
        evaluation.run(policies, progress.tell, lambda videos: progress.step({}, videos))


def alike(ranks: Ranks, weights: object) -> None:
    """UserError where ranks have loaded different weights."""
    if any(each != weights for each in ranks.gather(weights)):
        raise UserError("ranks: found different weights on them; accepted: a run that is finished, the same files")


def table_folder(config: RunConfig, run: Path, selection: Selection | None = None) -> Path:
    """Where the table of these settings goes: into `run` itself where they are those of its config.yaml, or where it
    has none yet; else, and with rows of best-of-N, into a folder in it that is named after them. So no table takes the
    place of another one."""
    own, count = run / CONFIG, 1 if selection is None else selection.count
    if count == 1 and (not own.is_file() or table_settings(from_yaml(own)) == table_settings(config)):
        return run
    told, settings = config.evaluation, table_settings(config) | ({} if selection is None else selection.settings)
    sets = "-".join(f"{name}-{number}" for name, number in sets_of(told).items())
    name = f"{told.split}-seed-{told.seed}-{sets}-{digest(settings, 8)}"
    name += f"-best-of-{count}" if count > 1 else ""
    folder = run / "evaluations" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def table_settings(config: RunConfig) -> dict[str, object]:
    """The values that the numbers of a table depend on, beside the trained weights and rounding."""
    keys = keys_of(RunConfig)
    chosen = {name for name in keys if name.startswith("evaluation.")} - {"evaluation.strips"}
    chosen -= {f"evaluation.{name}" for name in (SETS if is_strict(config) else ("suite", "strict"))}
    return video_settings(config) | {name: value for name, value in flatten(config).items() if name in chosen}


def video_settings(config: RunConfig) -> dict[str, object]:
    """The values that videos of given weights depend on, beyond rounding. Keys of LATER are among them where they are
    not as they were before there was such a key, so that what was made then goes on."""
    keys = keys_of(RunConfig)
    told = {name: value for name, value in flatten(config).items() if keys[name].sets == VIDEO}
    return {name: value for name, value in told.items() if name not in LATER or value != keys[name].default}


def is_strict(config: RunConfig) -> bool:
    """Are the stricter sets asked for?"""
    return config.evaluation.suite == STRICT


def methods_of(config: RunConfig) -> Sequence[Method]:
    """The rows of a run's table: with the stricter sets also those that tell overfitting to the prompts of training."""
    return (*METHODS, *OVERFITTING) if is_strict(config) else METHODS


def digest(settings: Mapping[str, object], length: int = 12) -> str:
    """Short hash of settings, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:length]


def tests_digest(suite: Suite) -> str:
    """Short hash of what runs are compared by: the instructions, the judges, their weights and code."""
    return digest({**suite.tests, "code": shapeworld_code()})


def shapeworld_suite(config: RunConfig, policies: PolicyPair, methods: Sequence[Method]) -> Suite:
    """ShapeWorld's held-out instructions with its own judges."""
    settings, prompts = config.evaluation, instructions(config.evaluation)
    judges = shapeworld_judges(policies.executor.device)
    frames = dict.fromkeys(prompts, config.executor.frames)
    return Suite(prompts, frames, methods, 1, judges, settings.seed, settings.batch, batched=True, reword=reword)


def instructions(settings: EvaluationConfig) -> dict[str, list[OrderPrompt]]:
    """ShapeWorld's held-out instructions of every set, of the split that the settings name."""
    found = {
        name: held_out_prompts(name, count, settings.seed, settings.split) for name, count in sets_of(settings).items()
    }
    return {name: [OrderPrompt(p.prompt_id, name, p.category, p.text) for p in own] for name, own in found.items()}


def sets_of(settings: EvaluationConfig) -> dict[str, int]:
    """The sets of the suite that the settings name, and their numbers of videos."""
    if settings.suite == STRICT:
        return dict.fromkeys(STRICT_SETS, settings.strict)
    return dict(zip(SETS, (settings.simple, settings.hard), strict=True))


def evaluate_benchmark(
    config: RunConfig, run: Path | None, load: Load, options: BenchmarkOptions, output: Path | None, ranks: Ranks
) -> int:
    """The Temporal Order Benchmark in `output`, else in the run's or preset's folder; returns the exit code.

    UserError where judges or PickScore cannot be had, before anything is written.
    """
    setup_logging()
    settings = config.evaluation
    with ExitStack() as opened:
        judges = opened.enter_context(served_judges(options.judges, config.judges, ranks.size))
        judges = [*judges, *(load_pickscore(config.judges, device_of(config)) if options.pickscore else [])]
        policies, weights = load()
        folder = claimed(output or (run or untrained_folder(config)) / "temporal-order", opened, ranks)
        suite = Suite(
            options.prompts, options.frames, options.methods, options.seeds, judges, settings.seed, settings.batch
        )
        files = mp4_format(policies.executor.codec.fps)
        count, own = max(method.best_of for method in options.methods), replace(config, output=str(folder))
        selection = opened.enter_context(selecting(count, own, policies.executor.device, ranks.size))
        suite = replace(suite, best_of=selection.settings)
        evaluation = Evaluation(
            folder, suite, policies.planner, policies.executor, gaussian_noise, files, options.retry_missing, ranks,
            selection.video,
        )  # fmt: skip
        named = world_of(config).note or weights
        known = f"{config.preset}, {named}, settings {policy_digest(config)}"
        try:
            run_shown(evaluation, known)
        except JudgeOutage as error:
            if not ranks.alone:
                raise
            sys.stderr.write(f"stopped: {error}; the same command goes on from here\n")
            return EXIT_ABORTED
        written = []
        if judges and ranks.first:
            results = gather(evaluation, settings.bootstrap)
            written += write_results(evaluation, results, settings.strips)
            log.info("\n%s", markdown(results))
        if options.export and ranks.first:
            written += export_vbench(evaluation)
    sys.stdout.write("".join(f"{path}\n" for path in written))
    ranks.arrive()
    return 0


def policy_digest(config: RunConfig) -> str:
    """Short hash of the values that videos of given weights depend on, beyond rounding."""
    return digest(video_settings(config))


def adapters_digest(policies: PolicyPair) -> str:
    """Short hash of the adapters' weights."""
    found = hashlib.sha256()
    for policy in (policies.planner, policies.executor):
        for _, weight in sorted(policy.parameters().items()):
            found.update(weight.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()[:12]


def untrained_folder(config: RunConfig) -> Path:
    """Where an evaluation of a preset goes: beside its runs, never into one."""
    return Path(f"{config.output}-untrained")
