"""A training run around the trainer: folder, checkpoints, logs, videos, evaluation and report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tempact.cli import fingerprint, from_yaml, to_yaml
from tempact.config import RunConfig, validate
from tempact.distributed import Ranks, told
from tempact.errors import EXIT_STOPPED, Aborted, Stopped, StopRequest, UserError
from tempact.files import claim_run_folder, write_atomic
from tempact.planner.sleep import begin as begin_server
from tempact.policies import PolicyPair, build_policies, build_trainer, device_of
from tempact.reporting import model_card, write_samples
from tempact.reporting.report import leave_report
from tempact.reporting.strips import videos_of_extremes, write_extremes
from tempact.rewards import Reward
from tempact.rewards.judges import JudgeOutage
from tempact.runs.checkpoint import (
    EXECUTOR,
    PLANNER,
    Checkpoint,
    latest,
    new_course,
    recover,
    restore_rng,
    save,
    set_aside,
)
from tempact.runs.ending import Ending, RunFailed, quiet
from tempact.runs.evaluation import evaluate
from tempact.runs.logs import MetricsLogger, Progress
from tempact.runs.resume import check_config, continues, records_aside, resolve_resume
from tempact.runs.trackers import track_videos
from tempact.runs.watching import Watching
from tempact.trainer import Iteration, Trainer
from tempact.worlds import world_of

log = logging.getLogger(__name__)

LOAD_ATTEMPTS = 5  # a run that trains may remove a checkpoint while it is read; the newest is then read in its place

Callback = Callable[[Iteration], None]


@dataclass(frozen=True)
class RunResult:
    """folder: of the run. exit_code: 0 finished, 130 stopped by a signal, 3 the run could not go on; what is done is
    saved. lines: the table, if there is one, and the report's path."""

    folder: Path
    exit_code: int
    lines: tuple[str, ...] = ()


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

    Raises UserError for a configuration or a file that cannot work, and RunFailed for an unexpected exception.
    """
    validate(config)
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    with (
        StopRequest().listening() as stop,
        Ranks.joined(stop, config.trainer.stall_s, on_gpu, config.executor.shard) as ranks,
        ExitStack() as opened,
    ):
        ending = Ending(ranks, stop)
        folder = Path(config.output)
        try:
            ranks.from_first(lambda: opened.enter_context(claim_run_folder(folder)) and None)
            with quiet(not ranks.first):  # every process warns of the same
                run = Run.begin(config, folder, resume, rewards, opened, ranks)
        except (Exception, Stopped) as error:  # noqa: BLE001  told, with its traceback in the folder
            return RunResult(folder, ending.code(error, folder))
        code = run.go(ending, callbacks)
        return RunResult(folder, code, tuple(leave_report(folder)) if ranks.first else ())


@dataclass
class Run:
    """A run in its folder, ready to go on. course: of its checkpoints. saved: iterations done in the newest of them."""

    config: RunConfig
    folder: Path
    policies: PolicyPair
    trainer: Trainer
    course: str
    saved: int

    @staticmethod
    def begin(
        config: RunConfig, folder: Path, resume: str, rewards: Sequence[Reward], opened: ExitStack, ranks: Ranks
    ) -> Run:
        """Loads everything, at the state of the checkpoint that `resume` names. `opened` closes what scores."""
        if ranks.first:
            recover(folder)
        checkpoint = ranks.from_first(lambda: resolve_resume(resume, folder))
        world = world_of(judged_here(config, ranks))
        world.check()  # missing parts are named before weights load
        if config.planner.sampler == "served":
            ranks.agreed(lambda: begin_server(config.planner) if ranks.first else None, Aborted)
        prompts, scoring = world.prompts(), world.rewards(device_of(config), ranks.size).extended(rewards)
        opened.callback(scoring.close)
        ranks.agreed(scoring.check if ranks.first else lambda: None, JudgeOutage, UserError)
        policies = build_policies(config)
        trainer = build_trainer(config, policies, prompts, scoring, ranks)
        opened.callback(trainer.close)
        if checkpoint is not None:
            restore(checkpoint, config, policies, trainer)
        trainer.agreement.compare(fingerprint(config))
        log.info("run folder %s, seed %d, configuration %s", folder, config.seed, fingerprint(config))
        if not ranks.first:
            return Run(config, folder, policies, trainer, "", 0)
        write_atomic(folder / "config.yaml", to_yaml(config))
        if checkpoint is None:
            return Run(config, folder, policies, trainer, new_course(), 0)
        if not checkpoint.within(folder):
            records_aside(folder, 0)
            return Run(config, folder, policies, trainer, new_course(), 0)
        if not continues(folder, checkpoint):
            records_aside(folder, checkpoint.step)
            set_aside(folder, checkpoint.step, checkpoint.course)
        return Run(config, folder, policies, trainer, checkpoint.course, checkpoint.step)

    def go(self, ending: Ending, callbacks: Sequence[Callback]) -> int:
        """The iterations that are left and the evaluation; returns the exit code.

        Whatever ends the iterations, the state of the last whole one is saved. Raises as `Ending.code`.
        """
        stop = ending.stop
        try:
            if self.iterate(stop, callbacks):
                self.finish(stop)
                return 0
            if self.trainer.ranks.first:
                log.warning("stopped after iteration %d; `--resume auto` goes on from there", self.trainer.done)
                told()
            return EXIT_STOPPED
        except (Exception, Stopped) as error:  # noqa: BLE001  told, with its traceback in the folder
            try:
                return ending.code(error, self.folder, lambda: self.kept(stop))
            except RunFailed:
                leave_report(self.folder)
                raise

    def kept(self, stop: StopRequest) -> str:
        """Saves the state of the last whole iteration; says what is saved, or what is lost."""
        trainer = self.trainer
        trainer.rollback()
        if not trainer.done and not self.saved:  # what was saved and taken back is set aside by a save at 0
            return "no iteration was finished"
        stop.close(f"saving after iteration {trainer.done}")
        try:
            if trainer.done != self.saved:
                trainer.ranks.drain()
                self.save()
        except (Stopped, OSError, RuntimeError, ValueError) as error:
            return f"not saved ({error}), iterations after {self.saved} are lost"
        again = "goes on from there" if trainer.done < self.config.trainer.iterations else "goes on with the evaluation"
        return f"saved after iteration {trainer.done}; the same command {again}"

    def finish(self, stop: StopRequest) -> None:
        """The held-out evaluation of a trained ShapeWorld run."""
        stop.open()
        ranks = self.trainer.ranks
        ranks.phase("evaluation")
        if world_of(self.config).real_video or ranks.members > 1:
            log.info("no held-out evaluation: ShapeWorld's is for its own executor, whole in one process")
        else:
            with self.trainer.ema.applied(self.policies.executor.parameters()):
                evaluate(self.config, self.folder, self.policies, f"step-{self.trainer.done:06d}", ranks=ranks)
        if ranks.first:
            track_videos(self.folder, self.config.trackers, self.config.tracker_project)
        ranks.arrive()

    def iterate(self, stop: StopRequest, callbacks: Sequence[Callback]) -> bool:
        """Runs and records the iterations that are left, or those until a stop is requested; are none left?

        The first rank records; of several, each gets the callbacks' calls with the videos that it has made.
        """
        settings, trainer, ranks = self.config.trainer, self.trainer, self.trainer.ranks
        tracked = self.config.trackers, self.config.tracker_project
        metrics = MetricsLogger(self.folder, trainer.done, *tracked) if ranks.first else None
        watch = world_of(self.config).watch(self.policies.executor.device)
        watching = Watching(self.config.alarms, watch, ranks, metrics.kept if metrics is not None else ())

        def phase(name: str) -> None:
            progress.phase(name)
            ranks.phase(f"iteration {trainer.done + 1}, {name}")
            if name == "step":
                stop.close(f"finishing iteration {trainer.done + 1}, then saving")
            elif not stop.opened:
                stop.open()

        try:
            with Progress("training", settings.iterations, trainer.done, ranks.first and None) as progress:
                for iteration in trainer.iterations(phase):
                    last = iteration.number == settings.iterations
                    stop.close(f"recording iteration {iteration.number}")  # nothing may have been learned from
                    ranks.phase(f"iteration {iteration.number}, recording")
                    iteration.metrics |= watching.look(iteration)
                    for callback in callbacks:
                        callback(iteration)
                    if metrics is not None:
                        metrics.log(iteration.number, iteration.metrics)
                    trainer.confirm()
                    progress.step(shown(iteration))
                    if iteration.number % settings.samples_every == 0 or iteration.number == 1 or last:
                        self.record(iteration)
                    leaving = any(ranks.gather(bool(stop)))
                    if ranks.first and (iteration.number % settings.checkpoint_every == 0 or last or leaving):
                        self.save()
                    if leaving:
                        return False
                    del iteration  # its videos and recorded states must not live through the next one: tens of GiB
            stop.close("ending")
        finally:
            if metrics is not None:
                metrics.close()
        return True

    def record(self, iteration: Iteration) -> None:
        """The table of samples, and strips of the best and the worst videos, which come from whoever made them."""
        number, ranks, rollout = iteration.number, self.trainer.ranks, iteration.rollout
        plans, scored = iteration.plans, iteration.scored
        if ranks.first:
            write_samples(self.folder, number, plans, scored, iteration.batch)
        shown = ranks.from_first(lambda: videos_of_extremes(self.folder, number))
        own = {
            (p, n): rollout.frames[p, iteration.continuations.index(n)].clone()
            for p, n in shown
            if p in iteration.own and n in iteration.continuations
        }
        frames = {video: each for of_rank in ranks.gather(own) for video, each in of_rank.items()}
        if ranks.first:
            write_extremes(self.folder, number, plans, frames)

    def save(self) -> None:
        """Saves both adapters (the executor's averaged, ready for use) and the training state."""
        trainer, executor = self.trainer, self.policies.executor

        def save_planner(path: Path) -> None:
            self.policies.planner.save_adapter(path)
            self.write_card(path)

        def save_executor(path: Path) -> None:
            with trainer.ema.applied(executor.parameters()):
                executor.save_adapter(path)
            self.write_card(path)

        writers = {PLANNER: save_planner, EXECUTOR: save_executor}
        keep = self.config.trainer.keep_checkpoints
        save(self.folder, trainer.done, writers, trainer.state(), self.config, keep, self.course)
        self.saved = trainer.done

    def write_card(self, path: Path) -> None:
        """README.md of an adapter's folder, in place of PEFT's template."""
        (path / "README.md").write_text(model_card(path.name, self.config, self.trainer.done), encoding="utf-8")


def judged_here(config: RunConfig, ranks: Ranks) -> RunConfig:
    """The configuration with a judges' cache for each machine: its locks do not reach over networks."""
    if not ranks.node or not config.judges.cache:
        return config
    return replace(config, judges=replace(config.judges, cache=f"{config.judges.cache}.node-{ranks.node}"))


def shown(iteration: Iteration) -> dict[str, float]:
    """The few metrics that the progress line shows."""
    names = {"executor/reward": "executor", "planner/reward": "planner", "rewards/temporal_following/mean": "order"}
    return {label: iteration.metrics[name] for name, label in names.items() if name in iteration.metrics}


def restore(checkpoint: Checkpoint, config: RunConfig, policies: PolicyPair, trainer: Trainer) -> None:
    """Loads weights, optimisers, averages and position; UserError if the configuration is not the checkpoint's."""
    check_config(checkpoint, config)
    policies.planner.load_adapter(checkpoint.planner_dir)
    trainer.load_state(checkpoint.state)
    restore_rng(checkpoint.rng)
    log.info("resumed from %s", checkpoint.path)


def load_policies(run: str | Path, device: str = "auto") -> PolicyPair:
    """Planner and executor of a run's newest checkpoint; UserError for a folder without an intact one.

    run: a run folder, also of a run that is training. device: auto, cpu or cuda. All weights are in this process.
    """
    config = from_yaml(Path(run) / "config.yaml")
    whole = replace(config, device=device, executor=replace(config.executor, shard=1))
    return load_newest(whole, Path(run))[0]


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
    """Calls `use` with `checkpoint` and returns it, or the then newest one where the run has removed or replaced it
    meanwhile."""
    for _ in range(LOAD_ATTEMPTS):
        fault: Exception | None = None
        try:
            use(checkpoint)
        except (UserError, OSError) as error:
            fault = error
        if checkpoint.current:
            if fault is not None:
                raise fault
            return checkpoint
        checkpoint = newest(folder)
    raise UserError(f"{folder}: its checkpoints change faster than they can be read; accepted: a run that is finished")
