"""Sampling, log-probs and adapters of the planner, on a random little model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tempact.errors import UserError
from tempact.planner.decode import Response
from tempact.planner.planner import Planner
from tempact.types import PlanTokens, Prompt

PROMPTS = [Prompt("a", "A red circle jumps."), Prompt("b", "The square grows, and then the red circle turns blue.")]


def plain_log_probs(planner: Planner, ids: list[int]) -> torch.Tensor:
    """Log-probs of ids[1:], one unpadded sequence, all logits in fp32."""
    logits = planner.peft(input_ids=torch.tensor([ids])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(-1)


def padded(tokens: PlanTokens, left: int, right: int, token: int) -> PlanTokens:
    pad = (left, right)
    return PlanTokens(
        torch.nn.functional.pad(tokens.input_ids, pad, value=token),
        torch.nn.functional.pad(tokens.attention_mask, pad, value=False),
        torch.nn.functional.pad(tokens.response_mask, pad, value=False),
        torch.nn.functional.pad(tokens.log_probs, pad),
    )


def k3(planner: Planner, tokens: PlanTokens) -> torch.Tensor:
    d = planner.log_probs(tokens, reference=True) - planner.log_probs(tokens)
    return (d.exp() - d - 1)[tokens.response_mask]


def test_sampling_repeats_for_a_seed_and_leaves_global_randomness_alone(make_planner):
    planner = make_planner()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = planner.sample(PROMPTS, 3, seed=11)
    assert torch.equal(torch.rand(3), expected)
    again, other = planner.sample(PROMPTS, 3, seed=11), planner.sample(PROMPTS, 3, seed=12)
    assert first.plans == again.plans and torch.equal(first.tokens.input_ids, again.tokens.input_ids)
    assert [p.response for p in first.plans] != [p.response for p in other.plans]


def test_plans_differ_and_depend_on_their_place_alone(make_planner):
    """More plans than rows of a step; plan m of prompt b is the same in a smaller batch."""
    planner = make_planner()
    batch = planner.sample(PROMPTS, 30, seed=11)
    assert len({p.response for p in batch.plans}) == len(batch.plans) == 60  # none repeats another's draws
    assert [p.instruction for p in batch.plans] == [prompt.text for prompt in PROMPTS for _ in range(30)]
    few, one = planner.sample(PROMPTS, 3, seed=11), planner.sample(PROMPTS[:1], 2, seed=11)
    assert few.plans == batch.plans[:3] + batch.plans[30:33] and one.plans == few.plans[:2]
    swapped = planner.sample([PROMPTS[0], PROMPTS[0]], 3, seed=11)
    assert swapped.plans[:3] == few.plans[:3] and swapped.plans[3:] != few.plans[:3]


def test_log_probs_at_sampling_are_those_that_are_trained(make_planner, move):
    for settings in ({}, {"loss_tokens": "json"}):
        planner = make_planner(**settings)
        move(planner)
        tokens = planner.sample(PROMPTS, 3, seed=11).tokens
        assert tokens.log_probs.dtype == torch.float32
        torch.testing.assert_close(planner.log_probs(tokens), tokens.log_probs, atol=1e-5, rtol=1e-5)
        start = planner.sample(PROMPTS, 3, seed=11, reference=True).tokens
        torch.testing.assert_close(planner.log_probs(start, reference=True), start.log_probs, atol=1e-5, rtol=1e-5)
        assert (planner.log_probs(start) - start.log_probs).abs().max() > 1e-2


def test_plans_belong_to_their_prompts_and_tokens_to_their_plans(make_planner, tokenizer):
    planner = make_planner(max_new_tokens=40)
    batch = planner.sample(PROMPTS, 4, seed=3)
    tokens, ends = batch.tokens, {tokenizer.eos_token_id, 7}
    stopped = 0
    for row, plan in enumerate(batch.plans):
        assert plan.instruction == batch.prompt_of(row).text == PROMPTS[row // 4].text
        length = int(tokens.attention_mask[row].sum())
        assert tokens.attention_mask[row, :length].all()
        ids, counted = tokens.input_ids[row, :length].tolist(), tokens.response_mask[row].tolist()
        prompt = counted.index(True)
        assert counted == [prompt <= i < length for i in range(len(counted))]
        assert tokenizer.decode(ids[:prompt]) == planner.prompt_text(plan.instruction)
        response = ids[prompt:]
        assert not ends & set(response[:-1])
        if response[-1] in ends:
            stopped += 1
            response = response[:-1]
        else:
            assert len(response) == 40
        assert tokenizer.decode(response) == plan.response
    assert 0 < stopped < len(batch.plans)  # both ways to end are seen
    assert tokens.attention_mask.any(0).all()


def test_samples_follow_the_full_distribution(make_planner):
    """The model ships top-k 1, top-p 0.1 and a repetition penalty; none of them may act."""
    planner = make_planner(max_new_tokens=1)
    batch = planner.sample(PROMPTS[:1], 6000, seed=0)
    row, mask = batch.tokens.input_ids[0], batch.tokens.response_mask[0]
    prompt = row[: int(mask.nonzero()[0])]
    with torch.no_grad():
        expected = planner.peft(input_ids=prompt[None]).logits[0, -1].softmax(-1)
    drawn = batch.tokens.input_ids[:, len(prompt)]
    seen = torch.bincount(drawn, minlength=len(expected)) / len(drawn)
    spread = (expected * (1 - expected) / len(drawn)).sqrt()
    assert ((seen - expected).abs() <= 5 * spread + 1 / len(drawn)).all()
    assert (expected.topk(20).values.sum() < 0.9) and (seen > 0).sum() > 100


def test_log_probs_are_those_of_the_counted_tokens(make_planner, move):
    planner = make_planner()
    move(planner)
    tokens = planner.sample(PROMPTS, 2, seed=2).tokens
    tokens.response_mask[1, : int(tokens.response_mask[1].nonzero()[3])] = False
    found = planner.log_probs(tokens)
    assert found.dtype == torch.float32 and found.shape == tokens.input_ids.shape
    for row in range(4):
        length = int(tokens.attention_mask[row].sum())
        expected = torch.zeros(tokens.input_ids.shape[1])
        expected[1:length] = plain_log_probs(planner, tokens.input_ids[row, :length].tolist())
        torch.testing.assert_close(found[row], expected * tokens.response_mask[row], atol=2e-5, rtol=1e-5)
    assert found[tokens.response_mask].max() < 0


def test_gradients_are_those_of_the_plain_computation_and_of_the_trained_adapter_only(make_planner, move):
    planner = make_planner()
    move(planner)
    tokens = planner.sample(PROMPTS[:1], 1, seed=4).tokens
    planner.log_probs(tokens).sum().backward()
    found = {name: p.grad.clone() for name, p in planner.parameters().items()}
    assert not any(p.grad is not None for name, p in planner.peft.named_parameters() if name not in found)
    planner.peft.zero_grad()
    counted = tokens.response_mask[0, 1:]
    (plain_log_probs(planner, tokens.input_ids[0].tolist()) * counted).sum().backward()
    for name, parameter in planner.parameters().items():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("left", "right"), [(0, 9), (7, 0), (13, 4)])
@pytest.mark.parametrize("absolute_positions", [False, True])
def test_padding_on_either_side_changes_nothing(make_planner, left, right, absolute_positions):
    """Whatever token the padding holds; gradients stay finite too."""
    planner = make_planner(absolute_positions=absolute_positions)
    tokens = planner.sample(PROMPTS, 2, seed=6).tokens
    expected = planner.log_probs(tokens)
    moved = planner.log_probs(padded(tokens, left, right, token=9))
    torch.testing.assert_close(moved[:, left : left + expected.shape[1]], expected, atol=2e-5, rtol=1e-5)
    moved.sum().backward()
    assert all(p.grad.isfinite().all() for p in planner.parameters().values())


def test_a_batch_equals_its_rows(make_planner):
    planner = make_planner()
    tokens = planner.sample(PROMPTS, 2, seed=8).tokens
    together = planner.log_probs(tokens)
    alone = torch.cat([planner.log_probs(tokens.select([row])) for row in range(4)])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)


def test_nothing_counted_gives_zeros(make_planner):
    planner = make_planner()
    tokens = planner.sample(PROMPTS, 1, seed=8).tokens
    tokens.response_mask[:] = False
    assert torch.equal(planner.log_probs(tokens), torch.zeros(tokens.input_ids.shape))


def test_a_warm_started_planner_is_its_own_reference(make_planner, move, tmp_path):
    before = make_planner()
    move(before)
    before.save_adapter(tmp_path)
    planner = make_planner(adapter=tmp_path)
    tokens = planner.sample(PROMPTS, 2, seed=9).tokens
    fresh = make_planner().log_probs(tokens)
    assert (planner.log_probs(tokens) - fresh).abs().max() > 1e-2  # the warm start acts
    assert torch.equal(planner.log_probs(tokens), before.log_probs(tokens))
    assert torch.equal(k3(planner, tokens), torch.zeros(int(tokens.response_mask.sum())))

    reference, plans = planner.log_probs(tokens, reference=True), planner.sample(PROMPTS, 2, seed=9).plans
    optimiser = torch.optim.AdamW(planner.parameters().values(), lr=0.1)
    planner.log_probs(tokens).sum().backward()
    optimiser.step()
    assert k3(planner, tokens).min() >= -1e-6 and k3(planner, tokens).mean() > 1e-3
    assert torch.equal(planner.log_probs(tokens, reference=True), reference)
    assert planner.sample(PROMPTS, 2, seed=9, reference=True).plans == plans
    assert planner.sample(PROMPTS, 2, seed=9).plans != plans


def test_adapters_round_trip_as_peft_folders_and_leave_the_reference(make_planner, move, tmp_path):
    planner, other = make_planner(), make_planner()
    move(planner)
    planner.save_adapter(tmp_path / "planner")
    assert {p.name for p in (tmp_path / "planner").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    tokens = planner.sample(PROMPTS, 2, seed=9).tokens
    start = other.log_probs(tokens)
    other.load_adapter(tmp_path / "planner")
    assert torch.equal(other.log_probs(tokens), planner.log_probs(tokens))
    assert torch.equal(other.log_probs(tokens, reference=True), start)
    assert other.parameters().keys() == planner.parameters().keys()


def test_adapters_that_do_not_fit_are_refused(make_planner, tmp_path):
    make_planner(rank=2).save_adapter(tmp_path)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors.*shape"):
        make_planner(rank=4, adapter=tmp_path)
    written = tmp_path / "adapter_config.json"
    written.write_text(written.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    with pytest.raises(UserError, match=r"adapter_config\.json: lora_alpha: found 16; accepted: 8"):
        make_planner(rank=2, adapter=tmp_path)
    with pytest.raises(UserError, match=r"not found"):
        make_planner(adapter=tmp_path / "nowhere")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"found a damaged or cut-off file"):
        make_planner(rank=2, adapter=tmp_path)


def test_a_planner_that_is_not_trained_may_sample_otherwise(make_planner):
    planner = make_planner(train=False, top_k=1)
    first, second = (planner.sample(PROMPTS, 1, seed=seed).plans for seed in (1, 2))
    assert [p.response for p in first] == [p.response for p in second]


def test_a_model_that_cannot_plan_is_refused(make_planner, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        Planner.load(tmp_path, make_planner().config, 24, 3)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(UserError, match="chat template"):
            make_planner()
    finally:
        tokenizer.chat_template = template


@pytest.mark.parametrize("thought", ["", "red </think>", "red</think> circle </think>"])
def test_json_loss_counts_what_follows_the_thought(make_planner, tokenizer, thought):
    planner = make_planner()
    planner.config = replace(planner.config, loss_tokens="json")
    prompt, end = tokenizer("moves")["input_ids"], tokenizer.eos_token_id
    head, tail = (tokenizer(text)["input_ids"] for text in (thought, "[{}]"))
    responses = [Response(own, [-1.0] * len(own)) for own in ([*head, *tail, end], [*tail, end])]
    tokens = planner.tokens([prompt, [*prompt, *prompt]], responses)
    assert torch.equal(tokens.log_probs, -tokens.response_mask.float())
    counted = tokens.response_mask.tolist()
    first = len(prompt) + len(head)
    assert counted[0] == [first <= i < first + len(tail) + 1 for i in range(len(counted[0]))]
    first = 2 * len(prompt)
    assert counted[1] == [first <= i < first + len(tail) + 1 for i in range(len(counted[1]))]
    planner.config = replace(planner.config, loss_tokens="all")
    everything = planner.tokens([prompt], responses[:1]).response_mask[0].tolist()
    assert everything == [i >= len(prompt) for i in range(len(everything))]
