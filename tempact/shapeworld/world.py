"""ShapeWorld's prompts: an endless training split, fixed validation and test sets.

ShapeWorld's rewards: a rule-based plan judge and the exact verifier, behind the interface of `rewards`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tempact.rewards.base import RewardSet
from tempact.shapeworld.grammar import parse_instruction, read_step, sample_story, write_instruction
from tempact.shapeworld.story import CHUNK, Event, Story, apply_event, states
from tempact.shapeworld.verifier import picture_quality, verify, verify_steps
from tempact.types import Plan, PlanBatch, Prompt, Rollout

HARD_SHARE = 0.5  # of training prompts


class ShapeWorldPrompts:
    """Training prompts drawn from the grammar's training split."""

    def draw(self, count: int, seed: int) -> list[Prompt]:
        rng = random.Random(seed)
        return [_prompt(rng, "train", "hard" if rng.random() < HARD_SHARE else "simple", i) for i in range(count)]


def held_out_prompts(category: str, count: int, seed: int, split: str = "test") -> list[Prompt]:
    """`count` instructions of one category of a held-out split, the same for the same seed."""
    rng = random.Random(f"{seed}/{category}")
    return [_prompt(rng, split, category, i) for i in range(count)]


def _prompt(rng: random.Random, split: str, category: str, number: int) -> Prompt:
    text = write_instruction(sample_story(rng, split, None, category=category), rng)
    return Prompt(f"{split}-{category}-{number}", text, category)


# the reward is picture quality to this power: its spread within a group is then near that of step following, so that
# its weight of 0.4 has a say; left at 1, training buys step following with quality
AESTHETICS_POWER = 4
FAITHFULNESS, COVERAGE, TEMPORAL, HALLUCINATION = 0.4, 0.25, 0.25, 0.3  # ALGORITHM.md 2.6


@dataclass(frozen=True)
class PlanVerdict:
    """Sub-scores of a plan, each in [0, 1].

    faithfulness: share of the plan's steps that say only what the instruction says, the opening scene first.
    coverage: share of the instruction's events that the plan has.
    temporal: share of the events that stand in order, each in a step of its own.
    hallucination: share of the plan's events that the instruction lacks; repeats, unreadable steps, entities of another
        colour and openings that are not there count among them.
    """

    faithfulness: float
    coverage: float
    temporal: float
    hallucination: float

    @property
    def score(self) -> float:
        """J in [0, 0.9]."""
        raw = FAITHFULNESS * self.faithfulness + COVERAGE * self.coverage + TEMPORAL * self.temporal
        return min(1.0, max(0.0, raw - HALLUCINATION * self.hallucination))


def judge_plan(plan: Plan) -> PlanVerdict:
    """Compares what the plan's steps tell with what its instruction tells.

    Looks count: an opening must name what is visible at first, as it looks there, and an event's entity must have the
    colour that it has by then, in the story or in the order of the plan.
    """
    story = parse_instruction(plan.instruction)
    scenes, now = states(story), list(story.entities)
    opening = {entity for entity in story.entities if entity.visible}
    left = list(enumerate(story.events))  # an event may be told twice in a story, so they are kept by place
    order: list[int] = []  # places in the story of the plan's events that stand alone in their step
    right_steps = invented = count = 0
    for position, step in enumerate(plan.steps):
        reading = read_step(step.prompt, story.entities)
        if reading is None:
            invented, count = invented + 1, count + 1
            continue
        known = []
        for event, colour in zip(reading.events, reading.colours, strict=True):
            looks = (None, now[event.entity].colour)
            match = next(
                (
                    each
                    for each in left
                    if each[1] == event and colour in (*looks, scenes[each[0]][event.entity].colour)
                ),
                None,
            )
            now[event.entity] = apply_event(now[event.entity], event)
            if match is not None:
                left.remove(match)
                known.append(match[0])
        foreign = len(set(reading.scene) - opening)
        told_right = not foreign and len(known) == len(reading.events)
        right_steps += told_right and (bool(known) if position else set(reading.scene) == opening and not known)
        invented += len(reading.events) - len(known) + foreign
        count += len(reading.events) + foreign
        if len(reading.events) == 1:
            order += known
    return PlanVerdict(
        faithfulness=right_steps / len(plan.steps),
        coverage=1.0 - len(left) / len(story.events),
        temporal=_longest_rise(order) / len(story.events),
        hallucination=invented / max(1, count),
    )


def _longest_rise(numbers: Sequence[int]) -> int:
    """Length of the longest strictly rising subsequence."""
    best: list[int] = []
    for i, number in enumerate(numbers):
        best.append(1 + max((best[j] for j in range(i) if numbers[j] < number), default=0))
    return max(best, default=0)


class PlanQuality:
    def score(self, plans: PlanBatch) -> Tensor:
        return torch.tensor([judge_plan(plan).score for plan in plans.plans])


class TemporalFollowing:
    """The verifier on the whole video; it knows the instruction and nothing of the plan."""

    def score(self, plans: PlanBatch, rollout: Rollout) -> Tensor:
        count = rollout.frames.shape[1]
        stories = [story for plan in plans.plans for story in [parse_instruction(plan.instruction)] * count]
        return verify(_pixels(rollout), stories).score.unflatten(0, (-1, count))


class StepFollowing:
    """The verifier on the span of the step that starts at the switch. Missing where no step starts there, and
    where the step's prompt cannot be read."""

    def score(self, plans: PlanBatch, rollout: Rollout) -> Tensor:
        assert rollout.transition is not None
        count = rollout.frames.shape[1]
        scores = torch.full(rollout.frames.shape[:2], float("nan"))
        rows: list[int] = []
        told: list[tuple[Story, tuple[int, int], list[Event]]] = []
        for p, (plan, start) in enumerate(zip(plans.plans, rollout.transition.start.tolist(), strict=True)):
            step = plan.steps[plan.step_at(start)]
            story = parse_instruction(plan.instruction)
            reading = read_step(step.prompt, story.entities)
            if step.start == start and reading is not None:
                rows.append(p)
                told.append((story, (step.start, step.end), list(reading.events)))
        if rows:
            stories, windows, expected = zip(*(each for each in told for _ in range(count)), strict=True)
            frames = rollout.frames[rows].flatten(0, 1).float() / 255.0
            scores[rows] = verify_steps(frames, stories, windows, expected).unflatten(0, (-1, count)).cpu()
        return scores


class Aesthetics:
    """Picture quality of the transition chunk, to the power of AESTHETICS_POWER."""

    def score(self, plans: PlanBatch, rollout: Rollout) -> Tensor:
        assert rollout.transition is not None
        chunks = [
            frames[:, start : start + CHUNK]
            for frames, start in zip(rollout.frames, rollout.transition.start.tolist(), strict=True)
        ]
        frames = torch.cat(chunks).float() / 255.0
        return picture_quality(frames).mean(1).pow(AESTHETICS_POWER).unflatten(0, rollout.frames.shape[:2])


def _pixels(rollout: Rollout) -> Tensor:
    return rollout.frames.flatten(0, 1).float() / 255.0


def shapeworld_rewards() -> RewardSet:
    """All four; they run on the frames' device."""
    return RewardSet(PlanQuality(), TemporalFollowing(), StepFollowing(), Aesthetics())
