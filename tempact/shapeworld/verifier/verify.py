"""The exact judge of ShapeWorld: did the events happen, each at its pace, one after another, and nothing else?

Partial credit, all in [0, 1], all without a learned part:

    happened  the value before was seen, the change was completed, and what it led to stays until the next event
              of the same channel (full credit from 85% of those frames on, none under 50%)
    in_order  every two events that happened follow one another: full credit up to about one frame of overlap,
              none from three frames on. One wrong pair takes the order credit of both; an event whose
              predecessor never happened keeps half
    on_time   the pace is as told (a quick event is over within 5 frames and not instant, a slow one takes at
              least 6.5) and, where spans are given, the event lies in its span, with one frame to spare
    calm      around the event (from its onset until 3 frames after its end) the picture is intact

    event score = happened * calm * (0.15 + in_order * (0.40 + 0.45 * on_time))
    video score = mean over the events * intactness

A frame is intact as far as every shape is where, as large, as opaque and as coloured as the story has it at
that point or in the middle of a told change, has its own shape, is well drawn, and there is nothing else in
the picture; a frame's intactness is the least of these. The score falls with the share of intact frames, from
all of it at 100% to nothing at 45%. So a frozen, empty or noisy video scores 0, a video whose events are swapped
about 0.15, a video that lacks one of n events at most 1 - 1/n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tempact.shapeworld.story import CHUNK, COLOURS, COLUMN_X, RADII, ROW_Y, SLOW_FRAMES, Event, Story
from tempact.shapeworld.verifier.timeline import (
    COLOUR,
    OPACITY,
    STRAY_PATIENCE,
    TOLERANCE,
    Alignment,
    Script,
    State,
    Times,
    X,
    align,
    event_progress,
    event_rows,
    event_times,
    observe,
    opening,
    write_script,
)
from tempact.shapeworld.verifier.tracking import Tracked, track

HAPPENED_SHARE, ORDER_SHARE, TIME_SHARE = 0.15, 0.40, 0.45
DAMAGED_BELOW = 0.45  # share of intact frames at which nothing of the score is left
AFTER_A_GAP = 0.5  # order credit of an event whose predecessor is missing
DISTINCT = 0.5  # opacity from which shape and drawing are looked at
GRACE = 2 * CHUNK  # frames after the nominal end for which closeness is measured
SHAPE_FRAMES = 5  # over which the evidence for a shape is averaged


def ramp(values: Tensor, zero: float | Tensor, one: float | Tensor) -> Tensor:
    """0 at `zero`, 1 at `one`, linear between, either way round."""
    return ((values - zero) / (one - zero)).clamp(0.0, 1.0)


@dataclass
class Verdict:
    """What V videos with at most E events did; entries past a story's last event are 0.

    happened, in_order, on_time, calm  [V, E] in [0, 1], see the module docstring
    credit  [V, E] event scores
    score   [V] in [0, 1]
    intact  [V] share of frames that are intact
    strict  [V] share of the events that happened, calm, in order and on time (each above 0.5)
    """

    happened: Tensor
    in_order: Tensor
    on_time: Tensor
    calm: Tensor
    credit: Tensor
    score: Tensor
    intact: Tensor
    strict: Tensor


@dataclass
class _Telling:
    """Everything read from one set of videos; [V, E] but intact [V, F] and progress [V, E, F]."""

    happened: Tensor
    in_order: Tensor
    pace: Tensor
    calm: Tensor
    times: Times
    intact: Tensor
    progress: Tensor
    idle: Tensor  # bool, the event asks for what is there already


def drawn_right(tracked: Tracked, opacity: Tensor, shaped: Tensor) -> Tensor:
    """[V, F] in [0, 1]: no ink away from the shapes, visible shapes cleanly drawn and of the right kind.

    opacity [V, R, F], shaped [V, R] False where any shape will do.
    """
    visible = opacity >= DISTINCT
    weight = visible.float()
    near = torch.nn.functional.avg_pool1d
    pad = SHAPE_FRAMES // 2
    margin = near(tracked.shape_margin * weight, SHAPE_FRAMES, 1, pad) / near(weight, SHAPE_FRAMES, 1, pad).clamp_min(
        1e-6
    )
    kind = torch.where(shaped[..., None], ramp(margin, -0.03, -0.012), 1.0)
    clean = ramp(tracked.fit, 0.935, 0.968)
    drawn = torch.where(visible, torch.minimum(kind, clean), 1.0).amin(1)
    return torch.minimum(drawn, ramp(tracked.clutter, 1.0, 0.35))


def _pace(duration: Tensor, slow: Tensor) -> Tensor:
    quick = ramp(duration, 0.5, 1.7) * ramp(duration, 7.0, 5.0)
    drawn_out = ramp(duration, 4.5, 6.5) * ramp(duration, 18.0, 14.0)
    return torch.where(slow, drawn_out, quick)


def _order(happened: Tensor, times: Times) -> Tensor:
    """[V, E] order credit."""
    told = happened > 0.25
    slack = 1.0 + 0.02 * (times.duration[:, :, None] + times.duration[:, None, :])
    overlap = times.completion[:, :, None] - times.onset[:, None, :]  # of event i with a later event j
    follows = ramp(overlap, slack + 1.0, slack)
    count = happened.shape[1]
    later = torch.ones(count, count, dtype=torch.bool, device=happened.device).triu(1)
    relevant = later & told[:, :, None] & told[:, None, :]
    follows = torch.where(relevant, follows, 1.0)
    led = torch.cat([torch.ones_like(happened[:, :1]), happened[:, :-1]], 1)
    gap = AFTER_A_GAP + (1.0 - AFTER_A_GAP) * led
    return torch.minimum(follows.amin(2), follows.amin(1)) * gap


def _happened(alignment: Alignment, script: Script) -> Tensor:
    """[V, E]: the value before was held, the change came to its end in plain sight, and it lasts."""
    label, match = event_rows(alignment.label, script), event_rows(alignment.match, script)
    seen = event_rows(alignment.seen, script)
    slot = script.slot[..., None]
    before, after = (label == 2 * slot) & seen, (label == 2 * slot + 2) & seen
    started = torch.where(before, match, 0.0).amax(-1)
    ended = torch.where(after, match, 0.0).amax(-1)
    lasting = torch.where(after, match, 0.0).sum(-1) / after.sum(-1).clamp_min(1)
    frame = torch.arange(label.shape[-1], device=label.device)
    last_before = torch.where(before, frame, -1).amax(-1, keepdim=True)
    first_after = torch.where(after, frame, label.shape[-1]).amin(-1, keepdim=True)
    in_sight = (seen | (frame < last_before) | (frame > first_after)).all(-1)
    return ramp(started, 0.0, 0.5) * ramp(ended, 0.0, 0.5) * ramp(lasting, 0.5, 0.85) * in_sight * script.exists


def _intact(alignment: Alignment, script: Script, happened: Tensor, drawing: Tensor, to_be_continued: bool) -> Tensor:
    """[V, F]. A change that never ends (unless the video goes on) or takes for ever is a shape that stands halfway;
    what an event leads to without the event is wrong as well."""
    label = event_rows(alignment.label, script)
    changing = label == 2 * script.slot[..., None] + 1
    stuck = (changing.sum(-1) > STRAY_PATIENCE) | (happened < 0.25)
    if to_be_continued:
        stuck = torch.zeros_like(stuck)
    ahead = (
        (label >= 2 * script.slot[..., None] + 2) & event_rows(alignment.seen, script) & (happened < 0.25)[..., None]
    )
    wrong = ((changing & stuck[..., None]) | ahead) & script.exists[..., None]
    return torch.where(wrong.any(1), 0.0, torch.minimum(alignment.match.amin((1, 2)), drawing))


def _read(tracked: Tracked, script: Script, to_be_continued: bool = False) -> _Telling:
    observed = observe(tracked, script.mixes)
    alignment = align(observed, script)
    happened = _happened(alignment, script)
    times = event_times(alignment, script)
    drawing = drawn_right(tracked, observed[:, :, OPACITY, :, 0], script.shapes >= 0)
    intact = _intact(alignment, script, happened, drawing, to_be_continued)

    frame = torch.arange(intact.shape[1], device=intact.device)
    around = (frame > times.onset[..., None]) & (frame < times.completion[..., None] + CHUNK)
    calm = (intact[:, None] * around).sum(-1) / around.sum(-1).clamp_min(1)

    tolerance = torch.tensor(TOLERANCE, device=intact.device)
    held = event_rows(script.held, script)
    pick = script.slot[..., None, None].expand(*script.slot.shape, 1, 3)
    peak = event_rows(script.peak, script).gather(2, pick)[:, :, 0]
    idle = (peak - held.gather(2, pick)[:, :, 0]).abs().amax(-1) < tolerance[script.channel]
    return _Telling(
        happened=happened,
        in_order=_order(happened, times),
        pace=_pace(times.duration, script.nominal == SLOW_FRAMES),
        calm=ramp(calm, 0.25, 0.75),
        times=times,
        intact=intact,
        progress=event_progress(alignment, script),
        idle=idle,
    )


def _in_span(times: Times, spans: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    """[V, E]: 1 within the span (one frame to spare at either end), 0 from three frames outside on."""
    events = times.onset.shape[1]
    table = torch.tensor([[*video, *[(0, 0)] * (events - len(video))] for video in spans], device=times.onset.device)
    early = (table[..., 0] - 1) - times.onset
    late = times.completion - (table[..., 1] - 1)
    return ramp(torch.maximum(early, late), 3.0, 1.0)


@torch.no_grad()
def verify(
    frames: Tensor, stories: Sequence[Story], spans: Sequence[Sequence[tuple[int, int]]] | None = None
) -> Verdict:
    """Judges videos by their stories.

    frames [V, F, 3, SIZE, SIZE] in [0, 1]; spans: for every video the frames [start, end) in which each of its
    events is to take place, None to judge order and pace alone. Runs on the frames' device.
    """
    states = [opening(story.entities)[0] for story in stories]
    script = write_script(states, stories, [story.events for story in stories], frames.device)
    telling = _read(track(frames, script.shapes), script)
    on_time = telling.pace if spans is None else telling.pace * _in_span(telling.times, spans)
    worth = HAPPENED_SHARE + telling.in_order * (ORDER_SHARE + TIME_SHARE * on_time)
    credit = telling.happened * telling.calm * worth * script.exists
    count = script.exists.sum(1)
    intact = telling.intact.mean(1)
    good = (telling.happened > 0.5) & (telling.in_order > 0.5) & (on_time > 0.5) & (telling.calm > 0.5) & script.exists
    return Verdict(
        happened=telling.happened,
        in_order=telling.in_order * script.exists,
        on_time=on_time * script.exists,
        calm=telling.calm * script.exists,
        credit=credit,
        score=credit.sum(1) / count * ramp(intact, DAMAGED_BELOW, 1.0),
        intact=intact,
        strict=good.sum(1) / count,
    )


def _settle(value: float, settled: Sequence[float], channel: int) -> float:
    """The settled value next to `value`, or `value` itself, in quarters, where none is near."""
    nearest = min(settled, key=lambda s: abs(s - value))
    return nearest if abs(nearest - value) <= TOLERANCE[channel] else round(value * 4) / 4


def _settled_state(tracks: list[list[float]], story: Story) -> State:
    """The state that one frame shows. tracks: for each row x, y, radius, opacity, red, green, blue.

    An invisible shape is taken to be where and as the story has it at first, or will have it when it appears.
    """
    first, shapes = opening(story.entities)
    state = []
    for row, (x, _, radius, opacity, *colour) in enumerate(tracks):
        if shapes[row] < 0 or opacity < DISTINCT:
            state.append((*first[row][:3], 0.0, *first[row][4:]))
            continue
        shade: tuple[float, ...] = min(
            COLOURS.values(), key=lambda c: max(abs(a - b) for a, b in zip(c, colour, strict=True))
        )
        if max(abs(a - b) for a, b in zip(shade, colour, strict=True)) > TOLERANCE[COLOUR]:
            shade = tuple(round(c * 4) / 4 for c in colour)
        place = (_settle(x, COLUMN_X, X), ROW_Y[row], _settle(radius, tuple(RADII.values()), 2))
        state.append((*place, 1.0, *shade))
    return tuple(state)


def _window(tracked: Tracked, first: Tensor, last: Tensor) -> Tracked:
    """Frames first[v] .. last[v] of each video; the last one is repeated up to the longest window, so that what
    lasts, lasts."""
    count = int((last - first).max()) + 1
    index = torch.minimum(first[:, None] + torch.arange(count, device=first.device), last[:, None])
    moved = {}
    for name in Tracked.__dataclass_fields__:
        values = getattr(tracked, name)
        axis = 1 if values.dim() == 2 else 2
        spots = index.view(len(first), *[1] * (axis - 1), count, *[1] * (values.dim() - axis - 1))
        moved[name] = values.gather(axis, spots.expand(*values.shape[:axis], count, *values.shape[axis + 1 :]))
    return Tracked(**moved)


def _expected(script: Script, frames: int) -> Tensor:
    """Progress [V, E, frames] of events told promptly and one after another from local frame 1 on."""
    start = script.nominal.cumsum(1) - script.nominal
    elapsed = torch.arange(frames, device=start.device) - start[..., None]
    share = (elapsed / script.nominal[..., None]).clamp(0.0, 1.0)
    pulse = event_rows(script.pulse, script).gather(-1, script.slot[..., None])
    return torch.where(pulse, ((share > 0.0) & (share < 1.0)).float(), share)


@torch.no_grad()
def verify_steps(
    frames: Tensor,
    stories: Sequence[Story],
    windows: Sequence[tuple[int, int]],
    events: Sequence[Sequence[Event]],
) -> Tensor:
    """How well each video does what one step of its plan says, in the step's own window. [V] in [0, 1].

    frames [V, F, 3, SIZE, SIZE]; windows: frames [start, end) of the step, start > 0; events: what the step tells
    (none: everything is to stay). What frame start - 1 shows is where the step begins, whatever the story has
    there. Per event: half for success inside the window (happened, in order; half of that for the pace), half
    for closeness of its progress to a prompt start at the nominal pace, until two chunks after it should be over (a
    video that stands still has none); all times the share of intact frames in the window.
    """
    device = frames.device
    first = torch.tensor([start for start, _ in windows], device=device) - 1
    length = torch.tensor([end - start for start, end in windows], device=device)
    assert int(first.min()) >= 0
    shapes = torch.tensor([opening(story.entities)[1] for story in stories], device=device)
    tracked = _window(track(frames, shapes), first, first + length)
    count = tracked.clutter.shape[1]
    states = _states_of(tracked, stories)
    script = write_script(states, stories, [tuple(e) for e in events], device)
    telling = _read(tracked, script, to_be_continued=True)
    frame = torch.arange(count, device=device)
    inside = (frame >= 1) & (frame <= length[:, None])  # [V, count]

    wanted = _expected(script, count)
    due = (script.nominal * script.exists).sum(1, keepdim=True)
    weight = (inside & (frame <= due + GRACE))[:, None].float()
    error = ((telling.progress.clamp(-0.5, 1.5) - wanted).abs() * weight).sum(-1)
    closeness = (1.0 - error / (wanted.abs() * weight).sum(-1).clamp_min(1e-3)).clamp(0.0, 1.0)
    success = telling.happened * telling.in_order * (0.5 + 0.5 * telling.pace)
    credit = torch.where(telling.idle, 1.0, 0.5 * success + 0.5 * closeness) * script.exists
    told = script.exists.sum(1)
    score = torch.where(told > 0, credit.sum(1) / told.clamp_min(1), 1.0)
    return score * (telling.intact * inside).sum(1) / length


def _states_of(tracked: Tracked, stories: Sequence[Story]) -> list[State]:
    """The settled state in the first frame of each video."""
    opacity = tracked.ink[:, :, 0].amax(-1)
    colour = tracked.ink[:, :, 0] / opacity.clamp_min(0.05)[..., None]
    scalars = torch.stack([tracked.x[:, :, 0], tracked.y[:, :, 0], tracked.radius[:, :, 0], opacity], -1)
    rows = torch.cat([scalars, colour], -1).tolist()
    return [_settled_state(tracks, story) for tracks, story in zip(rows, stories, strict=True)]
