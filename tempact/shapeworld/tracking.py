"""Finding shapes in decoded frames by analysis by synthesis.

A scene has at most one shape a row, so each frame is cut into its two row bands. In a band the brightest
blob is located, a window around its centroid is compared with a bank of drawings (four shapes, radii and
sub-pixel offsets; one matrix product for all frames of all videos), and the best one is refined by
parabolas. Whatever the two drawings leave over is measured too: `clutter` is ink away from both shapes
(copies, smears, tints), `residual` is the error of the whole re-drawing.

Colour and opacity cannot be told apart on a black background, so `ink` is their product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tempact.shapeworld.renderer import coverage
from tempact.shapeworld.story import ROW_Y, ROWS, SHAPES, SIZE

ANY_SHAPE = -1
BAND_EDGE = 11  # first pixel line of the bottom band: shapes that jump in the bottom row stay below it
HALF = 6  # half a window, in pixels, without its middle one
SIDE = 2 * HALF + 1
STEP = 0.25  # pixels between drawings of the bank, in offset and radius
OFFSETS = tuple(STEP * i for i in range(-3, 4))
RADIUS_MIN, RADIUS_COUNT = 1.25, 15
BLOB_SIGMA = 2.0  # pixels, the blur under which the brightest blob is looked for
CLUTTER_FLOOR = 0.08  # 3x3 mean ink that noise may reach without counting
VIDEOS_A_PASS = 128  # bounds memory: about 60 MB of scores for 128 videos on the way


@dataclass
class Tracked:
    """What is in the frames, by row. V videos, R = 2 rows, F frames.

    x, y, radius  [V, R, F] pixels, meaningless where nothing is drawn
    ink           [V, R, F, 3] colour times opacity
    fit           [V, R, F] share of the window's energy that the drawing of the asked shape explains
    shape_margin  [V, R, F] how much more the asked shape explains than the best other one, negative for a wrong shape
    clutter       [V, F] ink (in full pixels) away from the tracked shapes
    residual      [V, F] root mean square error of the re-drawing
    """

    x: Tensor
    y: Tensor
    radius: Tensor
    ink: Tensor
    fit: Tensor
    shape_margin: Tensor
    clutter: Tensor
    residual: Tensor


@dataclass(frozen=True)
class _Bank:
    """drawings [SIDE*SIDE, S*R*O*O] of unit norm, centre [S, R, 2]: x, y of the shape relative to its centroid."""

    drawings: Tensor
    centre: Tensor


def _offset_centroid(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Centroid (x, y) of squared values, relative to the middle of the last two dimensions."""
    weight = picture.square()
    height, width = picture.shape[-2:]
    x = torch.arange(width, device=picture.device, dtype=picture.dtype) - (width - 1) / 2
    y = torch.arange(height, device=picture.device, dtype=picture.dtype) - (height - 1) / 2
    total = weight.sum((-2, -1)).clamp_min(1e-6)
    return (weight.sum(-2) * x).sum(-1) / total, (weight.sum(-1) * y).sum(-1) / total


@cache
def _bank(device: torch.device) -> _Bank:
    """Drawings whose centroids lie OFFSETS away from the window's middle."""
    shape = torch.arange(len(SHAPES)).view(-1, 1, 1, 1, 1)
    radius = (RADIUS_MIN + STEP * torch.arange(RADIUS_COUNT)).view(1, -1, 1, 1, 1)
    dy = torch.tensor(OFFSETS).view(1, 1, -1, 1, 1)
    dx = torch.tensor(OFFSETS).view(1, 1, 1, -1, 1)
    size = torch.broadcast_shapes(shape.shape, radius.shape, dy.shape, dx.shape)
    shape = shape.expand(size)

    def render(x: Tensor, y: Tensor) -> Tensor:
        track = torch.zeros(*size, 7)
        track[..., 0], track[..., 1], track[..., 2], track[..., 3] = x, y, radius, 1.0
        return coverage(track, shape)[..., 0, :SIDE, :SIDE]

    middle = torch.full(size, SIDE / 2)
    off_x, off_y = _offset_centroid(render(middle, middle))
    centre = torch.stack([-off_x, -off_y], -1)  # the same for all offsets
    drawings = render(middle + dx - off_x.unsqueeze(-1), middle + dy - off_y.unsqueeze(-1))
    drawings = drawings.flatten(-2).flatten(0, -2)
    drawings = drawings / drawings.norm(dim=-1, keepdim=True)
    return _Bank(drawings.T.contiguous().to(device), centre[:, :, 0, 0].to(device))


@cache
def _blur(device: torch.device) -> Tensor:
    grid = torch.arange(SIZE, dtype=torch.float32)
    kernel = torch.exp(-0.5 * ((grid[:, None] - grid) / BLOB_SIGMA).square())
    return kernel.to(device)
