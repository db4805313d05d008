"""A third shape in the scene: it stands still, and another one of its row passes in front of it.

No instruction of training has it. Of two shapes in a row one, the bystander, has no event; the other one moves past it
and in front of it. Both judges of a video see the picture without the bystander, which `without_bystanders` takes out
exactly, and the instruction without its words; whether it is there is `standing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tempact.errors import UserError
from tempact.shapeworld.story import (
    COLOURS,
    ROWS,
    SHAPES,
    Entity,
    Story,
    coverage,
    entity_track,
    states,
)

ACCEPTED = (
    "one shape a row, or a second one of another colour that stands still and is only passed by the first, which keeps "
    "its colour"
)
COVERED = 0.75  # share of the bystander behind another shape from which a frame says nothing about it
THERE, GONE = 0.9, 0.75  # shares of its ink, of what is due, at which it is seen well and not at all
TIDY, SMEARED = 0.15, 0.35  # the same of ink in its colour next to it
LASTING, PASSING = 0.85, 0.5  # shares of the frames in which it must be seen
MISSED = 0.5  # share of a video's score that is lost without the bystander


def find_bystander(story: Story) -> int | None:
    """Number of the entity that shares its row and has no event; None where every entity has a row of its own.

    UserError where both entities of a row have events or none has, and where the other one stops in front of the
    bystander, turns a colour or has the bystander's (its colour tells it from the bystander while it passes).
    """
    for row in range(len(ROWS)):
        own = [i for i, entity in enumerate(story.entities) if entity.row == row]
        still = [i for i in own if all(event.entity != i for event in story.events)]
        if len(own) < 2:
            continue
        actor = next((i for i in own if i not in still), None)
        turns = any(event.kind == "turn" and event.entity == actor for event in story.events)
        stops = actor is not None and any(
            scene[actor].column == story.entities[still[0]].column for scene in states(story) if still
        )
        alike = len({story.entities[i].colour for i in own}) < len(own)
        if len(own) > 2 or len(still) != 1 or turns or stops or alike:
            raise UserError(f"instruction: found {len(own)} shapes in the {ROWS[row]} row; accepted: {ACCEPTED}")
        return still[0]
    return None


def actors_only(story: Story) -> Story:
    """The story without its bystander."""
    one = find_bystander(story)
    if one is None:
        return story
    events = tuple(replace(event, entity=event.entity - (event.entity > one)) for event in story.events)
    return Story((*story.entities[:one], *story.entities[one + 1 :]), events)


def behind(tracks: Tensor, shapes: Tensor, stories: Sequence[Story]) -> tuple[Tensor, Tensor]:
    """Tracks and shapes for `story.draw` with the bystander first, so that all others are in front of it.

    tracks [V, F, E, TRACK] and shapes [V, E] of `actors_only`; without a bystander the first track is invisible.
    """
    still = tracks.new_zeros(len(tracks), *tracks.shape[1:2], 1, tracks.shape[-1])
    kinds = shapes.new_zeros(len(shapes), 1)
    for video, story in enumerate(stories):
        one = find_bystander(story)
        if one is not None:
            still[video] = tracks.new_tensor(entity_track(story.entities[one]))
            kinds[video] = SHAPES.index(story.entities[one].shape)
    return torch.cat([still, tracks], 2), torch.cat([kinds, shapes], 1)


@torch.no_grad()
def without_bystanders(frames: Tensor, stories: Sequence[Story]) -> tuple[Tensor, Tensor]:
    """Videos [V, F, 3, SIZE, SIZE] in [0, 1] without the ink that bystanders may have, and `standing` [V] in [0, 1].

    In every pixel the ink is divided into that of the bystander and that of the shape in front of it, whose two colours
    are known. What is taken out is at most the exact drawing of the bystander at its place: a copy, a smear or another
    colour stays in the picture. `standing` is the share of frames in which the bystander is seen, as far as it is not
    covered, from nothing at PASSING to all at LASTING; 1 for a story without one, whose frames are left as they are.
    """
    frames, standing = frames.clone(), torch.ones(len(frames), device=frames.device)
    for video, story in enumerate(stories):
        one = find_bystander(story)
        if one is not None:
            still = story.entities[one]
            front = next(entity for i, entity in enumerate(story.entities) if entity.row == still.row and i != one)
            frames[video], seen = _divide(frames[video].float(), still, front)
            standing[video] = ((seen - PASSING) / (LASTING - PASSING)).clamp(0.0, 1.0)
    return frames, standing


def _divide(frames: Tensor, still: Entity, front: Entity) -> tuple[Tensor, Tensor]:
    """One video [F, 3, SIZE, SIZE] without the bystander, and the share of its frames in which it is seen."""
    device = frames.device
    shape = torch.tensor([SHAPES.index(still.shape)], device=device)
    drawn = coverage(torch.tensor([entity_track(still)], device=device), shape)[0]  # [SIZE, SIZE]
    a, b = (torch.tensor(COLOURS[entity.colour], device=device) for entity in (front, still))
    aa, bb, ab = a @ a, b @ b, a @ b
    pa, pb = (torch.einsum("fchw,c->fhw", frames, colour) for colour in (a, b))
    determinant = aa * bb - ab * ab  # two of the six colours are never multiples of each other
    covering, own = (bb * pa - ab * pb) / determinant, (aa * pb - ab * pa) / determinant
    own = torch.where(covering < 0.0, pb / bb, own).clamp_min(0.0)
    covering = torch.where(own > 0.0, covering, pa / aa).clamp(0.0, 1.0)
    taken = torch.minimum(own, drawn)
    around = torch.nn.functional.max_pool2d(drawn[None], 5, 1, 2)[0] > 0.0
    due = (drawn * (1.0 - covering)).sum((1, 2))
    share = torch.minimum(taken, drawn * (1.0 - covering)).sum((1, 2)) / due.clamp_min(1e-3)
    smear = ((own - taken) * around).sum((1, 2)) / drawn.sum()
    good = ((share - GONE) / (THERE - GONE)).clamp(0.0, 1.0)
    good = torch.minimum(good, ((SMEARED - smear) / (SMEARED - TIDY)).clamp(0.0, 1.0))
    judged = due > (1.0 - COVERED) * drawn.sum()
    rest = (frames - taken[:, None] * b[:, None, None]).clamp(0.0, 1.0)
    return rest, (good * judged).sum() / judged.sum().clamp_min(1)


def with_bystander(score: Tensor, standing: Tensor) -> Tensor:
    """The score [V] of a video whose actors have `score`: MISSED of it is lost where the bystander is not there."""
    return score * (1.0 - MISSED * (1.0 - standing))
