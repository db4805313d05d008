"""Stories performed in time: tracks for the renderer, and the captioned clips of the executor's pretraining.

`play` is the one function that moves entities. Pretraining clips, the judge's performances and ground truth differ
only in the acts that they give it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tempact.executor.rollout import smooth_prompts
from tempact.shapeworld.grammar import describe_story, sample_story, write_instruction
from tempact.shapeworld.story import (
    CHUNK,
    CHUNKS,
    COLOUR,
    COLUMN_OF,
    FRAMES,
    JUMP_HEIGHT,
    KINDS,
    OPACITY,
    SHAPES,
    TRACK,
    Entity,
    Event,
    Story,
    Y,
    entity_track,
)

ENTITIES = 2  # tracks of a clip, absent entities have opacity 0
WHOLE_SHARE = 0.35  # of pretraining clips, captioned as a whole
BLENDED_SHARE = 0.5  # of the whole-captioned clips of two events, timed against their order
LAGS, LAG_SHARES = (0, 1, 2), (0.45, 0.35, 0.20)  # chunks between a caption switch and the event's onset
NONE = len(KINDS)  # kind index where there is no event
JUMP, BLINK, APPEAR = (tuple(KINDS).index(kind) for kind in ("jump", "blink", "appear"))
VISIBLE_CHANGE = (2.0, 99.0, 0.5, 0.5, 0.4, 0.4, 0.4)  # least change of a track value that makes an event
_LASTING = {kind: first for kind, first in COLUMN_OF.items() if kind not in ("jump", "blink")}
_CHANGES = tuple(
    tuple(column == _LASTING.get(kind) or column > _LASTING.get(kind, TRACK) == COLOUR for column in range(TRACK))
    for kind in (*KINDS, "")
)


@lru_cache
def constant(values: tuple, device: torch.device) -> Tensor:
    """`values` on the device, kept there: a copy at every step would make the device wait."""
    return torch.tensor(values, device=device)


def changed_columns(kinds: Tensor) -> Tensor:
    """[..., TRACK] True at the track values that kinds [...] change for good."""
    return constant(_CHANGES, kinds.device)[kinds]


class Acts(NamedTuple):
    """Events as performed, A acts a video in the order of their starts.

    kinds, actors [V, A] indices; values [V, A, TRACK] settled track after the act; slow, plays [V, A] bool;
    duration, start [V, A] frames; limit [V, A] largest progress, below 1 for an act that is cut; place [V, A] number
    of the told event.
    """

    kinds: Tensor
    actors: Tensor
    values: Tensor
    slow: Tensor
    plays: Tensor
    duration: Tensor
    limit: Tensor
    start: Tensor
    place: Tensor


def play(opening: Tensor, acts: Acts, bend: Tensor | None = None, *, all_show: bool = False) -> tuple[Tensor, ...]:
    """Performs acts from an opening scene.

    Args:
        opening: [V, 2, TRACK].
        bend: [V] power of the progress, which without it is linear in time.
        all_show: performs also the acts that show nothing: those of hidden entities, and those without a change.

    Returns tracks [V, F, 2, TRACK], whether each act shows [V, A], and the kind going on [V, F, 2] (NONE: still).
    """
    videos, device = len(opening), opening.device
    time, row = torch.arange(FRAMES, device=device), torch.arange(videos, device=device)
    tracks = opening[:, None].expand(-1, FRAMES, -1, -1)
    lift, hidden = torch.zeros_like(tracks[..., 0]), torch.zeros_like(tracks[..., 0], dtype=torch.bool)
    busy = torch.full((videos, FRAMES, 2), NONE, device=device)
    changes, shows = changed_columns(acts.kinds), []
    least = constant(VISIBLE_CHANGE, device)
    for act in range(acts.kinds.shape[1]):
        kind, start = acts.kinds[:, act], acts.start[:, act]
        base = tracks[row, (start - 1).clamp(0, FRAMES - 1), acts.actors[:, act]]
        progress = ((time - start[:, None] + 1) / acts.duration[:, act, None]).clamp(0, 1)
        if bend is not None:
            progress = progress ** bend[:, None]
        progress = torch.minimum(progress, acts.limit[:, act, None])
        changed = (((acts.values[:, act] - base).abs() > least) & changes[:, act]).any(1)
        changed |= (kind == JUMP) | (kind == BLINK)
        visible = changed & ((base[:, OPACITY] > 0.5) | (kind == APPEAR))
        shows.append(acts.plays[:, act] & (visible | all_show))
        begun = (time >= start[:, None]) & shows[-1][:, None]
        own = begun[..., None] & F.one_hot(acts.actors[:, act], 2).bool()[:, None]  # [V, F, 2]
        moved = base[:, None] + progress[..., None] * (acts.values[:, act] - base)[:, None]
        tracks = torch.where(own[..., None] & changes[:, act, None, None], moved[:, :, None], tracks)
        unfinished = own & (progress < 1)[..., None]
        lift = lift + JUMP_HEIGHT * (unfinished & (kind == JUMP)[:, None, None])
        hidden = hidden | (unfinished & (kind == BLINK)[:, None, None])
        going = time < (start + acts.duration[:, act])[:, None]
        busy = torch.where(own & going[..., None], kind[:, None, None], busy)
    tracks = tracks.clone()
    tracks[..., Y] -= lift.clamp_max(JUMP_HEIGHT)
    tracks[..., OPACITY] *= ~hidden
    return tracks, torch.stack(shows, dim=1), busy


@dataclass(frozen=True)
class Cue:
    """An event, the frame it begins at, and the frame at which it stops, finished or not."""

    event: Event
    start: int
    stop: int = FRAMES


Scene = tuple[Sequence[Entity], Sequence[Cue]]  # what is there at first, and what happens


def shape_indices(scenes: Sequence[Scene]) -> Tensor:
    """[V, ENTITIES] indices into SHAPES, 0 for an absent entity."""
    shapes = [[SHAPES.index(entity.shape) for entity in entities] for entities, _ in scenes]
    return torch.tensor([row + [0] * (ENTITIES - len(row)) for row in shapes])


def tell(scenes: Sequence[Scene]) -> Tensor:
    """Tracks [V, F, ENTITIES, TRACK] in which cues happen, each from its start until it is over or stopped."""
    blank = (0.0,) * TRACK
    openings = [[*map(entity_track, entities), blank, blank][:ENTITIES] for entities, _ in scenes]
    most = max(1, *(len(cues) for _, cues in scenes))
    rows = []
    for entities, cues in scenes:
        own: list[tuple] = []
        for cue in sorted(cues, key=lambda cue: cue.start):
            event, frames = cue.event, cue.event.frames
            length = min(frames, cue.stop - cue.start)
            value = entity_track(entities[event.entity], event)
            kind = tuple(KINDS).index(event.kind)
            own.append((kind, event.entity, value, event.slow, length > 0, frames, length / frames, cue.start, 0))
        own += [(NONE, 0, blank, False, False, 1, 1.0, 0, 0)] * (most - len(own))
        rows.append(list(zip(*own, strict=True)))
    acts = Acts(*(torch.tensor(column) for column in zip(*rows, strict=True)))
    return play(torch.tensor(openings), acts, all_show=True)[0]


def relaxed_cues(story: Story, rng: random.Random) -> list[Cue]:
    """The right order and pace, at random chunks."""
    slack = CHUNKS - story.chunks_needed
    cues, start = [], CHUNK
    for event in story.events:
        wait = rng.randint(0, slack)
        slack -= wait
        cues.append(Cue(event, start + wait * CHUNK))
        start = cues[-1].start + event.frames
    return cues


class Clip(NamedTuple):
    """A pretraining clip: its scene, and a caption for every chunk."""

    scene: Scene
    captions: list[str]


def sample_clip(rng: random.Random) -> Clip:
    """A clip of one or two events of the training split."""
    story = sample_story(rng, "train", rng.choices((1, 2), (0.3, 0.7))[0])
    whole = rng.random() < WHOLE_SHARE
    cues, captions = _whole(story, rng) if whole else _switching(story, rng)
    return Clip((story.entities, cues), captions)


def _whole(story: Story, rng: random.Random) -> tuple[list[Cue], list[str]]:
    """One caption, whose events are in part timed against their order or at once."""
    cues = relaxed_cues(story, rng)
    if len(cues) == 2 and rng.random() < BLENDED_SHARE:
        first, second = cues
        starts = (second.start, first.start) if rng.random() < 0.3 else (first.start, first.start)
        cues = [replace(first, start=starts[0]), replace(second, start=starts[1])]
    return cues, [write_instruction(story, rng)] * CHUNKS


def _switching(story: Story, rng: random.Random) -> tuple[list[Cue], list[str]]:
    """Captions that switch an event at a time; events react late and are cut when their caption ends."""
    bounds = [0, rng.choices((1, 2, 3), (0.5, 0.3, 0.2))[0]]
    for event in story.events[:-1]:
        shares = (0.1, 0.25, 0.4, 0.25) if event.slow else (0.35, 0.3, 0.2, 0.15)
        bounds.append(min(bounds[-1] + rng.choices((1, 2, 3, 4), shares)[0], CHUNKS - 1))
    bounds.append(CHUNKS)
    told = describe_story(story, rng)
    cues = []
    for event, first, last in zip(story.events, bounds[1:], bounds[2:], strict=False):
        lag = rng.choices(LAGS, LAG_SHARES)[0]
        cues.append(Cue(event, (first + lag) * CHUNK, last * CHUNK))
    spans = zip(smooth_prompts(told), bounds, bounds[1:], strict=False)
    return cues, [caption for caption, first, last in spans for _ in range(first, last)]
