"""What can be told in ShapeWorld: entities, events, stories and the state of the world.

A scene has two rows, a top and a bottom one, and three columns. A story has one or two entities, each
in a row of its own and of a shape of its own, so "the circle" names one entity. Events happen one
after another. Everything here is plain data; pixels are in `renderer.py`, words in `grammar.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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

# kind -> can it be told "slowly"
KINDS = {
    "move": True,
    "turn": True,
    "grow": True,
    "shrink": True,
    "vanish": True,
    "appear": True,
    "jump": False,
    "blink": False,
}
QUICK_FRAMES = CHUNK  # a quick event is over after one chunk
SLOW_FRAMES = 3 * CHUNK  # a slow one takes three


@dataclass(frozen=True)
class Entity:
    """A shape with its state. `row`, `column` index ROWS, COLUMNS; `visible` is False before it
    appears and after it vanishes."""

    shape: str
    colour: str
    row: int
    column: int
    size: str = "normal"
    visible: bool = True


@dataclass(frozen=True)
class Event:
    """`entity` indexes Story.entities. `argument` is the column index of a move (as text "left",
    "middle", "right"), the colour of a turn, and empty for the other kinds."""

    kind: str
    entity: int
    argument: str = ""
    slow: bool = False

    @property
    def frames(self) -> int:
        """Frames the event takes when nothing cuts it short."""
        return SLOW_FRAMES if self.slow else QUICK_FRAMES


@dataclass(frozen=True)
class Story:
    """The opening scene and its events in order."""

    entities: tuple[Entity, ...]
    events: tuple[Event, ...]

    @property
    def chunks_needed(self) -> int:
        """Chunks that the opening (one) and all events take when told without slack."""
        return 1 + sum(event.frames for event in self.events) // CHUNK


def apply_event(entity: Entity, event: Event) -> Entity:
    """The settled state of `entity` after `event`; jump and blink leave it as it was."""
    if event.kind == "move":
        return replace(entity, column=COLUMNS.index(event.argument))
    if event.kind == "turn":
        return replace(entity, colour=event.argument)
    if event.kind == "grow":
        return replace(entity, size="large")
    if event.kind == "shrink":
        return replace(entity, size="small")
    if event.kind == "vanish":
        return replace(entity, visible=False)
    if event.kind == "appear":
        return replace(entity, visible=True)
    return entity


def states(story: Story) -> list[tuple[Entity, ...]]:
    """Settled scenes: states(story)[i] is the scene after the first i events."""
    scenes = [story.entities]
    for event in story.events:
        scene = list(scenes[-1])
        scene[event.entity] = apply_event(scene[event.entity], event)
        scenes.append(tuple(scene))
    return scenes
