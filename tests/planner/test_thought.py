"""What of a response is thought, for tokenizers with a token for each tag and without."""

from __future__ import annotations

import copy

import pytest
import torch

from tempact.planner.decode import Response
from tempact.planner.language_model import opens_thought, thought_length
from tempact.planner.plans import answer_of
from tempact.types import Prompt

RESPONSES = [
    ("a b</think> c </think>\n[1]", "a b</think> c </think>"),  # the last tag counts
    ("<think>\na\n</think>\n\n[1]", "<think>\na\n</think>"),
    ("<think>\n\n</think>", "<think>\n\n</think>"),  # cut off right after the thought
    ("<think>a [1] never closed", "<think>a [1] never closed"),  # cut off in the thought: no answer
    ("<think>a</think> b <think> again", "<think>a</think>"),
    ("[1]", ""),  # nothing was thought
    ("", ""),
]


@pytest.mark.parametrize("kind", ["tokenizer", "thinking_tokenizer"])
@pytest.mark.parametrize(("response", "thought"), RESPONSES)
def test_a_thought_ends_with_its_tag(request, kind, response, thought):
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    cut = thought_length(tokenizer, ids)
    assert (tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut:])) == (thought, response[len(thought) :])


def test_the_token_is_found_by_its_id(thinking_tokenizer, tokenizer):
    """Whatever that id is; the tokenizer without one spells the tag."""
    assert len(thinking_tokenizer("</think>", add_special_tokens=False)["input_ids"]) == 1
    assert len(tokenizer("</think>", add_special_tokens=False)["input_ids"]) > 1
    closing = thinking_tokenizer.convert_tokens_to_ids("</think>")
    spelled = tokenizer("</think>", add_special_tokens=False)["input_ids"]
    assert thought_length(thinking_tokenizer, [3, closing, 4, 5]) == 2
    assert thought_length(thinking_tokenizer, [*spelled, 4]) == 0  # characters that look like the tag are not it


def test_a_prompt_that_opens_the_thought(thinking_tokenizer):
    ids = thinking_tokenizer("a b", add_special_tokens=False)["input_ids"]
    assert opens_thought("assistant\n<think>\n") and not opens_thought("<think>\n\n</think>\n\n")
    assert thought_length(thinking_tokenizer, ids, opened=True) == len(ids)
    assert thought_length(thinking_tokenizer, ids) == 0


@pytest.mark.parametrize("kind", ["tokenizer", "thinking_tokenizer"])
def test_the_mask_is_what_the_parser_reads(make_planner, request, kind):
    tokenizer = request.getfixturevalue(kind)
    planner = make_planner(loss_tokens="json", tokenizer=tokenizer)
    prompt, end = tokenizer("moves")["input_ids"], tokenizer.eos_token_id
    for text in (response for response, _ in RESPONSES if response):
        for tail in ([end], []):  # with and without its end token
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            tokens = planner.tokens([prompt], [Response([*ids, *tail], [0.0] * len([*ids, *tail]))])
            answer = tokens.input_ids[0][tokens.response_mask[0]].tolist()
            cut_in_thought = text.startswith("<think>a [1]")
            if tail and not cut_in_thought:
                assert answer.pop() == end
            assert tokenizer.decode(answer).strip() == answer_of(text).strip()
            assert not tokens.response_mask[0, : len(prompt)].any()


def test_an_unfinished_thought_has_no_gradient_in_json_mode(make_planner, thinking_tokenizer, move):
    planner = make_planner(loss_tokens="json", tokenizer=thinking_tokenizer)
    move(planner)
    thought = thinking_tokenizer("<think>The red circle moves.", add_special_tokens=False)["input_ids"]
    tokens = planner.tokens([[3, 4]], [Response(thought, [0.0] * len(thought))])
    assert not tokens.response_mask.any()
    planner.log_probs(tokens).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in planner.parameters().values())


@pytest.mark.parametrize("thinking", [True, False])
def test_thinking_is_switched_in_the_template(make_planner, thinking_tokenizer, thinking):
    planner = make_planner(tokenizer=thinking_tokenizer, thinking=thinking, max_new_tokens=4)
    text = planner.prompt_text("A red circle jumps.")
    assert text.endswith("assistant\n" if thinking else "assistant\n<think>\n\n</think>\n\n")
    plan = planner.sample([Prompt("a", "A red circle jumps.")], 1, seed=0).plans[0]
    assert not plan.response.startswith("<think>")


def test_a_template_that_opens_the_thought_leaves_no_answer_to_an_unfinished_one(make_planner, thinking_tokenizer):
    """As models that always think do; what they would have planned in the thought is no plan."""
    tokenizer = copy.deepcopy(thinking_tokenizer)
    tokenizer.chat_template += "<think>\n"
    planner = make_planner(tokenizer=tokenizer, loss_tokens="json", max_new_tokens=4)
    batch = planner.sample([Prompt("a", "A red circle jumps.")], 8, seed=0)
    closing = torch.tensor(tokenizer.convert_tokens_to_ids("</think>"))
    assert batch.plans[0].response.startswith("<think>")
    for row, plan in enumerate(batch.plans):
        closed = bool((batch.tokens.input_ids[row] == closing).any())
        assert plan.format_score == 0.0 or closed
        assert bool(batch.tokens.response_mask[row].any()) <= closed
