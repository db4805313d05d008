"""Liger's fused loss against ours, on the CPU, and its kernels in Qwen3, on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tempact.config import LoraConfig
from tempact.errors import UserError
from tempact.planner import language_model as liger
from tempact.planner.language_model import chosen_log_probs
from tempact.rl.gspo import gspo_loss
from tempact.types import Batch, Prompt

pytest.importorskip("liger_kernel", reason="needs liger-kernel: pip install -e '.[liger]'")
WIDTH, VOCABULARY = 24, 300
CLIP = {"clip_low": 3e-4, "clip_high": 4e-4}
PROMPTS = [Prompt("a", "A red circle jumps."), Prompt("b", "The square grows, and then the red circle turns blue.")]


def case(tokens: int, bias: bool = False) -> tuple[nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor]:
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias).requires_grad_(False)
    hidden = torch.randn(tokens, WIDTH)
    return head, hidden, hidden + 0.1 * torch.randn(tokens, WIDTH), torch.randint(VOCABULARY, (tokens,))


@pytest.mark.parametrize("kl_weight", [0.0, 0.05])
@pytest.mark.parametrize("advantage", [0.8, -0.6])
@pytest.mark.parametrize(
    "move", [None, 0.0, 2e-4, -2e-4, 6e-4, -6e-4]
)  # mean of log_probs - old; the clip is 3e-4/4e-4
@pytest.mark.parametrize(("tokens", "bias"), [(1, False), (17, True), (40, False)])
def test_fused_loss_and_gradient_are_those_of_gspo(kl_weight, advantage, move, tokens, bias):
    """Each option that is used: length-normalised ratio, both clips, k3, on- and off-policy, lengths."""
    head, hidden, start, ids = case(tokens, bias)
    plain, fused = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    log_probs, reference = chosen_log_probs(head, plain, ids)[None], chosen_log_probs(head, start, ids)[None]
    old = None
    if move is not None:
        wobble = torch.randn(tokens)
        old = log_probs.detach()[0] - move + 1e-2 * (wobble - wobble.mean())
    expected, _ = gspo_loss(
        log_probs, log_probs.detach() if old is None else old[None], reference, torch.ones(1, tokens, dtype=torch.bool),
        torch.tensor([advantage]), torch.tensor([True]), **CLIP, kl_weight=kl_weight,
    )  # fmt: skip
    found = liger.fused_gspo_loss(fused, head, ids, advantage, old, start, **CLIP, kl_weight=kl_weight)
    assert found.item() == pytest.approx(expected.item(), abs=2e-6)
    (3 * expected).backward()
    (3 * found).backward()
    torch.testing.assert_close(fused.grad, plain.grad, atol=2e-7, rtol=1e-4)
    clipped = move is not None and ((move > 5e-4 and advantage > 0) or (move < -5e-4 and advantage < 0))
    assert bool(fused.grad.any()) is (not clipped or kl_weight > 0)
    assert head.weight.grad is None


def test_a_sequence_without_tokens():
    head, hidden, start, ids = case(3)
    hidden = hidden.requires_grad_()
    loss = liger.fused_gspo_loss(hidden[:0], head, ids[:0], 0.5, None, start[:0], **CLIP, kl_weight=0.1)
    loss.backward()
    assert loss.item() == -0.5 and not hidden.grad.any()


@pytest.mark.parametrize("loss_tokens", ["all", "json"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("micro_batch", [0, 3])
def test_a_planner_is_updated_the_same_with_and_without_it(
    make_planner, thinking_tokenizer, move, first, micro_batch, loss_tokens
):
    found = {}
    for choice in ("off", "all"):
        planner = make_planner(
            tokenizer=thinking_tokenizer, liger=choice, micro_batch=micro_batch, kl_weight=0.05, loss_tokens=loss_tokens
        )
        assert planner.fused_loss is (choice == "all")
        plans = planner.sample(PROMPTS, 3, seed=4)
        advantage = torch.tensor([0.9, -0.4, 0.2, -1.0, 0.0, 0.6])
        mask = torch.tensor([True, True, False, True, True, True])
        batch = Batch(advantage, mask, torch.empty(0), torch.empty(0), plans.tokens, None)
        old = None if first else planner.old_log_probs(batch, planner.units(batch, list(range(6))))
        move(planner)
        metrics = planner.update(batch, list(range(6)), old)
        found[choice] = metrics, {name: p.grad.clone() for name, p in planner.parameters().items()}
    assert found["all"][0] == pytest.approx(found["off"][0], abs=2e-6, rel=1e-5)
    if first:
        assert found["all"][0]["ratio"] == 1.0 and found["all"][0]["ratio_deviation"] == 0.0
    for name, gradient in found["off"][1].items():
        assert gradient.any()
        torch.testing.assert_close(found["all"][1][name], gradient, atol=1e-6, rtol=1e-3)


class WithoutOption(nn.Module):
    """As liger-kernel 0.6.0."""

    def __init__(self, beta=0.04, compiled=True, use_ref_model=True, epsilon_low=0.2, epsilon_high=0.2):
        super().__init__()


def dropping(change: dict):
    """Liger's own loss that takes the options and drops some of them."""
    real = liger._loss_class()

    class Dropping(real):
        def __init__(
            self, beta, epsilon_low, epsilon_high, loss_type, importance_sampling_level, use_ref_model, compiled
        ):
            own = dict(beta=beta, epsilon_low=epsilon_low, epsilon_high=epsilon_high, loss_type=loss_type)
            own |= dict(importance_sampling_level=importance_sampling_level, use_ref_model=use_ref_model)
            super().__init__(**own | change, compiled=compiled)

    return Dropping


def test_the_installed_version_is_accepted_without_a_random_draw():
    before = torch.get_rng_state()
    liger.check_fused_loss()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_version_without_or_with_a_silently_dropped_sequence_ratio_is_refused(monkeypatch, make_planner):
    monkeypatch.setattr(liger, "_loss_class", lambda: WithoutOption)
    with pytest.raises(UserError, match=r"liger-kernel [\d.]+, whose fused GRPO loss has no importance_sampling_le"):
        make_planner(liger="all")
    monkeypatch.undo()
    token_level = dropping({"importance_sampling_level": "token"})
    monkeypatch.setattr(liger, "_loss_class", lambda: token_level)
    with pytest.raises(UserError, match="drops the sequence-level ratio; accepted: a newer"):
        make_planner(liger="all")


def test_an_adapter_on_the_head_is_seen_before_it_is_there(make_planner):
    targets = LoraConfig(2, 4, ("q_proj", "lm_head"))
    with pytest.raises(UserError, match="planner.liger: found 'all' with an adapter on the head; accepted: auto, off"):
        make_planner(liger="all", lora=targets)
    assert make_planner(liger="all").fused_loss and not make_planner(liger="model", lora=targets).fused_loss


def test_choices(monkeypatch):
    head, adapted = True, False  # plain?
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert liger.choose("auto", head, cpu) == liger.choose("off", head, gpu) == "off"
    assert liger.choose("auto", head, gpu) == "all" and liger.choose("auto", adapted, gpu) == "model"
    with pytest.raises(UserError, match="adapter on the head"):
        liger.choose("all", adapted, gpu)
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    assert liger.choose("auto", head, gpu) == "off"
    with pytest.raises(UserError, match="found 'model' without liger-kernel; accepted here: auto, off, or any after"):
        liger.choose("model", head, gpu)


def test_the_cpu_keeps_its_own_kernels(make_planner):
    planner = make_planner(liger="model")
    assert not planner.fused_loss and not liger.use_kernels(planner.peft.get_base_model())
    assert math.isfinite(planner.sample(PROMPTS, 1, seed=0).plans[0].format_score)


@pytest.mark.gpu
def test_kernels_in_qwen3_change_only_rounding(make_planner, move):
    """And leave models of this process that run on the CPU as they were."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3)
    config = Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=64, initializer_range=0.1)
    plain = Qwen3ForCausalLM(config).eval()
    fused = Qwen3ForCausalLM(config).cuda().eval()
    fused.load_state_dict(plain.state_dict())
    ids = torch.randint(512, (3, 40))
    assert liger.use_kernels(fused) and "Liger" in repr(fused.model.layers[0].mlp)
    results = []
    for model in (plain, fused):
        given = model.get_input_embeddings()(ids.to(model.device)).detach().requires_grad_()
        logits = model(inputs_embeds=given).logits
        logits.float().logsumexp(-1).sum().backward()
        results.append((logits.detach().cpu(), given.grad.cpu()))
    torch.testing.assert_close(results[1][0], results[0][0], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(results[1][1], results[0][1], atol=2e-3, rtol=1e-2)
