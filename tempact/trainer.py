"""The loop: plans, rollouts, rewards, advantages, two updates.

Every process of a run makes its share of plans, videos and gradients; raw rewards of all are gathered, and everything
that is decided is decided from them, by every process alike.

Every random draw of an iteration comes from seeds derived of (run seed, iteration, purpose) and what is drawn for, so
the state of a run is its weights, its optimisers, its averages and the number of iterations done.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tempact.agreement import Agreement
from tempact.config import RunConfig
from tempact.distributed import Ranks
from tempact.distributed.shards import block_of
from tempact.errors import Aborted, UserError
from tempact.executor.executor import Executor
from tempact.executor.rollout import cost_of
from tempact.executor.sampler import NoiseSource, gaussian_noise
from tempact.forks import compared_by_depth, depths_of, drawn_forks
from tempact.meter import Meter
from tempact.planner.planner import Planner
from tempact.planner.served import ServedSampler
from tempact.rewards import Judging, RewardSet, Scores
from tempact.rewards.judges import JudgeOutage
from tempact.rl import EMA, PolicyOptimizer
from tempact.rl.advantages import (
    EXECUTION_EPS,
    PLAN_EPS,
    execution_rewards,
    group_advantages,
    plan_rewards,
    shuffled,
    sibling_advantages,
)
from tempact.rl.histograms import advantage_shares
from tempact.rl.levels import levels_of
from tempact.rl.planner_losses import LEAVE_ONE_OUT
from tempact.seeds import derive_seed
from tempact.types import Batch, Fork, PlanBatch, Prompt, Rollout, Scored, Transition, first_frame, siblings_of
from tempact.updates import ExecutorUpdates, PlannerUpdates, split, too_wide

log = logging.getLogger(__name__)

STEPPED = re.compile(r"\w+/(grad_norm|skipped_updates)(@\d+)?$")  # metrics of an optimiser step

Timed = Callable[[str], AbstractContextManager[None]]  # measures a phase


class PromptSource(Protocol):
    def draw(self, count: int, seed: int) -> list[Prompt]:
        """`count` training prompts, the same for the same seed."""
        ...


class TooManySkippedUpdates(Aborted):
    """Gradients stayed non-finite for `trainer.max_skipped_updates` updates in a row."""


class RolloutGapTooWide(Aborted):
    """What made videos or plans and what is trained do not compute the same log-probs (`executor.max_rollout_gap`,
    `planner.max_sampling_gap`)."""


class NothingLearned(Aborted):
    """A policy had nothing to learn from for `trainer.max_idle_iterations` iterations in a row."""


class VideosNotFinite(Aborted):
    """No video of an iteration has finite latents: the executor's last step was no good."""


class WeightsNotFinite(Aborted):
    """A step gave a policy weights that are NaN or infinite."""


@dataclass
class OwnVideos:
    """What this process makes of an iteration's videos.

    forks          of every plan, of all processes
    continuations  of each plan that it makes; processes that share weights make the others
    noise          of these continuations of all plans
    rollout        frames [P, n, ...] of them; of several processes, only its own plans' are filled
    records        of its plans
    """

    forks: list[Fork]
    continuations: range
    noise: NoiseSource
    rollout: Rollout = field(default_factory=lambda: Rollout(torch.empty(0)))
    records: dict[range, Transition] = field(default_factory=dict)


@dataclass
class Iteration:
    """What one iteration made, for logs, samples and videos. rollout: of several processes, the videos that this one
    made."""

    number: int
    plans: PlanBatch
    rollout: Rollout
    scored: Scored
    batch: Batch
    metrics: dict[str, float]
    own: frozenset[int]  # plans whose videos are in `rollout`
    continuations: range  # of these plans, in the order of `rollout`


def judging_of(config: RunConfig, device: torch.device, alone: bool) -> Judging:
    """What of the videos is judged. Only a GPU without other processes takes the plans of a tree together: it rounds as
    its batches have it anyway, unless it is to be deterministic, and would need several times as long."""
    depths, within = depths_of(config.executor), config.executor.forks == "random_chunk"
    exact = config.deterministic or not alone or device.type == "cpu"
    return Judging(depths, within, one_by_one=exact and (depths > 1 or within))


class Trainer:
    """Trains a planner and an executor; `iterations()` yields after each one.

    An iteration that ends by an exception may have changed a policy; `rollback` takes that back.
    """

    def __init__(
        self, config: RunConfig, planner: Planner, executor: Executor, rewards: RewardSet, prompts: PromptSource,
        ranks: Ranks | None = None,
    ):  # fmt: skip
        self.config, self.rewards, self.prompts, self.ranks = config, rewards, prompts, ranks or Ranks()
        self.planner, self.executor = planner, executor
        served = Path(config.output) / "served"
        self.served = (
            ServedSampler(planner, Path(config.planner.server_folder or served), self.ranks)
            if config.planner.sampler == "served"
            else None
        )
        self.judging = judging_of(config, executor.device, self.ranks.alone)
        self.meter = Meter()
        self.done = 0
        self.idle = {"planner": 0, "executor": 0}  # iterations in a row without anything to learn from
        self.wide_gap = ""  # why the last updates were refused, if it was for that
        self._before: dict | None = None  # state before the first optimiser step of the latest iteration
        self._earlier: dict | None = None  # the same of the iteration before, until its policies have made videos
        self.planner_policy = PolicyOptimizer(dict(planner.parameters()), config.planner.optim, self.ranks)
        self.executor_policy = PolicyOptimizer(executor.parameters(), config.executor.optim, self.ranks)
        self.agreement = Agreement(planner, executor, self._policies(), self.ranks)
        self.ema = EMA(executor.parameters(), config.executor.ema_decay)

    def iterations(self, phase: Callable[[str], None]) -> Iterator[Iteration]:
        """Runs the iterations that are left; `phase` is told the name of each phase as it begins.

        The phase "step" begins with the first optimiser step: until then the policies are those before the iteration.
        Raises Aborted, with the policies of the last whole iteration.
        """
        while self.done < self.config.trainer.iterations:
            yield self.iterate(phase)
            self._check_progress()
            if self.wide_gap:
                raise RolloutGapTooWide(self.wide_gap)

    def iterate(self, phase: Callable[[str], None]) -> Iteration:
        """One iteration of the method."""
        self.meter.begin()
        timed = partial(self.meter.timed, phase)
        self._before = None
        executor = self.config.executor
        with timed("plan"):
            plans, served = self._sample()
            rngs = [random.Random(self._seed("switch", prompt)) for prompt in range(len(plans.prompts))]
            forks = drawn_forks(executor, plans, rngs)
            count, chunks = executor.continuations, [first_frame(fork) // executor.chunk_frames for fork in forks]
            own = range(count)[block_of(count, self.ranks.member, self.ranks.members)]
            shape = self.executor.noise_shape(len(plans.plans), count)
            noise = gaussian_noise(self._seed("noise"), shape, self.executor.device)
            if executor.seed_group:
                noise = noise.seed_group(self.executor.settings.chunks)
            videos = OwnVideos(forks, own, noise.block(own, chunks))
        with timed("rollout"):
            # what may end here alone, silent judges for one, ends the iteration of all processes; where weights are
            # shared it ends the run at once, because others wait for this one's calls
            travelling = (JudgeOutage, UserError) if self.ranks.members == 1 else ()
            found = self.ranks.agreed(partial(self._score, plans, videos, timed), *travelling)
        with timed("rewards"):
            self._check_videos(torch.stack([broken for _, broken in found]).any(0))
            scored = self.rewards.whole(plans, [scores for scores, _ in found])
            batch, metrics = self._advantages(plans, videos, scored)
            metrics |= served | self.agreement.canaries(self.done + 1, plans, videos.noise)
        stepping = cache(partial(phase, "step"))
        with timed("update"):
            metrics |= self._update(plans, batch, videos, stepping)
        stepping()  # there may have been no step, but from here on the iteration counts
        metrics |= self.agreement.metrics(self.done + 1, self.meter, self.rewards.metrics())
        self._note_idle(batch)
        self.done += 1
        made = frozenset(plan for unit in videos.records for plan in unit)
        return Iteration(self.done, plans, videos.rollout, scored, batch, metrics, made, own)

    def _asked(self, done: int) -> tuple[list[Prompt], int, int]:
        """What the planner is asked for after `done` iterations: prompts, plans of each, and their seed."""
        prompts = self.prompts.draw(
            self.config.data.prompts_per_iteration, derive_seed(self.config.seed, done, "prompts")
        )
        return prompts, self.config.planner.plans_per_prompt, derive_seed(self.config.seed, done, "plans")

    def _sample(self) -> tuple[PlanBatch, dict[str, float]]:
        """The plans of this iteration, and metrics of the server that has sampled them."""
        if self.served:
            return self.served.sample(self.done + 1, *self._asked(self.done))
        return self.planner.sample(*self._asked(self.done), ranks=self.ranks), {}

    def _score(self, plans: PlanBatch, videos: OwnVideos, timed: Timed) -> tuple[Scores, Tensor]:
        """Makes the videos that fall to this process, while they are scored; their scores, and which are broken [P, N]
        (False for those of others)."""
        count, continuations, ranks = len(plans.plans), self.config.executor.continuations, self.ranks
        scoring = self.rewards.begin(
            plans, ranks.share(count), videos.continuations if ranks.members > 1 else None, self.judging
        )

        def made(unit: range, part: Rollout) -> None:
            assert part.transition is not None
            videos.records[unit] = part.transition
            with timed("rewards"):
                scoring.add(part, unit)

        taken, each = None, len(videos.continuations)
        if self.config.deterministic or not ranks.alone:
            parts = count if self.config.deterministic else ranks.groups  # a GPU rounds as the batch has it
            units = self.executor.rollout_units(count, each, parts)
            taken = ranks.take(units, lambda unit: cost_of(unit, videos.forks, each, self.executor.settings))
        prompts = self.executor.prompts(plans.plans)
        ranks.in_turn(lambda: self.executor.read(prompts))  # what one process of a machine has encoded is read
        videos.rollout = self.executor.rollout(plans.plans, videos.forks, videos.noise, made, taken)
        assert videos.rollout.broken is not None
        broken = torch.zeros(count, continuations, dtype=torch.bool)
        broken[:, videos.continuations] = videos.rollout.broken
        with timed("rewards"):
            return scoring.scores(), broken

    def state(self) -> dict:
        """All that a resumed run needs beside the adapters."""
        return {
            "done": self.done,
            # raw, beside the averaged ones that the adapter folder holds
            "executor": {name: p.detach() for name, p in self.executor_policy.parameters.items()},
            "planner_optimiser": self.planner_policy.optimizer.state_dict(),
            "executor_optimiser": self.executor_policy.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "skipped": [self.planner_policy.skipped, self.executor_policy.skipped],
            "idle": dict(self.idle),
        }

    def load_state(self, state: dict) -> None:
        self.done, self.idle = state["done"], dict(state.get("idle", self.idle))  # 0.1.0 has no idle
        with torch.no_grad():
            for name, value in state["executor"].items():
                self.executor_policy.parameters[name].copy_(value)
        self.planner_policy.optimizer.load_state_dict(state["planner_optimiser"])
        self.executor_policy.optimizer.load_state_dict(state["executor_optimiser"])
        self.ema.load_state_dict(state["ema"])
        self.planner_policy.skipped, self.executor_policy.skipped = state["skipped"]

    def close(self) -> None:
        """Leaves the planner's server without this run's adapters, asleep if it is to sleep."""
        if self.served:
            self.served.close()

    def confirm(self) -> None:
        """The latest iteration is recorded: `rollback` no longer takes it back."""
        self._earlier, self._before = self._before, None

    def rollback(self) -> None:
        """Takes back the optimiser steps of the latest iteration, finished or not, unless it is confirmed."""
        self._restore(self._before)

    def _restore(self, before: dict | None) -> None:
        if before is not None:
            with torch.no_grad():
                for name, value in before["planner"].items():
                    self.planner_policy.parameters[name].copy_(value)
            self.load_state(before["state"])
            if self.served:
                self.served.forget()
        self._before = self._earlier = None

    def _check_videos(self, broken: Tensor) -> None:
        """broken [P, N]: of all processes."""
        if bool(broken.all()):
            number = self.done + 1
            self._restore(self._earlier)
            lr = self.config.executor.optim.lr
            raise VideosNotFinite(
                f"iteration {number}: found no video whose latents are finite, so the policies are those after "
                f"iteration {self.done} again; accepted: steps of less than executor.optim.lr {lr:g}"
            )
        if bool(broken.any()):
            self._warn("iteration %d: %d videos have latents that are not finite", self.done + 1, int(broken.sum()))
        self._earlier = None

    def _warn(self, *message: object) -> None:
        """Of what all processes find alike."""
        log.log(logging.WARNING if self.ranks.first else logging.DEBUG, *message)

    def _seed(self, purpose: str, *index: int) -> int:
        return derive_seed(self.config.seed, self.done, purpose, *index)

    def _advantages(self, plans: PlanBatch, videos: OwnVideos, scored: Scored) -> tuple[Batch, dict[str, float]]:
        """Plan level and execution level, with the metrics of both and of the raw rewards."""
        weights, config = self.config.rewards, self.config
        group = plan_rewards(scored, weights).view(-1, plans.plans_per_prompt)
        plan, plan_mask, plan_metrics = group_advantages(
            group, config.planner.advantage_clip, PLAN_EPS, std=config.planner.advantage_std,
            leave_one_out=config.planner.loss in LEAVE_ONE_OUT,
        )  # fmt: skip
        rows = siblings_of(videos.forks, config.executor.continuations, self.executor.settings.siblings)
        execution, execution_mask, execution_metrics = sibling_advantages(
            [execution_rewards(own, weights) for own in (scored, *scored.later)], rows, config.executor.advantage_clip,
            EXECUTION_EPS, std=config.executor.advantage_std, by_depth=compared_by_depth(config.executor),
        )  # fmt: skip
        if weights.shuffle_advantages:
            generator = torch.Generator().manual_seed(self._seed("shuffle"))
            plan, execution = (shuffled(*each, generator) for each in ((plan, plan_mask), (execution, execution_mask)))
        flat, transition = (plan.flatten(), plan_mask.flatten()), videos.rollout.transition
        batch = Batch(*flat, execution, execution_mask, plans.tokens, transition, rows)
        plan_metrics |= advantage_shares(plan, plan_mask, config.planner.advantage_clip)
        execution_metrics |= advantage_shares(execution, execution_mask, config.executor.advantage_clip)
        metrics = prefixed("planner", plan_metrics) | prefixed("executor", execution_metrics)
        return batch, metrics | reward_metrics(scored)

    def _update(
        self, plans: PlanBatch, batch: Batch, videos: OwnVideos, stepping: Callable[[], None]
    ) -> dict[str, float]:
        """`updates_per_iteration` optimiser steps of both policies on consecutive parts of the plans.

        `stepping` is called before the first optimiser step. Names of the metrics of later updates end in @2, @3, ...
        """
        parts = split(len(batch.plan_advantage), self.config.trainer.updates_per_iteration)
        updates: dict[str, PlannerUpdates | ExecutorUpdates] = {}
        metrics: dict[str, float] = {}
        if self._in_turn("planner"):
            updates["planner"] = PlannerUpdates(self.planner, self.planner_policy, batch, parts)
        if self._in_turn("executor"):
            count = self.executor.settings.trained
            levels = levels_of(self.config.executor.levels, count, self.done, self._seed("level"))
            updates["executor"] = ExecutorUpdates(
                self.executor, self.executor_policy, plans, batch, videos.records, videos.noise, parts,
                videos.continuations, levels,
            )  # fmt: skip
            if self.config.executor.levels != "all":
                metrics["executor/level"] = float(levels.start)
        self.wide_gap = ""
        if not self.served or not self.config.planner.server_ahead:
            return metrics | self._steps(updates, len(parts), stepping)
        # until the executor's first step the iteration can be dropped: then the planner's are taken back
        own = {name: updates.pop(name) for name in ("planner",) if name in updates}
        metrics |= self._steps(own, len(parts), lambda: None)
        if self.done + 1 < self.config.trainer.iterations and not self.wide_gap:
            self.served.ahead(self.done + 2, *self._asked(self.done + 1))
        metrics |= self._steps(updates, len(parts), stepping)
        if self.wide_gap and self._before is not None:
            self.rollback()
            metrics = {name: value for name, value in metrics.items() if not STEPPED.match(name)}
        return metrics

    def _steps(
        self, updates: Mapping[str, PlannerUpdates | ExecutorUpdates], parts: int, stepping: Callable[[], None]
    ) -> dict[str, float]:
        """Optimiser steps of these policies, and their metrics."""
        metrics: dict[str, float] = {}
        for i in range(parts):
            found = {name: own.update(i) for name, own in updates.items()}
            self.wide_gap = self.wide_gap or too_wide(found, self.config)
            for name, values in found.items():  # all gradients first: until here the iteration can be dropped
                values |= self._step(name, stepping) if values else {}
                metrics |= {f"{name}/{key}{f'@{i + 1}' if i else ''}": value for key, value in values.items()}
        return metrics

    def _policies(self) -> dict[str, PolicyOptimizer]:
        return {"planner": self.planner_policy, "executor": self.executor_policy}

    def _trained_policies(self) -> dict[str, PolicyOptimizer]:
        return {name: policy for name, policy in self._policies().items() if getattr(self.config, name).train}

    def _in_turn(self, name: str) -> bool:
        """Is the policy `name` trained in this iteration?"""
        each = self.config.trainer.alternate
        turn = not each or ("planner", "executor")[self.done // each % 2] == name
        return turn and getattr(self.config, name).train

    def _step(self, name: str, stepping: Callable[[], None]) -> dict[str, float]:
        """An optimiser step of the policy `name`, unless another policy than the trained has made plans or videos."""
        policy = self._trained_policies()[name]
        if self.wide_gap:
            policy.clear()
            return {}
        if self._before is None:
            self._before = {"state": copied(self.state()), "planner": copied(dict(self.planner_policy.parameters))}
            if self.executor.device.type == "cuda":
                torch.cuda.current_stream().synchronize()
        stepping()
        metrics = policy.step(self.done / max(1, self.config.trainer.iterations - 1))
        if policy.skipped:
            self._warn("iteration %d: %s gradient is not finite; update left out", self.done + 1, name)
        elif not policy.finite():
            lr = getattr(self.config, name).optim.lr
            self.rollback()
            raise WeightsNotFinite(
                f"iteration {self.done + 1}: found {name} weights that are not finite; accepted: a step of less than "
                f"{name}.optim.lr {lr:g}"
            )
        elif name == "executor":
            self.ema.update(self.executor.parameters())
        return metrics

    def _note_idle(self, batch: Batch) -> None:
        advantages = {"planner": batch.plan_advantage, "executor": batch.execution_advantage}  # 0 where masked
        for name in filter(self._in_turn, self._trained_policies()):
            self.idle[name] = 0 if bool(advantages[name].any()) else self.idle[name] + 1
            if self.idle[name]:
                self._warn("iteration %d: no group of the %s has rewards to compare", self.done + 1, name)

    def _check_progress(self) -> None:
        settings = self.config.trainer
        for name, policy in self._trained_policies().items():
            if policy.skipped > settings.max_skipped_updates:
                raise TooManySkippedUpdates(f"{name}: {policy.skipped} updates in a row had non-finite gradients")
            if self.idle[name] >= min(settings.max_idle_iterations, max(2, settings.iterations)):
                raise NothingLearned(
                    f"{name}: {self.idle[name]} iterations in a row without a group whose rewards can be compared "
                    f"(all missing or all equal; trainer.max_idle_iterations)"
                )


def copied(value: Any) -> Any:
    """A copy of nested dictionaries and lists whose tensors are on the host. A GPU's is queued, into pinned memory:
    into other memory the 5 GB of a run at full size take seconds.
    """
    if isinstance(value, Tensor):
        place = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return place.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        return {key: copied(inner) for key, inner in value.items()}
    return [copied(inner) for inner in value] if isinstance(value, list) else value


def prefixed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def named_by_depth(scored: Scored) -> Iterator[tuple[str, Tensor]]:
    """Name and raw scores of every reward, those of the second fork on as <name>/depth2 and so on."""
    yield from scored.named()
    for depth, later in enumerate(scored.later, 2):
        for name, values in later.named():
            if not any(values is known for _, known in scored.named()):  # those of plans and whole videos are
                yield f"{name}/depth{depth}", values


def reward_metrics(scored: Scored) -> dict[str, float]:
    """rewards/<name>/mean, std and missing of every raw reward."""
    metrics: dict[str, float] = {}
    for name, values in named_by_depth(scored):
        present = values[~torch.isnan(values)]
        metrics[f"rewards/{name}/mean"] = present.mean().item() if len(present) else float("nan")
        metrics[f"rewards/{name}/std"] = present.std(correction=0).item() if len(present) else float("nan")
        metrics[f"rewards/{name}/missing"] = 1.0 - present.numel() / values.numel()
    return metrics
