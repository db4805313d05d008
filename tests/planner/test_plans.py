"""Responses to plans: what is usable as written, what is repaired and how, and that nothing raises."""

from __future__ import annotations

import json
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempact.planner.plans import MAX_RESPONSE_CHARS, parse_plan, plan_json, plan_messages, uniform_spans
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


FOX, LEAP = "A red fox sits on a log.", "The fox leaps into the snow."
RIGHT = plan_json([Step(0, 12, FOX), Step(12, 24, LEAP)])
STEPS_OF_RIGHT = json.loads(RIGHT)
DRAFT = plan_json([Step(0, 3, "It sits."), Step(3, 24, "It leaps.")])
PYTHON = str(STEPS_OF_RIGHT)


def swapped(*pairs: str, text: str = RIGHT) -> str:
    """RIGHT with some words in place of others: old, new, old, new, ..."""
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        assert old in text
        text = text.replace(old, new)
    return text


WRITTEN = [  # both steps, as language models and people write them
    ("mended", swapped("}]", "},]")),
    ("mended", swapped('"}', '",}')),
    ("mended", PYTHON),
    ("mended", swapped("[", "(", "]", ")", text=PYTHON)),
    ("mended", str([(0, 12, FOX), (12, 24, LEAP)])),
    ("mended", swapped("fox sits", "fox\nsits")),
    ("mended", swapped("fox sits", "fox\r\n    sits")),
    ("mended", swapped("A red", "\\A\\ red", "snow.", "snow\\.")),
    ("mended", swapped(',"', '，"', '":', '"：', "},{", "}，{")),
    ("mended", swapped("[", "【", "]", "】", "{", "｛", "}", "｝")),
    ("mended", swapped('"start"', "“start”", '"end"', "‘end’", '"prompt":"', "“prompt”: “", '"}', "”}")),
    ("mended", swapped("},{", '}, // now "it" leaps\n{', "[{", "/* it's */ [{", '"end":24', '# last\n"end":24')),
    ("mended", swapped("},{", "} {")),
    ("mended", swapped("},{", "}\n\n{")),
    ("mended", swapped(',"end"', ' "end"', ',"prompt"', '\n"prompt"')),
    ("mended", swapped("},{", ",{")),
    ("mended", swapped("},{", ",")),
    ("mended", swapped("},{", "}},{")),
    ("mended", swapped("[", "{", "]", "}")),
    ("mended", RIGHT[:-1]),
    ("mended", RIGHT[:-2]),
    ("mended", swapped('log."', "log.")),
    ("mended", swapped('"A red', "A red")),
    ("mended", swapped('"end":24', '"end:24', '"start":0', 'start":0')),
    ("mended", swapped('"start"', "start", '"end"', "end", '"prompt"', "prompt")),
    ("mended", swapped('"', "", ",", ", ", ":", ": ")),
    ("mended", swapped('"', "", ",", "\n", ":", ": ")),
    ("mended", swapped('":', '"=')),
    ("mended", swapped('"start":', '"start" ')),
    ("mended", swapped(f'"{FOX}"', f"`{FOX}`", f'"{LEAP}"', f'"""{LEAP}"""')),
    ("mended", swapped('"', '\\"')),
    ("mended", swapped('"', '\\"', ",", ",\\n")),
    ("mended", "I split it [it's two: a, b. " + RIGHT),
    ("mended", "With {start, end, prompt}: " + RIGHT),
    ("extracted", "\ufeff" + RIGHT),
    ("extracted", f"```\n```json\n{RIGHT}\n```\n```"),
    ("extracted", f"<answer>{RIGHT}</answer>"),
    ("extracted", swapped("},{", "}\n{")[1:-1]),
    ("extracted", swapped("},{", "}]\n[{")),
    ("extracted", swapped("},{", "}],{")),
    ("extracted", json.dumps(RIGHT)),
    ("extracted", json.dumps({"name": "plan", "arguments": json.dumps({"steps": STEPS_OF_RIGHT})})),
    ("extracted", json.dumps({"prompt": "A fox.", "steps": STEPS_OF_RIGHT})),
    ("extracted", json.dumps([{"prompt": "A fox.", "start": 0, "end": 24, "shots": STEPS_OF_RIGHT}])),
    ("extracted", json.dumps({"prompt": "A fox.", "steps": [{"prompt": FOX}, {"prompt": LEAP}]})),
    ("extracted", json.dumps({"prompt": "A fox.", "steps": [FOX, LEAP]})),
    ("extracted", json.dumps({"Plan": {"Scenes": STEPS_OF_RIGHT, "cast": [{"name": "fox", "description": "red"}]}})),
    ("extracted", json.dumps(dict(zip(("step_1", "step_2"), STEPS_OF_RIGHT, strict=True)))),
    ("extracted", json.dumps([[0, 12, FOX], [12, 24, LEAP]])),
    ("extracted", json.dumps([FOX, LEAP])),
    ("drafts left out", f"{DRAFT}\nOr rather:\n{RIGHT}"),
    ("drafts left out", f"```json\n{DRAFT}\n```\nToo short.\n```json\n{RIGHT}\n```"),
    ("drafts left out", swapped("},{", "}\n{", text=DRAFT)[1:-1] + "\n" + swapped("},{", "}\n{")[1:-1]),
    ("drafts left out", json.dumps({"draft": json.loads(DRAFT), "final": STEPS_OF_RIGHT})),
    ("drafts left out", RIGHT + ' as in {"start": 0, "end": 3, "prompt": "x"}'),
    ("keys renamed", swapped('"start"', '"start_frame"', '"end"', '"end_frame"')),
    ("keys renamed", swapped('"start"', '"startFrame"', '"end"', '"End Frame"', '"prompt"', '"Caption"')),
    ("keys renamed", swapped('"start"', '"frame_start"', '"end"', '"frame_end"')),
    ("keys renamed", swapped('"start"', '"latent-frames start"', '"end"', '"FrameStop"')),
    ("keys renamed", swapped('"start"', '"starting_frame"', '"end"', '"ending_frame"')),
    ("keys ignored", json.dumps([step | {"camera": json.loads(DRAFT)[0]} for step in STEPS_OF_RIGHT])),
    ("keys ignored", json.dumps([STEPS_OF_RIGHT[0] | {"camera": json.loads(DRAFT)[0]}, STEPS_OF_RIGHT[1]])),
    ("keys ignored", json.dumps([STEPS_OF_RIGHT[0] | {"actions": json.loads(DRAFT)}, STEPS_OF_RIGHT[1]])),
    ("keys ignored", json.dumps([STEPS_OF_RIGHT[0], STEPS_OF_RIGHT[1] | {"actions": DRAFT}])),
    ("mended", swapped('"start":0', '"camera":{"start":0,"prompt":"zoom"},"start":0', "}]", "},]")),
    ("extracted", json.dumps({"from": "planner", "text": "The plan", "answer": STEPS_OF_RIGHT})),
    ("keys renamed", swapped('"start"', '"Start"', '"end"', '"END"', '"prompt"', '"description"')),
    ("keys renamed", swapped('"start"', '"from"', '"end"', '"to"', '"prompt"', '"text"')),
    ("keys renamed", json.dumps([{"span": [0, 12], "prompt": FOX}, {"span": {"from": 12, "to": 24}, "prompt": LEAP}])),
    ("keys renamed", json.dumps([{"frames": "0-12", "prompt": FOX}, {"frames": "12 to 24", "prompt": LEAP}])),
    ("keys repeated", swapped('"prompt":"A', '"prompt":"x","prompt":"A')),
    ("keys repeated", f'{{"steps":{DRAFT},"steps":{RIGHT}}}'),
    ("bounds unread", swapped(":24", ":NaN")),
    ("bounds unread", swapped(":24", ":true")),
    ("bounds unread", swapped(":24", ": ")),
    ("bounds unread", swapped(":12", ': "noon"')),
    ("bounds filled", swapped(":24", ":None")),
    ("bounds converted", swapped(":12", ':"12 frames"', ":24", ":24.0")),
    ("steps dropped", swapped("},{", "}, ..., {")),
    ("steps dropped", swapped("},{", '}, "and then", null, {')),
]  # fmt: skip


@pytest.mark.parametrize(("repair", "text"), WRITTEN)
def test_both_steps_are_read_and_the_repair_is_named(repair, text):
    plan = parse(text)
    assert list(plan.steps) == [Step(0, 12, FOX), Step(12, 24, LEAP)]
    assert plan.format_score == 0.5 and repair in plan.repairs


QUOTES = [  # what stands in the first step's text, and is read of it
    ('A "red" fox', 'A "red" fox'),
    ('"A" red fox', '"A" red fox'),
    ('A fox, "red", leaps', 'A fox, "red", leaps'),
    ('It says "go"', 'It says "go"'),
    ('It says "go: now", and goes', 'It says "go: now", and goes'),
    ("It says “go”", "It says “go”"),
    ("The fox\\'s den", "The fox's den"),
    ("The fox's den, the foxes' den", "The fox's den, the foxes' den"),
    ("C:\\wolf \\u00e9 \\u12", "C:wolf é u12"),
    ("{one} [two]\nthree", "{one} [two] three"),
]


@pytest.mark.parametrize("quote", ['"', "'"])
@pytest.mark.parametrize(("inside", "read"), QUOTES)
def test_quotes_and_escapes_in_a_text(inside, read, quote):
    text = swapped(FOX, inside, "}]", "},]").replace('":"', f'":{quote}').replace('"}', f"{quote}}}")
    assert [step.prompt for step in parse(text).steps] == [read, LEAP]


@pytest.mark.parametrize("end", range(RIGHT.index(LEAP[5]) - len(RIGHT) + 2, -4))
def test_a_step_that_is_cut_off_is_named(end):
    plan = parse(RIGHT[: RIGHT.index("},{") + 3] + RIGHT[RIGHT.index("},{") + 3 : end])
    assert [step.prompt for step in plan.steps] == [FOX] and "steps dropped" in plan.repairs


@pytest.mark.parametrize("text", [RIGHT, PYTHON, json.dumps({"prompt": "A fox.", "steps": STEPS_OF_RIGHT}, indent=1)])
@pytest.mark.parametrize("mark", ["", *"\"'{}[],:"])
def test_one_wrong_mark_never_loses_a_step_in_silence(text, mark):
    """A mark left out ("") or put in at every place."""
    for i in range(len(text)):
        found = parse(text[:i] + mark + text[i + (not mark) :])
        named = {"steps dropped", "drafts left out", "unusable"} & set(found.repairs)
        assert len(found.steps) == 2 or named or mark == "]", (text[:i], found)


def test_steps_and_spans_stay_together_when_sorted_and_cut():
    found = parse(rows(*((3 * i, 3 * i + 3, f"step {i}") for i in (7, 2, 0, 5, 9, 1, 4, 8, 6, 3))))
    assert list(found.steps) == [Step(3 * i, 3 * i + 3, f"step {i}") for i in range(8)]  # the first ones are kept
    assert {"sorted", "too many steps"} == set(found.repairs)


def test_bounds_beyond_the_video_and_truth_values_are_no_bounds():
    assert spans(parse(rows((0, 10**9, "a"), (10**9, 24, "b")))) == [(0, 21), (21, 24)]
    assert spans(parse(rows((0, -(10**9), "a"), (-(10**9), 24, "b")))) == [(0, 3), (3, 24)]
    assert spans(parse(rows((0, None, "a"), (None, None, "b"), (10**400, 24, "c")))) == [(0, 18), (18, 21), (21, 24)]
    plan = parse(rows((False, 12, "a"), (12, True, "b")))
    assert spans(plan) == [(0, 12), (12, 24)] and plan.repairs == ("bounds unread",)
    plan = parse(rows((0, 12, "a"), (True, 24, "b")))
    assert spans(plan) == [(0, 12), (12, 24)] and plan.repairs == ("bounds unread",)


def test_what_only_looks_like_steps_is_none():
    for text in (
        '{"text": "I cannot do this."}',
        "I can't do this [sorry].",
        "[the plan]",
        '{"prompt": "x", "steps": []}',
    ):
        assert parse(text).repairs == ("unusable",)


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
    "response",
    [
        '{"a":' * 3900,
        "{" * 20_000,
        '{"prompt":"x"}' * 1400,
        '[{"prompt":' * 1800,
        "[" * 20_000,
        '[""/*' * 4000,
        '{"prompt":"' + " {a:“" * 3900,
        '{"prompt":"x","start":0} ' * 800,
        '[""' + " " * 19_000,
        "[x] " * 5000,
        '["' * 9999,
        '{"a":1,"a":2}"' * 1400,
        '{"a":"b ' + '"//' * 6600,
        '{a: "' + "b\n" * 9000,
        '{\\"a\\":{' * 2200,
        "{'a': (" * 2800,
    ],
)
def test_hostile_responses_take_bounded_time(response):
    started = time.monotonic()
    check(response)
    assert time.monotonic() - started < 2.0


@pytest.mark.parametrize("count", range(1, 9))
def test_equal_spans_keep_steps_and_differ_by_a_chunk_at_most(count: int) -> None:
    starts = [*range(0, CHUNK * count, CHUNK), FRAMES]  # the last step has what is left
    plan = parse(rows(*((a, b, f"step {i}") for i, (a, b) in enumerate(pairwise(starts)))))
    even = uniform_spans(plan, CHUNK)
    lengths = [end - start for start, end in spans(even)]
    assert [step.prompt for step in even.steps] == [step.prompt for step in plan.steps]
    assert spans(even)[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(spans(even)))
    assert sum(lengths) == FRAMES and all(n % CHUNK == 0 for n in lengths) and max(lengths) - min(lengths) <= CHUNK
    assert (even.format_score, even.repairs, even.response) == (plan.format_score, plan.repairs, plan.response)
