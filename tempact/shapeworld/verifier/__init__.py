"""The exact judge of ShapeWorld: each event happens, at its pace, one after another, and nothing else happens.

Partial credit, all in [0, 1], without a learned part:

    happened  the value before was seen, the change was completed, and its result stays until the next event
              of the same channel (full credit from 85% of those frames on, none under 50%)
    in_order  every two events that happened follow one another: full credit up to about one frame of overlap,
              none from three frames on. A wrong pair takes the order credit of both; an event whose
              predecessor never happened keeps half
    on_time   the pace is as told: a quick event is over within 5 frames and not instant, a slow one takes at
              least 6.5
    calm      around the event (from its onset until 3 frames after its end) the picture is intact

    event score = happened * calm * (0.15 + in_order * (0.40 + 0.45 * on_time))
    video score = mean over the events * intactness

A frame is intact as far as every shape has the place, size, opacity and colour of the story at that point, or of the
middle of a told change, and its own kind, is well drawn, and nothing else is in the picture; a frame's intactness is
the least of these. The score falls with the share of intact frames, from all of it at 100% to nothing at 45%. A frozen,
empty or noisy video scores 0, a video with its events swapped about 0.15, a video without one of n events at most
1 - 1/n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tempact.shapeworld.story import (
    CHUNK,
    COLOUR,
    COLOURS,
    COLUMN_X,
    JUMP_HEIGHT,
    OPACITY,
    RADII,
    RADIUS,
    ROW_Y,
    TRACK,
    Event,
    Story,
    X,
    Y,
    draw,
    states,
)
from tempact.shapeworld.verifier import timeline
from tempact.shapeworld.verifier.timeline import TOLERANCE, Alignment, Script, State, Times
from tempact.shapeworld.verifier.tracking import Tracked, track

HAPPENED_SHARE, ORDER_SHARE, TIME_SHARE = 0.15, 0.40, 0.45
DAMAGED_BELOW = 0.45  # share of intact frames at which nothing of the score is left
AFTER_A_GAP = 0.5  # order credit of an event whose predecessor is missing
DISTINCT = 0.5  # opacity from which a shape counts as visible: its kind and drawing are looked at
GRACE = 2 * CHUNK  # frames after the nominal end for which closeness is measured
SHAPE_FRAMES = 5  # over which the evidence for a shape is averaged
FREE_ERROR = 0.015  # root mean square error that comes from tracking alone, not from the picture
ERROR_SCALE = 0.05  # beyond that, the error at which quality has fallen to 1/e
EXTRA_INK = 2.0  # pixels of ink away from the tracked shapes that make a copy; the smallest shape has about 8
STILL = 0.25  # pixels a frame, slower shapes stand
AS_TOLD = 0.5  # credit of each kind from which an event counts as done as it was told


def _ramp(values: Tensor, zero: float | Tensor, one: float | Tensor) -> Tensor:
    """0 at `zero`, 1 at `one`, linear between, either way round."""
    return ((values - zero) / (one - zero)).clamp(0.0, 1.0)


@dataclass
class Verdict:
    """Judgement of V videos of F frames with at most E events each. The module defines the terms.

    happened, in_order, on_time, calm  [V, E] in [0, 1], zero past a story's last event
    events    [V] number of events
    intact    [V, F] in [0, 1]
    progress  [V, E, F] of each event, 0 before it, 1 after it or at its peak
    """

    happened: Tensor
    in_order: Tensor
    on_time: Tensor
    calm: Tensor
    events: Tensor
    intact: Tensor
    progress: Tensor

    @property
    def score(self) -> Tensor:
        """[V] in [0, 1], the score of each video; NaN for a video without events."""
        worth = HAPPENED_SHARE + self.in_order * (ORDER_SHARE + TIME_SHARE * self.on_time)
        credit = self.happened * self.calm * worth
        return credit.sum(1) / self.events * _ramp(self.intact.mean(1), DAMAGED_BELOW, 1.0)

    @property
    def as_told(self) -> Tensor:
        """[V, E] bool: the event happened, in its turn, at its pace and in a calm picture, each at least by half."""
        return torch.stack([self.happened, self.in_order, self.on_time, self.calm]).amin(0) >= AS_TOLD


@torch.no_grad()
def verify(frames: Tensor, stories: Sequence[Story]) -> Verdict:
    """Judges videos by their stories, on the frames' device.

    frames [V, F, 3, SIZE, SIZE] in [0, 1]. Raises UserError for a story with two shapes in a row.
    """
    openings = [timeline.opening(story.entities)[0] for story in stories]
    script = timeline.write_script(openings, stories, [story.events for story in stories], frames.device)
    return _judge(track(frames, script.shapes), script)


def _drawn_right(tracked: Tracked, opacity: Tensor, shaped: Tensor) -> Tensor:
    """[V, F] in [0, 1]: no ink away from the shapes, visible shapes cleanly drawn and of the right kind.

    opacity [V, R, F], shaped [V, R] False where any shape will do.
    """
    visible = opacity >= DISTINCT
    weight = visible.float()
    total, seen = (F.avg_pool1d(x, SHAPE_FRAMES, 1, SHAPE_FRAMES // 2) for x in (tracked.shape_margin * weight, weight))
    margin = total / seen.clamp_min(1e-6)
    kind = torch.where(shaped[..., None], _ramp(margin, -0.03, -0.012), 1.0)
    clean = _ramp(tracked.fit, 0.935, 0.968)
    drawn = torch.where(visible, torch.minimum(kind, clean), 1.0).amin(1)
    return torch.minimum(drawn, _ramp(tracked.clutter, 1.0, 0.35))


def _pace(duration: Tensor, slow: Tensor) -> Tensor:
    quick = _ramp(duration, 0.5, 1.7) * _ramp(duration, 7.0, 5.0)
    drawn_out = _ramp(duration, 4.5, 6.5) * _ramp(duration, 18.0, 14.0)
    return torch.where(slow, drawn_out, quick)


def _order(happened: Tensor, times: Times) -> Tensor:
    """[V, E] order credit."""
    told = happened > 0.25
    slack = 1.0 + 0.02 * (times.duration[:, :, None] + times.duration[:, None, :])
    overlap = times.completion[:, :, None] - times.onset[:, None, :]  # of event i with a later event j
    follows = _ramp(overlap, slack + 1.0, slack)
    count = happened.shape[1]
    later = torch.ones(count, count, dtype=torch.bool, device=happened.device).triu(1)
    relevant = later & told[:, :, None] & told[:, None, :]
    follows = torch.where(relevant, follows, 1.0)
    led = torch.cat([torch.ones_like(happened[:, :1]), happened[:, :-1]], 1)
    gap = AFTER_A_GAP + (1.0 - AFTER_A_GAP) * led
    return torch.minimum(follows.amin(2), follows.amin(1)) * gap


def _happened(alignment: Alignment, script: Script) -> Tensor:
    """[V, E] in [0, 1]: the value before was held, the change was completed in plain sight, and its result lasts."""
    label, match = script.of_events(alignment.label), script.of_events(alignment.match)
    seen = script.of_events(alignment.seen)
    slot = script.slot[..., None]
    before, after = (label == 2 * slot) & seen, (label == 2 * slot + 2) & seen
    started = torch.where(before, match, 0.0).amax(-1)
    ended = torch.where(after, match, 0.0).amax(-1)
    lasting = torch.where(after, match, 0.0).sum(-1) / after.sum(-1).clamp_min(1)
    frame = torch.arange(label.shape[-1], device=label.device)
    last_before = torch.where(before, frame, -1).amax(-1, keepdim=True)
    first_after = torch.where(after, frame, label.shape[-1]).amin(-1, keepdim=True)
    in_sight = (seen | (frame < last_before) | (frame > first_after)).all(-1)
    return _ramp(started, 0.0, 0.5) * _ramp(ended, 0.0, 0.5) * _ramp(lasting, 0.5, 0.85) * in_sight * script.exists


def _intact(alignment: Alignment, script: Script, happened: Tensor, drawing: Tensor, to_be_continued: bool) -> Tensor:
    """[V, F]. A change without end (unless the video goes on) or beyond STRAY_PATIENCE is a shape that stands halfway;
    the result of an event that did not happen is wrong as well."""
    label = script.of_events(alignment.label)
    changing = label == 2 * script.slot[..., None] + 1
    stuck = (changing.sum(-1) > timeline.STRAY_PATIENCE) | (happened < 0.25)
    if to_be_continued:
        stuck = torch.zeros_like(stuck)
    after = (label >= 2 * script.slot[..., None] + 2) & script.of_events(alignment.seen)
    ahead = after & (happened < 0.25)[..., None]
    wrong = ((changing & stuck[..., None]) | ahead) & script.exists[..., None]
    return torch.where(wrong.any(1), 0.0, torch.minimum(alignment.match.amin((1, 2)), drawing))


def _judge(tracked: Tracked, script: Script, to_be_continued: bool = False) -> Verdict:
    observed = timeline.observe(tracked, script.mixes)
    alignment = timeline.align(observed, script)
    happened = _happened(alignment, script)
    times = timeline.event_times(alignment, script)
    drawing = _drawn_right(tracked, observed[:, :, OPACITY, :, 0], script.shapes >= 0)
    intact = _intact(alignment, script, happened, drawing, to_be_continued)
    frame = torch.arange(intact.shape[1], device=intact.device)
    around = (frame > times.onset[..., None]) & (frame < times.completion[..., None] + CHUNK)
    calm = (intact[:, None] * around).sum(-1) / around.sum(-1).clamp_min(1)
    return Verdict(
        happened=happened,
        in_order=_order(happened, times) * script.exists,
        on_time=_pace(times.duration, script.nominal > CHUNK) * script.exists,
        calm=_ramp(calm, 0.25, 0.75) * script.exists,
        events=script.exists.sum(1),
        intact=intact,
        progress=timeline.event_progress(alignment, script),
    )


def _settle(value: float, settled: Sequence[float], channel: int) -> float:
    """The settled value next to `value`, or `value` itself, in quarters, where none is near."""
    nearest = min(settled, key=lambda s: abs(s - value))
    return nearest if abs(nearest - value) <= TOLERANCE[channel] else round(value * 4) / 4


def _settled_state(tracks: list[list[float]], story: Story) -> State:
    """The state that one frame shows. tracks: for each row x, y, radius, opacity, red, green, blue.

    An invisible shape has the place and looks of the story's opening, also where it only appears later.
    """
    first, shapes = timeline.opening(story.entities)
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
        place = (_settle(x, COLUMN_X, X), ROW_Y[row], _settle(radius, tuple(RADII.values()), RADIUS))
        state.append((*place, 1.0, *shade))
    return tuple(state)


def _window(tracked: Tracked, first: Tensor, last: Tensor) -> Tracked:
    """Frames first[v] .. last[v] of each video; repeats the last one up to the longest window, so that a state at the
    end counts as lasting."""
    count = int((last - first).max()) + 1
    index = torch.minimum(first[:, None] + torch.arange(count, device=first.device), last[:, None])

    def cut(values: Tensor) -> Tensor:
        spots = index if values.dim() == 2 else index[:, None] if values.dim() == 3 else index[:, None, :, None]
        return torch.take_along_dim(values, spots, min(2, values.dim() - 1))

    return Tracked(*map(cut, tracked))


def _expected(script: Script, frames: int) -> Tensor:
    """Progress [V, E, frames] of events told promptly and one after another from local frame 1 on."""
    start = script.nominal.cumsum(1) - script.nominal
    elapsed = torch.arange(frames, device=start.device) - start[..., None]
    share = (elapsed / script.nominal[..., None]).clamp(0.0, 1.0)
    pulse = script.of_events(script.pulse).gather(-1, script.slot[..., None])
    return torch.where(pulse, ((share > 0.0) & (share < 1.0)).float(), share)


@torch.no_grad()
def verify_steps(
    frames: Tensor, stories: Sequence[Story], windows: Sequence[tuple[int, int]], events: Sequence[Sequence[Event]]
) -> Tensor:
    """Judges each video by one step of its plan, in the step's own window: [V] in [0, 1].

    Args:
        frames: [V, F, 3, SIZE, SIZE] in [0, 1].
        windows: frames [start, end) of the step, start > 0. The step begins with the state that frame start - 1
            shows, also where the story has another.
        events: of the step; without one, everything is to stay.

    Per event: half for success in the window (happened, in order; half of that for the pace), half for closeness of
    its progress to a prompt start at the nominal pace, until two chunks after its nominal end (0 for a video that
    stands still); all that times the share of intact frames in the window.
    """
    device = frames.device
    first = torch.tensor([start for start, _ in windows], device=device) - 1
    length = torch.tensor([end - start for start, end in windows], device=device)
    assert int(first.min()) >= 0
    shapes = torch.tensor([timeline.opening(story.entities)[1] for story in stories], device=device)
    tracked = _window(track(frames, shapes), first, first + length)
    script = timeline.write_script(_states_of(tracked, stories), stories, [tuple(e) for e in events], device)
    verdict = _judge(tracked, script, to_be_continued=True)
    frame = torch.arange(tracked.clutter.shape[1], device=device)
    inside = (frame >= 1) & (frame <= length[:, None])  # [V, frames of the longest window]

    wanted = _expected(script, len(frame))
    due = (script.nominal * script.exists).sum(1, keepdim=True)
    weight = (inside & (frame <= due + GRACE))[:, None].float()
    error = ((verdict.progress.clamp(-0.5, 1.5) - wanted).abs() * weight).sum(-1)
    closeness = (1.0 - error / (wanted.abs() * weight).sum(-1).clamp_min(1e-3)).clamp(0.0, 1.0)
    success = verdict.happened * verdict.in_order * (0.5 + 0.5 * verdict.on_time)
    credit = torch.where(_idle(script), 1.0, 0.5 * success + 0.5 * closeness) * script.exists
    score = torch.where(verdict.events > 0, credit.sum(1) / verdict.events.clamp_min(1), 1.0)
    return score * (verdict.intact * inside).sum(1) / length


@torch.no_grad()
def verify_opening(frames: Tensor, stories: Sequence[Story]) -> Tensor:
    """Share of intact frames of videos in which the story's opening stands and nothing happens: [V] in [0, 1].

    frames [V, F, 3, SIZE, SIZE] in [0, 1].
    """
    openings = [timeline.opening(story.entities)[0] for story in stories]
    script = timeline.write_script(openings, stories, [()] * len(stories), frames.device)
    return _judge(track(frames, script.shapes), script, to_be_continued=True).intact.mean(1)


def _idle(script: Script) -> Tensor:
    """[V, E] bool, True for an event that asks for a state that is there already."""
    tolerance = torch.tensor(TOLERANCE, device=script.held.device)
    pick = script.slot[..., None, None].expand(*script.slot.shape, 1, 3)
    peak, held = (script.of_events(values).gather(2, pick)[:, :, 0] for values in (script.peak, script.held))
    return (peak - held).abs().amax(-1) < tolerance[script.channel]


def _states_of(tracked: Tracked, stories: Sequence[Story]) -> list[State]:
    """The settled state in the first frame of each video."""
    opacity = tracked.ink[:, :, 0].amax(-1)
    colour = tracked.ink[:, :, 0] / opacity.clamp_min(0.05)[..., None]
    scalars = torch.stack([tracked.x[:, :, 0], tracked.y[:, :, 0], tracked.radius[:, :, 0], opacity], -1)
    rows = torch.cat([scalars, colour], -1).tolist()
    return [_settled_state(tracks, story) for tracks, story in zip(rows, stories, strict=True)]


@torch.no_grad()
def picture_quality(frames: Tensor) -> Tensor:
    """Closeness of each frame to a clean drawing of the shapes found in it, at most one a row.

    frames [V, F, 3, SIZE, SIZE] in [0, 1]. Returns [V, F] in (0, 1]: exp(-error / ERROR_SCALE) with the root mean
    square error of the re-drawing. An empty picture is clean.
    """
    frames = frames.float()
    tracked = track(frames)
    tracks = torch.ones(*tracked.x.shape, TRACK, device=frames.device)
    tracks[..., X], tracks[..., Y], tracks[..., RADIUS] = tracked.x, tracked.y, tracked.radius
    tracks[..., COLOUR:] = tracked.ink
    again = draw(tracks.transpose(1, 2), tracked.shape.transpose(1, 2))
    error = (frames - again).square().mean((-3, -2, -1)).sqrt()
    return torch.exp(-(error - FREE_ERROR).clamp_min(0.0) / ERROR_SCALE)


@torch.no_grad()
def duplicates(frames: Tensor, stories: Sequence[Story]) -> Tensor:
    """Share of frames [V] with an extra or a misplaced shape.

    frames [V, F, 3, SIZE, SIZE] in [0, 1]. Extra: ink away from the shapes, or a shape in a row that the story leaves
    empty. Misplaced: a visible shape off its row (jumps excepted), or standing still where the story never has it.
    """
    shapes = torch.tensor([timeline.opening(story.entities)[1] for story in stories], device=frames.device)
    columns = torch.tensor([_told_columns(story) for story in stories], device=frames.device)  # [V, R, columns]
    tracked = track(frames, shapes)
    visible = tracked.ink.amax(-1) >= DISTINCT
    row_y = torch.tensor(ROW_Y, device=frames.device)[:, None]
    off_row = (tracked.y > row_y + TOLERANCE[Y]) | (tracked.y < row_y - JUMP_HEIGHT - TOLERANCE[Y])
    off_column = (tracked.x[..., None] - columns[:, :, None]).abs().amin(-1) > TOLERANCE[X]
    step = tracked.x.diff(dim=-1).abs()
    fastest = torch.maximum(torch.cat([step[..., :1], step], -1), torch.cat([step, step[..., -1:]], -1))
    misplaced = (off_row | (off_column & (fastest < STILL)) | (shapes < 0)[..., None]) & visible
    return ((tracked.clutter > EXTRA_INK) | misplaced.any(1)).float().mean(1)


def _told_columns(story: Story) -> list[list[float]]:
    """For every row the x that its shape has at some time, filled up with -inf to the number of columns."""
    told: list[set[float]] = [set() for _ in ROW_Y]
    for scene in states(story):
        for entity in scene:
            told[entity.row].add(COLUMN_X[entity.column])
    return [sorted(row) + [float("-inf")] * (len(COLUMN_X) - len(row)) for row in told]
