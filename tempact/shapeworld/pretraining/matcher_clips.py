"""Performances for the judge's training: a story told well or badly, drawn on the device, with its score.

Everything is vectorised over videos, so that each training step sees performances that no earlier step saw: right
ones at any timing; events left out, cut half way, at the wrong pace, with the wrong argument or entity, out of order,
at once, early or added; frozen videos; duplicated, misplaced or noisy pictures. Slight blur, noise, jitter, flicker and
colour drift come on top, as generated videos have them, and leave the score as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tempact.shapeworld.pretraining.clips import APPEAR, BLINK, JUMP, NONE, Acts, changed_columns, constant, play
from tempact.shapeworld.story import (
    COLOUR,
    COLOURS,
    COLUMN_X,
    COLUMNS,
    FRAMES,
    KINDS,
    OPACITY,
    RADII,
    RADIUS,
    ROW_Y,
    SHAPES,
    TRACK,
    Story,
    X,
    Y,
    draw,
    entity_track,
    states,
)

EVENTS = 4  # at most that many a story
ARGUMENTS = ("", *COLUMNS, *COLOURS)
SPOILED = 0.7  # share of the score that a picture costs which is wrong in at least half of the frames
CAN_BE_SLOW = (*KINDS.values(), False)  # by kind


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


class StoryTable(NamedTuple):
    """Stories as tensors (S stories, L tokens).

    tracks [S, 2, TRACK] opening state, shapes [S, 2], present [S, 2] bool, kinds [S, EVENTS] (NONE past the last),
    actors [S, EVENTS], values [S, EVENTS, TRACK] settled track after the event, slow [S, EVENTS] bool,
    arguments [S, EVENTS] indices into ARGUMENTS, tokens [S, L].
    """

    tracks: Tensor
    shapes: Tensor
    present: Tensor
    kinds: Tensor
    actors: Tensor
    values: Tensor
    slow: Tensor
    arguments: Tensor
    tokens: Tensor

    @classmethod
    def build(cls, stories: list[Story], tokens: Tensor) -> StoryTable:
        columns = zip(*map(_row, stories), strict=True)
        return cls(*(*map(torch.tensor, columns), tokens))

    def to(self, device: str | torch.device) -> StoryTable:
        return StoryTable(*(values.to(device) for values in self))

    def take(self, rows: Tensor) -> StoryTable:
        return StoryTable(*(values[rows] for values in self))


def _row(story: Story) -> tuple[list, ...]:
    """A story's row of the table, without its tokens."""
    tracks = [list(entity_track(entity)) for entity in story.entities]
    events = [
        (tuple(KINDS).index(event.kind), event.entity, list(entity_track(after[event.entity])), event.slow,
         ARGUMENTS.index(event.argument))
        for event, after in zip(story.events, states(story)[1:], strict=True)
    ]  # fmt: skip
    events += [(NONE, 0, [0.0] * TRACK, False, 0)] * (EVENTS - len(events))
    absent = 2 - len(tracks)
    other = [COLUMN_X[1], sum(ROW_Y) - tracks[0][Y], RADII["normal"], 0.0, 0.0, 0.0, 0.0]
    shapes = [SHAPES.index(entity.shape) for entity in story.entities] + [0] * absent
    present = [True] * len(tracks) + [False] * absent
    return tracks + [other] * absent, shapes, present, *map(list, zip(*events, strict=True))


class Performance(NamedTuple):
    """V videos and their labels.

    frames [V, F, 3, 24, 24], tokens [V, L] of the instruction, target [V] in [0, 1]. For auxiliary losses: intact [V],
    the share of the score that the picture leaves; the told events' kinds, shapes, arguments, slow [V, EVENTS]; told
    [V, EVENTS], 1 where the event is shown right and in order; when [V, EVENTS, 2] its first and last frame (FRAMES:
    never); busy [V, F, 2] the kind going on in each row of the picture (NONE: still); state [V, F, 2, TRACK] the
    tracks by row.
    """

    frames: Tensor
    tokens: Tensor
    target: Tensor
    intact: Tensor
    kinds: Tensor
    shapes: Tensor
    arguments: Tensor
    slow: Tensor
    told: Tensor
    when: Tensor
    busy: Tensor
    state: Tensor


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Values [V, A, ...] of the acts with index [V, B]: [V, B, ...]."""
    return torch.take_along_dim(values, index if values.dim() == 2 else index[..., None], 1)


def _random_acts(dice: Dice, story: StoryTable, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kinds, actors, values and pace of `count` events that no text asked for."""
    device = dice.device
    kinds, actors = dice.integer(0, NONE - 1, count), dice.integer(0, 1, count) * story.present[:, 1:].long()
    column = constant(COLUMN_X, device)[dice.integer(0, 2, count)]
    colour = constant(tuple(COLOURS.values()), device)[dice.integer(0, len(COLOURS) - 1, count)]
    radius = torch.where(kinds == tuple(KINDS).index("grow"), RADII["large"], RADII["small"])
    alpha = (kinds == APPEAR).float()
    values = torch.cat([torch.stack([column, torch.zeros_like(column), radius, alpha], dim=-1), colour], dim=-1)
    slow = constant(CAN_BE_SLOW, device)[kinds] & dice.chance(0.3, count)
    return kinds, actors, values, slow


def _choose_acts(dice: Dice, story: StoryTable, flawed: Tensor) -> Acts:
    """The told events, some spoiled, and an added one that mostly does not play; in told order and not yet timed."""
    told = story.kinds != NONE
    fails = (flawed & dice.chance(0.5))[:, None] & dice.chance(0.45, EVENTS) & told
    how = dice.integer(0, 7, EVENTS)
    other_kind, other_actor, other_value, other_slow = _random_acts(dice, story, EVENTS)
    argued = story.arguments > 0
    replaced = fails & ((how == 5) | ((how > 5) & ~argued))
    missing = fails & ((how == 0) | (how == 3) | ((how == 4) & ~story.present[:, 1:]))
    can_be_slow = constant(CAN_BE_SLOW, dice.device)[story.kinds]
    kinds = torch.where(replaced, other_kind, story.kinds)
    swapped = (story.actors + (fails & (how == 4)).long()) % 2
    actors = torch.where(replaced, other_actor, torch.where(missing, story.actors, swapped))
    values = torch.where((replaced | (fails & (how > 5)))[..., None], other_value, story.values)
    slow = torch.where(replaced, other_slow, story.slow ^ (fails & (how == 2) & can_be_slow))
    limit = torch.where(fails & (how == 1), dice.uniform(0.1, 0.65, EVENTS), 1.0)

    own = (kinds, actors, values, slow)
    kinds, actors, values, slow = (torch.cat(pair, 1) for pair in zip(own, _added_act(dice, story), strict=True))
    added = (flawed & dice.chance(0.15))[:, None]
    plays = torch.cat([told & ~missing, added], dim=1)
    duration = _durations(dice, kinds, slow, plays)
    limit = F.pad(limit, (0, 1), value=1.0)
    place = torch.arange(EVENTS + 1, device=dice.device).expand_as(kinds)
    return Acts(kinds, actors, values, slow, plays, duration, limit, torch.zeros_like(kinds), place)


def _added_act(dice: Dice, story: StoryTable) -> tuple[Tensor, ...]:
    """Kind, actor, value and pace of one event more: a told one again, or any."""
    other = _random_acts(dice, story, 1)
    again = dice.integer(0, EVENTS - 1, 1)
    copy = dice.chance(0.4, 1) & (_at(story.kinds, again) != NONE)
    told = (_at(values, again) for values in (story.kinds, story.actors, story.values, story.slow))
    return tuple(torch.where(copy.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(told, other, strict=True))


def _durations(dice: Dice, kinds: Tensor, slow: Tensor, plays: Tensor) -> Tensor:
    """Frames of every act: about the nominal ones where all acts then fit into the video, else exactly those."""
    held = (kinds == JUMP) | (kinds == BLINK)  # these may last longer than other quick events
    more = dice.integer(-1, 2, EVENTS + 1)
    quick = 3 + torch.where(held, more, more.clamp_max(1) * dice.chance(0.5, EVENTS + 1))
    duration = torch.where(slow, 9 + dice.integer(-2, 2, EVENTS + 1) * dice.chance(0.6, 1), quick)
    tight = torch.where(plays, duration, 0).sum(1, keepdim=True) > FRAMES - 2
    return torch.where(tight, torch.where(slow, 9, 3), duration)


def _time_acts(dice: Dice, acts: Acts, flawed: Tensor) -> Acts:
    """Sorts the acts into the order of performance and gives each a start: random slack, disorder in flawed videos."""
    count = (acts.plays[:, :EVENTS]).sum(1, keepdim=True)
    disorder = torch.where((flawed & dice.chance(0.3))[:, None], dice.uniform(1.0, 5.0, 1), 0.0)
    key = acts.place + disorder * dice.uniform(0, 1, EVENTS + 1)
    key[:, EVENTS:] = dice.uniform(-0.5, 1.0, 1) * count
    order = torch.where(acts.plays, key, 99.0).argsort(dim=1)
    acts = Acts(*(_at(values, order) for values in acts))
    length = torch.where(acts.plays, (acts.duration * acts.limit).round().clamp_min(1), 0).long()
    slack = (FRAMES - 1 - length.sum(1, keepdim=True)).clamp_min(0)
    share = dice.uniform(0, 1, EVENTS + 2).log().square()  # uneven: often one long wait, at any place
    share[:, :-1] *= acts.plays
    gaps = ((slack + 1) * share / share.sum(1, keepdim=True)).long()
    at_once = (flawed & dice.chance(0.2))[:, None] & dice.chance(0.6, EVENTS + 1)
    early = dice.uniform(0, 0.85, EVENTS + 1)
    cursor = torch.ones_like(length[:, 0])
    before_start, before_length = torch.zeros_like(cursor), torch.zeros_like(cursor)
    starts = []
    for act in range(EVENTS + 1):
        start = cursor + gaps[:, act]
        overlapping = before_start + (early[:, act] * before_length).long()
        start = torch.where(at_once[:, act] & (before_length > 0), overlapping, start)
        starts.append(start)
        cursor = torch.maximum(cursor, start + length[:, act])
        playing = acts.plays[:, act]
        before_start = torch.where(playing, start, before_start)
        before_length = torch.where(playing, length[:, act], before_length)
    return acts._replace(start=torch.stack(starts, dim=1))


def _told(story: StoryTable, acts: Acts, shows: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Truth of performances that freeze after frame `last` [V].

    Returns the told events that are shown as told, at the right pace and after the events before them [V, EVENTS];
    their share in all events told or added [V]; and first and last frame of each told event, right in order and pace
    or not, FRAMES where it never comes [V, EVENTS, 2].
    """
    shows = shows & (acts.start <= last[:, None])
    added = (shows & (acts.place == EVENTS)).any(1)
    back = acts.place.argsort(dim=1)[:, :EVENTS]
    shows, acts = _at(shows, back), Acts(*(_at(values, back) for values in acts))
    whole = (acts.limit == 1) & (acts.start + acts.duration - 1 <= last[:, None])
    over = acts.start + (acts.duration * acts.limit).round().long()
    as_told = shows & (acts.kinds == story.kinds) & (acts.actors == story.actors)
    as_told &= (((acts.values - story.values).abs() < 0.1) | ~changed_columns(story.kinds)).all(-1)
    when = torch.stack([acts.start, torch.minimum(over - 1, last[:, None])], dim=-1)
    when = torch.where(as_told[..., None], when, FRAMES)
    early = shows[:, :, None] & (acts.start[:, None] < over[:, :, None] - 1)  # [V, i, j]: j starts before i is over
    early &= torch.ones(EVENTS, EVENTS, dtype=torch.bool, device=early.device).triu(1)
    told = as_told & whole & (acts.slow == story.slow) & ~early.any(1)
    return told, told.sum(1) / ((story.kinds != NONE).sum(1) + added), when


def _spoil_opening(dice: Dice, story: StoryTable, flawed: Tensor) -> tuple[Tensor, Tensor]:
    """Opening tracks and shapes, in some flawed videos with a wrong column, colour, row or shape."""
    device = dice.device
    opening, shapes = story.tracks.clone(), story.shapes.clone()
    spoiled = flawed & dice.chance(0.2)
    actor, how = dice.integer(0, 1) * story.present[:, 1], dice.integer(0, 5)
    chosen = F.one_hot(actor.long(), 2).bool() & spoiled[:, None]
    columns = constant(COLUMN_X, device)
    column = (torch.searchsorted(columns, opening[..., X].contiguous()) + dice.integer(1, 2)[:, None]) % len(COLUMNS)
    colour = constant(tuple(COLOURS.values()), device)[dice.integer(0, len(COLOURS) - 1)]
    opening[..., X] = torch.where(chosen & (how > 2)[:, None], columns[column], opening[..., X])
    opening[..., COLOUR:] = torch.where(
        (chosen & (how == 0)[:, None])[..., None], colour[:, None], opening[..., COLOUR:]
    )
    swap = (spoiled & (how == 1))[:, None]
    opening[..., Y] = torch.where(swap, sum(ROW_Y) - opening[..., Y], opening[..., Y])
    other = (shapes + dice.integer(1, len(SHAPES) - 1)[:, None]) % len(SHAPES)
    return opening, torch.where(chosen & (how == 2)[:, None], other, shapes)


def _spoil_picture(dice: Dice, tracks: Tensor, shapes: Tensor, flawed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Adds a third entity, a misplaced copy or nothing, and in some flawed videos moves an entity out of place.

    Returns tracks [V, F, 3, TRACK], shapes [V, 3] and True for wrong frames [V, F].
    """
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
    apart = ((copy[:, :, None, :2] - tracks[..., :2]).abs().amax(-1) > 6) | (tracks[..., OPACITY] < 0.5)
    shown = window & apart.all(-1) & ((how == 1) | (how == 2)) & (copy[..., OPACITY] > 0.5)
    copy[..., OPACITY] = shown * dice.uniform(0.5, 1, 1)
    offset = torch.where(dice.chance(0.5)[:, None], dice.uniform(4, 6, 1), dice.uniform(-6, -4, 1))
    away = (window & (how == 3))[..., None] & F.one_hot(source, 2).bool()[:, None]
    across = (dice.chance(0.5) | (tracks[:, 0, :, X] != COLUMN_X[1]).any(1))[:, None, None]
    tracks = tracks.clone()
    inward = torch.where(tracks[:, :1, :, Y] > sum(ROW_Y) / 2, -offset.abs()[..., None], offset.abs()[..., None])
    tracks[..., Y] += away * across * inward
    tracks[..., X] += away * ~across * offset[..., None]
    wrong = shown | (away & (tracks[..., OPACITY] > 0.5)).any(-1)
    shapes = torch.cat([shapes, shapes[row, source][:, None]], dim=1)
    return torch.cat([tracks, copy[:, :, None]], dim=2), shapes, wrong


def _film(dice: Dice, tracks: Tensor, shapes: Tensor, flawed: Tensor) -> tuple[Tensor, Tensor]:
    """Draws tracks with the slight faults of generated videos; returns frames, and the share of the score that heavy
    noise or blur leaves [V]."""
    strength = torch.where(dice.chance(0.25), 0.0, dice.uniform(0, 1))[:, None, None]
    entities = tracks.shape[2]
    tracks = tracks.clone()
    tracks[..., :2] += strength[..., None] * (
        dice.uniform(-0.5, 0.5, 1, entities, 2) + 0.12 * dice.normal(FRAMES, entities, 2)
    )
    tracks[..., RADIUS] *= 1 + strength * dice.uniform(-0.1, 0.1, 1, entities)
    tracks[..., OPACITY] *= 1 - strength * dice.uniform(0, 0.15, 1, entities)
    drift = strength[..., None] * dice.uniform(0, 0.15, 1, entities, 1)
    tracks[..., COLOUR:] = tracks[..., COLOUR:] * (1 - drift) + drift * dice.uniform(0, 1, 1, entities, 3)
    flicker = dice.chance(0.15)[:, None, None] & (dice.integer(0, 79, FRAMES, entities) == 0)
    tracks[..., OPACITY] *= torch.where(flicker, dice.uniform(0.4, 0.9, 1, 1), 1.0)
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


@torch.no_grad()
def perform(story: StoryTable, generator: torch.Generator) -> Performance:
    """One random performance of each story in the table, and its score; a share of 0.3 has no fault."""
    dice = Dice(len(story.tracks), generator)
    flawed = ~dice.chance(0.3)
    acts = _time_acts(dice, _choose_acts(dice, story, flawed), flawed)
    opening, shapes = _spoil_opening(dice, story, flawed)
    bend = dice.uniform(0.75, 1.33)
    tracks, shows, busy = play(opening, acts, bend)
    right, _, _ = play(story.tracks, acts, bend)
    freezes = flawed & dice.chance(0.08)
    last = torch.where(freezes, dice.integer(0, FRAMES - 2), FRAMES - 1)
    told, share, when = _told(story, acts, shows, last)
    time = torch.minimum(torch.arange(FRAMES, device=last.device), last[:, None])
    tracks, right = (x.gather(1, time[..., None, None].expand_as(x)) for x in (tracks, right))
    halted = (torch.arange(FRAMES, device=last.device) > last[:, None])[..., None]
    busy = torch.where(halted, NONE, busy)
    differs = (tracks - right).abs() > constant((2.0, 2.0, 99.0, 99.0, 0.4, 0.4, 0.4), tracks.device)
    wrong = ((differs.any(-1) | (shapes != story.shapes)[:, None]) & (tracks[..., OPACITY] > 0.5)).any(-1)
    drawn, drawn_shapes, misplaced = _spoil_picture(dice, tracks, shapes, flawed)
    frames, clean = _film(dice, drawn, drawn_shapes, flawed)
    damage = (2 * (wrong | misplaced).float().mean(1)).clamp_max(1)
    intact = clean * (1 - SPOILED * damage)

    # some videos get the text of another story, which is told nowhere in them
    strange = flawed & dice.chance(0.06)
    own = torch.arange(len(story.tracks), device=last.device)
    text = torch.where(strange, own.roll(1), own)
    asked = story.take(text)
    lower = (opening[:, 0, Y] > sum(ROW_Y) / 2)[:, None, None]
    return Performance(
        frames=frames,
        tokens=asked.tokens,
        target=torch.where(strange, 0.0, share * intact),
        intact=torch.where(strange, 0.0, intact),
        kinds=asked.kinds,
        shapes=asked.shapes.gather(1, asked.actors),
        arguments=asked.arguments,
        slow=asked.slow,
        told=torch.where(strange[:, None], 0.0, told),
        when=torch.where(strange[:, None, None], FRAMES, when),
        busy=torch.where(lower, busy.flip(-1), busy),
        state=torch.where(lower[..., None], tracks.flip(2), tracks),
    )
