"""A training run around the trainer: its folder, checkpoints, logs, videos, evaluation and report."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from tempact.cli import EXIT_ABORTED, EXIT_STOPPED, fingerprint, to_yaml
from tempact.config import RunConfig
from tempact.files import claim_run_folder, write_atomic
from tempact.reporting.records import write_samples
from tempact.reporting.report import write_report
from tempact.reporting.strips import write_extremes
from tempact.rewards.judges.calls import JudgeOutage
from tempact.runs.checkpoint import check_config, load, resolve_resume, save
from tempact.runs.evaluation import evaluate
from tempact.runs.logs import MetricsLogger, Progress
from tempact.seeds import restore_rng
from tempact.trainer import Aborted, Iteration, Trainer
from tempact.worlds import (
    PolicyPair,
    build_policies,
    build_prompts,
    build_rewards,
    build_trainer,
    check_executor,
    is_shapeworld,
)

log = logging.getLogger(__name__)


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
        check_executor(config)
        prompts, rewards = build_prompts(config), build_rewards(config)  # what is missing is said before weights load
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
        if not is_shapeworld(config.executor.weights):
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
