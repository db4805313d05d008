"""Finding shapes in decoded frames by analysis through synthesis.

A scene has at most one shape a row, so each frame is cut into its two row bands. In a band the brightest blob is
located, and a window around its centroid is compared with a bank of drawings (four shapes, radii, sub-pixel offsets,
sharp and soft; one matrix product for all frames of all videos). Parabolas refine the best drawing. Ink away from both
shapes (copies, smears, tints) is `clutter`.

On a black background colour and opacity cannot be told apart, so `ink` is their product.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tempact.shapeworld.story import OPACITY, RADIUS, ROWS, SHAPES, SIZE, TRACK, X, Y, coverage

ANY_SHAPE = -1
BAND_EDGE = 11  # first pixel line of the bottom band: shapes that jump in the bottom row stay below it
HALF = 6  # half a window, in pixels, without its middle one
SIDE = 2 * HALF + 1
STEP = 0.25  # pixels between drawings of the bank, in offset and radius
OFFSETS = tuple(STEP * i for i in range(-2, 3))
RADIUS_MIN, RADIUS_COUNT = 1.5, 13
BLURS = (0.0, 0.6)  # generated pictures differ in sharpness; shares of a blurred copy in the drawings
BLOB_SIGMA = 2.0  # pixels, the blur under which the brightest blob is looked for
CLUTTER_FLOOR = 0.08  # 3x3 mean ink that noise may reach without counting
VIDEOS_A_PASS = 32  # bounds memory: 16 MB of scores a pass


class Tracked(NamedTuple):
    """Shapes found in the frames, by row. V videos, R = 2 rows, F frames.

    x, y, radius  [V, R, F] pixels, meaningless where nothing is drawn
    ink           [V, R, F, 3] colour times opacity
    fit           [V, R, F] share of the blurred window's energy that the drawing of the asked shape explains
    shape_margin  [V, R, F] how much more the asked shape explains than the best other one, negative for a wrong shape
    shape         [V, R, F] int64, the asked shape, or the best one under ANY_SHAPE
    clutter       [V, F] ink (in full pixels) away from the tracked shapes
    """

    x: Tensor
    y: Tensor
    radius: Tensor
    ink: Tensor
    fit: Tensor
    shape_margin: Tensor
    shape: Tensor
    clutter: Tensor


class _Bank(NamedTuple):
    """Drawings D = S*B*R*O*O (shape, blur, radius, offset y, offset x).

    drawings [D, SIDE*SIDE] of unit norm, norm [D] before that, covered [D, SIDE*SIDE] 1 on the shape and one pixel
    around, centre [S, R, 2]: x, y of the shape relative to its centroid.
    """

    drawings: Tensor
    norm: Tensor
    covered: Tensor
    centre: Tensor


def _offset_centroid(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Centroid (x, y) of squared values, relative to the middle of the last two dimensions."""
    weight = picture.square()
    reach = torch.arange(weight.shape[-1], device=picture.device, dtype=picture.dtype) - (weight.shape[-1] - 1) / 2
    total = weight.sum((-2, -1)).clamp_min(1e-6)
    return (weight.sum(-2) * reach).sum(-1) / total, (weight.sum(-1) * reach).sum(-1) / total


def _soften(windows: Tensor, share: float) -> Tensor:
    """Mixes [..., SIDE, SIDE] with a blurred copy."""
    index = torch.arange(SIDE, device=windows.device)
    kernel = (0.5 - 0.25 * (index[:, None] - index).abs()).clamp_min(0.0)
    return (1.0 - share) * windows + share * (kernel @ windows @ kernel)


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
        track = torch.zeros(*size, TRACK)
        track[..., X], track[..., Y], track[..., RADIUS], track[..., OPACITY] = x, y, radius, 1.0
        return coverage(track, shape)[..., 0, :SIDE, :SIDE]

    middle = torch.full(size, SIDE / 2)
    off_x, off_y = _offset_centroid(render(middle, middle))
    centre = torch.stack([-off_x, -off_y], -1)[:, :, 0, 0]  # the same for all offsets
    sharp = render(middle + dx - off_x.unsqueeze(-1), middle + dy - off_y.unsqueeze(-1)).flatten(0, 3)
    covered = F.max_pool2d((sharp > 0.02).float(), 3, stride=1, padding=1).unflatten(0, (len(SHAPES), 1, -1))
    covered = covered.expand(-1, len(BLURS), -1, -1, -1).flatten(0, 2)
    drawings = torch.stack([_soften(sharp, blur).unflatten(0, (len(SHAPES), -1)) for blur in BLURS], 1)
    drawings = drawings.flatten(0, 2).flatten(1)
    norm = drawings.norm(dim=-1)
    tensors = (drawings / norm[:, None], norm, covered.flatten(1), centre)
    return _Bank(*(tensor.to(device) for tensor in tensors))


@cache
def _blur(device: torch.device) -> Tensor:
    grid = torch.arange(SIZE, dtype=torch.float32)
    return torch.exp(-0.5 * ((grid[:, None] - grid) / BLOB_SIGMA).square()).to(device)


@cache
def _lines(device: torch.device) -> Tensor:
    """[R, SIZE + 2 * HALF] 1 for the lines of a padded picture in the row's band."""
    line = torch.arange(SIZE + 2 * HALF, device=device) - HALF
    return torch.stack([(line >= 0) & (line < BAND_EDGE), (line >= BAND_EDGE) & (line < SIZE)]).float()


def _spots(x: Tensor, y: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Window around pixels x, y [N, R]: its places in a flattened padded picture, and 1 for those in the row's band.

    Both [N, R, side * side].
    """
    reach = torch.arange(-half, half + 1, device=x.device) + HALF
    lines = y[..., None] + reach
    inside = _lines(x.device)[torch.arange(len(ROWS), device=x.device)[:, None], lines]
    spots = lines[..., None] * (SIZE + 2 * HALF) + (x[..., None] + reach)[..., None, :]
    return spots.flatten(-2), inside.repeat_interleave(len(reach), -1)


def _locate(ink: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels x, y [N, R] of the centroid of the brightest blob of every band. ink [N, SIZE, SIZE]."""
    blur = _blur(ink.device)
    bands = ink.square()[:, None] * _lines(ink.device)[:, HALF : HALF + SIZE, None]
    peak = (blur @ bands @ blur).flatten(2).argmax(-1)
    x, y = peak % SIZE, peak // SIZE
    padded = F.pad(ink, (HALF, HALF, HALF, HALF)).flatten(1)
    for half in (5, 4):
        spots, inside = _spots(x, y, half)
        window = padded.gather(1, spots.flatten(1)).view(spots.shape) * inside
        off_x, off_y = _offset_centroid(window.unflatten(-1, (2 * half + 1, 2 * half + 1)))
        x = (x + off_x.round().long()).clamp(0, SIZE - 1)
        y = (y + off_y.round().long()).clamp(0, SIZE - 1)
    return x, y


def _track_pass(frames: Tensor, shapes: Tensor) -> Tracked:
    """frames [V, F, 3, SIZE, SIZE], shapes [V, R]. Below, n is a frame or a band of one."""
    videos, count = frames.shape[:2]
    rows, bank = len(ROWS), _bank(frames.device)
    flat = frames.flatten(0, 1)
    pixel_x, pixel_y = _locate(flat.amax(1))
    spots, inside = _spots(pixel_x, pixel_y, HALF)
    padded = F.pad(flat, (HALF, HALF, HALF, HALF)).flatten(2)
    everywhere = spots.flatten(1)[:, None].expand(-1, 3, -1)
    windows = padded.gather(2, everywhere).unflatten(2, (rows, SIDE, SIDE)).transpose(1, 2)
    windows = windows * inside.unflatten(2, (SIDE, SIDE))[:, :, None]
    windows = windows.flatten(3).flatten(0, 1)  # [n, 3, SIDE * SIDE]

    weight = windows.amax(1, keepdim=True).square()
    hue = (windows * weight).sum(-1)
    hue = hue / hue.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    grey = (hue[:, None] @ windows)[:, 0]
    scores = (grey @ bank.drawings.T).unflatten(1, (len(SHAPES), -1))  # [n, S, B*R*O*O]
    best, where = scores.max(-1)
    asked = shapes[:, None].expand(videos, count, rows).reshape(-1)
    own = torch.where(asked < 0, best.argmax(-1), asked)
    spot = where.gather(1, own[:, None])[:, 0]
    explained = best.clamp_min(0.0).square() / windows.square().sum((1, 2)).clamp_min(1e-6)[:, None]
    explained_by_own = explained.gather(1, own[:, None])[:, 0]
    explained_by_others = explained.scatter(1, own[:, None], -1.0).amax(-1)

    drawing = own * scores.shape[2] + spot
    unit = bank.drawings[drawing][:, None]
    amount = (windows * unit).sum(-1, keepdim=True)  # [n, 3, 1]
    # blurred, pixel noise hardly counts and a ghost beside the shape does
    rest = _soften((windows - amount * unit).unflatten(2, (SIDE, SIDE)), 1.0).square().sum((1, 2, 3))
    whole = _soften(windows.unflatten(2, (SIDE, SIDE)), 1.0).square().sum((1, 2, 3))
    radius_step, offset_y, offset_x = _refine(scores, own, spot)
    centre = bank.centre[own, spot // len(OFFSETS) ** 2 % RADIUS_COUNT]
    clear = bank.covered[drawing].view(-1, 1, rows * SIDE * SIDE) * inside.flatten(1)[:, None]
    outside = padded * (
        1.0 - torch.zeros_like(padded[:, :1]).scatter_reduce(2, spots.flatten(1)[:, None], clear, "amax")
    )
    outside = outside.unflatten(2, (SIZE + 2 * HALF, -1))[:, :, HALF:-HALF, HALF:-HALF]
    spread = F.avg_pool2d(outside, 3, stride=1, padding=1).amax(1)

    def by_row(values: Tensor) -> Tensor:
        return values.unflatten(0, (videos, count, rows)).transpose(1, 2)

    return Tracked(
        x=by_row(pixel_x.flatten() + 0.5 + offset_x + centre[:, 0]),
        y=by_row(pixel_y.flatten() + 0.5 + offset_y + centre[:, 1]),
        radius=by_row(RADIUS_MIN + STEP * radius_step),
        ink=by_row((amount[..., 0] / bank.norm[drawing][:, None]).clamp(0.0, 1.0)),
        fit=by_row(1.0 - rest / whole.clamp_min(1e-6)),
        shape_margin=by_row(explained_by_own - explained_by_others),
        shape=by_row(own),
        clutter=(spread - CLUTTER_FLOOR).clamp_min(0.0).sum((-2, -1)).view(videos, count),
    )


def _refine(scores: Tensor, own: Tensor, spot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Radius in steps, offsets y and x in pixels, between the drawings of the bank. scores [n, S, B*R*O*O].

    Each is at the top of the parabola through the scores of the best drawing and its two neighbours.
    """
    sides = len(OFFSETS)
    index = torch.arange(len(own), device=own.device)
    places = (spot // sides**2 % RADIUS_COUNT, spot // sides % sides, spot % sides)
    strides, counts = (sides**2, sides, 1), (RADIUS_COUNT, sides, sides)
    middle = scores[index, own, spot]
    fine = []
    for place, stride, count in zip(places, strides, counts, strict=True):
        inner = (place > 0) & (place < count - 1)
        left, right = (scores[index, own, spot + side * stride * inner] for side in (-1, 1))
        bend = (2 * middle - left - right).clamp_min(1e-9)
        fine.append(place + (0.5 * (right - left) / bend).clamp(-0.5, 0.5) * inner)
    return fine[0], OFFSETS[0] + STEP * fine[1], OFFSETS[0] + STEP * fine[2]


@torch.no_grad()
def track(frames: Tensor, shapes: Tensor | None = None) -> Tracked:
    """Tracks the shapes of videos, on the frames' device.

    frames [V, F, 3, SIZE, SIZE] in [0, 1]; shapes [V, R] index SHAPES, or ANY_SHAPE, which None means for all rows.
    """
    frames = frames.float().clamp(0.0, 1.0)
    if shapes is None:
        shapes = torch.full((len(frames), len(ROWS)), ANY_SHAPE)
    shapes = shapes.to(frames.device)
    passes = zip(frames.split(VIDEOS_A_PASS), shapes.split(VIDEOS_A_PASS), strict=True)
    return Tracked(*map(torch.cat, zip(*(_track_pass(*given) for given in passes), strict=True)))
