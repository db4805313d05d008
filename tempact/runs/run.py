"""A training run around the trainer: folder, checkpoints, logs, videos, evaluation and report."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from tempact.cli import EXIT_ABORTED, EXIT_STOPPED, fingerprint, from_yaml, to_yaml
from tempact.config import RunConfig, validate
from tempact.errors import UserError
from tempact.files import claim_run_folder, write_atomic
from tempact.policies import PolicyPair, build_policies, build_trainer, device_of
from tempact.reporting import write_samples
from tempact.reporting.report import write_report
from tempact.reporting.strips import write_extremes
from tempact.rewards import Reward
from tempact.rewards.judges import JudgeOutage
from tempact.runs.checkpoint import Checkpoint, check_config, latest, recover, resolve_resume, restore_rng, save
from tempact.runs.evaluation import evaluate
from tempact.runs.logs import MetricsLogger, Progress
from tempact.trainer import Aborted, Iteration, Trainer
from tempact.worlds import world_of

log = logging.getLogger(__name__)

LOAD_ATTEMPTS = 5  # a run that trains may remove a checkpoint while it is read; the newest is then read in its place

Callback = Callable[[Iteration], None]


@dataclass(frozen=True)
class RunResult:
    """folder: of the run. exit_code: 0 finished, 130 stopped early, 3 the run could not go on; the state is saved."""

    folder: Path
    exit_code: int


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


def train(
    config: RunConfig, resume: str = "auto", *, rewards: Sequence[Reward] = (), callbacks: Sequence[Callback] = ()
) -> RunResult:
    """Trains both policies, evaluates them and writes the report, all in the folder `config.output`.

    Args:
        resume: "auto" goes on from the newest intact checkpoint of the folder, "none" begins, any other value is the
            path of a checkpoint or a run folder.
        rewards: of one's own, beside those of `rewards.custom`. They are not part of the configuration that a
            checkpoint holds: a resumed run is given them again.
        callbacks: called with each finished `Iteration` (plans, videos, rewards, metrics), before it is recorded.
            A callback that keeps videos keeps their memory.

    Raises UserError for a configuration or a file that cannot work.
    """
    validate(config)
    with claim_run_folder(config.output) as folder, ExitStack() as opened:
        recover(folder)
        checkpoint = resolve_resume(resume, folder)
        world = world_of(config)
        world.check()  # missing parts are named before weights load
        prompts, scoring = world.prompts(), world.rewards(device_of(config)).extended(rewards)
        opened.callback(scoring.close)
        policies = build_policies(config)
        trainer = build_trainer(config, policies, prompts, scoring)
        if checkpoint is not None:
            restore(checkpoint, config, policies, trainer)
        log.info("run folder %s, seed %d, configuration %s", folder, config.seed, fingerprint(config))
        write_atomic(folder / "config.yaml", to_yaml(config))
        try:
            with StopRequest().listening() as stop:
                finished = loop(config, folder, policies, trainer, stop, callbacks)
        except (Aborted, JudgeOutage) as error:
            store(config, folder, policies, trainer)
            log.error("%s; saved after iteration %d", error, trainer.done)
            return RunResult(folder, EXIT_ABORTED)
        if not finished:
            log.warning("stopped after iteration %d; `--resume auto` goes on from there", trainer.done)
            return RunResult(folder, EXIT_STOPPED)
        if world.real_video:
            log.info("%s\nno held-out evaluation: ShapeWorld's is for its own executor", write_report(folder))
            return RunResult(folder, 0)
        with trainer.ema.applied(policies.executor.parameters()):
            evaluate(config, folder, policies)
    return RunResult(folder, 0)


def loop(
    config: RunConfig,
    folder: Path,
    policies: PolicyPair,
    trainer: Trainer,
    stop: StopRequest,
    callbacks: Sequence[Callback] = (),
) -> bool:
    """Runs and records the iterations that are left; False if a stop was requested."""
    settings = config.trainer
    metrics = MetricsLogger(folder, trainer.done, config.wandb_project or None)
    try:
        with Progress("training", settings.iterations, trainer.done) as progress:
            for iteration in trainer.iterations(progress.phase):
                last = iteration.number == settings.iterations
                for callback in callbacks:
                    callback(iteration)
                metrics.log(iteration.number, iteration.metrics)
                progress.step(shown(iteration))
                if iteration.number % settings.samples_every == 0 or iteration.number == 1 or last:
                    write_samples(folder, iteration.number, iteration.plans, iteration.scored, iteration.batch)
                    write_extremes(folder, iteration.number, iteration.plans, iteration.rollout, iteration.scored)
                if iteration.number % settings.checkpoint_every == 0 or last or stop:
                    store(config, folder, policies, trainer)
                if stop:
                    return False
                del iteration  # its videos and recorded states must not live through the next one: tens of GiB at size
    finally:
        metrics.close()
    return True


def shown(iteration: Iteration) -> dict[str, float]:
    """The few metrics that the progress line shows."""
    names = {"executor/reward": "executor", "planner/reward": "planner", "rewards/temporal_following/mean": "order"}
    return {label: iteration.metrics[name] for name, label in names.items() if name in iteration.metrics}


def store(config: RunConfig, folder: Path, policies: PolicyPair, trainer: Trainer) -> None:
    """Saves both adapters (the executor's averaged, ready for use) and the training state."""

    def save_executor(path: Path) -> None:
        with trainer.ema.applied(policies.executor.parameters()):
            policies.executor.save_adapter(path)

    writers = {"planner": policies.planner.save_adapter, "executor": save_executor}
    save(folder, trainer.done, writers, trainer.state(), config, config.trainer.keep_checkpoints)


def restore(checkpoint: Checkpoint, config: RunConfig, policies: PolicyPair, trainer: Trainer) -> None:
    """Loads weights, optimisers, averages and position; UserError if the configuration is not the checkpoint's."""
    check_config(checkpoint, config)
    policies.planner.load_adapter(checkpoint.planner_dir)
    trainer.load_state(checkpoint.state)
    restore_rng(checkpoint.rng)
    log.info("resumed from %s", checkpoint.path)


def load_policies(run: str | Path, device: str = "auto") -> PolicyPair:
    """Planner and executor of a run's newest checkpoint; UserError for a folder without an intact one.

    run: a run folder, also of a run that is training. device: auto, cpu or cuda.
    """
    folder = Path(run)
    return load_newest(replace(from_yaml(folder / "config.yaml"), device=device), folder)[0]


def load_newest(config: RunConfig, folder: Path) -> tuple[PolicyPair, Checkpoint]:
    """Both policies as the newest checkpoint of a run holds them, and that checkpoint."""
    found = newest(folder)  # a run without a checkpoint is refused before weights are loaded
    policies = build_policies(config)
    return policies, use_newest(folder, found, lambda checkpoint: load_adapters(policies, checkpoint))


def load_adapters(policies: PolicyPair, checkpoint: Checkpoint) -> None:
    policies.planner.load_adapter(checkpoint.planner_dir)
    policies.executor.load_adapter(checkpoint.executor_dir)


def newest(folder: Path) -> Checkpoint:
    """The newest intact checkpoint of a run; UserError if there is none."""
    found = latest(folder)
    if found is None:
        raise UserError(f"{folder}: holds no intact checkpoint; accepted: the folder of a training run, a PEFT folder")
    return found


def use_newest(folder: Path, checkpoint: Checkpoint, use: Callable[[Checkpoint], None]) -> Checkpoint:
    """Calls `use` with `checkpoint` and returns it, or the then newest one of a run that has removed it meanwhile."""
    for _ in range(LOAD_ATTEMPTS):
        try:
            use(checkpoint)
            return checkpoint
        except (UserError, OSError):
            if checkpoint.path.is_dir():
                raise
        checkpoint = newest(folder)
    raise UserError(f"{folder}: its checkpoints change faster than they can be read; accepted: a run that is finished")
