"""Rewards that choose one of a video's continuations while the video is made."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tempact.config import RewardConfig
from tempact.errors import UserError
from tempact.rewards import VIDEO_REWARDS, RewardSet, Span, unasked
from tempact.types import Plan, PlanBatch, Prompt

LOCAL = ("step_following", "aesthetics")  # of the step that begins at a switch: they need no frames before it
TOTAL = "total"


@dataclass(frozen=True)
class Choice:
    """The continuation that goes on, and all scores: of every reward that was asked and their weighted sum, TOTAL; NaN
    where missing."""

    chosen: int
    scores: dict[str, list[float]]


@dataclass(frozen=True)
class Chooser:
    """Chooses by the weighted sum of rewards.

    rewards  scores; those without a weight are not asked
    weights  of the rewards that are asked, by name
    """

    rewards: RewardSet
    weights: dict[str, float]

    @classmethod
    def of(cls, rewards: RewardSet, weights: RewardConfig, names: Collection[str]) -> Chooser:
        """The rewards of these names; without names those of a continuation in training, step following, aesthetics
        and the user's own of the execution level. UserError for a name that no reward has, and where none has a weight.
        """
        own = {reward.name: reward for reward in rewards.custom}
        known = [*VIDEO_REWARDS, *own]
        unknown = next((name for name in names if name not in known), None)
        if unknown is not None:
            raise UserError(f"best_of.rewards: found {unknown!r}; accepted: {', '.join(known)}")
        usual = [*LOCAL, *(name for name, reward in own.items() if reward.level == "execution")]
        chosen = {name: own[name].weight if name in own else getattr(weights, name) for name in names or usual}
        chosen = {name: weight for name, weight in chosen.items() if weight}
        if not chosen:
            raise UserError("best_of.rewards: found none with a weight; accepted: rewards with weights other than 0")
        following, step, pictures = (getattr(rewards, n) if n in chosen else unasked for n in VIDEO_REWARDS)
        asked = replace(
            rewards, plan_quality=unasked, temporal_following=following, step_following=step, aesthetics=pictures,
            custom=tuple(reward for name, reward in own.items() if name in chosen),
        )  # fmt: skip
        return cls(asked, chosen)

    @property
    def local(self) -> bool:
        """Do all of them look at the step alone, so that frames before its switch need not be whole?"""
        return all(name in LOCAL for name in self.weights)

    def __call__(self, plan: Plan, frames: Tensor, span: Span, broken: Tensor) -> Choice:
        """Chooses by what has been made so far.

        plan: of the video. frames: uint8 [N, T, 3, height, width], those of the continuations last. span: the step as
        far as it has been made, among these frames. broken: [N] bool, continuations that cannot be chosen.

        A reward that is missing for all is left out; a continuation that misses another one is not chosen, and where
        none is left, continuation 0 goes on. Equal sums go to the first. All rewards are asked before the first is
        waited for. Raises what they raise: JudgeOutage, UserError for own scores that cannot be used.
        """
        scoring = self.rewards.begin(PlanBatch([Prompt("", plan.instruction)], [plan], 1), range(0))
        scoring.ask(range(1), frames[None], [span], broken[None])
        found = scoring.scores()[1][2]
        scores = {name: found[name].expand(1, len(frames))[0].double() for name in self.weights}
        self.rewards.metrics()  # of an iteration: here nobody asks for them, and they would add up
        counted = [weight * scores[name] for name, weight in self.weights.items() if not scores[name].isnan().all()]
        total = torch.stack([torch.zeros(len(frames), dtype=torch.float64), *counted]).sum(0)
        total = total.masked_fill(broken.cpu(), math.nan)
        chosen = int(total.nan_to_num(-math.inf).argmax()) if not torch.isnan(total).all() else 0
        total = total if counted else torch.full_like(total, math.nan)
        return Choice(chosen, {name: own.tolist() for name, own in (scores | {TOTAL: total}).items()})
