"""ShapeWorld's prompts and rewards.

Prompts are an endless training split and fixed validation and test sets. Rewards are a rule-based judge of plans and
the exact verifier of videos, with the interface of `tempact.rewards`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from tempact.rewards import RewardSet, Span
from tempact.rewards.judged import PlanVerdict
from tempact.shapeworld import STRICT_SETS
from tempact.shapeworld.crowd import actors_only, with_bystander, without_bystanders
from tempact.shapeworld.grammar import parse_instruction, read_step, sample_story, write_instruction
from tempact.shapeworld.story import CHUNK, KINDS, Event, Story, apply_event, states
from tempact.shapeworld.strict import strict_prompts
from tempact.shapeworld.verifier import picture_quality, verify, verify_opening, verify_steps
from tempact.types import Plan, Prompt

HARD_SHARE = 0.5  # of training prompts


class ShapeWorldPrompts:
    """Training prompts drawn from the grammar's training split."""

    def draw(self, count: int, seed: int) -> list[Prompt]:
        rng = random.Random(seed)
        return [_prompt(rng, "train", "hard" if rng.random() < HARD_SHARE else "simple", i) for i in range(count)]


def held_out_prompts(category: str, count: int, seed: int, split: str = "test") -> list[Prompt]:
    """`count` instructions of one category of a held-out split, the same for the same seed.

    category: "simple" (1-2 events), "hard" (3-4), or one of STRICT_SETS.
    """
    if category in STRICT_SETS:
        return strict_prompts(category, count, seed, split)
    rng = random.Random(f"{seed}/{category}")
    return [_prompt(rng, split, category, i) for i in range(count)]


def _prompt(rng: random.Random, split: str, category: str, number: int) -> Prompt:
    text = write_instruction(sample_story(rng, split, None, category=category), rng)
    return Prompt(f"{split}-{category}-{number}", text, category)


# the reward is picture quality to this power: its spread within a group is then near that of step following, so that
# its weight of 0.4 has a say; left at 1, training buys step following with quality
AESTHETICS_POWER = 4
VECTORS = 64  # numbers of whole CPU vectors; powers of what is left over may differ in the last bit


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


class TemporalFollowing:
    """The reward V, and how often events of each kind have happened as told in the videos that it has scored."""

    def __init__(self) -> None:
        self._seen: list[tuple[list[Story], Tensor]] = []  # and which of their events, on the frames' device

    def __call__(self, prompts: list[str], plans: list[Plan], frames: Tensor, spans: list[Span | None]) -> Tensor:
        """V [P, N] in [0, 1]: the verifier on whole videos; it knows the instruction and nothing of the plan."""
        count = frames.shape[1]
        stories = [story for plan in plans for story in [parse_instruction(plan.instruction)] * count]
        pixels, standing = without_bystanders(frames.flatten(0, 1).float() / 255.0, stories)
        acting = [*map(actors_only, stories)]
        verdict = verify(pixels, acting)
        self._seen.append((acting, verdict.as_told))
        return with_bystander(verdict.score, standing).unflatten(0, (-1, count))

    def metrics(self) -> dict[str, float]:
        """events/KIND/count and the share events/KIND/success since the last call, of kinds that were told."""
        told: Counter[str] = Counter()
        done: Counter[str] = Counter()
        for stories, as_told in self._seen:
            for story, row in zip(stories, as_told.tolist(), strict=True):
                for event, good in zip(story.events, row, strict=False):  # rows are as long as the longest story
                    told[event.kind] += 1
                    done[event.kind] += good
        self._seen.clear()
        found: dict[str, float] = {}
        for kind in filter(told.get, KINDS):
            found |= {f"events/{kind}/count": float(told[kind]), f"events/{kind}/success": done[kind] / told[kind]}
        return found


def step_following(prompts: list[str], plans: list[Plan], frames: Tensor, spans: list[Span | None]) -> Tensor:
    """L [P, N] in [0, 1]: the verifier on the switched step; on a first one without events, which best-of-N and random
    chunks ask about, how intact the story's opening is in its frames. NaN where no step begins at the switch frame, and
    where the step's prompt cannot be read."""
    count = frames.shape[1]
    scores = torch.full(frames.shape[:2], float("nan"))
    rows: list[int] = []
    told: list[tuple[Story, tuple[int, int], list[Event]]] = []
    for p, (plan, span) in enumerate(zip(plans, spans, strict=True)):
        story = parse_instruction(plan.instruction)
        reading = read_step(span.step.prompt, actors_only(story).entities) if span is not None else None
        if span is None or reading is None:
            continue
        if span.step.start == 0 and not reading.events:
            own = frames[p, :, : span.last + 1].float() / 255.0
            opening, _ = without_bystanders(own, [story] * count)
            scores[p] = verify_opening(opening, [actors_only(story)] * count).cpu()
        else:
            rows.append(p)
            start = max(1, span.step.start)  # before a video's first frame there is no state to begin with
            told.append((story, (start, span.step.end), list(reading.events)))
    if rows:
        stories, windows, expected = zip(*(each for each in told for _ in range(count)), strict=True)
        videos, _ = without_bystanders(frames[rows].flatten(0, 1).float() / 255.0, stories)
        found = verify_steps(videos, [*map(actors_only, stories)], windows, expected)
        scores[rows] = found.unflatten(0, (-1, count)).cpu()
    return scores


def aesthetics(prompts: list[str], plans: list[Plan], frames: Tensor, spans: list[Span | None]) -> Tensor:
    """P [P, N] in [0, 1]: picture quality of the trained chunk, to the power of AESTHETICS_POWER."""
    # a plan of one step forks after its first chunk
    starts = (CHUNK if span is None else max(span.first, span.fork) for span in spans)
    chunks = torch.cat([videos[:, start : start + CHUNK] for videos, start in zip(frames, starts, strict=True)])
    quality = picture_quality(chunks.float() / 255.0)
    mean = quality.mean(1)
    whole = functional.pad(mean, (0, -len(mean) % VECTORS))
    return whole.pow(AESTHETICS_POWER)[: len(mean)].unflatten(0, frames.shape[:2])


def shapeworld_rewards() -> RewardSet:
    """All four; they run on the frames' device."""
    following = TemporalFollowing()
    return RewardSet(plan_quality, following, step_following, aesthetics, metrics=following.metrics)
