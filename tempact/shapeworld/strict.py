"""Stricter held-out instructions: wordings, lengths and scenes that no training instruction has.

paraphrase  1-4 events in the held-out wording (`wording.py`)
long        5-6 events in the words of training, which has up to 4
crowded     2-3 events in the words of training, with a third shape that is passed by another one (`crowd.py`)

No event sequence stands twice in a set, and the sequences of a split are in no other split.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from tempact.config import refuse
from tempact.errors import UserError
from tempact.shapeworld.crowd import actors_only, find_bystander
from tempact.shapeworld.grammar import (
    describe_event,
    describe_scene,
    event_sequence,
    parse_instruction,
    read_step,
    sample_story,
    write_instruction,
)
from tempact.shapeworld.story import COLOURS, COLUMNS, SHAPES, Entity, Story, apply_event, states
from tempact.shapeworld.wording import HELD_OUT, TRAINED
from tempact.types import Plan, Prompt

MIDDLE = COLUMNS.index("middle")  # the place of a bystander: what moves from one side to the other passes it
# number of events -> share of the stories that are drawn. Those whose sequence stands there are drawn anew, so that
# short ones, of which there are few, become fewer the larger a set is
PARAPHRASED = {1: 0.15, 2: 0.35, 3: 0.3, 4: 0.2}  # as in the simple and the hard set together
LONG = {5: 0.5, 6: 0.5}
TRIES = 1000  # stories drawn for an instruction before there is none of a new sequence
CROWDED = {2: 0.5, 3: 0.5}


def strict_prompts(category: str, count: int, seed: int, split: str) -> list[Prompt]:
    """`count` instructions of one of STRICT_SETS; the first ones are the same for any count. UserError for more than
    the split has sequences of."""
    rng = random.Random(f"{seed}/{category}")
    sample, wording = SETS[category]
    prompts: list[Prompt] = []
    told: set[str] = set()
    while len(prompts) < count:
        drawn = (sample(rng, split) for _ in range(TRIES))
        story = next((story for story in drawn if event_sequence(story) not in told), None)
        if story is None:
            refuse("evaluation.strict", count, f"at most {len(prompts)}, the sequences of {category} in {split}")
        told.add(event_sequence(story))
        text = write_instruction(story, rng, wording)
        prompts.append(Prompt(f"{split}-{category}-{len(prompts)}", text, category))
    return prompts


def _sampler(shares: dict[int, float]) -> Callable[[random.Random, str], Story]:
    def sample(rng: random.Random, split: str) -> Story:
        return sample_story(rng, split, rng.choices(list(shares), list(shares.values()))[0])

    return sample


def sample_crowded(rng: random.Random, split: str) -> Story:
    """A story with a bystander in the middle of a row, past which the row's other entity moves."""
    while True:
        story = sample_story(rng, split, rng.choices(list(CROWDED), list(CROWDED.values()))[0])
        passing = [i for i in range(len(story.entities)) if _passes(story, i)]
        if passing and len(story.entities) == 2:
            return _with_bystander(story, rng, rng.choice(passing))


def _passes(story: Story, actor: int) -> bool:
    """Moves past the middle, never stops there, keeps its colour, and is there from the beginning."""
    events = [event for event in story.events if event.entity == actor]
    columns = {scene[actor].column for scene in states(story)}
    moves, turns = (any(event.kind == kind for event in events) for kind in ("move", "turn"))
    return moves and not turns and MIDDLE not in columns and story.entities[actor].visible


def _with_bystander(story: Story, rng: random.Random, actor: int) -> Story:
    """The bystander is told after all that is there at first: told before them, it takes an actor's place in plans."""
    worn = {entity.colour for scene in states(story) for entity in scene}
    shape = rng.choice([shape for shape in SHAPES if all(shape != entity.shape for entity in story.entities)])
    colour = rng.choice([colour for colour in COLOURS if colour not in worn])
    place = sum(entity.visible for entity in story.entities)
    still = Entity(shape, colour, story.entities[actor].row, MIDDLE)
    events = tuple(replace(event, entity=event.entity + (event.entity >= place)) for event in story.events)
    return Story((*story.entities[:place], still, *story.entities[place:]), events)


SETS = {
    "paraphrase": (_sampler(PARAPHRASED), HELD_OUT),
    "long": (_sampler(LONG), TRAINED),
    "crowded": (sample_crowded, TRAINED),
}


def in_trained_words(instruction: str) -> str:
    """What the matcher is told: the instruction itself if its words are those of training and every row has one entity,
    else the story without its bystander in words of training, always the same ones."""
    story = parse_instruction(instruction)
    if find_bystander(story) is None and is_trained_wording(instruction):
        return instruction
    return write_instruction(actors_only(story), random.Random(instruction))


def is_trained_wording(instruction: str) -> bool:
    """True for an instruction that is understood without the held-out wording."""
    try:
        parse_instruction(instruction, (TRAINED,))
    except UserError:
        return False
    return True


def reword(plan: Plan) -> Plan:
    """The plan with each step prompt in the held-out wording, always the same one, its meaning unchanged.

    A prompt that the grammar cannot read stays as it is. Where the held-out wording names a place that the prompt does
    not, it is the entity's place by then, as the plan has told it.
    """
    now = list(parse_instruction(plan.instruction).entities)
    steps = []
    for number, step in enumerate(plan.steps):
        rng = random.Random(f"{plan.instruction}/{number}/{step.prompt}")
        reading = read_step(step.prompt, now)
        if reading is None:
            steps.append(step)
            continue
        for thing in reading.scene:
            now = [replace(thing, size=e.size) if e.shape == thing.shape else e for e in now]
        said = [describe_scene(reading.scene, rng, HELD_OUT)] if reading.scene or not reading.events else []
        events = []
        for event, colour in zip(reading.events, reading.colours, strict=True):
            actor = now[event.entity]
            as_told = [*now[: event.entity], replace(actor, colour=colour or actor.colour), *now[event.entity + 1 :]]
            events.append(describe_event(as_told, event, rng, HELD_OUT))
            now[event.entity] = apply_event(actor, event)
        if events:
            said.append(" and ".join([events[0][:-1], *(f"{e[0].lower()}{e[1:-1]}" for e in events[1:])]) + ".")
        steps.append(replace(step, prompt=" ".join(said)))
    return replace(plan, steps=tuple(steps))
