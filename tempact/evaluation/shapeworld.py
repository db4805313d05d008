"""The held-out evaluation in ShapeWorld: the paper's table, with an exact and a learned judge.

Five methods make the same videos' worth of prompts from the same noise: the whole instruction as one prompt,
the untrained planner and executor, both trained, and each trained one with the other's start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tempact.config import EvaluationConfig
from tempact.evaluation.harness import Cell, CellStore
from tempact.evaluation.methods import METHODS, Method
from tempact.evaluation.statistics import DUPLICATES, PICTURE_QUALITY, MethodScores
from tempact.executor.executor import Executor
from tempact.executor.rollout import gaussian_noise
from tempact.planner.planner import Planner
from tempact.seeds import derive_seed
from tempact.shapeworld.grammar import parse_instruction
from tempact.shapeworld.matcher import ShapeWorldJudge
from tempact.shapeworld.verifier import duplicates, picture_quality, verify
from tempact.shapeworld.world import held_out_prompts
from tempact.types import Plan, Prompt, Step

JUDGES = ("verifier", "matcher")
SCORED = (*JUDGES, PICTURE_QUALITY, DUPLICATES)


@dataclass
class Sample:
    """One held-out video: frames uint8 [F, 3, height, width]."""

    method: str
    prompt: Prompt
    plan: Plan
    frames: Tensor


@dataclass
class Evaluation:
    """Scores of every method, set and judge, and the first videos of each set."""

    scores: list[MethodScores]
    samples: list[Sample]


class ShapeWorldSuite:
    """Evaluates a planner and an executor on `config.simple` + `config.hard` test instructions."""

    def __init__(self, config: EvaluationConfig, planner: Planner, executor: Executor, judge: ShapeWorldJudge):
        self.config, self.planner, self.executor, self.judge = config, planner, executor, judge

    def run(
        self, tell: Callable[[str], None], methods: Sequence[Method] = METHODS, store: CellStore | None = None
    ) -> Evaluation:
        """All methods on all sets; `tell` is given a word on what is being made. Leaves global RNG as it was.

        store: keeps what is done, cell by cell; what it holds already is not made again.
        """
        result = Evaluation([], [])
        for category, count in (("simple", self.config.simple), ("hard", self.config.hard)):
            prompts = held_out_prompts(category, count, self.config.seed)
            plans: dict[str | None, list[Plan]] = {}
            for method in methods:
                tell(f"{method.name}, {category}")
                cell = store.load(method.name, category, SCORED, prompts) if store else None
                if cell is None:
                    if method.planner not in plans:
                        plans[method.planner] = self._plan(method.planner, category, prompts)
                    cell = self._cell(method, category, prompts, plans[method.planner])
                    if store:
                        store.save(method.name, category, prompts, cell)
                result.scores += cell.scores
                shown = zip(prompts, cell.plans, cell.frames, strict=False)
                result.samples += [Sample(method.name, *each) for each in shown]
        return result

    def _cell(self, method: Method, category: str, prompts: list[Prompt], plans: list[Plan]) -> Cell:
        frames = self._videos(method, category, plans)
        shown = self.config.strips
        return Cell(self._score(method.name, category, prompts, frames), plans[:shown], frames[:shown])

    def _plan(self, who: str | None, category: str, prompts: list[Prompt]) -> list[Plan]:
        if who is None:
            return [Plan(p.text, (Step(0, self.executor.settings.frames, p.text),)) for p in prompts]
        plans: list[Plan] = []
        for first in range(0, len(prompts), self.config.batch):
            batch = prompts[first : first + self.config.batch]
            seed = derive_seed(self.config.seed, first, f"{category} plans")
            plans += self.planner.sample(batch, 1, seed, reference=who == "start").plans
        return plans

    def _videos(self, method: Method, category: str, plans: list[Plan]) -> Tensor:
        """uint8 [n, F, 3, height, width]."""
        made = []
        for first in range(0, len(plans), self.config.batch):
            batch = plans[first : first + self.config.batch]
            seed = derive_seed(self.config.seed, first, f"{category} noise")
            noise = gaussian_noise(seed, self.executor.noise_shape(len(batch), 1), self.executor.device)
            forks = [0] * len(batch)
            if method.executor == "start":
                with self.executor.reference():
                    rollout = self.executor.rollout(batch, forks, noise)
            else:
                rollout = self.executor.rollout(batch, forks, noise)
            made.append(rollout.frames[:, 0])
        return torch.cat(made)

    def _score(self, method: str, category: str, prompts: list[Prompt], frames: Tensor) -> list[MethodScores]:
        pixels = frames.float() / 255.0
        stories = [parse_instruction(prompt.text) for prompt in prompts]
        judged = {
            "verifier": verify(pixels, stories).score,
            "matcher": self.judge.score(pixels, [prompt.text for prompt in prompts]),
            PICTURE_QUALITY: picture_quality(pixels).mean(1),
            DUPLICATES: duplicates(pixels, stories),
        }
        return [MethodScores(method, category, judge, scores.tolist()) for judge, scores in judged.items()]
