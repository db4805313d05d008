"""ShapeWorld's rewards: plan quality by hand-made plans, the others on drawn rollouts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from rewards.reward_cases import result, score
from shapeworld_films import reference_cues, shape_indices, tell

from tempact.rewards import Judging, Span
from tempact.shapeworld.grammar import parse_instruction, reference_plan
from tempact.shapeworld.pretraining.clips import Cue
from tempact.shapeworld.story import CHUNK, FRAMES, draw
from tempact.shapeworld.world import aesthetics, judge_plan, shapeworld_rewards
from tempact.types import Plan, PlanBatch, Prompt, Rollout, Step, Transition

TEXT = (
    "A red circle is at the top left and a blue square is at the bottom right. "
    "First, the circle moves to the right. Then the square slowly turns green. Finally, the circle jumps."
)
STORY = parse_instruction(TEXT)
OPENING = "A red circle is at the top left and a blue square is at the bottom right."
MOVE, TURN, JUMP = "The red circle moves to the right.", "The blue square slowly turns green.", "The red circle jumps."


def plan(*prompts: str) -> Plan:
    bounds = [CHUNK * i for i in range(len(prompts))] + [FRAMES]
    return Plan(TEXT, tuple(Step(*each) for each in zip(bounds, bounds[1:], prompts, strict=False)))


def told(made: Plan) -> list[float]:
    """Faithfulness, coverage, temporal, hallucination."""
    return list(judge_plan(made).model_dump().values())


def scores(*prompts: str) -> list[float]:
    return told(plan(*prompts))


def test_the_right_plan_has_the_best_quality() -> None:
    assert scores(OPENING, MOVE, TURN, JUMP) == [1.0, 1.0, 1.0, 0.0]
    for right in (plan(OPENING, MOVE, TURN, JUMP), reference_plan(TEXT)):
        assert judge_plan(right).score() == pytest.approx(0.9)


@pytest.mark.parametrize(
    "prompts,expected",
    [
        ((OPENING, TURN, MOVE, JUMP), [1.0, 1.0, 2 / 3, 0.0]),
        ((OPENING, JUMP, TURN, MOVE), [1.0, 1.0, 1 / 3, 0.0]),
        ((OPENING, MOVE, JUMP), [1.0, 2 / 3, 2 / 3, 0.0]),
        ((OPENING, MOVE, TURN, JUMP, JUMP), [0.8, 1.0, 1.0, 0.25]),
        ((OPENING, MOVE, "The blue square turns green.", JUMP), [0.75, 2 / 3, 2 / 3, 1 / 3]),
        ((OPENING, MOVE, "The blue square jumps.", JUMP), [0.75, 2 / 3, 2 / 3, 1 / 3]),
        ((OPENING, MOVE, "Colourless ideas sleep.", JUMP), [0.75, 2 / 3, 2 / 3, 1 / 3]),
        ((MOVE, TURN, JUMP), [2 / 3, 1.0, 1.0, 0.0]),
        ((TEXT,), [0.0, 1.0, 0.0, 0.0]),
        # things that are not there: another opening, one of two shapes elsewhere, one missing, other colours later
        (
            ("A green circle is at the top left and a cyan square is at the bottom right.", MOVE, TURN, JUMP),
            [0.75, 1.0, 1.0, 0.4],
        ),
        (
            ("A red circle is at the top left and a blue square is at the bottom left.", MOVE, TURN, JUMP),
            [0.75, 1.0, 1.0, 0.25],
        ),
        (("A red circle is at the top left.", MOVE, TURN, JUMP), [0.75, 1.0, 1.0, 0.0]),
        ((OPENING, MOVE, TURN, "The cyan circle jumps."), [0.75, 2 / 3, 2 / 3, 1 / 3]),
        ((OPENING, MOVE, "The green square slowly turns green.", JUMP), [0.75, 2 / 3, 2 / 3, 1 / 3]),
    ],
)
def test_sub_scores(prompts: tuple[str, ...], expected: list[float]) -> None:
    assert scores(*prompts) == pytest.approx(expected)
    assert judge_plan(plan(*prompts)).score() < 0.9


def test_a_merged_step_lowers_only_temporal_coherence() -> None:
    merged = scores(OPENING, "The red circle moves to the right and the blue square slowly turns green.", JUMP)
    assert merged == pytest.approx([1.0, 1.0, 1 / 3, 0.0])


def test_an_event_told_twice() -> None:
    """In the story two jumps are two events; in a plan one too many is invented, also within one step."""
    text = "A red circle is at the top left. The circle jumps. Then the circle turns blue. Finally, the circle jumps."
    assert told(reference_plan(text)) == [1.0, 1.0, 1.0, 0.0]
    merged = scores(OPENING, MOVE, TURN, "The red circle jumps and the red circle jumps.")
    assert merged == pytest.approx([0.75, 1.0, 2 / 3, 0.25])


def test_in_another_order_a_shape_may_have_the_colour_of_either_order() -> None:
    text = "A red circle is at the top left. The circle turns blue. Then the circle jumps."
    bounds = [(0, 3), (3, 6), (6, FRAMES)]
    for colour in ("red", "blue"):
        steps = ("A red circle is at the top left.", f"The {colour} circle jumps.", "The red circle turns blue.")
        swapped = Plan(text, tuple(Step(*span, words) for span, words in zip(bounds, steps, strict=True)))
        assert told(swapped) == [1.0, 1.0, 0.5, 0.0]


def test_quality_is_never_negative() -> None:
    assert judge_plan(plan("Nothing at all.", "Words.")).score() == 0.0


def rollout(videos: Sequence[Sequence[Sequence[Cue]]], starts: Sequence[int], damage: float = 0.0) -> Rollout:
    tracks = torch.as_tensor(np.stack([[tell(STORY.entities, cues) for cues in each] for each in videos]))
    shapes = torch.as_tensor(shape_indices(STORY.entities)).expand(tracks.shape[:-1])
    frames = draw(tracks, shapes)
    dots = torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    dots[:, ::2] = 0.0  # every other continuation stays clean
    frames = (255 * (frames + damage * dots).clamp(0.0, 1.0)).round().to(torch.uint8)
    plans, continuations = frames.shape[:2]
    states = torch.zeros(plans, continuations, 4, 3, CHUNK, 24, 24)
    transition = Transition(
        states, states[:, :, :3], torch.tensor(starts), torch.zeros(plans, 3, max(starts), 24, 24), []
    )
    return Rollout(frames, transition)


RIGHT = reference_cues(STORY)  # move at 3, turn at 6, jump at 15
LATE = [RIGHT[0], Cue(RIGHT[1].event, 9, 15), RIGHT[2]]
STILL: list[Cue] = []


def batch(*plans: Plan) -> PlanBatch:
    return PlanBatch([Prompt("a", TEXT)], list(plans), len(plans))


def test_all_rewards_of_a_rollout() -> None:
    good = reference_plan(TEXT)
    made = rollout([[RIGHT, LATE, STILL]] * 2, [6, 15])
    scored = score(shapeworld_rewards(), batch(good, good), made)
    assert scored.plan_quality.tolist() == pytest.approx([0.9, 0.9])
    following = scored.temporal_following
    assert following[:, 0].min() > 0.95 and following[:, 1].max() < 0.5 and following[:, 2].max() < 0.01
    step = scored.step_following
    assert step[0, 0] > 0.95 and 0.0 < step[0, 1] < 0.5 and step[0, 2] < 0.02  # the slow turn, cut in the second
    assert step[1, 0] > 0.95 and step[1, 2] < 0.02  # the jump
    assert scored.aesthetics.min() > 0.95


def test_aesthetics_look_at_the_trained_chunk_of_each_video() -> None:
    made = rollout([[RIGHT, RIGHT]], [6], damage=0.2)
    made.frames[0, 0, 12:] = 128
    clean, noisy = score(shapeworld_rewards(), batch(reference_plan(TEXT)), made).aesthetics[0].tolist()
    assert clean > 0.95 and noisy < 0.2


def test_aesthetics_have_the_same_bits_whatever_the_number_of_videos() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 60 * torch.rand(6, 4, 24, 3, 24, 24, generator=generator)
    frames = (noise + torch.randint(0, 180, (6, 4, 1, 3, 1, 1), generator=generator)).to(torch.uint8)
    whole = aesthetics([], [], frames, [None] * 6)
    assert len(whole.unique()) > 12
    for count in (1, 2, 3, 5):
        parts = [
            aesthetics([], [], frames[p : p + count], [None] * len(frames[p : p + count])) for p in range(0, 6, count)
        ]
        assert torch.equal(torch.cat(parts), whole), count
    assert torch.equal(torch.cat([aesthetics([], [], frames[:, n : n + 1], [None] * 6) for n in range(4)], 1), whole)


def test_a_fork_within_a_step_is_judged_by_the_whole_step_and_the_pictures_behind_the_fork() -> None:
    good, whole = reference_plan(TEXT), Plan(TEXT, (Step(0, FRAMES, OPENING),))
    made = rollout([[RIGHT, RIGHT], [STILL, RIGHT]], [9, 12])
    made.frames[0, 1, 6:9] = 128  # grey from the step's start to the fork
    scoring = shapeworld_rewards().begin(batch(good, whole), None, None, Judging(within=True))
    scoring.add(made)
    scored = result(scoring)
    step = scored.step_following
    assert step[0, 0] > 0.95 and step[0, 1] < 0.6  # the turn of the step at 6
    assert step[1, 0] > 0.95 and step[1, 1] < 0.5  # a step from the first frame on: everything is to stay
    assert scored.aesthetics.min() > 0.95


def test_what_cannot_be_read_is_missing_for_its_plan_alone() -> None:
    good = reference_plan(TEXT)
    odd = Plan(TEXT, (*good.steps[:2], Step(6, 15, "The circle dreams."), *good.steps[3:]))
    scored = score(shapeworld_rewards(), batch(good, odd), rollout([[RIGHT, STILL]] * 2, [6, 6]))
    assert not torch.isnan(scored.step_following[0]).any()
    assert torch.isnan(scored.step_following[1]).all()
    assert not torch.isnan(scored.temporal_following).any()


def test_other_plans_do_not_change_a_score() -> None:
    rewards, good, other = shapeworld_rewards(), reference_plan(TEXT), plan(OPENING, TURN, MOVE, JUMP)
    alone = score(rewards, batch(good), rollout([[RIGHT, LATE]], [6]))
    beside = score(rewards, batch(other, good), rollout([[STILL, LATE], [RIGHT, LATE]], [3, 6]))
    for name in ("temporal_following", "step_following", "aesthetics"):
        torch.testing.assert_close(getattr(alone, name)[0], getattr(beside, name)[1], atol=1e-4, rtol=0.0)


def test_events_are_counted_by_kind_in_videos_that_show_them_as_told() -> None:
    """As told, without the last events, without any, and with one at another pace than it was told."""
    rewards, good = shapeworld_rewards(), reference_plan(TEXT)
    score(rewards, batch(good), rollout([[RIGHT, RIGHT, STILL, STILL]], [6]))
    score(rewards, batch(good), rollout([[RIGHT, [RIGHT[0], RIGHT[1]], [RIGHT[0]], STILL]], [6]))
    found = rewards.metrics()
    success = {kind: found.pop(f"events/{kind}/success") for kind in ("move", "turn", "jump")}
    assert success == {"move": 5 / 8, "turn": 4 / 8, "jump": 3 / 8}
    assert found == dict.fromkeys(("events/move/count", "events/turn/count", "events/jump/count"), 8.0)
    assert rewards.metrics() == {}
    quick = [RIGHT[0], Cue(RIGHT[1].event, 6, 9), RIGHT[2]]  # the turn was to be slow
    score(rewards, batch(good), rollout([[quick]], [6]))
    assert rewards.metrics()["events/turn/success"] == 0.0


def test_a_step_in_the_making_is_scored_by_its_frames_and_the_chunk_before() -> None:
    """As best-of-N shows it: cut off where it ends so far, or with the whole video before it."""
    good, rewards = reference_plan(TEXT), shapeworld_rewards()
    step = good.steps[2]
    frames = rollout([[RIGHT, LATE, STILL]], [step.start]).frames
    assert (step.start, step.end) == (6, 15)
    for end in (9, 12, 15):
        whole = Span(6, end - 1, Step(6, end, step.prompt))
        cut = Span(CHUNK, end - 4, Step(CHUNK, end - 3, step.prompt))
        for name, atol in (("step_following", 1e-4), ("aesthetics", 1e-4)):
            function = getattr(rewards, name)
            a, b = (
                function([TEXT], [good], frames[:, :, first:end], [span]) for first, span in ((0, whole), (CHUNK, cut))
            )
            torch.testing.assert_close(a, b, atol=atol, rtol=0.0)
        right, late, still = rewards.step_following([TEXT], [good], frames[:, :, :end], [whole])[0].tolist()
        assert right > 0.45 and right > late + 0.1 and right > still + 0.1


def test_a_first_step_is_followed_where_the_opening_stands() -> None:
    good = reference_plan(TEXT)
    span = Span(0, CHUNK - 1, Step(0, CHUNK, OPENING))
    frames = rollout([[RIGHT, RIGHT, RIGHT]], [6]).frames[:, :, :CHUNK]
    frames[0, 1] = frames[0, 1].flip(-1)  # everything at the wrong side
    frames[0, 2, 1:] = 0
    step = shapeworld_rewards().step_following([TEXT], [good], frames, [span])[0].tolist()
    assert step[0] > 0.95 and step[1] < 0.05 and 0.2 < step[2] < 0.4


@pytest.mark.parametrize(("fork", "last"), [(3, 8), (6, 8)])
def test_a_first_step_that_tells_an_event_is_followed_by_its_event(fork: int, last: int) -> None:
    """As a random chunk in it asks: standing still is no way to follow it."""
    good, rewards = reference_plan(TEXT), shapeworld_rewards()
    story = parse_instruction(TEXT)
    first = Step(0, last + 1, f"{good.steps[0].prompt} {good.steps[1].prompt}")
    assert story.events and good.steps[1].start == CHUNK
    span = Span(0, last, first, fork)
    frames = rollout([[RIGHT, STILL]], [fork]).frames
    followed, still = rewards.step_following([TEXT], [good], frames, [span])[0].tolist()
    assert followed > 0.4 and followed > still + 0.2
