"""GRPO (arXiv 2402.03300): a ratio a token, a mean over the tokens of a sequence (docs/algorithm.md 2.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from tempact.rl.sequences import Moves


def grpo_loss(
    log_probs: Tensor,
    old: Tensor,
    reference: Tensor,
    token_mask: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl_weight: float,
    terms: int | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """A `SequenceLoss` whose ratios are those of tokens, each clipped for itself.

    Loss, k3 and metrics of a sequence are means over its tokens. The gradient at ratio 1 is that of GSPO.
    """
    moves = Moves.of(log_probs, old, reference, token_mask, advantage, mask)
    policy, low, high = moves.clipped(moves.moved.exp(), clip_low, clip_high)
    k3 = moves.k3.sum(1) / moves.tokens
    away = torch.expm1(moves.moved)
    metrics = {
        "kl": k3,
        "ratio": 1.0 + moves.by_token(away.double()),
        "ratio_deviation": moves.by_token(away.abs()),
        "clip_ratio/low": moves.by_token(low.double()),
        "clip_ratio/high": moves.by_token(high.double()),
        **moves.bins(away, clip_low, clip_high),
    }
    return moves.mean(moves.by_token(policy) + kl_weight * k3, metrics, terms)
