"""A training run around the trainer: its folder, checkpoints, logs, videos, evaluation and report."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from tempact.cli import EXIT_STOPPED, fingerprint, to_yaml
from tempact.config import RunConfig
from tempact.errors import UserError
from tempact.evaluation.harness import CellStore
from tempact.evaluation.methods import BOTH, METHODS, SINGLE, STEP, Method
from tempact.evaluation.statistics import write_evaluation
from tempact.evaluation.tables import markdown_table
from tempact.files import claim_run_folder, write_atomic
from tempact.policies import PolicyPair, build_policies, build_trainer, device_of
from tempact.reporting.records import write_samples
from tempact.reporting.report import write_report
from tempact.reporting.strips import write_extremes, write_showcase
from tempact.rewards.judges.calls import JudgeOutage
from tempact.runs.checkpoint import check_config, latest, load, resolve_resume, save
from tempact.runs.logs import MetricsLogger, Progress
from tempact.seeds import restore_rng
from tempact.trainer import Aborted, Iteration, Trainer
from tempact.worlds import world_of

log = logging.getLogger(__name__)

SHOWN = {SINGLE: "single prompt", STEP: "before: step prompts", BOTH: "after: + TempAct"}  # rows of the film strips
EXIT_ABORTED = 3  # the run could not go on


class StopRequest:
    """Set by SIGINT or SIGTERM; the loop ends after the iteration in hand. A second signal ends at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {each: signal.signal(each, self._note) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self:
            raise KeyboardInterrupt
        self.signal = number
        log.warning("%s: finishing this iteration, then saving; once more to stop at once", signal.Signals(number).name)


def train(config: RunConfig, resume: str) -> int:
    """Trains, evaluates and reports; returns the exit code: 0, EXIT_STOPPED when asked to stop, EXIT_ABORTED when
    the run cannot go on (`trainer.Aborted`) or no judge answered. Either way the state is saved."""
    with claim_run_folder(config.output) as folder, ExitStack() as opened:
        checkpoint = resolve_resume(resume, folder)
        world = world_of(config)
        world.check()
        prompts, rewards = (
            world.prompts(),
            world.rewards(device_of(config)),
        )  # missing ones are told before weights load
        opened.callback(rewards.close)
        policies = build_policies(config)
        trainer = build_trainer(config, policies, prompts, rewards)
        if checkpoint is not None:
            restore(checkpoint, config, policies, trainer)
        log.info("run folder %s, seed %d, configuration %s", folder, config.seed, fingerprint(config))
        write_atomic(folder / "config.yaml", to_yaml(config))
        try:
            with StopRequest().listening() as stop:
                finished = loop(config, folder, policies, trainer, stop)
        except (Aborted, JudgeOutage) as error:
            store(config, folder, policies, trainer)
            log.error("%s; saved after iteration %d", error, trainer.done)
            return EXIT_ABORTED
        if not finished:
            log.warning("stopped after iteration %d; `--resume auto` goes on from there", trainer.done)
            return EXIT_STOPPED
        if world.real_video:
            log.info("%s\nno held-out evaluation: ShapeWorld's is for its own executor", write_report(folder))
            return 0
        with trainer.ema.applied(policies.executor.parameters()):
            evaluate(config, folder, policies)
    return 0


def loop(config: RunConfig, folder: Path, policies: PolicyPair, trainer: Trainer, stop: StopRequest) -> bool:
    """The iterations that are left, recorded; False if it was asked to stop."""
    settings = config.trainer
    metrics = MetricsLogger(folder, trainer.done, config.wandb_project or None)
    try:
        with Progress("training", settings.iterations, trainer.done) as progress:
            for iteration in trainer.iterations(progress.phase):
                last = iteration.number == settings.iterations
                metrics.log(iteration.number, iteration.metrics)
                progress.step(shown(iteration))
                if iteration.number % settings.samples_every == 0 or iteration.number == 1 or last:
                    write_samples(folder, iteration.number, iteration.plans, iteration.scored, iteration.batch)
                    write_extremes(folder, iteration.number, iteration.plans, iteration.rollout, iteration.scored)
                if iteration.number % settings.checkpoint_every == 0 or last or stop:
                    store(config, folder, policies, trainer)
                if stop:
                    return False
    finally:
        metrics.close()
    return True


def shown(iteration: Iteration) -> dict[str, float]:
    """The few numbers worth watching."""
    names = {"executor/reward": "executor", "planner/reward": "planner", "rewards/temporal_following/mean": "order"}
    return {label: iteration.metrics[name] for name, label in names.items() if name in iteration.metrics}


def store(config: RunConfig, folder: Path, policies: PolicyPair, trainer: Trainer) -> None:
    """Saves both adapters (the executor's averaged, ready for use) and all that a resumed run needs."""

    def save_executor(path: Path) -> None:
        with trainer.ema.applied(policies.executor.parameters()):
            policies.executor.save_adapter(path)

    writers = {"planner": policies.planner.save_adapter, "executor": save_executor}
    save(folder, trainer.done, writers, trainer.state(), config, config.trainer.keep_checkpoints)


def restore(path: Path, config: RunConfig, policies: PolicyPair, trainer: Trainer) -> None:
    """Weights, optimisers, averages and position of a checkpoint."""
    checkpoint = load(path)
    check_config(checkpoint, config)
    policies.planner.load_adapter(checkpoint.planner_dir)
    trainer.load_state(checkpoint.state)
    restore_rng(checkpoint.rng)
    log.info("resumed from %s", path)


def evaluate(
    config: RunConfig,
    folder: Path,
    policies: PolicyPair,
    store: CellStore | None = None,
    methods: Sequence[Method] = METHODS,
) -> None:
    """The held-out table, videos and report of a finished run; the executor holds its averaged weights.

    store: keeps what is done, so that a killed evaluation can go on.
    """
    suite = world_of(config).held_out(policies.planner, policies.executor)
    assert suite is not None, "another world's videos"
    with Progress("evaluation", 0) as progress:
        result = suite.run(progress.tell, methods, store)
    rows = write_evaluation(folder, result.scores, config.evaluation.bootstrap, config.evaluation.seed)
    write_showcase(folder, result.samples, SHOWN)
    write_report(folder)
    log.info("%s\n%s", folder / "evaluation.json", markdown_table(rows))


def trained_policies(config: RunConfig, folder: Path) -> PolicyPair:
    """Both policies as the newest checkpoint of a run holds them."""
    path = latest(folder)
    if path is None:
        raise UserError(f"{folder}: holds no intact checkpoint; accepted: the folder of a training run")
    policies = build_policies(config)
    checkpoint = load(path)
    policies.planner.load_adapter(checkpoint.planner_dir)
    policies.executor.load_adapter(checkpoint.executor_dir)
    return policies
