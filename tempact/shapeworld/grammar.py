"""Stories and their words: sampling, writing and reading back.

Writing and reading are exact inverses: `parse_instruction(write_instruction(story, rng)) == story`. An instruction
names everything that the verifier checks: shape, colour, row and column of each visible entity; kind, target and pace
of every event; the order of events.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from tempact.errors import UserError
from tempact.shapeworld.crowd import find_bystander
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
from tempact.shapeworld.wording import HELD_OUT, TRAINED, Wording, connective
from tempact.types import Plan, Step

SPLITS = ("train", "validation", "test")
MAX_EVENTS = 6  # of an instruction; training has up to 4
SLOW_SHARE = 0.35  # of the events that can be slow
TWO_ENTITIES_SHARE = 0.8
HIDDEN_SHARE = 0.3  # of stories, one entity appears later

EXAMPLE = "A red circle is at the top left. First, the circle slowly moves to the right. Then the circle turns blue."
READ = (TRAINED, HELD_OUT)  # the wordings that an instruction may have; plans are read in that of training alone


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


def describe_scene(entities: Sequence[Entity], rng: random.Random | None = None, wording: Wording = TRAINED) -> str:
    """The opening scene as a sentence: visible entities and their places. Canonical without `rng`."""
    visible = [entity for entity in entities if entity.visible]
    if not visible:
        return _sentence(wording.empty)
    whole, part = wording.scenes[rng is not None and rng.random() < 0.5]
    things = [part.format(thing=f"a {e.colour} {e.shape}", place=place(e)) for e in visible]
    return _sentence(whole.format(things=" and ".join(things)))


def describe_event(
    entities: Sequence[Entity], event: Event, rng: random.Random | None = None, wording: Wording = TRAINED
) -> str:
    """A step prompt that stands alone, from the scene before the event. Canonical without `rng`."""
    return _sentence(_event_words(entities, event, rng, True, wording))


def describe_story(story: Story, rng: random.Random | None = None, wording: Wording = TRAINED) -> list[str]:
    """The step prompts of a story: its opening scene, then each of its events. Canonical without `rng`."""
    scenes = zip(states(story), story.events, strict=False)
    events = (describe_event(scene, event, rng, wording) for scene, event in scenes)
    return [describe_scene(story.entities, rng, wording), *events]


def _event_words(
    entities: Sequence[Entity], event: Event, rng: random.Random | None, named: bool, wording: Wording
) -> str:
    entity = entities[event.entity]
    phrases = wording.phrases[event.kind]
    phrase = phrases[0] if rng is None else rng.choice(phrases)
    words = f" {phrase.format(event.argument or place(entity))}"
    article = "a" if event.kind == "appear" else "the"
    thing = f"{entity.colour} {entity.shape}" if named or event.kind == "appear" else entity.shape
    return f"{article} {thing}{wording.slow.format(phrase=words) if event.slow else words}"


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def write_instruction(story: Story, rng: random.Random, wording: Wording = TRAINED) -> str:
    """A story in varied words, as one sentence or several."""
    scenes = states(story)
    words = [
        _event_words(scene, event, rng, rng.random() < 0.5, wording)
        for scene, event in zip(scenes, story.events, strict=False)
    ]
    opening = describe_scene(story.entities, rng, wording)
    last = len(words) - 1
    if rng.random() < 0.35:
        text = "".join(
            (wording.final if i == last and i else rng.choice(wording.links)) + w for i, w in enumerate(words)
        )
        return f"{opening[:-1]}{text}."
    lines = [opening]
    for i, w in enumerate(words):
        lead = rng.choice(wording.first if i == 0 else wording.last if i == last else wording.middle)
        lines.append(f"{lead}{w}." if lead else _sentence(w))
    return " ".join(lines)


def parse_instruction(text: str, wordings: tuple[Wording, ...] = READ) -> Story:
    """The story of an instruction. Raises UserError naming words that are not understood or cannot be true."""
    pieces = _pieces(text, wordings)
    scene = _parse_scene(pieces[0], wordings, crowded=True) if pieces else None
    if scene is None:
        raise _not_understood(pieces[0] if pieces else text)
    entities, events = list(scene), []
    for piece in pieces[1:]:
        found = _parse_event(piece, scene, wordings)
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
    find_bystander(story)
    return story


@dataclass(frozen=True)
class StepReading:
    """Content of a step prompt: entities that it says are there, events, and the colour in each event's words (None
    where it names none)."""

    scene: tuple[Entity, ...]
    events: tuple[Event, ...]
    colours: tuple[str | None, ...]


def read_step(text: str, entities: Sequence[Entity], wordings: tuple[Wording, ...] = (TRAINED,)) -> StepReading | None:
    """Reads a step prompt about a story's entities, which events name by shape; None if not understood."""
    pieces = _pieces(text, wordings)
    scene: list[Entity] = []
    told: list[tuple[Event, str | None]] = []
    for piece in pieces:
        things = _parse_scene(piece, wordings, len(entities) > len(ROWS))
        if things is not None:
            scene += things
            continue
        for part in piece.split(" and "):
            found = _parse_event(part.strip(), list(entities), wordings)
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


def _pieces(text: str, wordings: tuple[Wording, ...]) -> list[str]:
    found = connective(wordings).split(text.strip())
    return [piece.strip(" ,").lower() for piece in found if piece and piece.strip(" ,")]


def _parse_scene(piece: str, wordings: tuple[Wording, ...], crowded: bool) -> list[Entity] | None:
    """The entities of an opening, of different shapes. crowded: one row may have two, at different places."""
    if piece in [wording.empty for wording in wordings]:
        return []
    entities = []
    for part in piece.split(" and "):
        matches = (wording.scene_pattern.fullmatch(part.strip()) for wording in wordings)
        match = next((each for each in matches if each), None)
        if match is None:
            return None
        row, column = ROWS.index(match["row"]), COLUMNS.index(match["column"])
        entities.append(Entity(match["form"], match["hue"], row, column))
    shapes, places = {e.shape for e in entities}, {(e.row, e.column) for e in entities}
    rows = {e.row for e in entities}
    apart = len(shapes) == len(places) == len(entities)
    return entities if apart and len(entities) - len(rows) <= crowded else None


def _possible(actor: Entity, event: Event) -> bool:
    """True where the event can happen to an entity in this state and shows."""
    pulse = event.kind in ("jump", "blink")
    return actor.visible != (event.kind == "appear") and (pulse or apply_event(actor, event) != actor)


def _parse_event(
    piece: str, entities: list[Entity], wordings: tuple[Wording, ...]
) -> tuple[Event, str | None, list[Entity]] | None:
    """The event, the colour in its words, and the entities then known (an appearing one is added, not yet visible)."""
    patterns = ((kind, each) for wording in wordings for kind, each in wording.event_patterns)
    kind, match = next(((kind, found) for kind, each in patterns if (found := each.fullmatch(piece))), ("", None))
    if match is None or (match["slow"] and not KINDS[kind]):
        return None
    told = match.groupdict()
    colour, shape, row, column = match["colour"], match["shape"], told.get("row"), told.get("column")
    index = next((i for i, entity in enumerate(entities) if entity.shape == shape), None)
    if kind == "appear" and index is None and colour and row and column:
        if any(entity.row == ROWS.index(row) for entity in entities):
            return None  # a row holds one entity
        index, new = len(entities), Entity(shape, colour, ROWS.index(row), COLUMNS.index(column), visible=False)
        entities = [*entities, new]
    if index is None or (row and f"{row} {column}" != place(entities[index])):
        return None
    return Event(kind, index, told.get("argument") or "", bool(match["slow"])), colour, entities


def _not_understood(words: str) -> UserError:
    return UserError(f"instruction: not understood: {words!r}; accepted for example: {EXAMPLE}")
