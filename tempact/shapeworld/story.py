"""ShapeWorld as plain data: entities, events, stories and the states of a scene.

A scene has two rows, top and bottom, and three columns. A story has one or two entities, each in its own row and of its
own shape, so that "the circle" names one entity. Events happen one after another. Pixels are in `renderer.py`, words in
`grammar.py`.

Exact drawing of ShapeWorld scenes, vectorised over any batch shape, without gradients.

A picture is described by numbers alone (`TRACK` values an entity), so that partly finished events, ground truth and
the verifier's own re-drawing of tracked shapes all use one function.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

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


# columns of a track: centre x, centre y (pixels), radius (pixels), opacity [0, 1], red, green, blue
X, Y, RADIUS, OPACITY, COLOUR = range(5)
TRACK = COLOUR + 3
# the first column that an event of a kind changes; a jump and a blink only for a while
COLUMN_OF = {
    "move": X, "turn": COLOUR, "grow": RADIUS, "shrink": RADIUS,
    "vanish": OPACITY, "appear": OPACITY, "jump": Y, "blink": OPACITY,
}  # fmt: skip
SQUARE_SIDE = 0.9  # half a square's side over its radius, so that shapes of one radius look alike in size
CROSS_ARM = 0.36  # half a cross arm's width over its radius
TRIANGLE_TOP = 1.1  # height of a triangle's tip above its centre over its radius


def entity_track(entity: Entity, event: Event | None = None) -> tuple[float, ...]:
    """Track values of a settled entity, after `event` where one is given."""
    entity = entity if event is None else apply_event(entity, event)
    red, green, blue = COLOURS[entity.colour]
    return (COLUMN_X[entity.column], ROW_Y[entity.row], RADII[entity.size], float(entity.visible), red, green, blue)


def _distance(shape: Tensor, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to the outline (negative inside) of the shape with index `shape`; y grows downwards."""
    ax, ay = dx.abs(), dy.abs()
    circle = torch.hypot(dx, dy) - radius
    square = torch.maximum(ax, ay) - SQUARE_SIDE * radius
    slope = (2.0 * ax - dy - TRIANGLE_TOP * radius) / 5.0**0.5
    triangle = torch.maximum(slope, dy - 0.9 * radius)
    arm = CROSS_ARM * radius
    cross = torch.minimum(torch.maximum(ax - radius, ay - arm), torch.maximum(ay - radius, ax - arm))
    return torch.where(shape == 0, circle, torch.where(shape == 1, square, torch.where(shape == 2, triangle, cross)))


def coverage(tracks: Tensor, shapes: Tensor) -> Tensor:
    """Opacity of every entity at every pixel.

    tracks [..., E, TRACK], shapes [..., E] indices into SHAPES. Returns [..., E, SIZE, SIZE] in [0, 1].
    """
    grid = torch.arange(SIZE, device=tracks.device, dtype=tracks.dtype) + 0.5
    x, y, radius, alpha = (tracks[..., i, None, None] for i in range(4))
    inside = (0.5 - _distance(shapes[..., None, None], grid - x, grid[:, None] - y, radius)).clamp(0.0, 1.0)
    return inside * alpha


def draw(tracks: Tensor, shapes: Tensor) -> Tensor:
    """Pictures of entities on black, later entities over earlier ones.

    tracks [..., E, TRACK], shapes [..., E]. Returns [..., 3, SIZE, SIZE] in [0, 1].
    """
    masks = coverage(tracks, shapes)
    picture = torch.zeros(*masks.shape[:-3], 3, SIZE, SIZE, device=tracks.device, dtype=tracks.dtype)
    for entity in range(tracks.shape[-2]):
        mask = masks[..., entity, None, :, :]
        colour = tracks[..., entity, COLOUR:, None, None]
        picture = picture * (1.0 - mask) + colour * mask
    return picture
