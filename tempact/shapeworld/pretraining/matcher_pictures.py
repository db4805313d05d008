"""Pictures for the judge's training: faults that lower a score, and the slight ones of generated videos."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tempact.shapeworld.renderer import draw
from tempact.shapeworld.story import COLUMN_X, FRAMES, ROW_Y, SIZE

X, Y, RADIUS, ALPHA, RED = 0, 1, 2, 3, 4  # columns of a track


class Dice:
    """Random draws for V videos from one generator."""

    def __init__(self, videos: int, generator: torch.Generator):
        self.videos, self.generator, self.device = videos, generator, generator.device

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(self.videos, *shape, generator=self.generator, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.videos, *shape, generator=self.generator, device=self.device)

    def chance(self, probability: float, *shape: int) -> Tensor:
        return self.uniform(0, 1, *shape) < probability

    def integer(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, (self.videos, *shape), generator=self.generator, device=self.device)


@lru_cache
def constant(values: tuple, device: torch.device) -> Tensor:
    """`values` on the device, kept: copying them there at every step would make the device wait."""
    return torch.tensor(values, device=device)


def spoil_picture(dice: Dice, tracks: Tensor, shapes: Tensor, flawed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Adds a third entity: a copy that does not belong there, or nothing; moves an entity out of place in some.

    Returns tracks [V, F, 3, TRACK], shapes [V, 3] and which frames are wrong [V, F]."""
    device, videos = tracks.device, len(tracks)
    time, row = torch.arange(FRAMES, device=device), torch.arange(videos, device=device)
    begin = dice.integer(0, FRAMES - 4)[:, None]
    length = torch.where(dice.chance(0.5)[:, None], FRAMES, dice.integer(2, 12)[:, None])
    begin = torch.where(dice.chance(0.3)[:, None], 0, begin)
    window = (time >= begin) & (time < begin + length)
    how = torch.where(flawed & dice.chance(0.22), dice.integer(1, 3), 0)[:, None]
    source = dice.integer(0, 1)
    copy = tracks[row, :, source].clone()
    copy[..., X] = constant(COLUMN_X, device)[dice.integer(0, 2)][:, None]
    copy[..., Y] = constant(ROW_Y, device)[dice.integer(0, 1)][:, None]
    apart = ((copy[:, :, None, :2] - tracks[..., :2]).abs().amax(-1) > 6) | (tracks[..., ALPHA] < 0.5)
    shown = window & apart.all(-1) & ((how == 1) | (how == 2)) & (copy[..., ALPHA] > 0.5)
    copy[..., ALPHA] = shown * dice.uniform(0.5, 1, 1)
    offset = torch.where(dice.chance(0.5)[:, None], dice.uniform(4, 6, 1), dice.uniform(-6, -4, 1))
    away = (window & (how == 3))[..., None] & F.one_hot(source, 2).bool()[:, None]
    across = (dice.chance(0.5) | (tracks[:, 0, :, X] != COLUMN_X[1]).any(1))[:, None, None]
    tracks = tracks.clone()
    inward = torch.where(tracks[:, :1, :, Y] > SIZE / 2, -offset.abs()[..., None], offset.abs()[..., None])
    tracks[..., Y] += away * across * inward
    tracks[..., X] += away * ~across * offset[..., None]
    wrong = shown | (away & (tracks[..., ALPHA] > 0.5)).any(-1)
    shapes = torch.cat([shapes, shapes[row, source][:, None]], dim=1)
    return torch.cat([tracks, copy[:, :, None]], dim=2), shapes, wrong


def film(dice: Dice, tracks: Tensor, shapes: Tensor, flawed: Tensor) -> tuple[Tensor, Tensor]:
    """Draws the tracks with the slight faults of generated videos; returns frames and what heavy noise or blur leaves
    of the score [V]."""
    strength = torch.where(dice.chance(0.25), 0.0, dice.uniform(0, 1))[:, None, None]
    entities = tracks.shape[2]
    tracks = tracks.clone()
    tracks[..., :2] += strength[..., None] * (
        dice.uniform(-0.5, 0.5, 1, entities, 2) + 0.12 * dice.normal(FRAMES, entities, 2)
    )
    tracks[..., RADIUS] *= 1 + strength * dice.uniform(-0.1, 0.1, 1, entities)
    tracks[..., ALPHA] *= 1 - strength * dice.uniform(0, 0.15, 1, entities)
    drift = strength[..., None] * dice.uniform(0, 0.15, 1, entities, 1)
    tracks[..., RED:] = tracks[..., RED:] * (1 - drift) + drift * dice.uniform(0, 1, 1, entities, 3)
    flicker = dice.chance(0.15)[:, None, None] & (dice.integer(0, 79, FRAMES, entities) == 0)
    tracks[..., ALPHA] *= torch.where(flicker, dice.uniform(0.4, 0.9, 1, 1), 1.0)
    frames = draw(tracks, shapes[:, None].expand(-1, FRAMES, -1))
    trail = torch.where(dice.chance(0.2), dice.uniform(0, 0.25), 0.0)[:, None, None, None, None]
    frames = torch.cat([frames[:, :1], (1 - trail) * frames[:, 1:] + trail * frames[:, :-1]], dim=1)
    poor = torch.where(flawed & dice.chance(0.1), dice.integer(1, 2), 0)
    heavy = dice.uniform(0, 1)
    edge = torch.where(poor == 2, 0.33, strength[:, 0, 0] * dice.uniform(0, 0.25))[:, None, None, None, None]
    blurred = frames
    for axis in (-1, -2):
        blurred = (1 - 2 * edge) * blurred + edge * (blurred.roll(1, axis) + blurred.roll(-1, axis))
    smear = F.avg_pool2d(blurred.flatten(0, 1), 7, 1, 3).view_as(frames)
    mix = torch.where(poor == 2, 0.5 + 0.5 * heavy, 0.0)[:, None, None, None, None]
    frames = (1 - mix) * blurred + mix * smear
    level = torch.where(poor == 1, 0.15 + 0.35 * heavy, strength[:, 0, 0] * dice.uniform(0, 0.08))
    noise = torch.randn(frames.shape, generator=dice.generator, device=dice.device)
    frames = (frames + level[:, None, None, None, None] * noise).clamp(0, 1)
    return frames, 1 - (poor > 0) * (0.2 + 0.6 * heavy)
