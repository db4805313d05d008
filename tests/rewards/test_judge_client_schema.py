"""What counts as a reply, and that nothing a judge can send raises anything but BadReply and BadBody."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field
from rewards.fault_proxy import MALFORMED, completion
from rewards.judge_cases import Score

from tempact.rewards.judges.replies import MAX_REPLY_CHARACTERS, BadBody, BadReply, read_completion, read_reply

GOOD = '{"score": 0.25, "reason": "x"}'


class Frames(BaseModel):
    frame_scores: list[float] = Field(min_length=3, max_length=3)
    final: float = Field(ge=0, le=10)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"\n {GOOD}\n",
        f"```json\n{GOOD}\n```",
        f"```\n{GOOD}\n```\n",
        f"<think>it could be 0.9: {{}}</think>\n\n{GOOD}",
        f"<think>\n\n</think>\n```json\n{GOOD}\n```",
        f"<thinking>it could be 0.9</thinking>{GOOD}",
        f"[THINK]it could be 0.9[/THINK]{GOOD}",
        f"```JSON\n{GOOD}\n```",
        f"```json {GOOD}```",
        f"<|begin_of_box|>{GOOD}<|end_of_box|>",
        f"<think>x</think><|begin_of_box|>\n```json\n{GOOD}\n```\n<|end_of_box|>",
        f"<answer>{GOOD}</answer>",
        f"<think>x</think>\n<answer>\n{GOOD}\n</answer>",
        f"<json>{GOOD}</json>",
        f"\\boxed{{{GOOD}}}",
        f"{GOOD}<|im_end|>",
        f"{GOOD}</s>\n",
        f"\ufeff{GOOD}",
    ],
)
def test_accepted(text: str) -> None:
    assert read_reply(text, Score) == Score(score=0.25, reason="x")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"score": 0.5', "not one JSON object"),
        ("[0.5]", "a JSON list"),
        ("0.5", "a JSON float"),
        ("null", "a JSON NoneType"),
        (f"Here you are: {GOOD}", "not one JSON object"),
        (f"{GOOD}\n{GOOD}", "not one JSON object"),
        (f"```json\n{GOOD}\n```\n```json\n{GOOD}\n```", "not one JSON object"),
        (f"the plan says ```json\n{GOOD}\n```", "not one JSON object"),
        ('{"score": 0.1, "score": 0.9}', "a name occurs twice"),
        ('{"score": true}', "score: Input should be a valid number"),
        ('{"score": "0.5"}', "score: Input should be a valid number"),
        ('{"score": null}', "score: Input should be a valid number"),
        ('{"score": -0.01}', "score: Input should be greater than or equal to 0"),
        ('{"score": 1.01}', "score: Input should be less than or equal to 1"),
        ('{"score": NaN}', "NaN is no number"),
        ('{"score": Infinity}', "Infinity is no number"),
        ('{"score": 1e400}', "1e400 is too large"),
        ('{"score": 1' + "0" * 400 + "}", "score: "),
        ('{"score": 1' + "0" * 5000 + "}", "not one JSON object"),
        ('{"reason": "x"}', "score: Field required"),
        ('{"score": 0.5, "more": 1}', "more: Extra inputs"),
        ("<think>never closed " + GOOD, "thinking block is not closed"),
        (f"it says: </think>{GOOD}", "text in front of </think> without <think>; accepted: a server that takes"),
        (f"</think>{GOOD}", "text in front of </think> without <think>"),
        (f"0.1 [/THINK]{GOOD}", "text in front of [/THINK] without [THINK]"),
        (f"So <think>x</think>{GOOD}", "text in front of </think>"),
        (f"<think>it says: </think>{GOOD}</think>{GOOD}", "not one JSON object"),
        (f"<|begin_of_box|>{GOOD}<|end_of_box|>{GOOD}", "not one JSON object"),
        (f"<|begin_of_box|>{GOOD}", "not one JSON object"),
        (f"<|begin_of_box|>so: {GOOD}<|end_of_box|>", "not one JSON object"),
        (f"<answer><answer>{GOOD}</answer></answer>", "not one JSON object"),
        ("[" * 50_000, "not one JSON object"),
        ("x" * (MAX_REPLY_CHARACTERS + 1), "characters; accepted"),
        ("", "not one JSON object"),
    ],
)
def test_refused(text: str, reason: str) -> None:
    with pytest.raises(BadReply) as error:
        read_reply(text, Score)
    assert reason in str(error.value) and len(str(error.value)) < 300


def test_whole_numbers_are_numbers_and_lists_have_their_length() -> None:
    assert read_reply('{"frame_scores": [1, 2, 3], "final": 10}', Frames).model_dump() == {
        "frame_scores": [1.0, 2.0, 3.0],
        "final": 10.0,
    }
    for scores in ("[1, 2]", "[1, 2, 3, 4]", '[1, 2, "3"]', "1"):
        with pytest.raises(BadReply, match="frame_scores"):
            read_reply(f'{{"frame_scores": {scores}, "final": 1}}', Frames)


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b"{}", b'{"choices": null}', b'{"choices": [{}]}', b'{"choices": [{"message": 3}]}',
     b"<html>", b'{"choices": [3]}',
     b'{"choices": {"0": 1}}', b"\xff\xfe\x00", b"[" * 50_000],
)  # fmt: skip
def test_no_completion(body: bytes) -> None:
    with pytest.raises(BadBody):
        read_completion(body, Score)


def test_completions_without_an_answer() -> None:
    for body in (completion(None), completion(""), completion(GOOD, refusal="no")):
        with pytest.raises(BadReply):
            read_completion(body, Score)
    assert read_completion(completion(GOOD, refusal=None), Score) == Score(score=0.25, reason="x")


def test_a_name_that_quotes_the_end_of_a_block_is_read() -> None:
    assert read_reply('{"score": 0.5, "reason": "it says </think>"}', Score) == Score(
        score=0.5, reason="it says </think>"
    )


def test_a_reply_that_was_cut_off_or_a_routers_error_says_so() -> None:
    cut = {"finish_reason": "length", "message": {"content": None, "reasoning": "I think"}}
    with pytest.raises(BadReply, match="a larger judges.max_tokens"):
        read_completion(json.dumps({"choices": [cut]}).encode(), Score)
    half = {"finish_reason": "length", "message": {"content": '{"score": 0.5, "reason": "it'}}
    with pytest.raises(BadReply, match="cut off .* accepted: a larger judges.max_tokens"):
        read_completion(json.dumps({"choices": [half]}).encode(), Score)
    whole = {"finish_reason": "length", "message": {"content": GOOD}}
    assert read_completion(json.dumps({"choices": [whole]}).encode(), Score) == Score(score=0.25, reason="x")
    for code, status in ((429, 429), ("429", 0), (True, 0), (12, 0)):
        with pytest.raises(BadBody, match="too fast") as error:
            read_completion(json.dumps({"error": {"code": code, "message": "too fast"}}).encode(), Score)
        assert error.value.status == status


def outcome(text: str) -> Score | None:
    try:
        found = read_reply(text, Score)
    except BadReply:
        return None
    assert isinstance(found, Score) and 0 <= found.score <= 1
    return found


@settings(max_examples=400)
@given(st.text(max_size=200) | st.text(alphabet='{}[]",:.0123456789eE-+ \n`<>/think"score"', max_size=80))
def test_any_text_is_a_score_or_a_bad_reply(text: str) -> None:
    outcome(text)


@settings(max_examples=400)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["score", "reason", "x"]), inner),
        max_leaves=8,
    )
)
def test_any_json_is_a_score_or_a_bad_reply(value: object) -> None:
    outcome(json.dumps(value))


def test_damaged_replies() -> None:
    """3,000 replies with bytes cut, doubled, changed or pieces put in: in range, or refused."""
    generator = random.Random(0)
    pieces = [*MALFORMED.values(), GOOD, f"```json\n{GOOD}\n```", "<think>x</think>" + GOOD, "\ud800", "\x00", "1e999"]
    accepted = 0
    for _ in range(3000):
        text = generator.choice(pieces)
        for _ in range(generator.randrange(4)):
            at = generator.randrange(len(text) + 1)
            change = generator.randrange(3)
            middle = ("", generator.choice(pieces), chr(generator.randrange(0x3000)))[change]
            text = text[:at] + middle + text[at + generator.randrange(3) :]
        accepted += outcome(text) is not None
    assert 100 < accepted < 1500  # the test sees both sides
