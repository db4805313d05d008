"""ShapeWorld as plain data: entities, events, stories and the states of a scene.

A scene has two rows, top and bottom, and three columns. A story has one or two entities, each in its own row and of its
own shape, so that "the circle" names one entity. Events happen one after another. Pixels are in `renderer.py`, words in
`grammar.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

FRAMES = 24
CHUNK = 3
CHUNKS = FRAMES // CHUNK
SIZE = 24  # pixels a side

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "purple": (1.0, 0.0, 1.0),
    "cyan": (0.0, 1.0, 1.0),
}
COLUMNS = ("left", "middle", "right")
ROWS = ("top", "bottom")
COLUMN_X = (4.0, 12.0, 20.0)  # pixel coordinates of the centres, pixel i covers [i, i+1)
ROW_Y = (7.0, 18.0)
RADII = {"small": 2.0, "normal": 3.0, "large": 4.0}
JUMP_HEIGHT = 3.0  # pixels upwards

# kind -> True if the grammar has it "slowly"
KINDS = {
    "move": True, "turn": True, "grow": True, "shrink": True, "vanish": True, "appear": True,
    "jump": False, "blink": False,
}  # fmt: skip
QUICK_FRAMES = CHUNK  # a quick event is over after one chunk
SLOW_FRAMES = 3 * CHUNK  # a slow one takes three


@dataclass(frozen=True)
class Entity:
    """A shape with its state. `row`, `column` index ROWS, COLUMNS; `visible` is False before it appears and after it
    vanishes."""

    shape: str
    colour: str
    row: int
    column: int
    size: str = "normal"
    visible: bool = True


@dataclass(frozen=True)
class Event:
    """A change of one entity. `entity` indexes Story.entities; `argument` is a move's column ("left", "middle",
    "right"), a turn's colour, and empty for the other kinds."""

    kind: str
    entity: int
    argument: str = ""
    slow: bool = False

    @property
    def frames(self) -> int:
        """Frames from start to completion of an event that nothing cuts short."""
        return SLOW_FRAMES if self.slow else QUICK_FRAMES


@dataclass(frozen=True)
class Story:
    """The opening scene and its events in order."""

    entities: tuple[Entity, ...]
    events: tuple[Event, ...]

    @property
    def chunks_needed(self) -> int:
        """Chunks of the opening (one) and of all events, without slack between them."""
        return 1 + sum(event.frames for event in self.events) // CHUNK


_SETTLED: dict[str, dict[str, Any]] = {
    "grow": {"size": "large"}, "shrink": {"size": "small"}, "vanish": {"visible": False}, "appear": {"visible": True},
}  # fmt: skip


def apply_event(entity: Entity, event: Event) -> Entity:
    """The settled state of `entity` after `event`; a jump or blink leaves it unchanged."""
    if event.kind == "move":
        return replace(entity, column=COLUMNS.index(event.argument))
    if event.kind == "turn":
        return replace(entity, colour=event.argument)
    return replace(entity, **_SETTLED.get(event.kind, {}))


def states(story: Story) -> list[tuple[Entity, ...]]:
    """Settled scenes: states(story)[i] is the scene after the first i events."""
    scenes = [story.entities]
    for event in story.events:
        scene = list(scenes[-1])
        scene[event.entity] = apply_event(scene[event.entity], event)
        scenes.append(tuple(scene))
    return scenes
