"""A third shape that another one passes: what is accepted, what is taken out of the picture, and what it costs to leave
it out."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tempact.errors import UserError
from tempact.rewards import Span
from tempact.shapeworld.crowd import actors_only, behind, find_bystander, with_bystander, without_bystanders
from tempact.shapeworld.grammar import parse_instruction, read_step, reference_plan, write_instruction
from tempact.shapeworld.pretraining.clips import Cue
from tempact.shapeworld.pretraining.matcher import corrupt, corrupted_tracks
from tempact.shapeworld.story import CHUNK, COLOUR, FRAMES, OPACITY, SHAPES, Entity, Event, Story, X, draw
from tempact.shapeworld.strict import sample_crowded
from tempact.shapeworld.verifier import picture_quality, verify
from tempact.shapeworld.world import TemporalFollowing, judge_plan, step_following

SCENE = (
    "A green square is at the top middle and a red circle is at the top left and a blue cross is at the bottom right."
)
TEXT = f"{SCENE} First, the circle slowly moves to the right. Then the cross turns yellow."
STORY = Story(
    (Entity("square", "green", 0, 1), Entity("circle", "red", 0, 0), Entity("cross", "blue", 1, 2)),
    (Event("move", 1, "right", slow=True), Event("turn", 2, "yellow")),
)
Edit = Callable[[Tensor, Tensor], None]


@pytest.fixture(scope="module")
def stories() -> list[Story]:
    rng = random.Random(4)
    return [sample_crowded(rng, "train") for _ in range(32)]


def film(stories: list[Story], edit: Edit = lambda tracks, shapes: None) -> Tensor:
    """Exact drawings; `edit` changes tracks [V, F, E, TRACK] and shapes [V, E], in which the bystander comes first."""
    shows = [corrupt(actors_only(story), "truth", random.Random(7)) for story in stories]
    tracks, shapes = behind(*corrupted_tracks(shows), stories)
    edit(tracks, shapes)
    return draw(tracks, shapes[:, None].expand(-1, FRAMES, -1))


def scores(frames: Tensor, stories: list[Story]) -> tuple[Tensor, Tensor]:
    rest, standing = without_bystanders(frames, stories)
    return with_bystander(verify(rest, [*map(actors_only, stories)]).score, standing), standing


def test_a_crowded_instruction_is_read_and_written() -> None:
    assert parse_instruction(TEXT) == STORY and find_bystander(STORY) == 0
    two = "A red circle is at the top left and a blue cross is at the bottom right."
    assert actors_only(STORY) == parse_instruction(TEXT.replace(SCENE, two))
    rng = random.Random(2)
    for _ in range(150):
        story = sample_crowded(rng, "validation")
        assert parse_instruction(write_instruction(story, rng)) == story
        still = find_bystander(story)
        assert still is not None and len(story.entities) == 3
        assert [entity.visible for entity in story.entities[: still + 1]] == [True] * (still + 1)
        assert not any(entity.visible for entity in story.entities[still + 1 :])


def test_only_a_story_of_three_has_steps_with_three() -> None:
    """Of all others a step with a third shape cannot be read, as before: training rewards are the same."""
    assert read_step(SCENE, STORY.entities) is not None
    assert read_step(SCENE, actors_only(STORY).entities) is None
    two = "A green square is at the top middle and a red circle is at the top left."
    assert read_step(two, STORY.entities[:2]) is None


@pytest.mark.parametrize(
    ("events", "found"),
    [
        ("The circle moves to the right. Then the square jumps.", "found 2 shapes in the top row"),
        ("The cross jumps.", "found 2 shapes in the top row"),
        ("The circle moves to the right. Then the circle turns yellow.", "found 2 shapes in the top row"),
        ("The circle moves to the middle.", "found 2 shapes in the top row"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(events: str, found: str) -> None:
    with pytest.raises(UserError, match=found) as error:
        parse_instruction(f"{SCENE} {events}")
    assert "accepted: one shape a row, or a second one of another colour that stands still" in str(error.value)


@pytest.mark.parametrize(
    "scene",
    [
        SCENE.replace("cross is at the bottom right", "cross is at the top right"),
        SCENE.replace("top left", "top middle"),
        SCENE.replace("blue cross", "blue circle"),
        f"{SCENE[:-1]} and a cyan triangle is at the bottom left.",
    ],
)
def test_more_than_one_bystander_is_not_understood(scene: str) -> None:
    with pytest.raises(UserError, match="not understood"):
        parse_instruction(f"{scene} The circle moves to the right.")


def test_taking_the_bystander_out_leaves_the_others_as_they_are(stories: list[Story]) -> None:
    shows = [corrupt(actors_only(story), "truth", random.Random(7)) for story in stories]
    tracks, shapes = corrupted_tracks(shows)
    alone = draw(tracks, shapes[:, None].expand(-1, FRAMES, -1))
    crowded = film(stories)
    assert (crowded - alone).abs().amax((1, 2, 3, 4)).min() > 0.9
    rest, standing = without_bystanders(crowded, stories)
    torch.testing.assert_close(rest, alone, atol=1e-6, rtol=0)
    assert standing.tolist() == [1.0] * len(stories)
    unchanged, none = without_bystanders(alone, [*map(actors_only, stories)])
    assert torch.equal(unchanged, alone) and none.tolist() == [1.0] * len(stories)


def test_a_bystander_is_covered_while_it_is_passed(stories: list[Story]) -> None:
    """Else nothing would be occluded: in some frame a quarter of it is not to be seen, of slow passings more."""
    seen = (film(stories) - film(stories, missing)).abs().amax(2).sum((2, 3))  # [V, F]
    covered = 1.0 - seen.amin(1) / seen.amax(1)
    assert covered.min() > 0.25 and covered.max() > 0.6


def missing(tracks: Tensor, shapes: Tensor) -> None:
    tracks[:, :, 0, OPACITY] = 0.0


def moves(tracks: Tensor, shapes: Tensor) -> None:
    tracks[:, 9:, 0, X] += 4.0


def recoloured(tracks: Tensor, shapes: Tensor) -> None:
    tracks[:, :, 0, COLOUR:] = 1.0 - tracks[:, :, 0, COLOUR:]


def another(tracks: Tensor, shapes: Tensor) -> None:
    shapes[:, 0] = (shapes[:, 0] + 1) % len(SHAPES)


@pytest.mark.parametrize(("edit", "most"), [(missing, 0.51), (moves, 0.15), (recoloured, 0.05), (another, 0.5)])
def test_without_its_bystander_a_video_loses_at_least_half(stories: list[Story], edit: Edit, most: float) -> None:
    exact, _ = scores(film(stories), stories)
    wrong, standing = scores(film(stories, edit), stories)
    assert exact.mean() > 0.98 and wrong.mean() < most and standing.mean() < 0.5
    if edit is missing:
        assert wrong.mean() == pytest.approx(exact.mean().item() / 2, abs=1e-3)


def test_slight_faults_hide_no_bystander_and_noise_shows_none(stories: list[Story]) -> None:
    crowded = film(stories)
    soft = torch.nn.functional.avg_pool2d(crowded.flatten(0, 1), 3, 1, 1).view_as(crowded)
    dots = torch.randn(crowded.shape, generator=torch.Generator().manual_seed(0))
    slight = (0.8 * crowded + 0.2 * soft + 0.02 * dots).clamp(0.0, 1.0)
    rest, standing = without_bystanders(slight, stories)
    assert standing.mean() > 0.9 and picture_quality(rest).mean() > 0.6 * picture_quality(slight).mean()
    assert scores(torch.zeros_like(crowded), stories)[0].tolist() == [0.0] * len(stories)
    assert scores((0.5 + 0.5 * dots).clamp(0.0, 1.0), stories)[0].max() < 0.05


def test_rewards_take_the_bystander_for_granted_in_a_step_and_ask_for_it_in_a_video() -> None:
    """Prompts of users may be crowded, where videos are chosen by these rewards."""
    plan = reference_plan(TEXT)
    shows = [corrupt(actors_only(STORY), "truth", random.Random(7))]
    cues = [Cue(event, step.start) for event, step in zip(actors_only(STORY).events, plan.steps[1:], strict=True)]
    tracks, shapes = behind(*corrupted_tracks([shows[0]._replace(scene=(shows[0].scene[0], cues))]), [STORY])
    videos = [draw(tracks, shapes[:, None].expand(-1, FRAMES, -1))]
    missing(tracks, shapes)
    videos.append(draw(tracks, shapes[:, None].expand(-1, FRAMES, -1)))
    frames = (255 * torch.cat(videos)).round().to(torch.uint8)[None]
    step = plan.steps[2]
    span = Span(step.start, step.start + CHUNK - 1, step)
    whole = TemporalFollowing()([TEXT], [plan], frames, [span])[0].tolist()
    assert whole[0] > 0.95 and whole[1] == pytest.approx(whole[0] / 2, abs=1e-3)
    assert step_following([TEXT], [plan], frames, [span])[0].min() > 0.95
    assert judge_plan(plan).score() == pytest.approx(0.9)


def test_a_bystander_is_told_from_what_passes_it_by_its_colour() -> None:
    text = "A {} circle is at the top left and a red square is at the top middle. The circle moves to the right."
    assert find_bystander(parse_instruction(text.format("blue"))) == 1
    with pytest.raises(UserError, match=r"found 2 shapes in the top row; accepted: .* a second one of another colour"):
        parse_instruction(text.format("red"))
