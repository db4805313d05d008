"""Log-probs from hidden states, a chunk of logits at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GraniteConfig, GraniteForCausalLM

from tempact.errors import UserError
from tempact.planner.language_model import check_head, chosen_log_probs

WIDTH, VOCABULARY, TOKENS = 16, 200, 23


class Watched(nn.Linear):
    """Remembers the largest number of logits made at once."""

    most = 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = super().forward(hidden)
        self.most = max(self.most, logits.numel())
        return logits


@pytest.fixture
def case():
    head = Watched(WIDTH, VOCABULARY, bias=False).requires_grad_(False)
    return head, 2 * torch.randn(TOKENS, WIDTH), torch.randint(VOCABULARY, (TOKENS,))


@pytest.mark.parametrize("at_once", [1, VOCABULARY, 5 * VOCABULARY + 3, 10**9])
def test_chunks_change_neither_value_nor_gradient(case, at_once):
    head, hidden, ids = case
    weights = torch.linspace(-1, 1, TOKENS)
    plain, ours = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    expected = head(plain).log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    (expected * weights).sum().backward()
    head.most = 0
    found = chosen_log_probs(head, ours, ids, at_once)
    (found * weights).sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.grad, plain.grad, atol=1e-6, rtol=1e-5)
    assert head.most <= max(at_once, VOCABULARY)  # in the backward pass too


def test_nothing_of_the_logits_is_kept_for_the_backward_pass(case):
    head, hidden, ids = case
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        chosen_log_probs(head, hidden.requires_grad_(), ids, 4 * VOCABULARY)
    assert all(count < VOCABULARY * TOKENS / 4 for count in kept)


def test_softmax_is_in_fp32_for_a_model_in_bf16():
    head = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    hidden, ids = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16), torch.randint(VOCABULARY, (TOKENS,))
    found = chosen_log_probs(head, hidden, ids)
    expected = head(hidden).float().log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_no_token_gives_no_log_prob(case):
    head, hidden, ids = case
    assert chosen_log_probs(head, hidden[:0].requires_grad_(), ids[:0]).shape == (0,)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_model_that_scales_its_logits_is_refused(scale):
    model = GraniteForCausalLM(
        GraniteConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, logits_scaling=scale, initializer_range=0.5,
        )
    ).eval()  # fmt: skip
    if scale == 1.0:
        check_head(model)
    else:
        with pytest.raises(UserError, match="found granite, whose logits are more"):
            check_head(model)
