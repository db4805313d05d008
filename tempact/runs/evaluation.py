"""Evaluations of runs and presets: policies, the folder of results, and where a killed evaluation goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from tempact.cli import EXIT_ABORTED, to_yaml
from tempact.config import VIDEO, RunConfig, flatten, keys_of
from tempact.evaluation import BOTH, METHODS, SINGLE, STEP, BenchmarkOptions, Method
from tempact.evaluation.harness import LOSSLESS, Evaluation, Suite, mp4_format
from tempact.evaluation.judges import load_pickscore, served_judges, shapeworld_judges
from tempact.evaluation.prompts import SETS, OrderPrompt
from tempact.evaluation.statistics import Bootstrap, write_evaluation
from tempact.evaluation.tables import export_vbench, gather, markdown
from tempact.executor.sampler import gaussian_noise
from tempact.files import claim_run_folder, write_atomic
from tempact.policies import PolicyPair, device_of
from tempact.reporting.report import leave_report, write_report, write_results
from tempact.reporting.strips import write_showcase
from tempact.rewards.judges import JudgeOutage
from tempact.runs.logs import Progress, setup_logging
from tempact.shapeworld.world import held_out_prompts
from tempact.worlds import world_of

log = logging.getLogger(__name__)

SHOWN = {SINGLE: "single prompt", STEP: "before: step prompts", BOTH: "after: + TempAct"}  # rows of the film strips
Load = Callable[[], tuple[PolicyPair, str]]  # the policies, and the name of their weights


def evaluate_shapeworld(config: RunConfig, run: Path | None, load: Load) -> int:
    """ShapeWorld's own table, beside the run (or, for a preset, beside its runs); returns the exit code."""
    setup_logging()
    policies, _ = load()
    with claim_run_folder(run or untrained_folder(config)) as folder:
        if run is None:
            write_atomic(folder / "config.yaml", to_yaml(config))  # for the report
        evaluate(config, folder, policies, [method for method in METHODS if run or not method.trained])
    sys.stdout.write("".join(f"{line}\n" for line in leave_report(folder)))
    return 0


def evaluate(config: RunConfig, folder: Path, policies: PolicyPair, methods: Sequence[Method] = METHODS) -> None:
    """The held-out table, videos and report of `folder`, a finished run of ShapeWorld or an untrained preset's folder.

    The executor holds its averaged weights. What is done is kept in a folder whose name differs wherever scores may, so
    that a killed evaluation goes on there.
    """
    suite = shapeworld_suite(config, policies, methods)
    known = f"adapters {adapters_digest(policies)}, settings {policy_digest(config)}"
    own = hashlib.sha256(json.dumps(suite.settings(known), sort_keys=True).encode()).hexdigest()[:12]
    evaluation = Evaluation(
        folder / "evaluation" / own, suite, policies.planner, policies.executor, gaussian_noise, LOSSLESS
    )
    with Progress("evaluation", 0) as progress:
        evaluation.run(known, progress.tell)
    scores = evaluation.method_scores()
    write_evaluation(folder, scores, Bootstrap(config.evaluation.bootstrap, suite.seed))
    write_showcase(folder, evaluation.samples(config.evaluation.strips), SHOWN)
    write_report(folder)
    log.info("%s", folder / "evaluation.json")


def shapeworld_suite(config: RunConfig, policies: PolicyPair, methods: Sequence[Method] = METHODS) -> Suite:
    """ShapeWorld's held-out test instructions with its own judges."""
    settings = config.evaluation
    counts = dict(zip(SETS, (settings.simple, settings.hard), strict=True))
    prompts = {
        name: [OrderPrompt(p.prompt_id, name, p.category, p.text) for p in held_out_prompts(name, n, settings.seed)]
        for name, n in counts.items()
    }
    judges = shapeworld_judges(policies.executor.device)
    frames = dict.fromkeys(prompts, config.executor.frames)
    return Suite(prompts, frames, methods, 1, judges, settings.seed, settings.batch, batched=True)


def evaluate_benchmark(
    config: RunConfig, run: Path | None, load: Load, options: BenchmarkOptions, output: Path | None
) -> int:
    """The Temporal Order Benchmark in `output`, else in the run's or preset's folder; returns the exit code.

    UserError where judges or PickScore cannot be had, before anything is written.
    """
    setup_logging()
    settings = config.evaluation
    with ExitStack() as opened:
        judges = opened.enter_context(served_judges(options.judges, config.judges))
        judges = [*judges, *(load_pickscore(config.judges, device_of(config)) if options.pickscore else [])]
        policies, weights = load()
        folder = opened.enter_context(claim_run_folder(output or (run or untrained_folder(config)) / "temporal-order"))
        suite = Suite(
            options.prompts, options.frames, options.methods, options.seeds, judges, settings.seed, settings.batch
        )
        files = mp4_format(policies.executor.codec.fps)
        evaluation = Evaluation(folder, suite, policies.planner, policies.executor, gaussian_noise, files)
        named = world_of(config).note or weights
        known = f"{config.preset}, {named}, settings {policy_digest(config)}"
        try:
            with Progress("evaluation", 0) as progress:
                evaluation.run(known, progress.tell, retry_missing=options.retry_missing)
        except JudgeOutage as error:
            sys.stderr.write(f"stopped: {error}; the same command goes on from here\n")
            return EXIT_ABORTED
        written = []
        if judges:
            results = gather(evaluation, settings.bootstrap)
            written += write_results(evaluation, results, settings.strips)
            log.info("\n%s", markdown(results))
        if options.export:
            written += export_vbench(evaluation)
    sys.stdout.write("".join(f"{path}\n" for path in written))
    return 0


def policy_digest(config: RunConfig) -> str:
    """Short hash of the values that videos of given weights depend on, beyond rounding."""
    keys = keys_of(RunConfig)
    told = {name: value for name, value in flatten(config).items() if keys[name].sets == VIDEO}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


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
