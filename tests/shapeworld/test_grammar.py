"""Stories, their words and the way back."""

from __future__ import annotations

import random
import re

import pytest

from tempact.errors import UserError
from tempact.shapeworld.grammar import (
    SPLITS,
    StepReading,
    describe_event,
    describe_scene,
    event_sequence,
    parse_instruction,
    read_step,
    reference_plan,
    sample_story,
    split_of,
    write_instruction,
)
from tempact.shapeworld.story import CHUNKS, FRAMES, KINDS, Story, states
from tempact.shapeworld.world import ShapeWorldPrompts, held_out_prompts

SETS = [(split, category) for split in SPLITS for category in ("simple", "hard")]


def stories(split: str, category: str, count: int = 250) -> list[Story]:
    rng = random.Random(f"{split}{category}")
    return [sample_story(rng, split, category=category) for _ in range(count)]


@pytest.mark.parametrize(("split", "category"), SETS)
def test_writing_and_reading_are_inverses(split: str, category: str) -> None:
    rng = random.Random(1)
    for story in stories(split, category):
        text = write_instruction(story, rng)
        assert parse_instruction(text) == story, text
        for scene, event in zip(states(story), story.events, strict=False):
            for words in (None, rng):
                reading = read_step(describe_event(scene, event, words), story.entities)
                assert reading == StepReading((), (event,), (scene[event.entity].colour,))
        visible = tuple(entity for entity in story.entities if entity.visible)
        assert read_step(describe_scene(story.entities, rng), story.entities) == StepReading(visible, (), ())


@pytest.mark.parametrize(("split", "category"), SETS)
def test_stories_are_possible(split: str, category: str) -> None:
    for story in stories(split, category):
        assert len(story.events) in ((1, 2) if category == "simple" else (3, 4))
        assert story.chunks_needed <= CHUNKS
        for scene, event, after in zip(states(story), story.events, states(story)[1:], strict=False):
            actor = scene[event.entity]
            assert actor.visible != (event.kind == "appear")
            assert KINDS[event.kind] or not event.slow
            assert (scene == after) == (event.kind in ("jump", "blink"))
            colours = [entity.colour for entity in after]
            assert len(set(colours)) == len(colours)


def test_all_kinds_are_told_and_the_vocabulary_is_small() -> None:
    rng = random.Random(2)
    told = [story for split, category in SETS for story in stories(split, category)]
    assert {event.kind for story in told for event in story.events} == set(KINDS)
    words = {word for story in told for word in re.findall("[a-z]+", write_instruction(story, rng).lower())}
    assert 40 < len(words) < 120
    assert max(len(write_instruction(story, rng).split()) for story in told) <= 80


def test_splits_never_share_an_event_sequence() -> None:
    seen = {split: {event_sequence(s) for c in ("simple", "hard") for s in stories(split, c, 1500)} for split in SPLITS}
    assert all(len(sequences) > 500 for sequences in seen.values())
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


def test_prompts_are_the_same_for_the_same_seed_and_stay_in_their_split() -> None:
    source = ShapeWorldPrompts()
    assert source.draw(4, 7) == source.draw(4, 7) != source.draw(4, 8)
    held_out = held_out_prompts("hard", 20, 1)
    assert held_out == held_out_prompts("hard", 20, 1)
    train = {event_sequence(parse_instruction(p.text)) for seed in range(40) for p in source.draw(8, seed)}
    assert not train & {event_sequence(parse_instruction(p.text)) for p in held_out}


@pytest.mark.parametrize("category", ["simple", "hard"])
def test_held_out_instructions_are_of_their_split_and_of_no_other(category: str) -> None:
    """The test split is what is evaluated on unless another one is named."""
    usual = held_out_prompts(category, 60, 3)
    assert usual == held_out_prompts(category, 60, 3, "test")
    for split in ("validation", "test"):
        prompts = held_out_prompts(category, 60, 3, split)
        told = [parse_instruction(prompt.text) for prompt in prompts]
        assert {split_of(story) for story in told} == {split}
        assert {len(story.events) > 2 for story in told} == {category == "hard"}
        assert all(prompt.prompt_id.startswith(f"{split}-{category}-") for prompt in prompts)
    train = [parse_instruction(p.text) for p in ShapeWorldPrompts().draw(60, 3)]
    assert {split_of(story) for story in train} == {"train"}


def test_merged_steps_are_read_as_two_events() -> None:
    story = parse_instruction(
        "A red circle is at the top left and a blue cross is at the bottom right. First, the circle jumps. "
        "Then the cross slowly turns green."
    )
    merged = read_step("The circle hops and the blue cross slowly becomes green.", story.entities)
    assert merged == StepReading((), story.events, (None, "blue"))
    assert read_step("The triangle hops.", story.entities) is None
    assert read_step("Something lovely happens.", story.entities) is None
    assert read_step(" ", story.entities) is None


def test_the_reference_plan_gives_events_what_they_need() -> None:
    plan = reference_plan("A red circle is at the top left. First, the circle slowly grows. Then the circle jumps.")
    assert [(step.start, step.end) for step in plan.steps] == [(0, 3), (3, 12), (12, FRAMES)]
    assert [step.prompt for step in plan.steps] == [
        "A red circle is at the top left.",
        "The red circle slowly grows.",
        "The red circle jumps.",
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "not understood"),
        ("A cat sits on a sofa.", "not understood: 'a cat sits on a sofa'"),
        ("A red circle is at the top left.", "no event found"),
        ("A red circle is at the top left. First, the circle sings.", "not understood: 'the circle sings'"),
        ("A red circle is at the top left. First, the square jumps.", "not understood: 'the square jumps'"),
        ("A red circle is at the top left. Then the circle slowly jumps.", "not understood"),
        (
            "A red circle is at the top left. Then a blue square appears at the top right.",
            "not understood: 'a blue square appears at the top right'",
        ),
        (
            "A red circle is at the top left. First, the circle turns blue. Then the red circle jumps.",
            "not possible by then: 'the red circle jumps'",
        ),
        (
            "A red circle is at the top left. First, the circle vanishes. Then the circle jumps.",
            "not possible by then: 'the circle jumps'",
        ),
        ("A red circle is at the top left. First, the circle moves to the left.", "not possible by then"),
        ("A red circle is at the top left. First, a red circle appears at the top left.", "not possible by then"),
        (
            "A red circle is at the top left. First, the circle slowly grows. Then the circle slowly turns blue. "
            "Finally, the circle slowly vanishes.",
            "3 events need 10 chunks",
        ),
    ],
)
def test_what_is_not_understood_is_named_in_one_line(text: str, found: str) -> None:
    with pytest.raises(UserError) as error:
        parse_instruction(text)
    assert found in str(error.value) and "accepted" in str(error.value) and "\n" not in str(error.value)
