"""The exact judge: ground truth scores near 1, and nothing that a policy might find instead comes close."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from shapeworld_films import picture, reference_cues, shape_indices, tell
from torch import Tensor

from tempact.errors import UserError
from tempact.shapeworld.grammar import sample_story
from tempact.shapeworld.pretraining.clips import Cue, relaxed_cues
from tempact.shapeworld.pretraining.matcher import corrupt, draw_corrupted
from tempact.shapeworld.story import (
    COLUMN_X,
    FRAMES,
    KINDS,
    OPACITY,
    RADIUS,
    ROW_Y,
    SHAPES,
    TRACK,
    Entity,
    Event,
    Story,
    X,
    Y,
)
from tempact.shapeworld.verifier import Verdict, verify, verify_steps
from tempact.shapeworld.verifier.tracking import track

CIRCLE = Entity("circle", "red", 0, 0)
SQUARE = Entity("square", "blue", 1, 2)
MOVE, TURN, JUMP = Event("move", 0, "right"), Event("turn", 1, "green"), Event("jump", 0)
STORY = Story((CIRCLE, SQUARE), (MOVE, TURN, JUMP))


def film(story: Story, cues: Sequence[Cue] | None = None, edit: Callable[[np.ndarray], None] | None = None) -> Tensor:
    """One video [1, F, 3, size, size]; `edit` changes its tracks [F, 3, TRACK], the last one is free for a copy."""
    tracks = tell(story.entities, reference_cues(story) if cues is None else cues)
    tracks = np.concatenate([tracks, np.zeros((FRAMES, 1, TRACK), np.float32)], 1)
    shapes = np.append(shape_indices(story.entities), SHAPES.index(story.entities[0].shape))
    if edit is not None:
        edit(tracks)
    return picture([tracks], [shapes])


def score(frames: Tensor, story: Story = STORY) -> float:
    return verify(frames, [story]).score.item()


def all_right(verdict: Verdict) -> Tensor:
    """[V] True where every event happened, calm, in order and on time."""
    parts = torch.stack([verdict.happened, verdict.in_order, verdict.on_time, verdict.calm])
    untold = torch.arange(parts.shape[2]) >= verdict.events[:, None]
    return ((parts > 0.5).all(0) | untold).all(1)


def soften(frames: Tensor, noise: float = 0.03) -> Tensor:
    """As pictures of a small generator look: a little blurred and noisy."""
    blurred = torch.nn.functional.avg_pool2d(frames.flatten(0, 1), 3, 1, 1).view_as(frames)
    dots = torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    return (0.6 * frames + 0.4 * blurred + noise * dots).clamp(0.0, 1.0)


@pytest.fixture(scope="module")
def stories() -> list[Story]:
    rng = random.Random(1)
    return [sample_story(rng, "train", None, category=rng.choice(("simple", "hard"))) for _ in range(150)]


@pytest.fixture(scope="module")
def truth(stories: list[Story]) -> Tensor:
    rng = random.Random(2)
    return picture(
        [tell(s.entities, relaxed_cues(s, rng)) for s in stories], [shape_indices(s.entities) for s in stories]
    )


def each_kind() -> list[Story]:
    """Every event kind at every pace, for every shape."""
    arguments = {"move": "middle", "turn": "purple"}
    out = []
    for shape in SHAPES:
        for kind, can_be_slow in KINDS.items():
            for slow in (False, True)[: 1 + can_be_slow]:
                actor = replace(CIRCLE, shape=shape, colour="yellow", visible=kind != "appear")
                other = replace(SQUARE, shape="cross" if shape != "cross" else "square")
                out.append(Story((actor, other), (Event(kind, 0, arguments.get(kind, ""), slow),)))
    return out


@pytest.mark.parametrize("change", [lambda f: f, soften, lambda f: 0.9 * f], ids=["clean", "soft", "dim"])
def test_ground_truth_of_every_kind_pace_and_shape(change: Callable[[Tensor], Tensor]) -> None:
    told = each_kind()
    frames = change(torch.cat([film(story) for story in told]))
    verdict = verify(frames, told)
    assert verdict.score.min() > 0.95
    assert all_right(verdict).all()


def test_ground_truth_of_drawn_stories(stories: list[Story], truth: Tensor) -> None:
    clean, soft = verify(truth, stories), verify(soften(truth), stories)
    assert clean.score.min() > 0.95 and all_right(clean).all() and clean.intact.mean(1).min() > 0.97
    assert soft.score.mean() > 0.95 and soft.score.quantile(0.05) > 0.9


def test_event_count_in_a_batch_does_not_change_a_score(stories: list[Story], truth: Tensor) -> None:
    frames = soften(truth[:12])
    together = verify(frames, stories[:12]).score
    alone = torch.cat([verify(frames[i : i + 1], [stories[i]]).score for i in range(12)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0.0)


# name, the most that a corrupted video may score on average
CORRUPTED = {
    "shuffled": 0.45,
    "missing": 0.55,
    "cut": 0.45,
    "overlapping": 0.55,
    "duplicated": 0.2,
    "misplaced": 0.2,
    "argument": 0.5,
    "frozen": 0.001,
}


@pytest.mark.parametrize("kind", CORRUPTED)
def test_corrupted_stories_are_clearly_lower(kind: str, stories: list[Story]) -> None:
    rng = random.Random(3)
    made = [(story, corrupt(story, kind, rng)) for story in stories]
    made = [(story, c) for story, c in made if c.kind == kind]
    scores = verify(draw_corrupted([c for _, c in made]), [s for s, _ in made]).score
    assert len(made) >= 30
    assert scores.mean() < CORRUPTED[kind]
    # a story of n events, one of them wrong, keeps (n - 1) / n; "shuffled" may swap two equal events
    assert scores.quantile(0.98) < 0.8


@pytest.mark.parametrize("slow", [False, True])
def test_wrong_pace(slow: bool) -> None:
    """A slow event that is over after one chunk, a quick one that takes three."""
    for event in (Event("move", 0, "right"), Event("turn", 0, "cyan"), Event("grow", 0), Event("vanish", 0)):
        wanted = Story((CIRCLE, SQUARE), (replace(event, slow=slow),))
        frames = film(wanted, [Cue(replace(event, slow=not slow), 3)])
        assert score(frames, wanted) < 0.6
        assert verify(frames, [wanted]).on_time[0, 0] < 0.1


@pytest.mark.parametrize("late", [0, 1, 3, 9])
def test_order_and_pace_count_and_not_the_start(late: int) -> None:
    assert score(film(STORY, [replace(cue, start=cue.start + late) for cue in reference_cues(STORY)])) > 0.95


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
def test_orders(order: tuple[int, ...]) -> None:
    cues = [Cue(STORY.events[i], 3 + 4 * place) for place, i in enumerate(order)]
    verdict = verify(film(STORY, cues), [STORY])
    assert verdict.score.item() < 0.5
    assert verdict.happened[0, :3].min() > 0.9  # they did happen, all of them
    assert verdict.in_order[0, :3].min() < 0.1


@pytest.mark.parametrize("overlap,credit", [(0, 1.0), (1, 1.0), (3, 0.2)])
def test_overlapping_events(overlap: int, credit: float) -> None:
    two = Story(STORY.entities, (MOVE, TURN))
    got = score(film(two, [Cue(MOVE, 3), Cue(TURN, 6 - overlap)]), two)
    assert got == pytest.approx(credit, abs=0.06)


def test_a_quick_event_inside_a_slow_one() -> None:
    for first, second in ((JUMP, replace(TURN, slow=True)), (replace(TURN, slow=True), JUMP)):
        story = Story(STORY.entities, (first, second))
        assert score(film(story, [Cue(first, 3), Cue(second, 3)]), story) < 0.25


def test_change_behind_a_blink_is_not_seen() -> None:
    story = Story(STORY.entities, (Event("grow", 0), Event("blink", 0)))
    assert score(film(story, [Cue(story.events[0], 3), Cue(story.events[1], 3)]), story) < 0.4


def test_missing_events_and_what_the_rest_is_worth() -> None:
    cues = reference_cues(STORY)
    got = [score(film(STORY, cues[:i] + cues[i + 1 :])) for i in range(3)]
    # the first of three lacks: the next keeps 0.15 + 0.5 * 0.85, the last all
    assert got[0] == pytest.approx((0.575 + 1.0) / 3, abs=0.02)
    assert got[1] == pytest.approx((1.0 + 0.575) / 3, abs=0.02)
    assert got[2] == pytest.approx(2 / 3, abs=0.02)
    assert score(film(STORY, cues[:1])) < 0.35


def hold_at(
    channel: int, entity: int, value: float, start: int = 0, stop: int = FRAMES
) -> Callable[[np.ndarray], None]:
    def edit(tracks: np.ndarray) -> None:
        tracks[start:stop, entity, channel] = value

    return edit


def copy_at(column: int, row: int, opacity: float, start: int = 0) -> Callable[[np.ndarray], None]:
    def edit(tracks: np.ndarray) -> None:
        tracks[start:, 2] = tracks[start:, 0]
        tracks[start:, 2, X], tracks[start:, 2, Y], tracks[start:, 2, OPACITY] = COLUMN_X[column], ROW_Y[row], opacity

    return edit


def scaled(channel: int, factor: float) -> Callable[[np.ndarray], None]:
    def edit(tracks: np.ndarray) -> None:
        tracks[:, :, channel] *= factor

    return edit


def swap_colours(tracks: np.ndarray) -> None:
    tracks[:, :2, 4:] = tracks[:, 1::-1, 4:].copy()


def swap_rows(tracks: np.ndarray) -> None:
    tracks[:, :2, Y] = tracks[:, 1::-1, Y].copy()


def flicker(tracks: np.ndarray) -> None:
    tracks[::2, 0, OPACITY] = 0.0


HOLES = {
    "a copy in the row": (copy_at(1, 0, 1.0), 0.05),
    "a copy in the other row": (copy_at(0, 1, 1.0), 0.05),
    "a faint copy": (copy_at(1, 1, 0.35), 0.05),
    "a copy from the middle on": (copy_at(0, 1, 1.0, 12), 0.3),
    "a copy at the end": (copy_at(0, 1, 1.0, 18), 0.6),
    "a copy of what moved stays behind": (copy_at(0, 0, 1.0, 4), 0.05),
    "half-faded": (scaled(OPACITY, 0.6), 0.05),
    "too large": (scaled(RADIUS, 1.3), 0.05),
    "too small": (scaled(RADIUS, 0.7), 0.05),
    "colours swapped": (swap_colours, 0.05),
    "rows swapped": (swap_rows, 0.05),
    "flicker": (flicker, 0.1),
    "a row too low": (hold_at(Y, 1, ROW_Y[1] + 2.5), 0.05),
    "moved without being told": (hold_at(X, 1, COLUMN_X[1]), 0.05),
    "gone without being told": (hold_at(OPACITY, 1, 0.0, 12), 0.25),
    "back for the last frames": (hold_at(X, 0, COLUMN_X[0], 18), 0.55),
    "vanishes for a while": (hold_at(OPACITY, 1, 0.0, 13, 19), 0.6),
    "never quite there": (hold_at(X, 0, 17.5, 5), 0.3),
}


@pytest.mark.parametrize("name", HOLES)
def test_holes(name: str) -> None:
    edit, most = HOLES[name]
    assert score(film(STORY)) > 0.95
    assert score(film(STORY, edit=edit)) <= most
    assert score(soften(film(STORY, edit=edit))) <= most


@pytest.mark.parametrize("wrong", SHAPES)
@pytest.mark.parametrize("right", SHAPES)
def test_shape_class(right: str, wrong: str) -> None:
    other = next(shape for shape in SHAPES if shape not in (right, wrong))
    story = Story((replace(CIRCLE, shape=right), replace(SQUARE, shape=other)), STORY.events)
    drawn = replace(story, entities=(replace(CIRCLE, shape=wrong), story.entities[1]))
    got = score(film(drawn), story)
    assert got > 0.95 if right == wrong else got < 0.1


FRAME = torch.arange(FRAMES).view(-1, 1, 1, 1)
PICTURES: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "tint": (lambda f: (f + 0.15).clamp(0, 1), 0.01),
    "half as bright": (lambda f: 0.5 * f, 0.01),
    "inverted": (lambda f: 1 - f, 0.01),
    "grey": (lambda f: torch.full_like(f, 0.5), 0.01),
    "black": (torch.zeros_like, 0.001),
    "white noise": (lambda f: torch.rand(f.shape, generator=torch.Generator().manual_seed(0)), 0.001),
    "noisy": (lambda f: (f + 0.2 * torch.randn(f.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1), 0.1),
    "smeared": (lambda f: torch.maximum(f, 0.5 * f.roll(3, -1)), 0.3),
    "doubled": (lambda f: torch.maximum(f, f.roll(4, -1)), 0.1),
    "first frame frozen": (lambda f: f[:, :1].expand_as(f), 0.001),
    "last frame frozen": (lambda f: f[:, -1:].expand_as(f), 0.001),
    "backwards": (lambda f: f.flip(1), 0.15),
    "first dissolves into last": (lambda f: f[:, :1].lerp(f[:, -1:], FRAME / (FRAMES - 1)), 0.1),
    "first and last at once": (lambda f: torch.maximum(f[:, :1], f[:, -1:]).expand_as(f), 0.01),
    "every other frame is the last": (lambda f: torch.where(FRAME % 2 == 0, f[:, -1:], f), 0.6),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name: str) -> None:
    change, most = PICTURES[name]
    assert score(change(film(STORY))) <= most


def test_event_done_by_both_or_by_the_other() -> None:
    for event in (Event("move", 0, "middle"), Event("turn", 0, "yellow"), Event("jump", 0), Event("vanish", 0)):
        story = Story(STORY.entities, (event,))
        other = replace(event, entity=1)
        assert score(film(story, [Cue(other, 3)]), story) < 0.01
        both = score(film(story, [Cue(event, 3), Cue(other, 3)]), story)
        assert both < (0.6 if event.kind == "jump" else 0.05)  # the other's jump is over after two frames


def test_appearing_twice_and_reverting() -> None:
    hidden = Story((replace(CIRCLE, visible=False), SQUARE), (Event("appear", 0),))
    twice = [Cue(Event("appear", 0), 3), Cue(Event("vanish", 0), 9), Cue(Event("appear", 0), 15)]
    assert score(film(hidden), hidden) > 0.95
    assert score(film(hidden, twice), hidden) < 0.6
    assert score(film(hidden, twice[:2]), hidden) < 0.05
    assert score(film(hidden, edit=hold_at(X, 0, COLUMN_X[1])), hidden) < 0.05  # at the wrong place
    assert score(film(hidden, edit=copy_at(1, 0, 1.0, 5)), hidden) < 0.05  # the prototype's hole: two copies


def test_a_ghost_that_touches_its_shape() -> None:
    """Too near for being clutter of its own."""
    story = Story((CIRCLE,), (Event("turn", 0, "blue"),))
    frames = film(story)
    assert score(torch.maximum(frames, 0.5 * frames.roll(3, -1)), story) < 0.6 < 0.95 < score(soften(frames), story)


def test_what_an_event_leads_to_is_not_there_before_it() -> None:
    story = Story(STORY.entities, (JUMP, Event("move", 0, "middle")))
    early = replace(story, entities=(replace(CIRCLE, column=1), SQUARE))
    assert score(film(early), story) < 0.01


def test_what_an_event_leads_to_stays() -> None:
    story = Story(STORY.entities, (MOVE,))
    reverted = [film(story, edit=hold_at(X, 0, COLUMN_X[0], back)) for back in (24, 18, 8)]
    happened = verify(torch.cat(reverted), [story] * 3).happened[:, 0].tolist()
    assert happened[0] == 1.0
    assert 0.3 < happened[1] < 0.7
    assert happened[2] == 0.0


def test_untold_events_cost() -> None:
    got = score(film(STORY, [*reference_cues(STORY), Cue(Event("jump", 1), 15)]))
    assert 0.7 < got < 0.9
    moved = score(film(STORY, [*reference_cues(STORY), Cue(Event("move", 1, "left"), 15)]))
    assert moved < 0.55


def test_teleporting_keeps_less_than_moving() -> None:
    story = Story(STORY.entities, (MOVE,))
    jumpy = film(story, edit=lambda tracks: tracks[:, 0, X].put(range(FRAMES), [4.0] * 4 + [20.0] * (FRAMES - 4)))
    assert score(jumpy, story) < 0.8 < score(film(story), story)


def test_tracking_is_exact_to_a_fraction_of_a_pixel() -> None:
    rng = np.random.default_rng(0)
    tracks = np.ones((60, FRAMES, 2, TRACK), np.float32)
    tracks[..., X] = rng.uniform(4, 20, tracks.shape[:3])
    tracks[..., Y] = np.array(ROW_Y) - 3.0 * (rng.random(tracks.shape[:3]) < 0.2)
    tracks[..., RADIUS] = rng.uniform(2, 4, tracks.shape[:3])
    tracks[..., 5:] = rng.random((*tracks.shape[:3], 2))
    shapes = rng.integers(0, len(SHAPES), (60, 2))
    for change, most in ((lambda f: f, 0.16), (lambda f: soften(f, 0.05), 0.35)):
        found = track(change(picture(tracks, shapes)), torch.as_tensor(shapes))
        for name, channel in (("x", X), ("y", Y), ("radius", RADIUS)):
            error = (getattr(found, name).transpose(1, 2) - torch.as_tensor(tracks[..., channel])).abs()
            assert error.quantile(0.99) < most, name


def step_score(frames: Tensor, window: tuple[int, int], events: Sequence[Event], story: Story = STORY) -> float:
    return verify_steps(frames, [story], [window], [list(events)]).item()


def test_steps_reward_promptness() -> None:
    slow = replace(MOVE, slow=True)
    got = [step_score(film(STORY, [Cue(slow, 3 + late, 15)]), (3, 15), [slow]) for late in (0, 1, 2, 3)]
    assert got[0] > 0.95
    assert all(b < a - 0.03 for a, b in pairwise(got))
    cut = [step_score(film(STORY, [Cue(slow, 3 + late, 12)]), (3, 12), [slow]) for late in (0, 3, 6)]
    assert cut[0] > 0.95 and 0.1 < cut[1] < 0.4 and cut[2] < cut[1]
    assert step_score(film(STORY, []), (3, 12), [slow]) < 0.02
    assert step_score(film(STORY, [Cue(MOVE, 3)]), (3, 15), [slow]) < 0.7  # too fast


def test_steps_start_from_what_is_there() -> None:
    """The story's turn never happened before; the jump is judged all the same, and by its own window alone."""
    frames = film(STORY, [Cue(MOVE, 3), Cue(JUMP, 9)])
    assert step_score(frames, (9, 15), [JUMP]) > 0.95
    assert step_score(frames, (6, 9), [TURN]) < 0.02
    assert step_score(frames, (12, 24), [JUMP]) < 0.02  # over before the window
    assert step_score(frames, (9, 15), []) < 0.75  # told to do nothing
    assert step_score(frames, (12, 24), []) > 0.95
    assert step_score(film(STORY, [Cue(MOVE, 3), Cue(JUMP, 9)], copy_at(1, 1, 1.0, 9)), (9, 15), [JUMP]) < 0.02


def test_steps_with_two_events_need_their_order() -> None:
    right = film(STORY, [Cue(MOVE, 3), Cue(TURN, 6)])
    wrong = film(STORY, [Cue(TURN, 3), Cue(MOVE, 6)])
    assert step_score(right, (3, 12), [MOVE, TURN]) > 0.95
    assert step_score(wrong, (3, 12), [MOVE, TURN]) < 0.5


def test_two_shapes_in_a_row_are_refused() -> None:
    with pytest.raises(UserError, match="two shapes in the top row"):
        verify(film(STORY), [Story((CIRCLE, replace(SQUARE, row=0)), (MOVE,))])


def test_speed(stories: list[Story], truth: Tensor) -> None:
    verify(truth[:64], stories[:64])
    times = []
    for _ in range(3):
        start = time.process_time()
        verify(truth[:64], stories[:64])
        times.append((time.process_time() - start) / torch.get_num_threads())
    assert min(times) < 0.3
