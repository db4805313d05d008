"""Performances for the judge's training: a story told well or badly, drawn on the device, with its score.

Everything is vectorised over videos, so that each training step sees performances that no earlier one saw:
right ones at any timing, events left out, cut half way, at the wrong pace, with the wrong argument or entity,
out of order, at once, early or added, frozen videos, duplicated, misplaced or noisy pictures. Slight blur,
noise, jitter, flicker and colour drift come on top and leave the score as it is, as generated videos have them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from tempact.shapeworld.pretraining.matcher_pictures import (
    ALPHA,
    RADIUS,
    RED,
    Dice,
    X,
    Y,
    constant,
    film,
    spoil_picture,
)
from tempact.shapeworld.renderer import TRACK, entity_track
from tempact.shapeworld.story import (
    COLOURS,
    COLUMN_X,
    COLUMNS,
    FRAMES,
    JUMP_HEIGHT,
    KINDS,
    RADII,
    ROW_Y,
    SHAPES,
    SIZE,
    Story,
    apply_event,
)

EVENTS = 4  # at most that many a story
NONE = len(KINDS)  # kind index where there is no event
ARGUMENTS = ("", *COLUMNS, *COLOURS)
SPOILED = 0.7  # share of the score that a picture costs which is wrong in at least half of the frames
_KINDS = tuple(KINDS)
_JUMP, _BLINK, _APPEAR = _KINDS.index("jump"), _KINDS.index("blink"), _KINDS.index("appear")
_CHANNELS = {  # columns of a track that a kind changes for good
    "move": (X,), "turn": (RED, RED + 1, RED + 2), "grow": (RADIUS,), "shrink": (RADIUS,),
    "vanish": (ALPHA,), "appear": (ALPHA,),
}  # fmt: skip
_CHANGES = tuple(tuple(column in _CHANNELS.get(kind, ()) for column in range(TRACK)) for kind in (*_KINDS, ""))
_VISIBLE_CHANGE = (2.0, 99.0, 0.5, 0.5, 0.4, 0.4, 0.4)  # least change of a track value that makes an event


@dataclass
class StoryTable:
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
        rows = [_row(story) for story in stories]
        tracks, shapes, present, kinds, actors, values, slow, arguments = (
            torch.tensor(column) for column in zip(*rows, strict=True)
        )
        return cls(tracks, shapes, present, kinds, actors, values, slow, arguments, tokens)

    def __len__(self) -> int:
        return len(self.tracks)

    def to(self, device: str | torch.device) -> StoryTable:
        return StoryTable(*(getattr(self, f.name).to(device) for f in fields(self)))

    def take(self, rows: Tensor) -> StoryTable:
        return StoryTable(*(getattr(self, f.name)[rows] for f in fields(self)))


def _row(story: Story) -> tuple[list, ...]:
    scene = list(story.entities)
    tracks = [list(entity_track(entity)) for entity in scene]
    kinds, actors, values, slow, arguments = [], [], [], [], []
    for event in story.events:
        scene[event.entity] = apply_event(scene[event.entity], event)
        kinds.append(_KINDS.index(event.kind))
        actors.append(event.entity)
        values.append(list(entity_track(scene[event.entity])))
        slow.append(event.slow)
        arguments.append(ARGUMENTS.index(event.argument) if event.kind in ("move", "turn") else 0)
    missing = EVENTS - len(kinds)
    absent = 2 - len(scene)
    return (
        tracks + [[COLUMN_X[1], sum(ROW_Y) - tracks[0][Y], 3.0, 0.0, 0.0, 0.0, 0.0]] * absent,
        [SHAPES.index(entity.shape) for entity in scene] + [0] * absent,
        [True] * len(scene) + [False] * absent,
        kinds + [NONE] * missing,
        actors + [0] * missing,
        values + [[0.0] * TRACK] * missing,
        slow + [False] * missing,
        arguments + [0] * missing,
    )  # fmt: skip


@dataclass
class Performance:
    """V videos and what they show.

    frames [V, F, 3, 24, 24], tokens [V, L] of the instruction, target [V] in [0, 1]. For auxiliary losses: intact [V],
    what the picture leaves of the score; the told events' kinds, shapes, arguments, slow [V, EVENTS]; told [V, EVENTS],
    1 where the event is shown right and in order; when [V, EVENTS, 2] its first and last frame (FRAMES: never); busy
    [V, F, 2] the kind going on in each row of the picture (NONE: still), state [V, F, 2, TRACK] the track of what is
    there.
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


@dataclass
class _Acts:
    """What is played, in the order of start (EVENTS + 1 acts, the last of a story's is the added one).

    kinds, actors [V, A], values [V, A, TRACK], slow, plays [V, A] bool, start, duration [V, A] frames,
    limit [V, A] largest progress, below 1 for a cut event; place [V, A] index of the told event, EVENTS if added.
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


def _channel_mask(kinds: Tensor) -> Tensor:
    """[..., TRACK] True at the track values that a kind changes."""
    return constant(_CHANGES, kinds.device)[kinds]


def _random_acts(dice: Dice, story: StoryTable, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kinds, actors, values and pace of `count` events that no text asked for."""
    device = dice.device
    kinds, actors = dice.integer(0, NONE - 1, count), dice.integer(0, 1, count) * story.present[:, 1:].long()
    column = constant(COLUMN_X, device)[dice.integer(0, 2, count)]
    colour = constant(tuple(COLOURS.values()), device)[dice.integer(0, len(COLOURS) - 1, count)]
    radius = torch.where(kinds == _KINDS.index("grow"), RADII["large"], RADII["small"])
    alpha = (kinds == _APPEAR).float()
    values = torch.cat([torch.stack([column, torch.zeros_like(column), radius, alpha], dim=-1), colour], dim=-1)
    slow = constant((*KINDS.values(), False), device)[kinds] & dice.chance(0.3, count)
    return kinds, actors, values, slow


def _choose_acts(dice: Dice, story: StoryTable, flawed: Tensor) -> _Acts:
    """The told events with some spoiled, and the added one, in told order and not yet timed."""
    device, told = dice.device, story.kinds != NONE
    fails = (flawed & dice.chance(0.5))[:, None] & dice.chance(0.45, EVENTS) & told
    how = dice.integer(0, 7, EVENTS)
    other_kind, other_actor, other_value, other_slow = _random_acts(dice, story, EVENTS)
    argued = story.arguments > 0
    replaced = fails & ((how == 5) | ((how > 5) & ~argued))
    missing = fails & ((how == 0) | (how == 3) | ((how == 4) & ~story.present[:, 1:]))
    can_be_slow = constant((*KINDS.values(), False), device)[story.kinds]
    kinds = torch.where(replaced, other_kind, story.kinds)
    swapped = (story.actors + (fails & (how == 4)).long()) % 2
    actors = torch.where(replaced, other_actor, torch.where(missing, story.actors, swapped))
    values = torch.where((replaced | (fails & (how > 5)))[..., None], other_value, story.values)
    slow = torch.where(replaced, other_slow, story.slow ^ (fails & (how == 2) & can_be_slow))
    limit = torch.where(fails & (how == 1), dice.uniform(0.1, 0.65, EVENTS), 1.0)

    extra = _added_act(dice, story)
    kinds, actors, values, slow = (
        torch.cat(pair, dim=1) for pair in zip((kinds, actors, values, slow), extra, strict=True)
    )
    added = (flawed & dice.chance(0.15))[:, None]
    plays = torch.cat([told & ~missing, added], dim=1)
    duration = _durations(dice, kinds, slow, plays)
    limit = torch.cat([limit, torch.ones_like(limit[:, :1])], dim=1)
    place = torch.arange(EVENTS + 1, device=device).expand_as(kinds)
    return _Acts(kinds, actors, values, slow, plays, duration, limit, torch.zeros_like(kinds), place)


def _added_act(dice: Dice, story: StoryTable) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kind, actor, value and pace of one event more: a told one again, or any."""
    kinds, actors, values, slow = _random_acts(dice, story, 1)
    again = dice.integer(0, EVENTS - 1, 1)
    copy = dice.chance(0.4, 1) & (story.kinds.gather(1, again) != NONE)
    return (
        torch.where(copy, story.kinds.gather(1, again), kinds),
        torch.where(copy, story.actors.gather(1, again), actors),
        torch.where(copy[..., None], story.values.gather(1, again[..., None].expand_as(values)), values),
        torch.where(copy, story.slow.gather(1, again), slow),
    )


def _durations(dice: Dice, kinds: Tensor, slow: Tensor, plays: Tensor) -> Tensor:
    """Frames of every act: about the nominal ones where all acts then fit into the video, else exactly those."""
    held = (kinds == _JUMP) | (kinds == _BLINK)  # these may last longer than other quick events
    more = dice.integer(-1, 2, EVENTS + 1)
    quick = 3 + torch.where(held, more, more.clamp_max(1) * dice.chance(0.5, EVENTS + 1))
    duration = torch.where(slow, 9 + dice.integer(-2, 2, EVENTS + 1) * dice.chance(0.6, 1), quick)
    tight = torch.where(plays, duration, 0).sum(1, keepdim=True) > FRAMES - 2
    return torch.where(tight, torch.where(slow, 9, 3), duration)


def _time_acts(dice: Dice, acts: _Acts, flawed: Tensor) -> _Acts:
    """Sorts the acts into the order of playing and gives each a start: random slack, and in flawed videos disorder."""
    count = (acts.plays[:, :EVENTS]).sum(1, keepdim=True)
    disorder = torch.where((flawed & dice.chance(0.3))[:, None], dice.uniform(1.0, 5.0, 1), 0.0)
    key = acts.place + disorder * dice.uniform(0, 1, EVENTS + 1)
    key[:, EVENTS:] = dice.uniform(-0.5, 1.0, 1) * count
    order = torch.where(acts.plays, key, 99.0).argsort(dim=1)
    values = acts.values.gather(1, order[..., None].expand_as(acts.values))
    rest = {f.name: getattr(acts, f.name).gather(1, order) for f in fields(acts) if f.name != "values"}
    acts = _Acts(values=values, **rest)
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
    acts.start = torch.stack(starts, dim=1)
    return acts


def _play(opening: Tensor, acts: _Acts, bend: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tracks [V, F, 2, TRACK] of the acts from `opening` [V, 2, TRACK], whether each act shows [V, A], and the kind
    going on [V, F, 2]. Progress is linear to the power of `bend` [V]."""
    videos, device = len(opening), opening.device
    time = torch.arange(FRAMES, device=device)
    tracks = opening[:, None].expand(-1, FRAMES, -1, -1)
    lift, hidden = torch.zeros_like(tracks[..., 0]), torch.zeros_like(tracks[..., 0], dtype=torch.bool)
    busy = torch.full((videos, FRAMES, 2), NONE, device=device)
    changes, shows = _channel_mask(acts.kinds), []
    least = constant(_VISIBLE_CHANGE, device)
    for act in range(EVENTS + 1):
        kind, start = acts.kinds[:, act], acts.start[:, act]
        row = torch.arange(videos, device=device)
        base = tracks[row, (start - 1).clamp(0, FRAMES - 1), acts.actors[:, act]]
        progress = (time - start[:, None] + 1) / acts.duration[:, act, None]
        progress = progress.clamp(0, 1) ** bend[:, None]
        progress = torch.minimum(progress, acts.limit[:, act, None])
        changed = (((acts.values[:, act] - base).abs() > least) & changes[:, act]).any(1)
        changed |= (kind == _JUMP) | (kind == _BLINK)
        shows.append(changed & ((base[:, ALPHA] > 0.5) | (kind == _APPEAR)) & acts.plays[:, act])
        begun = (time >= start[:, None]) & shows[-1][:, None]
        own = begun[..., None] & F.one_hot(acts.actors[:, act], 2).bool()[:, None]  # [V, F, 2]
        moved = base[:, None] + progress[..., None] * (acts.values[:, act] - base)[:, None]
        tracks = torch.where(own[..., None] & changes[:, act, None, None], moved[:, :, None], tracks)
        unfinished = own & (progress < 1)[..., None]
        lift = lift + JUMP_HEIGHT * (unfinished & (kind == _JUMP)[:, None, None])
        hidden = hidden | (unfinished & (kind == _BLINK)[:, None, None])
        going = time < (start + acts.duration[:, act])[:, None]
        busy = torch.where(own & going[..., None], kind[:, None, None], busy)
    tracks = tracks.clone()
    tracks[..., Y] -= lift.clamp_max(JUMP_HEIGHT)
    tracks[..., ALPHA] *= ~hidden
    return tracks, torch.stack(shows, dim=1), busy


def _told(story: StoryTable, acts: _Acts, shows: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which told events are shown as told, at the right pace and after those before them [V, EVENTS], the share of
    them in all that was told or added [V], and the first and last frame of each told event, right in order and pace or
    not, FRAMES where it never comes [V, EVENTS, 2]. `last` [V] is the last frame before the video freezes."""
    shows = shows & (acts.start <= last[:, None])
    added = (shows & (acts.place == EVENTS)).any(1)
    back = acts.place.argsort(dim=1)
    whole = (acts.limit == 1) & (acts.start + acts.duration - 1 <= last[:, None])
    over = acts.start + (acts.duration * acts.limit).round().long()
    start, over, shows, whole, slow, kinds, actors = (
        x.gather(1, back)[:, :EVENTS] for x in (acts.start, over, shows, whole, acts.slow, acts.kinds, acts.actors)
    )
    values = acts.values.gather(1, back[..., None].expand_as(acts.values))[:, :EVENTS]
    as_told = shows & (kinds == story.kinds) & (actors == story.actors)
    as_told &= (((values - story.values).abs() < 0.1) | ~_channel_mask(story.kinds)).all(-1)
    when = torch.stack([start, torch.minimum(over - 1, last[:, None])], dim=-1)
    when = torch.where(as_told[..., None], when, FRAMES)
    early = shows[:, :, None] & (start[:, None] < over[:, :, None] - 1)  # [V, i, j]: j starts before i is over
    early &= torch.ones(EVENTS, EVENTS, dtype=torch.bool, device=early.device).triu(1)
    told = as_told & whole & (slow == story.slow) & ~early.any(1)
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
    opening[..., RED:] = torch.where((chosen & (how == 0)[:, None])[..., None], colour[:, None], opening[..., RED:])
    swap = (spoiled & (how == 1))[:, None]
    opening[..., Y] = torch.where(swap, sum(ROW_Y) - opening[..., Y], opening[..., Y])
    other = (shapes + dice.integer(1, len(SHAPES) - 1)[:, None]) % len(SHAPES)
    return opening, torch.where(chosen & (how == 2)[:, None], other, shapes)


@torch.no_grad()
def perform(story: StoryTable, generator: torch.Generator) -> Performance:
    """One random performance of each story in `story`, and its score; 0.3 of them without any fault."""
    dice = Dice(len(story), generator)
    flawed = ~dice.chance(0.3)
    acts = _time_acts(dice, _choose_acts(dice, story, flawed), flawed)
    opening, shapes = _spoil_opening(dice, story, flawed)
    bend = dice.uniform(0.75, 1.33)
    tracks, shows, busy = _play(opening, acts, bend)
    right, _, _ = _play(story.tracks, acts, bend)
    freezes = flawed & dice.chance(0.08)
    last = torch.where(freezes, dice.integer(0, FRAMES - 2), FRAMES - 1)
    told, share, when = _told(story, acts, shows, last)
    time = torch.minimum(torch.arange(FRAMES, device=last.device), last[:, None])
    tracks, right = (x.gather(1, time[..., None, None].expand_as(x)) for x in (tracks, right))
    halted = (torch.arange(FRAMES, device=last.device) > last[:, None])[..., None]
    busy = torch.where(halted, NONE, busy)
    differs = (tracks - right).abs() > constant((2.0, 2.0, 99.0, 99.0, 0.4, 0.4, 0.4), tracks.device)
    wrong = ((differs.any(-1) | (shapes != story.shapes)[:, None]) & (tracks[..., ALPHA] > 0.5)).any(-1)
    drawn, drawn_shapes, misplaced = spoil_picture(dice, tracks, shapes, flawed)
    frames, clean = film(dice, drawn, drawn_shapes, flawed)
    damage = (2 * (wrong | misplaced).float().mean(1)).clamp_max(1)
    intact = clean * (1 - SPOILED * damage)

    # some videos get the text of another story, which is told nowhere in them
    strange = flawed & dice.chance(0.06)
    own = torch.arange(len(story), device=last.device)
    text = torch.where(strange, own.roll(1), own)
    asked = story.take(text)
    lower = (opening[:, 0, Y] > SIZE / 2)[:, None, None]
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
