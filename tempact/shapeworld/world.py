"""ShapeWorld's prompts and rewards.

Prompts are an endless training split and fixed validation and test sets. Rewards are a rule-based judge of plans and
the exact verifier of videos, with the interface of `tempact.rewards`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from tempact.rewards import RewardSet, Span
from tempact.rewards.judged import PlanVerdict
from tempact.shapeworld.grammar import parse_instruction, read_step, sample_story, write_instruction
from tempact.shapeworld.story import CHUNK, Event, Story, apply_event, states
from tempact.shapeworld.verifier import picture_quality, verify, verify_opening, verify_steps
from tempact.types import Plan, Prompt

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


def judge_plan(plan: Plan) -> PlanVerdict:
    """Compares the plan's steps with its instruction.

    faithfulness   share of the steps that say only what the instruction says, the opening scene first
    coverage       share of the instruction's events that the plan has
    temporal       share of the events that stand in order, each in a step of its own
    hallucination  share of the plan's events that the instruction lacks; repeats, unreadable steps, entities of another
                   colour and openings that are not there count among them

    Looks count: an opening must name the entities that are visible at first, as they look there, and an event's entity
    must have the colour that it has by then, in the story or in the order of the plan.
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


def plan_quality(prompts: list[str], plans: list[Plan], frames: Tensor, spans: list[Span | None]) -> Tensor:
    """J [P] in [0, 0.9]: `judge_plan`."""
    return torch.tensor([judge_plan(plan).score() for plan in plans])


def temporal_following(prompts: list[str], plans: list[Plan], frames: Tensor, spans: list[Span | None]) -> Tensor:
    """V [P, N] in [0, 1]: the verifier on whole videos; it knows the instruction and nothing of the plan."""
    count = frames.shape[1]
    stories = [story for plan in plans for story in [parse_instruction(plan.instruction)] * count]
    return verify(frames.flatten(0, 1).float() / 255.0, stories).score.unflatten(0, (-1, count))


def step_following(prompts: list[str], plans: list[Plan], frames: Tensor, spans: list[Span | None]) -> Tensor:
    """L [P, N] in [0, 1]: the verifier on the switched step; on the first one, which only best-of-N asks about, how
    intact the story's opening is. NaN where no step begins at the switch frame, and where the step's prompt cannot be
    read."""
    count = frames.shape[1]
    scores = torch.full(frames.shape[:2], float("nan"))
    rows: list[int] = []
    told: list[tuple[Story, tuple[int, int], list[Event]]] = []
    for p, (plan, span) in enumerate(zip(plans, spans, strict=True)):
        story = parse_instruction(plan.instruction)
        if span is not None and span.step.start == 0:
            scores[p] = verify_opening(frames[p].float() / 255.0, [story] * count).cpu()
            continue
        reading = read_step(span.step.prompt, story.entities) if span is not None else None
        if span is not None and reading is not None:
            rows.append(p)
            told.append((story, (span.step.start, span.step.end), list(reading.events)))
    if rows:
        stories, windows, expected = zip(*(each for each in told for _ in range(count)), strict=True)
        videos = frames[rows].flatten(0, 1).float() / 255.0
        scores[rows] = verify_steps(videos, stories, windows, expected).unflatten(0, (-1, count)).cpu()
    return scores


def aesthetics(prompts: list[str], plans: list[Plan], frames: Tensor, spans: list[Span | None]) -> Tensor:
    """P [P, N] in [0, 1]: picture quality of the trained chunk, to the power of AESTHETICS_POWER."""
    starts = (CHUNK if span is None else span.first for span in spans)  # a plan of one step forks after its first chunk
    chunks = torch.cat([videos[:, start : start + CHUNK] for videos, start in zip(frames, starts, strict=True)])
    quality = picture_quality(chunks.float() / 255.0)
    return quality.mean(1).pow(AESTHETICS_POWER).unflatten(0, frames.shape[:2])


def shapeworld_rewards() -> RewardSet:
    """All four; they run on the frames' device."""
    return RewardSet(plan_quality, temporal_following, step_following, aesthetics)
