"""Weights of samples that another program has drawn with the same weights (docs/algorithm.md 2.4)."""

from __future__ import annotations

from torch import Tensor


def importance_weights(log_probs: Tensor, sampled: Tensor, token_mask: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """exp of the mean difference of a sequence's log-probs, a weight [P], truncated to `largest`; and where it was.

    Args:
        log_probs: [P, L] fp32, of the policy that is trained, before its first update.
        sampled: [P, L] fp32, of the program that has drawn the tokens.
        token_mask: [P, L] bool, tokens that count; a row without any has weight 1.
    """
    moved = (log_probs - sampled).masked_fill(~token_mask, 0.0)
    weights = (moved.sum(1) / token_mask.sum(1).clamp_min(1)).exp()
    return weights.clamp(max=largest), weights > largest
