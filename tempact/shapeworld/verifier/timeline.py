"""Fitting a story's expected course to tracked shapes.

Every row of the picture has five channels: x, y, radius, opacity, colour. An event changes one channel of one row, so
the course of a channel is a chain: hold a value, change, hold the next value, ... `align` finds the best such chain
over the frames for each channel (Viterbi), all videos at once. Times and matches of events are read from its labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from tempact.errors import UserError
from tempact.shapeworld.story import (
    COLOUR,
    COLUMN_OF,
    JUMP_HEIGHT,
    OPACITY,
    QUICK_FRAMES,
    ROWS,
    SHAPES,
    SLOW_FRAMES,
    TRACK,
    Entity,
    Event,
    Story,
    entity_track,
)
from tempact.shapeworld.verifier.tracking import ANY_SHAPE, Tracked

CHANNELS = 5  # x, y, radius, opacity, colour: the columns of a track, its three colours as one
TOLERANCE = (1.25, 1.2, 0.25, 0.22, 0.22)  # pixels (x, y, radius), opacity, colour: how far a held value may stray
SEEN = 0.3  # opacity under which place, size and colour are not looked at
CHANGING_MATCH = 0.75  # what a frame in mid-change is worth to the aligner, a frame that holds is worth up to 1
UNSEEN_MATCH = 0.5
LOW, HIGH = 1 / 3, 2 / 3  # progress levels between which a change is timed
STRAY_PATIENCE = SLOW_FRAMES + 2 * QUICK_FRAMES  # frames a change may last before it counts as standing still halfway

State = tuple[tuple[float, ...], ...]  # a TRACK for every row


@dataclass
class Script:
    """Expected course of V videos with at most E events. R rows, C channels, K = E + 1 held values.

    shapes   [V, R] index into SHAPES, ANY_SHAPE for a row that stays empty
    held     [V, R, C, K, 3] values (scalars in the first place) in the order they are held
    peak     [V, R, C, E, 3] goal of a change: the next held value, or the excursion of a jump or blink
    pulse    [V, R, C, E] bool, jumps and blinks
    changes  [V, R, C] number of changes of the channel
    mixes    [V, R, E + 1, 2, 3] pairs of colours between which the row's colour may lie
    row, channel, slot  [V, E] an event's row, its channel, and its number among the channel's changes
    nominal  [V, E] frames the event takes at its pace
    exists   [V, E] bool
    """

    shapes: Tensor
    held: Tensor
    peak: Tensor
    pulse: Tensor
    changes: Tensor
    mixes: Tensor
    row: Tensor
    channel: Tensor
    slot: Tensor
    nominal: Tensor
    exists: Tensor

    def of_events(self, values: Tensor) -> Tensor:
        """Each event's channel from values [V, R, C, ...]: [V, E, ...]."""
        return values[torch.arange(len(values), device=values.device)[:, None], self.row, self.channel]


@dataclass
class Alignment:
    """The fit of V videos of F frames to their scripts.

    label     [V, R, C, F] 2k holds value k, 2k + 1 changes from value k
    match     [V, R, C, F] in [0, 1], fit of the label to the frame
    seen      [V, R, C, F] bool, False where the channel cannot be read
    progress  [V, R, C, F, E] of each change: 0 before, 1 after or at the peak
    """

    label: Tensor
    match: Tensor
    seen: Tensor
    progress: Tensor


def opening(entities: Sequence[Entity]) -> tuple[State, tuple[int, ...]]:
    """State and shape of every row. Raises UserError for two shapes in a row."""
    state, shapes = [(0.0,) * TRACK] * len(ROWS), [ANY_SHAPE] * len(ROWS)
    for entity in entities:
        if shapes[entity.row] != ANY_SHAPE:
            raise UserError(f"instruction: found two shapes in the {ROWS[entity.row]} row; accepted: one shape a row")
        state[entity.row], shapes[entity.row] = entity_track(entity), SHAPES.index(entity.shape)
    return tuple(state), tuple(shapes)


def _value(track: Sequence[float], channel: int) -> list[float]:
    """A channel's value [3] in a track; scalars in the first place."""
    return list(track[COLOUR:]) if channel == COLOUR else [track[channel], 0.0, 0.0]


@lru_cache(maxsize=4096)
def _expect(state: State, entities: tuple[Entity, ...], events: tuple[Event, ...], slots: int) -> tuple[Sequence, ...]:
    """Values of Script from `held` on for one video, nested without the tensors' V."""
    chains = [[[_value(track, channel)] for channel in range(CHANNELS)] for track in state]
    changes: list[list[list]] = [[[] for _ in range(CHANNELS)] for _ in state]  # peaks and pulses
    places, nominal = [], []
    for event in events:
        actor = entities[event.entity]
        row, channel = actor.row, COLUMN_OF[event.kind]
        chain = chains[row][channel]
        pulse = event.kind in ("jump", "blink")
        if pulse:
            peak = [chain[-1][0] - JUMP_HEIGHT if event.kind == "jump" else 0.0, 0.0, 0.0]
        else:
            peak = _value(entity_track(actor, event), channel)
        places.append((row, channel, len(chain) - 1))
        nominal.append(event.frames)
        changes[row][channel].append((peak, pulse))
        chain.append(list(chain[-1]) if pulse else peak)

    def fill(values: list, length: int, last: object) -> list:
        return values + [last] * (length - len(values))

    held = [[fill(chain, slots + 1, chain[-1]) for chain in row] for row in chains]
    peaks = [[fill([peak for peak, _ in own], slots, [0.0] * 3) for own in row] for row in changes]
    pulses = [[fill([pulse for _, pulse in own], slots, False) for own in row] for row in changes]
    counts = [[len(own) for own in row] for row in changes]
    mixes = [list(pairwise(fill(row[COLOUR], slots + 2, row[COLOUR][-1]))) for row in chains]
    exists = [i < len(events) for i in range(slots)]
    rows, channels, numbers = zip(*fill(places, slots, (0, 0, 0)), strict=True)
    return held, peaks, pulses, counts, mixes, rows, channels, numbers, fill(nominal, slots, QUICK_FRAMES), exists


def write_script(
    states: Sequence[State], stories: Sequence[Story], events: Sequence[tuple[Event, ...]], device: torch.device
) -> Script:
    """The script of V videos: each begins in its state and goes through its events, whose entities are its story's."""
    slots = max(1, *(len(e) for e in events)) if events else 1
    given = zip(states, stories, events, strict=True)
    parts = [_expect(state, story.entities, own, slots) for state, story, own in given]
    columns = [torch.tensor(column) for column in zip(*parts, strict=True)]
    shapes = torch.tensor([opening(story.entities)[1] for story in stories])
    return Script(*(tensor.to(device) for tensor in [shapes, *columns]))


def _opacity(ink: Tensor, mixes: Tensor) -> Tensor:
    """Opacity of ink [V, R, F, 3] whose colour may lie between the two of any of mixes [V, R, M, 2, 3]."""
    pairs = mixes[:, :, None]  # over frames
    one, two = pairs[..., 0, :], pairs[..., 1, :]
    colour = ink[..., None, :]
    aa, bb, ab = (one * one).sum(-1), (two * two).sum(-1), (one * two).sum(-1)
    a, b = (colour * one).sum(-1), (colour * two).sum(-1)
    determinant = aa * bb - ab * ab
    apart = determinant > 1e-3
    safe = torch.where(apart, determinant, 1.0)
    alpha = torch.where(apart, (bb * a - ab * b) / safe, a / aa.clamp_min(1e-3))
    beta = torch.where(apart, (aa * b - ab * a) / safe, 0.0)
    error = (colour - alpha[..., None] * one - beta[..., None] * two).abs().amax(-1)
    fits = (alpha > -0.1) & (beta > -0.1) & (error < 0.15)
    mixed = torch.where(fits, alpha.clamp_min(0.0) + beta.clamp_min(0.0), 0.0).amax(-1)
    return torch.maximum(mixed, ink.amax(-1)).clamp(0.0, 1.0)


def observe(tracked: Tracked, mixes: Tensor) -> Tensor:
    """Channel values [V, R, C, F, 3]; scalars in the first place. Colour has its opacity divided out."""
    opacity = _opacity(tracked.ink, mixes)
    scalars = torch.stack([tracked.x, tracked.y, tracked.radius, opacity], 2)
    scalars = torch.nn.functional.pad(scalars[..., None], (0, 2))
    colour = tracked.ink / opacity.clamp_min(0.05)[..., None]
    return torch.cat([scalars, colour[:, :, None]], 2)


def align(observed: Tensor, script: Script) -> Alignment:
    """Fits every channel's chain to observed [V, R, C, F, 3]."""
    tolerance = torch.tensor(TOLERANCE, device=observed.device)[:, None, None]
    seen = (observed[:, :, OPACITY, :, 0] >= SEEN)[:, :, None].repeat(1, 1, CHANNELS, 1)
    seen[:, :, OPACITY] = True

    values = observed[..., None, :]
    stray = (values - script.held[:, :, :, None]).abs().amax(-1) / tolerance
    hold = (1.5 - stray).clamp(0.0, 1.0)

    before = script.held[:, :, :, None, :-1]
    path = script.peak[:, :, :, None] - before
    length = path.square().sum(-1)
    progress = ((values - before) * path).sum(-1) / length.clamp_min(1e-3)
    off = (values - before - progress[..., None] * path).abs().amax(-1) / tolerance
    pulse = script.pulse[:, :, :, None]
    on_way = (progress > 0.08) & (progress < 0.92) & (off < 1.0)
    change = torch.where(pulse, ((progress > 0.5) & (progress < 1.6)).float(), CHANGING_MATCH * on_way)

    worth = torch.empty(*hold.shape[:-1], hold.shape[-1] + change.shape[-1], device=hold.device)
    worth[..., 0::2], worth[..., 1::2] = hold, change
    judged = torch.where(seen[..., None], worth, UNSEEN_MATCH)
    label = _viterbi(judged.flatten(0, 2), script.pulse.flatten(0, 2), script.changes.flatten()).view(seen.shape)
    worth[..., 0::2], worth[..., 1::2] = (3.0 - 2.0 * stray).clamp(0.0, 1.0), (change > 0).float()
    match = torch.where(seen, worth.gather(-1, label[..., None])[..., 0], 1.0)
    return Alignment(label, match, seen, progress)


def _viterbi(worth: Tensor, pulse: Tensor, changes: Tensor) -> Tensor:
    """Best label of every frame. worth [N, F, L], pulse [N, E], changes [N]; returns [N, F] int64.

    A chain begins at label 0, stays, goes on by one, or skips a change that took no frame at all (but no jump or
    blink, whose change is all there is).
    """
    chains, frames, labels = worth.shape
    never = torch.finfo(worth.dtype).min / 4
    index = torch.arange(labels, device=worth.device)
    worth = worth.masked_fill((index > 2 * changes[:, None])[:, None], never)
    skips = torch.full((chains, labels), never, device=worth.device)
    skips[:, 2::2] = torch.where(pulse, never, 0.0)
    best = torch.full((chains, labels), never, device=worth.device)
    best[:, 0] = worth[:, 0, 0]
    came = []
    blank = torch.full((chains, 2), never, device=worth.device)
    for frame in range(1, frames):
        shifted = torch.cat([blank, best], 1)
        options = torch.stack([best, shifted[:, 1:-1], shifted[:, :-2] + skips])
        best, step = options.max(0)
        best = best + worth[:, frame]
        came.append(step)
    label = best.argmax(-1)
    path = [label]
    for step in reversed(came):
        label = label - step.gather(1, label[:, None])[:, 0]
        path.append(label)
    return torch.stack(path[::-1], 1)


def event_progress(alignment: Alignment, script: Script) -> Tensor:
    """Progress of each event [V, E, F], 0 where its channel cannot be read."""
    rows = script.of_events(alignment.progress)
    slot = script.slot[:, :, None, None].expand(*rows.shape[:3], 1)
    return rows.gather(-1, slot)[..., 0] * script.of_events(alignment.seen)


@dataclass
class Times:
    """Times of events, in frames with fractions. All [V, E].

    onset      the last frame before the event shows
    completion the first frame at which it is over
    """

    onset: Tensor
    completion: Tensor

    @property
    def duration(self) -> Tensor:
        return self.completion - self.onset


def event_times(alignment: Alignment, script: Script) -> Times:
    """Times of the events, meaningless for events that did not happen."""
    label = script.of_events(alignment.label)
    seen = script.of_events(alignment.seen)
    progress = event_progress(alignment, script)
    slot = script.slot[..., None]
    frame = torch.arange(label.shape[-1], device=label.device)
    last = label.shape[-1] - 1

    def first(condition: Tensor) -> Tensor:
        return torch.where(condition, frame, last).amin(-1)

    done = first(label >= 2 * slot + 2)
    low_yet = (frame <= done[..., None]) & seen & (progress < LOW) & (label <= 2 * slot + 1)
    start = torch.where(low_yet, frame, 0).amax(-1)
    finish = first((frame > start[..., None]) & seen & (progress >= HIGH))
    finish = torch.maximum(torch.minimum(finish, torch.maximum(done, start + 1)), start + 1).clamp_max(last)

    def crossing(frame_before: Tensor, level: float) -> Tensor:
        low = progress.gather(-1, frame_before[..., None])[..., 0]
        high = progress.gather(-1, (frame_before + 1).clamp_max(last)[..., None])[..., 0]
        return frame_before + ((level - low) / (high - low).clamp_min(1e-3)).clamp(0.0, 1.0)

    low, high = crossing(start, LOW), crossing((finish - 1).clamp_min(0), HIGH)
    third = (high - low).clamp_min(0.0)
    changing = first(label >= 2 * slot + 1)
    pulse = script.of_events(script.pulse).gather(-1, slot)[..., 0]
    return Times(
        onset=torch.where(pulse, changing - 1.0, low - third),
        completion=torch.where(pulse, done.float(), high + third),
    )
