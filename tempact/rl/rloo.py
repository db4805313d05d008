"""RLOO (arXiv 2402.14740): REINFORCE on whole sequences against a leave-one-out baseline (docs/algorithm.md 2.4).

The baseline is that of `group_advantages` with `leave_one_out`. A later update of an iteration is off-policy: there the
sequence's own probability ratio, which is clipped, weights the gradient; at ratio 1 the gradient is REINFORCE's.
"""

from __future__ import annotations

from torch import Tensor

from tempact.rl.sequences import Moves


def rloo_loss(
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
    """A `SequenceLoss` whose ratio is the exponential of a sequence's summed move; k3 is summed likewise, as a sequence
    is one action. The metric kl is a mean over tokens all the same."""
    moves = Moves.of(log_probs, old, reference, token_mask, advantage, mask)
    ratio = moves.moved.sum(1).exp()
    policy, low, high = moves.clipped(ratio, clip_low, clip_high)
    k3 = moves.k3.sum(1)
    metrics = {
        "kl": k3 / moves.tokens,
        "ratio": ratio,
        "ratio_deviation": (ratio - 1).abs(),
        "clip_ratio/low": low,
        "clip_ratio/high": high,
        **moves.bins(ratio - 1, clip_low, clip_high),
    }
    return moves.mean(policy + kl_weight * k3, metrics, terms)
