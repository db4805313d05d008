"""GSPO: clipped policy gradient with one length-normalised ratio a sequence (docs/algorithm.md 2.4)."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """Mean over sequences of the clipped loss plus the mean k3 divergence from the reference policy.

    Args:
        log_probs, old, reference: [P, L] fp32 log-probabilities of the sampled tokens at temperature 1; only
            log_probs gets a gradient. What lies outside token_mask is never read.
        token_mask: [P, L] bool, tokens that count; an empty row counts as one token of ratio 1.
        advantage, mask: [P]; sequences whose mask is False count for nothing, whatever their numbers (NaN too).
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        kl_weight: beta of k3 = exp(d) - d - 1, d = reference - log_probs, which is never negative.
        terms: counted sequences of the whole update, where these are a micro-batch of it: losses, gradients and
            metrics of micro-batches then add up to those of the whole. None: these are all.

    Returns:
        Scalar loss (0 with gradient 0 if nothing counts) and metrics loss, kl, ratio, ratio_deviation,
        clip_ratio/low, clip_ratio/high.
    """
    token_mask, mask, advantage = (t.to(log_probs.device) for t in (token_mask, mask, advantage))
    token_mask = token_mask & mask[:, None]  # a gradient of 0 times an infinite ratio or a missing advantage is no 0
    tokens = token_mask.sum(1).clamp_min(1)
    moved = torch.where(token_mask, log_probs - old.detach(), 0.0)
    ratio = moved.sum(1).div(tokens).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    policy = -torch.minimum(ratio * advantage, clipped * advantage)
    distance = torch.where(token_mask, reference.detach() - log_probs, 0.0)
    # exp(d) - 1 loses all of a small d's k3 to rounding, expm1 does not
    k3 = (torch.expm1(distance) - distance).sum(1) / tokens
    each = policy + kl_weight * k3

    def mean(values: Tensor) -> Tensor:
        return torch.where(mask, values, 0.0).sum() / (mask.sum().clamp_min(1) if terms is None else terms)

    metrics = {
        "loss": each,
        "kl": k3,
        "ratio": ratio,
        "ratio_deviation": (ratio - 1).abs(),
        "clip_ratio/low": (ratio < 1 - clip_low) & (advantage < 0),
        "clip_ratio/high": (ratio > 1 + clip_high) & (advantage > 0),
    }
    values = torch.stack([mean(value.detach().double()) for value in metrics.values()]).tolist()
    return mean(each), dict(zip(metrics, values, strict=True))
