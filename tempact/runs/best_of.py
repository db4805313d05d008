"""Best-of-N of generated and evaluated videos: rewards that choose, and what is told of their choices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tempact.config import RunConfig, flatten
from tempact.executor.best_of import BestOf, Continuations
from tempact.executor.executor import Executor
from tempact.executor.sampler import NoiseSource
from tempact.executor.stream import stream_frames
from tempact.rewards import Span
from tempact.rewards.choice import LOCAL, Chooser
from tempact.types import Plan, Step
from tempact.worlds import world_of

DIGITS = 6  # of scores in files
TOGETHER = "best_of.together"  # of the keys the one that no choice depends on


@dataclass(frozen=True)
class Selection:
    """Makes videos whose every switch is the best of `count` continuations, by the keys `best_of` of a configuration.
    Without a chooser there is one continuation, and nothing to choose."""

    count: int
    config: RunConfig
    chooser: Chooser | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What the choices depend on beside weights and settings of the video; nothing of one continuation."""
        if self.chooser is None:
            return {}
        keys = flatten(self.config).items()
        told = {name: value for name, value in keys if name.startswith("best_of.") and name != TOGETHER}
        return {"continuations": self.count, "weights": self.chooser.weights, **told}

    def video(self, executor: Executor, plan: Plan, noise: NoiseSource) -> tuple[Tensor, bool, list[dict[str, Any]]]:
        """All frames of a plan's video, whether latents of it are not finite, and what was chosen."""
        choices: list[dict[str, Any]] = []
        broken: list[bool] = []
        return torch.cat([*self.stream(executor, plan, noise, choices, broken)]), any(broken), choices

    def stream(
        self, executor: Executor, plan: Plan, noise: NoiseSource, choices: list[dict[str, Any]],
        broken: list[bool] | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """The frames of a plan's video, as `stream_frames`. `choices` gets what was chosen, switch by switch: first
        latent frame and number of latent frames of the continuations, the number of the one that goes on, all scores.
        """
        if self.chooser is None:
            yield from stream_frames(executor, plan, noise, broken=broken)
            return
        chooser, settings = self.chooser, self.config.best_of

        def choose(made: Continuations) -> int:
            before = made.start if not chooser.local else min(made.start, executor.settings.chunk)
            choice = chooser(plan, made.frames, span_of(plan, made, before), made.broken)
            scores = {name: [rounded(one) for one in own] for name, own in choice.scores.items()}
            told = {"frame": made.start, "frames": made.end - made.start, "continuation": choice.chosen}
            choices.append({**told, "scores": scores})
            return choice.chosen

        given = settings.chunks, settings.first, settings.together, not chooser.local
        yield from stream_frames(executor, plan, noise, BestOf(self.count, choose, *given), broken)


def span_of(plan: Plan, made: Continuations, before: int) -> Span:
    """The step that begins at a switch, as far as it has been made, among the frames at hand. before: how many latent
    frames before the switch are at hand."""
    step = plan.steps[plan.step_at(made.start)]
    last = made.frames.shape[1] - 1
    return Span(made.shared, last, Step(before, before + made.end - made.start, step.prompt))


def rounded(score: float) -> float | None:
    """For JSON, which knows no NaN."""
    return round(score, DIGITS) if math.isfinite(score) else None


@contextmanager
def selecting(count: int, config: RunConfig, device: torch.device, processes: int = 1) -> Iterator[Selection]:
    """Best-of-`count` by the rewards of the configuration's world, which are closed at the end; of 1 none are needed.

    processes: that make videos; each keeps to its part of the judges' limits. UserError as `World.rewards`, of which
    only what `best_of.rewards` names must be at hand, and for names of other rewards.
    """
    if count == 1:
        yield Selection(count, config)
        return
    names = config.best_of.rewards
    rewards = world_of(config).rewards(device, processes, only=names or LOCAL)
    try:
        yield Selection(count, config, Chooser.of(rewards, config.rewards, names))
    finally:
        rewards.close()
