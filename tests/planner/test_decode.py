"""Decoding of plans: its distribution, its log-probs, and that a plan does not depend on the plans beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tempact.config import LoraConfig, OptimConfig, PlannerConfig
from tempact.errors import UserError
from tempact.planner.decode import BUCKET, Response, _attend, draw, steps, uniforms
from tempact.planner.planner import Planner

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


@pytest.mark.parametrize("fallback", [False, True])
def test_temperature_and_cuts_act_on_what_is_drawn(make_planner, fallback):
    """Log-probs stay those of the full distribution."""
    planner = make_planner(train=False, max_new_tokens=1, temperature=0.7, top_k=40, top_p=0.8)
    planner.stepwise = not fallback
    prompt = planner.tokenizer("The red circle")["input_ids"]
    made = planner.respond([prompt] * 3000, range(3000))
    drawn = torch.tensor([each.tokens[0] for each in made])
    with torch.no_grad():
        logits = planner.peft(input_ids=torch.tensor([prompt])).logits[0, -1].float()
    kept, ids = (logits / 0.7).topk(40)
    kept = kept.softmax(-1)
    kept[kept.cumsum(-1) - kept >= 0.8] = 0.0  # the first that reach the mass
    expected = torch.zeros(len(logits)).index_put((ids,), kept / kept.sum())
    assert 3 < (expected > 0).sum() < 40 and (expected[drawn] > 0).all()
    assert chi_square(torch.bincount(drawn, minlength=len(logits)), expected) < 2.5  # of fewer degrees of freedom
    found = torch.tensor([each.log_probs[0] for each in made])
    torch.testing.assert_close(found, logits.log_softmax(-1)[drawn], atol=1e-5, rtol=1e-5)


def test_query_heads_of_a_group_read_the_same_keys():
    """As transformers' attention does, which copies K and V for each head."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 6, 1, 8, generator=generator)
    key, value = torch.randn(2, 3, 2, 11, 8, generator=generator)
    mask = torch.zeros(3, 1, 1, 11).masked_fill(
        torch.arange(11) > torch.tensor([4, 10, 0])[:, None, None, None], -torch.inf
    )
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    found, _ = _attend(module, query, key, value, mask, scaling=0.3)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    assert found.shape == expected.shape == (3, 1, 6, 8)
    torch.testing.assert_close(found, expected)


def planner_of(model, tokenizer, **settings) -> Planner:
    lora = LoraConfig(4, 8, ("q_proj", "v_proj", "down_proj"))
    config = PlannerConfig("tiny", lora, OptimConfig(lr=1e-2), **settings)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    return Planner(model, tokenizer, config, 24, 3)


@pytest.mark.parametrize("kind", ["window", "rope", "eager"])
def test_models_without_such_a_cache_are_generated_from(tokenizer, move, prompts, kind):
    """With log-probs of their own forward pass: where a window moves, and where a rope's frequencies do."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, initializer_range=0.2, max_position_embeddings=256,
    )  # fmt: skip
    if kind == "window":
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=8))
    else:
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0} if kind == "rope" else None
        config = Qwen3Config(**sizes, **({"rope_parameters": rope} if rope else {}))
        config._attn_implementation = "eager" if kind == "eager" else "sdpa"
        model = Qwen3ForCausalLM(config)
    planner = planner_of(model.eval(), tokenizer, max_new_tokens=30)
    move(planner)
    assert not planner.stepwise
    found = planner.respond(prompts, range(8))
    assert planner.respond(prompts[4:5], [4]) == found[4:5]
    for prompt, response in zip(prompts, found, strict=True):
        values = torch.tensor(response.log_probs)
        torch.testing.assert_close(values, given(planner, prompt, response), atol=1e-5, rtol=1e-5)


def test_a_model_that_attends_otherwise_is_seen(make_planner, monkeypatch):
    """A decoded token that does not have the states of a whole sequence."""
    model = make_planner().peft.get_base_model()
    planner = make_planner()
    layer = model.model.layers[1].self_attn
    layer.scaling *= 8
    usual = type(layer).forward

    def capped(self, *args, past_key_values=None, **kwargs):
        out, weights = usual(self, *args, past_key_values=past_key_values, **kwargs)
        return out if past_key_values is None else 3 * out, weights

    assert steps(model, planner.generation)
    monkeypatch.setattr(type(layer), "forward", capped)
    assert not steps(model, planner.generation)


def test_adapters_and_attention_are_as_before(make_planner, move, prompts):
    planner = make_planner(max_new_tokens=4)
    move(planner)
    planner.respond(prompts, range(8))
    assert planner.peft.get_base_model().config._attn_implementation == "sdpa"
    assert not any("forward" in vars(module) for module in planner.peft.modules())


def test_broken_weights_are_told(make_planner, prompts):
    planner = make_planner()
    with torch.no_grad():
        planner.peft.get_base_model().model.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="planner: found logits that are not finite; accepted: "):
        planner.respond(prompts, range(8))


def test_bf16_stays_near_the_trained_log_probs(make_planner, move, prompts):
    planner = make_planner(dtype=torch.bfloat16, precision="bf16", max_new_tokens=40)
    move(planner)
    tokens = planner.tokens(prompts, planner.respond(prompts, range(8)))
    off = (planner.log_probs(tokens).detach() - tokens.log_probs)[tokens.response_mask]
    assert off.abs().mean() < 0.02


@pytest.mark.gpu
def test_graphs_replay_the_plain_steps(make_planner, move, prompts, monkeypatch):
    """On a GPU in fp32: the CPU's log-probs along the same tokens, and those of steps without graphs."""
    planner = make_planner(max_new_tokens=40)
    move(planner)
    expected = planner.respond(prompts, range(8))
    planner.peft.cuda()
    torch.backends.cuda.matmul.allow_tf32 = False
    graphed = planner.respond(prompts, range(8))
    monkeypatch.setattr("tempact.planner.decode.Decoder.advance", lambda self, length: self.decode(length))
    plain = planner.respond(prompts, range(8))
    assert graphed == plain
    assert sum(a.tokens == b.tokens for a, b in zip(graphed, expected, strict=True)) >= 7
    for prompt, response in zip(prompts, graphed, strict=True):
        values = torch.tensor(response.log_probs, device="cuda")
        torch.testing.assert_close(values, given(planner, prompt, response), atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_plans_of_a_bf16_model_do_not_depend_on_neighbours_on_a_gpu(tokenizer, move, deterministic):
    """Rows are fixed; the cache grows over a bucket, rows are taken again, and its memory is given back."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=4000, hidden_size=1024, intermediate_size=2048, num_hidden_layers=4, head_dim=64)
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=16, num_key_value_heads=8)).bfloat16().eval()
    planner = planner_of(model, tokenizer, precision="bf16", max_new_tokens=300, sampled_together=24)
    with torch.no_grad():
        for name, parameter in planner.parameters().items():
            parameter.add_(0.01 * torch.randn(parameter.shape) if "lora_B" in name else 0.0)
    planner.peft.cuda()
    generator = torch.Generator().manual_seed(1)
    own = [torch.randint(4000, (300 + 17 * b,), generator=generator).tolist() for b in range(8)]
    prompts = [own[i % 8] for i in range(64)]
    planner.respond(prompts[:1], [0])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        many = planner.respond(prompts, range(64))
        assert torch.cuda.memory_allocated() - before < 2**20
        for i in (0, 7, 40):
            assert planner.respond(prompts[i : i + 1], [i])[0].tokens == many[i].tokens
        assert planner.respond(prompts[::-1], range(63, -1, -1))[::-1] == many
    finally:
        torch.use_deterministic_algorithms(False)
    tokens = planner.tokens(prompts, many)
    with torch.no_grad():
        off = (planner.log_probs(tokens) - tokens.log_probs)[tokens.response_mask]
    assert off.abs().mean() < 0.05
