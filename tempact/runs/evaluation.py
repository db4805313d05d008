"""Both suites of `tempact.evaluate`: policies, a folder of results, and where a killed evaluation goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

from tempact.cli import to_yaml
from tempact.config import RunConfig
from tempact.evaluation.harness import CellStore, Maker, Suite, evaluate_suite
from tempact.evaluation.judges import VideoJudge, load_pickscore, served_judges
from tempact.evaluation.methods import METHODS
from tempact.evaluation.options import SUITES, OrderOptions
from tempact.evaluation.tables import gather, markdown, write_results
from tempact.evaluation.temporal_order.vbench import export_vbench
from tempact.executor.rollout import gaussian_noise
from tempact.files import claim_run_folder, safe_name, write_atomic
from tempact.policies import PolicyPair, build_policies, device_of
from tempact.rewards.judges import JudgeOutage
from tempact.runs.checkpoint import latest
from tempact.runs.logs import Progress, setup_logging
from tempact.runs.run import EXIT_ABORTED, evaluate, load_newest
from tempact.worlds import world_of

log = logging.getLogger(__name__)


def evaluate_shapeworld(config: RunConfig, run: Path | None) -> int:
    """ShapeWorld's own table, beside the run (or, for a preset, beside its runs); returns the exit code."""
    setup_logging()
    policies = _policies(config, run)
    with claim_run_folder(run or untrained_folder(config)) as folder:
        if run is None:
            write_atomic(folder / "config.yaml", to_yaml(config))  # for the report
        store = CellStore(folder / "evaluation" / evaluation_name(config, weights_of(run)), config.evaluation.seed)
        evaluate(config, folder, policies, store, [method for method in METHODS if run or not method.trained])
    return 0


def evaluate_benchmark(config: RunConfig, run: Path | None, options: OrderOptions, output: Path | None) -> int:
    """The Temporal Order Benchmark in `output`, else in the run's or preset's folder; returns the exit code.

    UserError where judges or PickScore cannot be had, before anything is written.
    """
    setup_logging()
    target = output or (run or untrained_folder(config)) / SUITES[0]
    with served_judges(options.judges, config.judges) as served:
        judges = [*served, *(load_pickscore(config.judges, device_of(config)) if options.pickscore else [])]
        policies = _policies(config, run)
        with claim_run_folder(target) as folder:
            try:
                paths = _benchmark(folder, config, options, policies, judges, run)
            except JudgeOutage as error:
                sys.stderr.write(f"stopped: {error}; the same command goes on from here\n")
                return EXIT_ABORTED
    sys.stdout.write("".join(f"{path}\n" for path in paths))
    return 0


def _benchmark(
    folder: Path, config: RunConfig, options: OrderOptions, policies: PolicyPair, judges: list[VideoJudge],
    run: Path | None,
) -> list[Path]:  # fmt: skip
    """Does what is left in `folder`; returns what it wrote."""
    settings = config.evaluation
    fps = policies.executor.codec.fps
    maker = Maker(
        folder, policies.planner, policies.executor, gaussian_noise, batch=settings.batch, seed=settings.seed, fps=fps
    )  # fmt: skip
    suite = Suite(options.prompts, options.frames, options.methods, options.seeds, judges)
    weights = world_of(config).note or weights_of(run)
    known = f"{config.preset}, {weights}, settings {policy_digest(config)}"
    with Progress("evaluation", 0) as progress:
        ledger = evaluate_suite(
            folder, suite, maker, policies=known, retry_missing=options.retry_missing, tell=progress.tell
        )
    written = []
    if judges:
        results = gather(suite, ledger, settings.bootstrap, settings.seed)
        written += write_results(folder, suite, maker, ledger, results, settings.strips)
        log.info("\n%s", markdown(results, {}))
    if options.export:
        written += export_vbench(folder, suite, maker)
    return written


# of the executor's settings: videos are the same up to rounding, so a killed evaluation may go on with others
HOW_ONLY = ("rollout_videos", "micro_batch", "cuda_graphs", "text_cache")


def _policies(config: RunConfig, run: Path | None) -> PolicyPair:
    return load_newest(config, run)[0] if run else build_policies(config)


def policy_digest(config: RunConfig) -> str:
    """Short hash of all settings that videos depend on."""
    executor = {name: value for name, value in asdict(config.executor).items() if name not in HOW_ONLY}
    told = json.dumps([asdict(config.planner), executor, config.seed], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def untrained_folder(config: RunConfig) -> Path:
    """Where an evaluation of a preset goes: beside its runs, never into one."""
    return Path(f"{config.output}-untrained")


def weights_of(run: Path | None) -> str:
    """Which weights the newest checkpoint of a run holds, by name and hash; "untrained" without a run."""
    newest = None if run is None else latest(run)
    return "untrained" if newest is None else newest.name


def evaluation_name(config: RunConfig, weights: str) -> str:
    """A folder name that differs wherever scores may: weights, sampler, prompts, seed."""
    told = json.dumps([weights, policy_digest(config), asdict(config.evaluation)], sort_keys=True)
    return f"{safe_name(weights.split()[0])}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
