"""The planner's update: micro-batches, first and later updates, precision, memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tempact.errors import UserError
from tempact.planner.planner import Planner
from tempact.rl.gspo import gspo_loss
from tempact.types import Batch, PlanBatch, PlanTokens, Prompt

PROMPTS = [Prompt("a", "A red circle jumps."), Prompt("b", "The square grows, and then the red circle turns blue.")]
ADVANTAGE = torch.tensor([0.9, -0.4, 0.2, -1.0, 0.7, 0.6])
SCORED = torch.tensor([True, True, False, True, True, True])


def batch_of(plans: PlanBatch, mask: torch.Tensor = SCORED) -> Batch:
    return Batch(ADVANTAGE, mask, torch.empty(0), torch.empty(0), plans.tokens, None)


def gradients(planner: Planner) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in planner.parameters().items()}


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert any(value.any() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerance)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("plans", [list(range(6)), [4, 1, 5]])
def test_micro_batches_add_up_to_the_loss_of_all(make_planner, move, first, micro_batch, plans):
    """The reference here is the plain loss over all rows at once, those without a score masked."""
    planner = make_planner(micro_batch=micro_batch, kl_weight=0.1)
    batch = batch_of(planner.sample(PROMPTS, 3, seed=4))
    with torch.no_grad():
        old = None if first else planner.log_probs(batch.tokens.select(plans))
    given = None if first else planner.old_log_probs(batch, planner.units(batch, plans))
    move(planner)
    tokens = batch.tokens.select(plans)
    log_probs = planner.log_probs(tokens)
    reference = planner.log_probs(tokens, reference=True)
    loss, expected = gspo_loss(
        log_probs, log_probs if old is None else old, reference, tokens.response_mask, ADVANTAGE[plans], SCORED[plans],
        clip_low=planner.config.clip_low, clip_high=planner.config.clip_high, kl_weight=0.1,
    )  # fmt: skip
    loss.backward()
    wanted = gradients(planner)
    planner.peft.zero_grad()
    found = planner.update(batch, plans, given)
    close(gradients(planner), wanted, atol=1e-6, rtol=1e-3)
    if first:  # the adapter has moved since the plans were sampled
        counted = tokens.response_mask & SCORED[plans][:, None]
        moves = (log_probs.detach() - tokens.log_probs)[counted].double()
        expected |= {
            "sampling_gap": moves.abs().mean().item(), "sampling_k3": (moves.exp() - 1 - moves).mean().item(),
        }  # fmt: skip
        assert expected["sampling_gap"] > 0.01
    assert found == pytest.approx(expected, abs=2e-6, rel=1e-4)
    if first:
        assert found["ratio"] == pytest.approx(1.0, abs=1e-12) and found["ratio_deviation"] == 0.0


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_nothing_scored_leaves_no_gradient_and_no_metrics(make_planner, micro_batch):
    planner = make_planner(micro_batch=micro_batch)
    batch = batch_of(planner.sample(PROMPTS, 3, seed=4), SCORED & False)
    assert planner.update(batch, list(range(6)), None) == {}
    assert all(p.grad is None for p in planner.parameters().values())


def test_log_probs_by_micro_batches_are_those_of_all(make_planner, move):
    planner, parts = make_planner(), make_planner(micro_batch=2)
    tokens = planner.sample(PROMPTS, 3, seed=4).tokens
    for each in (planner, parts):
        move(each)
    with torch.no_grad():
        torch.testing.assert_close(parts.log_probs(tokens), planner.log_probs(tokens), atol=2e-5, rtol=1e-5)


def kept_bytes(planner: Planner, tokens) -> int:
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        planner.log_probs(tokens).sum().backward()
    weights = {p.untyped_storage().data_ptr() for p in planner.peft.parameters()}
    return sum(size for pointer, size in kept.items() if pointer not in weights)


def test_recomputed_layers_give_the_same_gradients_from_less_memory(make_planner, move):
    found = {}
    for recompute in (False, True):
        planner = make_planner(checkpoint_activations=recompute, micro_batch=3)
        move(planner)
        batch = batch_of(planner.sample(PROMPTS, 3, seed=4))
        kept = kept_bytes(planner, batch.tokens)
        planner.peft.zero_grad()
        metrics = planner.update(batch, list(range(6)), None)
        assert not any(module.training for module in planner.peft.modules())
        found[recompute] = kept, metrics, gradients(planner)
    assert found[True][0] < 0.5 * found[False][0]
    assert found[True][1] == found[False][1]
    close(found[True][2], found[False][2], atol=1e-7, rtol=1e-5)


def test_recomputed_layers_are_asked_for_without_a_warning(make_planner, recwarn: pytest.WarningsRecorder):
    make_planner(checkpoint_activations=True)
    assert [str(one.message) for one in recwarn if "checkpointing_enable" in str(one.message)] == []


def test_bf16_weights_under_fp32_adapters(make_planner, move):
    planner, exact = make_planner(dtype=torch.bfloat16, kl_weight=0.1), make_planner(kl_weight=0.1)
    assert {p.dtype for p in planner.parameters().values()} == {torch.float32}
    assert planner.peft.get_base_model().dtype == torch.bfloat16
    batch = batch_of(planner.sample(PROMPTS, 3, seed=4))
    metrics = planner.update(batch, list(range(6)), None)
    assert metrics["ratio"] == 1.0 and metrics["kl"] == 0.0
    assert {p.grad.dtype for p in planner.parameters().values()} == {torch.float32}
    planner.peft.zero_grad()
    for each in (planner, exact):
        move(each)
        each.update(batch, list(range(6)), None)
    flat = [torch.cat([g.flatten() for g in gradients(each).values()]) for each in (planner, exact)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.98


def test_padding_is_never_attended_in_bf16(make_planner, move):
    """Right padding is left to causality, left padding is masked."""
    planner = make_planner(dtype=torch.bfloat16)
    move(planner)
    tokens = planner.sample(PROMPTS, 2, seed=6).tokens
    expected = planner.log_probs(tokens)
    for row in range(4):
        length = int(tokens.attention_mask[row].sum())
        alone = tokens.select([row])
        alone.input_ids[:, length:] = 9
        torch.testing.assert_close(planner.log_probs(alone)[0], expected[row], atol=0.05, rtol=0.02)
    pads = {"input_ids": 9, "attention_mask": False, "response_mask": False, "log_probs": 0.0}
    left = PlanTokens(*(torch.nn.functional.pad(getattr(tokens, k), (40, 0), value=v) for k, v in pads.items()))
    torch.testing.assert_close(planner.log_probs(left)[:, 40:], expected, atol=0.05, rtol=0.02)


def test_an_authors_planner_adapter_is_start_and_reference(make_planner, move, tokenizer, tmp_path):
    """Written by plain PEFT, as their llm_lora; k3 is 0 at step 0 although the model is not the base model's."""
    base = make_planner().peft.unload()
    torch.manual_seed(3)
    theirs = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    theirs.save_pretrained(tmp_path / "llm_lora")
    model_folder = tmp_path / "model"
    make_planner().peft.unload().save_pretrained(model_folder)
    tokenizer.save_pretrained(model_folder)
    config = replace(make_planner(kl_weight=0.1).config, adapter=str(tmp_path / "llm_lora"))
    planner = Planner.load(model_folder, config, 24, 3)
    bare = Planner.load(model_folder, replace(config, adapter=""), 24, 3)
    batch = batch_of(planner.sample(PROMPTS, 3, seed=4))
    with torch.no_grad():
        own = theirs.eval()(input_ids=batch.tokens.input_ids[:1]).logits[0, :-1].log_softmax(-1)
        own = own.gather(-1, batch.tokens.input_ids[0, 1:, None]).squeeze(-1)
        found = planner.log_probs(batch.tokens)
    counted = batch.tokens.response_mask[0, 1:]
    torch.testing.assert_close(found[0, 1:][counted], own[counted], atol=2e-5, rtol=1e-5)
    assert (bare.log_probs(batch.tokens) - found).abs().max() > 1e-2
    metrics = planner.update(batch, list(range(6)), None)
    assert metrics["kl"] == 0.0 and metrics["ratio"] == 1.0
    with pytest.raises(UserError, match="adapter_model.safetensors: not found"):
        Planner.load(model_folder, replace(config, adapter=str(tmp_path / "nothing")), 24, 3)


def test_what_cannot_be_loaded_is_one_line(make_planner, tokenizer, tmp_path):
    config = make_planner().config
    with pytest.raises(UserError, match="no config.json there"):
        Planner.load(tmp_path / "nowhere", config, 24, 3)
    make_planner().peft.unload().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for broken in (whole[:-100], b"nonsense", b""):
        file.write_bytes(broken)
        with pytest.raises(UserError, match="not readable .*accepted: a causal LM") as caught:
            Planner.load(tmp_path, config, 24, 3)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    file.write_bytes(whole)
    planner = Planner.load(tmp_path, replace(config, precision="bf16"), 24, 3)
    assert planner.peft.dtype == torch.bfloat16 and planner.peft.config._attn_implementation == "sdpa"
