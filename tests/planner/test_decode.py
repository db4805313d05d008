"""Decoding of plans: its distribution, its log-probs, and that a plan does not depend on the plans beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tempact.planner import decode
from tempact.planner.decode import BUCKET, Response, draw, lean_adapters, uniforms

CHI_SQUARE = 1.5  # of its degrees of freedom: 5 standard deviations at 200 of them


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's statistic over its degrees of freedom; the tokens expected less than 8 times are one class."""
    expected = probabilities.double() * counts.sum()
    often = expected >= 8
    seen = torch.cat([counts[often].double(), counts[~often].sum().double()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    return float(((seen - expected).square() / expected.clamp_min(1e-9)).sum() / (len(expected) - 1))


@pytest.fixture
def prompts(tokenizer) -> list[list[int]]:
    """Token ids of prompts of several lengths, the shortest of one token; some are given twice."""
    texts = ["red", "The red circle moves.", "user\nThe square grows, and then the red circle turns blue.", "moves"]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert min(map(len, ids)) == 1
    return [ids[i % 4] for i in (0, 1, 1, 2, 3, 1, 0, 2)]


def test_tokens_are_the_quantiles_of_their_distribution():
    """A grid of uniforms gives each token its share of the grid, to one point, in order of the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(1, 1000, generator=generator)
    scores[0, 500:520] = -torch.inf
    scores[0, 0] = scores[0, -1] = -torch.inf
    grid = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    drawn = torch.cat([draw(scores.expand(len(part), -1), part) for part in grid.split(1000)])
    assert (drawn.diff() >= 0).all()
    shares = torch.bincount(drawn, minlength=1000) / len(grid)
    expected = scores[0].double().softmax(-1)
    assert ((shares - expected).abs() <= 1.001 / len(grid)).all()
    assert shares[expected == 0].sum() == 0


@pytest.mark.parametrize("size", [1, 127, 128, 129, 4000])
def test_the_ends_of_the_interval_are_tokens_of_some_probability(size):
    scores = torch.full((3, size), -torch.inf)
    scores[:, size // 2] = 0.0
    uniform = torch.tensor([0.0, 1 - 2**-53, 0.5], dtype=torch.float64)
    assert draw(scores, uniform).tolist() == [size // 2] * 3
    flat = torch.zeros(3, size)
    assert draw(flat, uniform).tolist() == [0, size - 1, size // 2]


def test_drawn_tokens_follow_the_softmax():
    generator = torch.Generator().manual_seed(1)
    scores = 2 * torch.randn(1, 700, generator=generator)
    drawn = draw(scores.expand(40_000, -1), uniforms(3, 40_000))
    assert chi_square(torch.bincount(drawn, minlength=700), scores[0].softmax(-1)) < CHI_SQUARE
    moved = scores + 0.1 * torch.randn(1, 700, generator=generator)
    assert chi_square(torch.bincount(drawn, minlength=700), moved[0].softmax(-1)) > CHI_SQUARE  # the test sees that


def test_uniforms_are_those_of_their_seed():
    assert torch.equal(uniforms(5, 20), uniforms(5, 40)[:20]) and not torch.equal(uniforms(5, 20), uniforms(6, 20))


@pytest.mark.parametrize("fallback", [False, True])
def test_a_response_does_not_depend_on_its_neighbours(make_planner, move, prompts, fallback):
    """Alone, among others, in any order and number of rows: the same tokens and log-probs to the last bit."""
    planner = make_planner(max_new_tokens=40)
    move(planner)
    assert planner.stepwise
    planner.stepwise = not fallback
    many, seeds = prompts * 8, list(range(8 * len(prompts)))  # more than rows: rows are taken again
    expected = planner.respond(many, seeds)
    lengths = {len(each.tokens) for each in expected}
    assert len(lengths) > 10 and len({tuple(each.tokens) for each in expected}) == len(many)
    for which in ([3], [0, 7], list(range(63, -1, -1)), list(range(1, 64, 3))):
        found = planner.respond([many[i] for i in which], [seeds[i] for i in which])
        assert found == [expected[i] for i in which]
    for together in (1, 2, 32):
        planner.config = replace(planner.config, sampled_together=together)
        assert planner.respond(many[:9], seeds[:9]) == expected[:9]


def test_a_long_neighbour_and_a_long_cache_change_nothing(make_planner, move, prompts):
    """Other rows need a longer cache, whose tail adds exact zeros; and a row goes on where its own part ends."""
    planner = make_planner(max_new_tokens=24)
    move(planner)
    long = (prompts[3] * 60)[: BUCKET - 10]
    alone = planner.respond(prompts, range(8))
    for size in (BUCKET - 60, BUCKET - 10, BUCKET + 7, 2 * BUCKET + 5):
        beside = planner.respond([*prompts, (prompts[3] * 120)[:size]], range(9))
        assert beside[:8] == alone
    (crossing,) = planner.respond([long], [3])
    planner.generation.eos_token_id = [-1]
    (crossing,) = planner.respond([long], [3])
    assert len(crossing.tokens) == 24  # 14 tokens of them behind the first part
    torch.testing.assert_close(torch.tensor(crossing.log_probs), given(planner, long, crossing), atol=1e-5, rtol=1e-5)


def given(planner, prompt: list[int], response: Response) -> torch.Tensor:
    """Log-probs of a response's tokens in its whole sequence, by PEFT's own forward pass."""
    ids = torch.tensor([[*prompt, *response.tokens]], device=planner.device)
    with torch.no_grad():
        logits = planner.peft(input_ids=ids[:, :-1]).logits[0, len(prompt) - 1 :].float()
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("absolute_positions", [False, True])
def test_log_probs_are_those_of_the_whole_sequence(make_planner, move, prompts, absolute_positions, fallback):
    planner = make_planner(absolute_positions=absolute_positions, max_new_tokens=30)
    move(planner)
    assert planner.stepwise
    planner.stepwise = not fallback
    for prompt, response in zip(prompts, planner.respond(prompts, range(8)), strict=True):
        found = torch.tensor(response.log_probs)
        torch.testing.assert_close(found, given(planner, prompt, response), atol=1e-5, rtol=1e-5)


def test_both_ways_draw_the_same_tokens(make_planner, move, prompts):
    planner = make_planner(max_new_tokens=30)
    move(planner)
    expected = planner.respond(prompts, range(8))
    planner.stepwise = False
    for ours, theirs in zip(expected, planner.respond(prompts, range(8)), strict=True):
        assert ours.tokens == theirs.tokens
        torch.testing.assert_close(torch.tensor(ours.log_probs), torch.tensor(theirs.log_probs), atol=1e-5, rtol=1e-5)
