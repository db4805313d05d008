"""Stories and their words: sampling, writing and reading back.

Writing and reading are exact inverses: `parse_instruction(write_instruction(story, rng)) == story`. An instruction
names everything that the verifier checks: shape, colour, row and column of each visible entity; kind, target and pace
of every event; the order of events.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from tempact.errors import UserError
from tempact.shapeworld.story import (
    CHUNK,
    CHUNKS,
    COLOURS,
    COLUMNS,
    FRAMES,
    KINDS,
    ROWS,
    SHAPES,
    Entity,
    Event,
    Story,
    apply_event,
    states,
)
from tempact.types import Plan, Step

SPLITS = ("train", "validation", "test")
MAX_EVENTS = 4
SLOW_SHARE = 0.35  # of the events that can be slow
TWO_ENTITIES_SHARE = 0.8
HIDDEN_SHARE = 0.3  # of stories, one entity appears later

# kind -> ways to say it after the entity and "slowly"; {} is the argument, the first is canonical
PHRASES: dict[str, tuple[str, ...]] = {
    "move": ("moves to the {}", "goes to the {}"),
    "turn": ("turns {}", "becomes {}"),
    "grow": ("grows", "gets bigger"),
    "shrink": ("shrinks", "gets smaller"),
    "vanish": ("vanishes", "disappears"),
    "appear": ("appears at the {}", "shows up at the {}"),
    "jump": ("jumps", "hops"),
    "blink": ("blinks", "flashes"),
}
FIRST, MIDDLE, LAST = ("First, ", "At first, ", ""), ("Then ", "Next, ", "After that, "), ("Finally, ", "In the end, ")
EMPTY = "The scene is empty"
EXAMPLE = "A red circle is at the top left. First, the circle slowly moves to the right. Then the circle turns blue."

_THING = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_PLACE = rf"({'|'.join(ROWS)}) ({'|'.join(COLUMNS)})"
_SCENE = re.compile(rf"(?:there is )?a {_THING}(?: is)? at the {_PLACE}")
_CONNECTIVE = re.compile(
    r"\s*(?:[.,;:]|^)\s*(?:and )?(?:(?:at first|first|then|next|after that|finally|in the end),?\s+)|\s*\.\s*",
    re.IGNORECASE,
)
_ENTITY = rf"(?:(?:the|a) (?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)}))"
_ARGUMENTS = {"move": rf"({'|'.join(COLUMNS)})", "turn": rf"({'|'.join(COLOURS)})", "appear": _PLACE}
_EVENTS = [
    (kind, re.compile(rf"{_ENTITY}( slowly)? {phrase.format(_ARGUMENTS.get(kind, ''))}"))
    for kind, phrases in PHRASES.items()
    for phrase in phrases
]


def event_sequence(story: Story) -> str:
    """The events in order, without the scene, as text: the key that keeps the splits apart."""
    return " ".join(
        f"{event.kind}{'~' if event.slow else ''}:{story.entities[event.entity].shape}:{event.argument}"
        for event in story.events
    )


def split_of(story: Story) -> str:
    """A story's split by a hash of its event sequence: 80% train, 10% validation, 10% test."""
    bucket = hashlib.blake2b(event_sequence(story).encode(), digest_size=2).digest()[0] % 10
    return SPLITS[max(0, bucket - 7)]


def sample_story(rng: random.Random, split: str, events: int | None = None, *, category: str | None = None) -> Story:
    """A story of a split with `events` events, or a number drawn for the category (simple 1-2, hard 3-4)."""
    assert split in SPLITS
    while True:
        count = events or rng.choices((1, 2, 3, 4), (0.3, 0.7, 0, 0) if category == "simple" else (0, 0, 0.6, 0.4))[0]
        story = _try_story(rng, count)
        if story is not None and split_of(story) == split:
            return story


def _try_story(rng: random.Random, count: int) -> Story | None:
    entities = sample_scene(rng)
    hidden = rng.random() < HIDDEN_SHARE
    if hidden:
        entities = (*entities[:-1], replace(entities[-1], visible=False))
    scene = list(entities)
    events: list[Event] = []
    sized: set[int] = set()
    unseen = {len(entities) - 1} if hidden else set()
    for _ in range(count):
        choices = []
        for i, entity in enumerate(scene):
            if i in unseen:
                choices.append((i, "appear"))
            elif entity.visible:
                last = events[-1] if events else None
                for kind in KINDS:
                    again = last is not None and (last.kind, last.entity) == (kind, i)
                    if kind == "appear" or again or (kind in ("grow", "shrink") and i in sized):
                        continue
                    choices.append((i, kind))
        if not choices:
            return None
        i, kind = rng.choice(choices)
        event = Event(kind, i, _argument(rng, kind, i, scene), KINDS[kind] and rng.random() < SLOW_SHARE)
        unseen.discard(i)
        if kind in ("grow", "shrink"):
            sized.add(i)
        scene[i] = apply_event(scene[i], event)
        events.append(event)
    story = Story(entities, tuple(events))
    return None if unseen or story.chunks_needed > CHUNKS else story


def sample_scene(rng: random.Random) -> tuple[Entity, ...]:
    """One or two entities of different shapes, colours and rows, all visible and of normal size."""
    count = 2 if rng.random() < TWO_ENTITIES_SHARE else 1
    shapes, colours = rng.sample(SHAPES, count), rng.sample(sorted(COLOURS), count)
    rows = rng.sample(range(len(ROWS)), count)
    return tuple(
        Entity(shape, colour, row, rng.randrange(len(COLUMNS)))
        for shape, colour, row in zip(shapes, colours, rows, strict=True)
    )


def _argument(rng: random.Random, kind: str, i: int, scene: Sequence[Entity]) -> str:
    if kind == "move":
        return rng.choice([column for n, column in enumerate(COLUMNS) if n != scene[i].column])
    if kind == "turn":
        return rng.choice([colour for colour in COLOURS if all(colour != entity.colour for entity in scene)])
    return ""


def place(entity: Entity) -> str:
    """Row and column in words."""
    return f"{ROWS[entity.row]} {COLUMNS[entity.column]}"


def describe_scene(entities: Sequence[Entity], rng: random.Random | None = None) -> str:
    """The opening scene as a sentence: visible entities and their places. Canonical without `rng`."""
    things = [f"a {e.colour} {e.shape} is at the {place(e)}" for e in entities if e.visible]
    if not things:
        return f"{EMPTY}."
    text = " and ".join(things)
    if rng is not None and rng.random() < 0.5:
        text = f"there is {text.replace(' is at', ' at')}"
    return _sentence(text)


def describe_event(entities: Sequence[Entity], event: Event, rng: random.Random | None = None) -> str:
    """A step prompt that stands alone, from the scene before the event. Canonical without `rng`."""
    return _sentence(_event_words(entities, event, rng, named=True))


def describe_story(story: Story, rng: random.Random | None = None) -> list[str]:
    """The step prompts of a story: its opening scene, then each of its events. Canonical without `rng`."""
    scenes = zip(states(story), story.events, strict=False)
    return [describe_scene(story.entities, rng), *(describe_event(scene, event, rng) for scene, event in scenes)]


def _event_words(entities: Sequence[Entity], event: Event, rng: random.Random | None, named: bool) -> str:
    entity = entities[event.entity]
    phrase = PHRASES[event.kind][0] if rng is None else rng.choice(PHRASES[event.kind])
    words = phrase.format(place(entity) if event.kind == "appear" else event.argument)
    article = "a" if event.kind == "appear" else "the"
    thing = f"{entity.colour} {entity.shape}" if named or event.kind == "appear" else entity.shape
    return f"{article} {thing}{' slowly' if event.slow else ''} {words}"


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def write_instruction(story: Story, rng: random.Random) -> str:
    """A story in varied words, as one sentence or several."""
    scenes = states(story)
    words = [
        _event_words(scene, event, rng, named=rng.random() < 0.5)
        for scene, event in zip(scenes, story.events, strict=False)
    ]
    opening = describe_scene(story.entities, rng)
    last = len(words) - 1
    if rng.random() < 0.35:
        links = [", then ", ", and then ", ", after that "]
        text = "".join((", and finally " if i == last and i else rng.choice(links)) + w for i, w in enumerate(words))
        return f"{opening[:-1]}{text}."
    lines = [opening]
    for i, w in enumerate(words):
        lead = rng.choice(FIRST if i == 0 else LAST if i == last else MIDDLE)
        lines.append(f"{lead}{w}." if lead else _sentence(w))
    return " ".join(lines)


def parse_instruction(text: str) -> Story:
    """The story of an instruction. Raises UserError naming words that are not understood or cannot be true."""
    pieces = _pieces(text)
    scene = _parse_scene(pieces[0]) if pieces else None
    if scene is None:
        raise _not_understood(pieces[0] if pieces else text)
    entities, events = list(scene), []
    for piece in pieces[1:]:
        found = _parse_event(piece, scene)
        if found is None:
            raise _not_understood(piece)
        event, colour, scene = found
        entities += scene[len(entities) :]
        actor = scene[event.entity]
        if colour not in (None, actor.colour) or not _possible(actor, event):
            raise UserError(f"instruction: not possible by then: {piece!r}; accepted for example: {EXAMPLE}")
        scene[event.entity] = apply_event(actor, event)
        events.append(event)
    if not events:
        raise UserError(f"instruction: no event found in {text!r}; accepted for example: {EXAMPLE}")
    story = Story(tuple(entities), tuple(events))
    if len(events) > MAX_EVENTS or story.chunks_needed > CHUNKS:
        raise UserError(
            f"instruction: {len(events)} events need {story.chunks_needed} chunks; "
            f"accepted: at most {MAX_EVENTS} events in {CHUNKS} chunks"
        )
    return story


@dataclass(frozen=True)
class StepReading:
    """Content of a step prompt: entities that it says are there, events, and the colour in each event's words (None
    where it names none)."""

    scene: tuple[Entity, ...]
    events: tuple[Event, ...]
    colours: tuple[str | None, ...]


def read_step(text: str, entities: Sequence[Entity]) -> StepReading | None:
    """Reads a step prompt about a story's entities, which events name by shape; None if not understood."""
    pieces = _pieces(text)
    scene: list[Entity] = []
    told: list[tuple[Event, str | None]] = []
    for piece in pieces:
        things = _parse_scene(piece)
        if things is not None:
            scene += things
            continue
        for part in piece.split(" and "):
            found = _parse_event(part.strip(), list(entities))
            if found is None or len(found[2]) > len(entities):
                return None
            told.append(found[:2])
    events, colours = zip(*told, strict=True) if told else ((), ())
    return StepReading(tuple(scene), events, colours) if pieces else None


def reference_plan(instruction: str) -> Plan:
    """The plan that gives the opening one chunk and each event its nominal frames; slack goes to the last step."""
    story = parse_instruction(instruction)
    bounds = [0, *accumulate((event.frames for event in story.events[:-1]), initial=CHUNK), FRAMES]
    steps = zip(bounds, bounds[1:], describe_story(story), strict=False)
    return Plan(instruction, tuple(Step(*each) for each in steps))


def _pieces(text: str) -> list[str]:
    return [piece.strip(" ,").lower() for piece in _CONNECTIVE.split(text.strip()) if piece and piece.strip(" ,")]


def _parse_scene(piece: str) -> list[Entity] | None:
    if piece == EMPTY.lower():
        return []
    entities = []
    for part in piece.split(" and "):
        match = _SCENE.fullmatch(part.strip())
        if match is None:
            return None
        colour, shape, row, column = match.groups()
        entities.append(Entity(shape, colour, ROWS.index(row), COLUMNS.index(column)))
    shapes, rows = {e.shape for e in entities}, {e.row for e in entities}
    return entities if len(shapes) == len(rows) == len(entities) else None


def _possible(actor: Entity, event: Event) -> bool:
    """True where the event can happen to an entity in this state and shows."""
    pulse = event.kind in ("jump", "blink")
    return actor.visible != (event.kind == "appear") and (pulse or apply_event(actor, event) != actor)


def _parse_event(piece: str, entities: list[Entity]) -> tuple[Event, str | None, list[Entity]] | None:
    """The event, the colour in its words, and the entities then known (an appearing one is added, not yet visible)."""
    for kind, pattern in _EVENTS:
        match = pattern.fullmatch(piece)
        if match is None:
            continue
        colour, shape, slow, *argument = match.groups()
        if slow and not KINDS[kind]:
            return None
        index = next((i for i, entity in enumerate(entities) if entity.shape == shape), None)
        if kind == "appear" and index is None and colour:
            row, column = argument
            if any(entity.row == ROWS.index(row) for entity in entities):
                return None  # a row holds one entity
            new = Entity(shape, colour, ROWS.index(row), COLUMNS.index(column), visible=False)
            index, entities, argument = len(entities), [*entities, new], []
        if index is None or (argument and kind == "appear" and " ".join(argument) != place(entities[index])):
            return None
        return Event(kind, index, "" if kind == "appear" else "".join(argument), bool(slow)), colour, entities
    return None


def _not_understood(words: str) -> UserError:
    return UserError(f"instruction: not understood: {words!r}; accepted for example: {EXAMPLE}")
