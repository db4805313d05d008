"""GSPO (arXiv 2507.18071): one length-normalised ratio a sequence (docs/algorithm.md 2.4)."""

from __future__ import annotations

from torch import Tensor

from tempact.rl.sequences import Moves


def gspo_loss(
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
    """A `SequenceLoss` whose ratio is the exponential of a sequence's mean move, and k3 a mean over its tokens."""
    moves = Moves.of(log_probs, old, reference, token_mask, advantage, mask)
    ratio = moves.moved.sum(1).div(moves.tokens).exp()
    policy, low, high = moves.clipped(ratio, clip_low, clip_high)
    k3 = moves.k3.sum(1) / moves.tokens
    metrics = {
        "kl": k3,
        "ratio": ratio,
        "ratio_deviation": (ratio - 1).abs(),
        "clip_ratio/low": low,
        "clip_ratio/high": high,
        **moves.bins(ratio - 1, clip_low, clip_high),
    }
    return moves.mean(policy + kl_weight * k3, metrics, terms)
