"""Responses to plans: what is usable as written, what is repaired and how, and that nothing raises."""

from __future__ import annotations

import json
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempact.planner.plans import MAX_RESPONSE_CHARS, parse_plan, plan_json, plan_messages
from tempact.types import Step

FRAMES, CHUNK = 24, 3
FUZZ = settings(max_examples=150, deadline=None, derandomize=True, database=None)
GOOD = [Step(0, 3, "A red circle."), Step(3, 12, "It moves."), Step(12, 24, "It stops.")]


def parse(response: str):
    return parse_plan(response, "the whole", FRAMES, CHUNK)


def spans(plan) -> list[tuple[int, int]]:
    return [(step.start, step.end) for step in plan.steps]


def rows(*steps: tuple) -> str:
    return json.dumps([dict(zip(("start", "end", "prompt"), step, strict=True)) for step in steps])


@pytest.mark.parametrize(
    "before", ["", "<think>first [1, 2] then {}</think>\n", "thought with a prefilled tag</think>"]
)
def test_a_plan_survives_writing_and_reading(before):
    plan = parse(before + plan_json(GOOD))
    assert list(plan.steps) == GOOD
    assert (plan.format_score, plan.repairs) == (1.0, ())
    assert plan.response == before + plan_json(GOOD)


def test_the_example_in_the_request_is_itself_usable_as_written():
    system = plan_messages("anything", 30, 3)[0]["content"]
    example = next(line for line in system.splitlines() if line.startswith("["))
    assert parse_plan(example, "anything", 30, 3).format_score == 1.0


A, B, C = (0, 3, "a"), (3, 12, "b"), (12, 24, "c")
REPAIRED = [
    (f"```json\n{rows(A, B, C)}\n```", "extracted", [(0, 3), (3, 12), (12, 24)]),
    (f"Here is the plan: {rows(A, B, C)} Enjoy!", "extracted", [(0, 3), (3, 12), (12, 24)]),
    (json.dumps({"plan": json.loads(rows(A, B, C))}), "extracted", [(0, 3), (3, 12), (12, 24)]),
    (rows(A, B, C)[:-20], "extracted", [(0, 3), (3, 24)]),
    ('{"start":0,"end":24,"prompt":"a"}', "extracted", [(0, 24)]),
    (rows(A, (3, 12, "  "), C), "steps dropped", [(0, 12), (12, 24)]),
    (rows(A, (3, 12, None), C), "steps dropped", [(0, 12), (12, 24)]),
    ('[{"start":0,"end":3},{"start":3,"end":24,"prompt":"b"}]', "steps dropped", [(0, 24)]),
    ('[{"start":0,"end":24,"prompt":"a","mood":"sad"}]', "keys ignored", [(0, 24)]),
    (rows(("0", "3", "a"), (3.0, 24.0, "b")), "bounds converted", [(0, 3), (3, 24)]),
    (rows((None, 3, "a"), (3, None, "b")), "bounds filled", [(0, 3), (3, 24)]),
    (
        '[{"prompt":"a"},{"prompt":"b"},{"prompt":"c"},{"prompt":"d"}]',
        "bounds filled",
        [(0, 6), (6, 12), (12, 18), (18, 24)],
    ),
    (rows(C, A, B), "sorted", [(0, 3), (3, 12), (12, 24)]),
    (rows(*((3 * i, 3 * i + 3, "x") for i in range(11))), "too many steps", [(3 * i, 3 * i + 3) for i in range(8)]),
    (rows((0, 24, "x" * 5000)), "prompt shortened", [(0, 24)]),
    ('[{"start":0,"end":24,"prompt":"a \\ud800"}]', "prompt cleaned", [(0, 24)]),
    (rows((0, 3, "a"), (6, 24, "b")), "gaps closed", [(0, 6), (6, 24)]),
    (rows((0, 9, "a"), (6, 24, "b")), "gaps closed", [(0, 6), (6, 24)]),
    (rows((3, 6, "a"), (6, 24, "b")), "starts at 0", [(0, 6), (6, 24)]),
    (rows((0, 6, "a"), (6, 21, "b")), "ends at F", [(0, 6), (6, 24)]),
    (rows((0, 4, "a"), (4, 11, "b"), (11, 24, "c")), "snapped", [(0, 3), (3, 12), (12, 24)]),
    (rows((0, 0, "a"), (0, 24, "b"), (24, 24, "c")), "snapped", [(0, 3), (3, 21), (21, 24)]),
    (rows((0, 10**30, "a"), (10**30, 24, "b")), "snapped", [(0, 21), (21, 24)]),
]


@pytest.mark.parametrize(("response", "repair", "expected"), REPAIRED)
def test_repairs(response, repair, expected):
    plan = parse(response)
    assert repair in plan.repairs
    assert plan.format_score == 0.5
    assert spans(plan) == expected


ROUNDED = [  # frames, chunk, rounding, a switch asked for, the chunk start that it gets
    (120, 3, "nearest", 40, 39),
    (120, 3, "up", 40, 42),  # as LongLive: the first chunk start at or after the switch
    (120, 3, "nearest", 41, 42),
    (120, 3, "up", 41, 42),
    (120, 3, "up", 42, 42),
    (24, 4, "nearest", 10, 12),  # ties go up
    (24, 4, "up", 9, 12),
    (24, 3, "up", 23, 21),  # the last step keeps a chunk
    (24, 3, "up", 1, 3),  # and so does the first
    (24, 3, "nearest", 1, 3),
]


@pytest.mark.parametrize(("frames", "chunk", "rounding", "asked", "expected"), ROUNDED)
def test_bounds_off_the_grid_follow_the_rounding(frames, chunk, rounding, asked, expected):
    plan = parse_plan(rows((0, asked, "a"), (asked, frames, "b")), "the whole", frames, chunk, rounding)
    assert spans(plan) == [(0, expected), (expected, frames)]
    assert plan.repairs == (("snapped",) if asked != expected else ())


def test_answers_of_the_planner_are_rounded_to_the_nearest():
    text = rows((0, 40, "a"), (40, 120, "b"))
    assert parse_plan(text, "the whole", 120, 3) == parse_plan(text, "the whole", 120, 3, "nearest")


UNUSABLE = [
    "", "   ", "null", "[]", "{}", "[1, 2]", "a plan", "[[[[", "</think>", '[{"start":0,"end":24}]', rows((0, 24, " ")),
    f"<think>maybe {rows(A, B, C)}, or else",
    f"{rows(A, B, C)}</think>",
    "[" + "9" * (MAX_RESPONSE_CHARS + 1) + "]",
]  # fmt: skip


@pytest.mark.parametrize("response", UNUSABLE)
def test_an_unusable_response_becomes_the_whole_instruction(response):
    plan = parse(response)
    assert plan.format_score == 0.0
    assert list(plan.steps) == [Step(0, FRAMES, "the whole")]


def check(response: str, frames: int = FRAMES, chunk: int = CHUNK) -> None:
    plan = parse_plan(response, "the whole", frames, chunk)
    assert plan.format_score in (0.0, 0.5, 1.0)
    assert (plan.format_score == 1.0) == (not plan.repairs)
    assert plan.steps[0].start == 0 and plan.steps[-1].end == frames
    assert all(a.end == b.start for a, b in pairwise(plan.steps))
    assert all(step.start < step.end and step.start % chunk == step.end % chunk == 0 for step in plan.steps)
    assert all(step.prompt.strip() and step.prompt.encode() for step in plan.steps)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["start", "end", "prompt", "steps", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)
BOUND = st.integers(-9, 40) | st.none() | st.floats() | st.text(max_size=3) | st.integers()
STEPS = st.lists(
    st.fixed_dictionaries({"start": BOUND, "end": BOUND, "prompt": st.text(max_size=5) | st.none()}), max_size=14
)


@FUZZ
@given(st.text(st.characters(), max_size=60))
def test_any_text_gives_a_plan(response):
    check(response)


@FUZZ
@given(JSON | STEPS, st.integers(0, 400), st.sampled_from(["", "```", "</think>", "<think>", "[", "{"]))
def test_any_json_whole_or_cut_gives_a_plan(value, length, around):
    text = json.dumps(value)
    check(text)
    check(around + text[:length] + around)


@FUZZ
@given(STEPS, st.sampled_from([(30, 3), (24, 24), (21, 1)]))
def test_plans_fit_other_lengths_and_chunks(value, size):
    check(json.dumps(value), *size)


@pytest.mark.parametrize(
    "response", ['{"a":' * 3900, "{" * 20_000, '{"prompt":"x"}' * 1400, '[{"prompt":' * 1800, "[" * 20_000]
)
def test_hostile_responses_take_bounded_time(response):
    started = time.monotonic()
    check(response)
    assert time.monotonic() - started < 2.0
