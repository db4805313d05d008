"""Log-probs of chosen tokens from hidden states, without the logits of a whole sequence.

Qwen3 has 151,936 tokens: the fp32 logits of 2,024 positions are 1.2 GB a sequence, and their softmax and
gradient as much again. Here they exist for a chunk of positions at a time, in the forward and in the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from tempact.errors import UserError

LOGITS_AT_ONCE = 2**27  # fp32 numbers, 0.5 GiB


def chosen_log_probs(head: nn.Module, hidden: Tensor, ids: Tensor, at_once: int = LOGITS_AT_ONCE) -> Tensor:
    """Log-softmax (temperature 1) at `ids`: fp32 [n].

    hidden [n, width], ids [n]; `head` maps hidden states to logits. The softmax is in fp32; at most
    `at_once` logits (one position's at the least) exist at a time, and they are computed again for the gradient.
    """
    rows = max(1, at_once // vocabulary(head))
    chunks = [
        checkpoint(_chunk, head, *pair, use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else _chunk(head, *pair)
        for pair in zip(hidden.split(rows), ids.split(rows), strict=True)
    ]
    return torch.cat(chunks)


def _chunk(head: nn.Module, hidden: Tensor, ids: Tensor) -> Tensor:
    logits = head(hidden).float()
    return logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(-1)


def vocabulary(head: nn.Module) -> int:
    """Number of logits a position has."""
    weight = head.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raises UserError for a model that does more to its logits than its head (scales or caps them)."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits
    own = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(logits.float(), own.float(), rtol=1e-2, atol=1e-3):
        raise UserError(
            f"planner.weights: found {model.config.model_type}, whose logits are more than its head of its hidden "
            "states; accepted: models without scaled or capped logits, as Qwen3"
        )
