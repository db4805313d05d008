"""Timelines: when which event happens in a video, as tracks for the renderer.

`tell` is the one function that moves entities. Ground truth, pretraining clips and the corruptions that the
learned judge trains on differ only in the cues they give it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tempact.executor.rollout import smooth_prompts
from tempact.shapeworld.grammar import describe_event, describe_scene, sample_story, write_instruction
from tempact.shapeworld.renderer import TRACK, entity_track
from tempact.shapeworld.story import (
    CHUNK,
    CHUNKS,
    COLOURS,
    COLUMN_X,
    COLUMNS,
    FRAMES,
    JUMP_HEIGHT,
    QUICK_FRAMES,
    RADII,
    ROW_Y,
    SHAPES,
    SLOW_FRAMES,
    Entity,
    Event,
    Story,
    states,
)

ENTITIES = 2  # tracks of a clip, absent entities have opacity 0
WHOLE_SHARE = 0.35  # of pretraining clips, captioned as a whole
BLENDED_SHARE = 0.5  # of the whole-captioned clips of two events, timed against their order
LAGS, LAG_SHARES = (0, 1, 2), (0.45, 0.35, 0.20)  # chunks between a caption switch and the event's onset
X, Y, RADIUS, OPACITY, RGB = 0, 1, 2, 3, slice(4, 7)

Tracks = NDArray[np.float32]


@dataclass(frozen=True)
class Cue:
    """An event, the frame it begins at, and the frame at which it stops, finished or not."""

    event: Event
    start: int
    stop: int = FRAMES


@dataclass(frozen=True)
class Clip:
    """tracks [FRAMES, ENTITIES, TRACK] fp32, shapes [ENTITIES] indices into SHAPES, a caption for every chunk."""

    tracks: Tracks
    shapes: NDArray[np.int64]
    captions: list[str]


def shape_indices(entities: Sequence[Entity]) -> NDArray[np.int64]:
    indices = [SHAPES.index(entity.shape) for entity in entities]
    return np.array((indices + [0] * ENTITIES)[:ENTITIES])


def tell(entities: Sequence[Entity], cues: Sequence[Cue]) -> Tracks:
    """Tracks of a scene in which `cues` happen, each from its start until it is over or stopped."""
    tracks = np.zeros((FRAMES, ENTITIES, TRACK), np.float32)
    for i, entity in enumerate(entities):
        tracks[:, i] = entity_track(entity)
    for cue in sorted(cues, key=lambda cue: cue.start):
        _perform(tracks[:, cue.event.entity], cue)
    return tracks


def _perform(track: Tracks, cue: Cue) -> None:
    """Writes one event into an entity's track [FRAMES, TRACK], linear in time; what follows keeps its end."""
    event = cue.event
    stop = min(cue.start + event.frames, cue.stop, FRAMES)
    if stop <= cue.start:
        return
    progress = (np.arange(1, stop - cue.start + 1) / event.frames).astype(np.float32)
    if event.kind in ("jump", "blink"):
        pulsed, value = (Y, track[cue.start, Y] - JUMP_HEIGHT) if event.kind == "jump" else (OPACITY, 0.0)
        track[cue.start : stop, pulsed] = np.where(progress < 1.0, value, track[cue.start, pulsed])
        return
    channel, target = _target(event)
    before = track[cue.start, channel].copy()
    shape = (-1,) + (1,) * before.ndim
    track[cue.start : stop, channel] = before + progress.reshape(shape) * (np.asarray(target, np.float32) - before)
    track[stop:, channel] = track[stop - 1, channel]


def _target(event: Event) -> tuple[int | slice, float | tuple[float, float, float]]:
    """The channel that an event changes and its value when the event is over."""
    if event.kind == "move":
        return X, COLUMN_X[COLUMNS.index(event.argument)]
    if event.kind == "turn":
        return RGB, COLOURS[event.argument]
    if event.kind in ("grow", "shrink"):
        return RADIUS, RADII["large" if event.kind == "grow" else "small"]
    return OPACITY, 1.0 if event.kind == "appear" else 0.0


def reference_cues(story: Story) -> list[Cue]:
    """Every event right after the one before it, the first after one chunk."""
    cues, start = [], CHUNK
    for event in story.events:
        cues.append(Cue(event, start))
        start += event.frames
    return cues


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


def sample_clip(rng: random.Random) -> Clip:
    """A pretraining clip of one or two events of the training split."""
    story = sample_story(rng, "train", rng.choices((1, 2), (0.3, 0.7))[0])
    whole = rng.random() < WHOLE_SHARE
    cues, captions = _whole(story, rng) if whole else _switching(story, rng)
    return Clip(tell(story.entities, cues), shape_indices(story.entities), captions)


def _whole(story: Story, rng: random.Random) -> tuple[list[Cue], list[str]]:
    cues = relaxed_cues(story, rng)
    if len(cues) == 2 and rng.random() < BLENDED_SHARE:
        first, second = cues
        starts = (second.start, first.start) if rng.random() < 0.3 else (first.start, first.start)
        cues = [replace(first, start=starts[0]), replace(second, start=starts[1])]
    return cues, [write_instruction(story, rng)] * CHUNKS


def _switching(story: Story, rng: random.Random) -> tuple[list[Cue], list[str]]:
    """Captions that switch a step at a time, events that react late and are cut when their caption ends."""
    bounds = [0, rng.choices((1, 2, 3), (0.5, 0.3, 0.2))[0]]
    for event in story.events[:-1]:
        shares = (0.1, 0.25, 0.4, 0.25) if event.slow else (0.35, 0.3, 0.2, 0.15)
        bounds.append(min(bounds[-1] + rng.choices((1, 2, 3, 4), shares)[0], CHUNKS - 1))
    bounds.append(CHUNKS)
    scenes = states(story)
    steps = [describe_scene(story.entities, rng)]
    steps += [describe_event(scene, event, rng) for scene, event in zip(scenes, story.events, strict=False)]
    cues = []
    for event, first, last in zip(story.events, bounds[1:], bounds[2:], strict=False):
        lag = rng.choices(LAGS, LAG_SHARES)[0]
        cues.append(Cue(event, (first + lag) * CHUNK, last * CHUNK))
    seen = smooth_prompts(steps)
    captions = [step for step, first, last in zip(seen, bounds, bounds[1:], strict=False) for _ in range(first, last)]
    return cues, captions


@dataclass(frozen=True)
class Corruption:
    """A rendering of a story gone wrong in a known way.

    kind: one of CORRUPTIONS. tracks [FRAMES, ENTITIES + 1, TRACK] (the last track is an extra entity, mostly
    invisible), shapes [ENTITIES + 1]. target: fraction of the events told completely, at the right pace and
    after all events before them, times DAMAGED where the picture holds shapes that the story does not.
    """

    kind: str
    tracks: Tracks
    shapes: NDArray[np.int64]
    target: float


CORRUPTIONS = (
    "truth",
    "shuffled",
    "missing",
    "cut",
    "overlapping",
    "pace",
    "argument",
    "duplicated",
    "misplaced",
    "frozen",
)
DAMAGED = 0.3


def corrupt(story: Story, kind: str, rng: random.Random) -> Corruption:
    """The story told with one kind of fault; where a story offers no such fault, a missing event instead."""
    entities, cues = story.entities, relaxed_cues(story, rng)
    right = [True] * len(cues)
    count = len(cues)
    one = rng.randrange(count)
    extra: tuple[Entity, int] | None = None
    if kind == "shuffled" and count > 1:
        order = rng.sample(range(count), count)
        while order == sorted(order):
            order = rng.sample(range(count), count)
        cues = relaxed_cues(replace(story, events=tuple(story.events[i] for i in order)), rng)
        place = {i: at for at, i in enumerate(order)}
        right = [all(place[j] < place[i] for j in range(i)) for i in range(count)]
    elif kind == "overlapping" and count > 1:
        one = rng.randrange(1, count)
        cues[one] = replace(cues[one], start=cues[one - 1].start)
        right[one] = False
    elif kind == "cut" and any(event.slow for event in story.events):
        one = rng.choice([i for i, event in enumerate(story.events) if event.slow])
        cues[one] = replace(cues[one], stop=cues[one].start + rng.choice((QUICK_FRAMES, 2 * QUICK_FRAMES)))
        right[one] = False
    elif kind == "pace" and story.events[one].kind not in ("jump", "blink"):
        event = story.events[one]
        if event.slow or cues[one].start + SLOW_FRAMES <= FRAMES:
            cues[one] = replace(cues[one], event=replace(event, slow=not event.slow))
            right[one] = False
    elif kind == "argument" and story.events[one].kind in ("move", "turn"):
        event = story.events[one]
        names = COLUMNS if event.kind == "move" else tuple(COLOURS)
        other = rng.choice([name for name in names if name != event.argument])
        cues[one] = replace(cues[one], event=replace(event, argument=other))
        right[one] = False
    elif kind == "duplicated":
        extra = (rng.choice(entities), rng.choice((0, CHUNK * rng.randrange(CHUNKS - 1))))
    elif kind == "misplaced":
        index = rng.randrange(len(entities))
        wrong = [column for column in range(len(COLUMNS)) if column != entities[index].column]
        moved = replace(entities[index], column=rng.choice(wrong))
        entities = tuple(moved if i == index else entity for i, entity in enumerate(entities))
    elif kind == "frozen":
        cues, right = [], [False] * count
    if kind not in ("truth", "duplicated", "misplaced", "frozen") and all(right):
        dropped = set(rng.sample(range(count), rng.randint(1, max(1, count - 1))))
        cues = [cue for i, cue in enumerate(cues) if i not in dropped]
        right = [i not in dropped for i in range(count)]
        kind = "missing"
    damaged = kind in ("duplicated", "misplaced")
    return _corruption(kind, entities, cues, extra, sum(right) / count * (DAMAGED if damaged else 1.0), rng)


def _corruption(
    kind: str,
    entities: Sequence[Entity],
    cues: list[Cue],
    extra: tuple[Entity, int] | None,
    target: float,
    rng: random.Random,
) -> Corruption:
    tracks = np.concatenate([tell(entities, cues), np.zeros((FRAMES, 1, TRACK), np.float32)], axis=1)
    shapes = np.append(shape_indices(entities), 0)
    if extra is not None:
        entity, start = extra
        columns = [column for column in range(len(COLUMNS)) if column != entity.column]
        copy = replace(entity, column=rng.choice(columns), visible=True, row=rng.randrange(len(ROW_Y)))
        tracks[start:, -1] = entity_track(copy)
        shapes[-1] = SHAPES.index(entity.shape)
    return Corruption(kind, tracks, shapes, target)
