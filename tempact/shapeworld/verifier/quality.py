"""How clean the pictures are, whatever they tell, and whether shapes are there that should not be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tempact.shapeworld.renderer import TRACK, draw
from tempact.shapeworld.story import COLUMN_X, JUMP_HEIGHT, ROW_Y, SIZE, Story, states
from tempact.shapeworld.verifier.timeline import TOLERANCE, X, Y, opening
from tempact.shapeworld.verifier.tracking import track

FREE_ERROR = 0.015  # root mean square error that comes from tracking alone, not from the picture
ERROR_SCALE = 0.05  # beyond that, the error at which quality has fallen to 1/e
EXTRA_INK = 2.0  # pixels of ink away from the tracked shapes that make a copy; the smallest shape has about 8
VISIBLE = 0.5  # opacity
STILL = 0.25  # pixels a frame, slower shapes stand


@torch.no_grad()
def picture_quality(frames: Tensor) -> Tensor:
    """Closeness of each frame to a clean drawing of the shapes found in it, at most one a row.

    frames [V, F, 3, SIZE, SIZE] in [0, 1]. Returns [V, F] in (0, 1]: exp(-error / ERROR_SCALE) with the root mean
    square error of the re-drawing. An empty picture is clean.
    """
    frames = frames.float()
    tracked = track(frames)
    tracks = torch.ones(*tracked.x.shape, TRACK, device=frames.device)
    tracks[..., 0], tracks[..., 1], tracks[..., 2] = tracked.x, tracked.y, tracked.radius
    tracks[..., 4:] = tracked.ink
    again = draw(tracks.transpose(1, 2), tracked.shape.transpose(1, 2))
    error = (frames - again).square().mean((-3, -2, -1)).sqrt()
    return torch.exp(-(error - FREE_ERROR).clamp_min(0.0) / ERROR_SCALE)


@torch.no_grad()
def duplicates(frames: Tensor, stories: Sequence[Story]) -> Tensor:
    """Share of frames [V] with an extra or a misplaced shape.

    frames [V, F, 3, SIZE, SIZE] in [0, 1]. Extra: ink away from the shapes, or a shape in a row where the story
    has none. Misplaced: a visible shape off its row (jumps apart), or one that stands still where the story never
    puts it.
    """
    shapes = torch.tensor([opening(story.entities)[1] for story in stories], device=frames.device)
    columns = torch.tensor([_told_columns(story) for story in stories], device=frames.device)  # [V, R, columns]
    tracked = track(frames, shapes)
    visible = tracked.ink.amax(-1) >= VISIBLE
    row_y = torch.tensor(ROW_Y, device=frames.device)[:, None]
    off_row = (tracked.y > row_y + TOLERANCE[Y]) | (tracked.y < row_y - JUMP_HEIGHT - TOLERANCE[Y])
    off_column = (tracked.x[..., None] - columns[:, :, None]).abs().amin(-1) > TOLERANCE[X]
    step = tracked.x.diff(dim=-1).abs()
    fastest = torch.maximum(torch.cat([step[..., :1], step], -1), torch.cat([step, step[..., -1:]], -1))
    misplaced = (off_row | (off_column & (fastest < STILL)) | (shapes < 0)[..., None]) & visible
    return ((tracked.clutter > EXTRA_INK) | misplaced.any(1)).float().mean(1)


def _told_columns(story: Story) -> list[list[float]]:
    """For every row the x that its shape has at some time; as many numbers as there are columns, far away if unused."""
    told: list[set[float]] = [set() for _ in ROW_Y]
    for scene in states(story):
        for entity in scene:
            told[entity.row].add(COLUMN_X[entity.column])
    return [sorted(row) + [-float(SIZE)] * (len(COLUMN_X) - len(row)) for row in told]
