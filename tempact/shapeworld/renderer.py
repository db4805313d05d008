"""Exact drawing of ShapeWorld scenes, vectorised over any batch shape, without gradients.

A picture is described by numbers alone (`TRACK` values an entity), so that partly finished events, ground truth and
the verifier's own re-drawing of tracked shapes all use one function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tempact.shapeworld.story import COLOURS, COLUMN_X, RADII, ROW_Y, SIZE, Entity, Event, apply_event

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
