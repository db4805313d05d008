"""What the planner's losses share: masked moves of log-probs, the divergence from the reference, means over sequences.

Every loss is one file with one function of one signature (`SequenceLoss`); `LOSSES` of planner_losses.py names them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tempact.rl.histograms import ratio_bins


class SequenceLoss(Protocol):
    """A clipped policy gradient plus the k3 divergence from the reference policy, a mean over sequences.

    Args:
        log_probs, old, reference: [P, L] fp32 log-probabilities of the sampled tokens at temperature 1; only
            log_probs gets a gradient. What lies outside token_mask is never read.
        token_mask: [P, L] bool, tokens that count; a row without any has ratio 1 and no gradient.
        advantage, mask: [P]; sequences whose mask is False count for nothing, whatever their numbers (NaN too).
        clip_low, clip_high: a ratio is clipped to [1 - clip_low, 1 + clip_high].
        kl_weight: beta of k3 = exp(d) - d - 1, d = reference - log_probs, which is never negative.
        terms: counted sequences of the whole update, where these are a micro-batch of it: losses, gradients and
            metrics of micro-batches then add up to those of the whole. None: these are all.

    Returns:
        Scalar loss (0 with gradient 0 if nothing counts) and metrics loss, kl (mean nats a token), ratio,
        ratio_deviation, clip_ratio/low, clip_ratio/high, ratio_histogram/00 and on (`ratio_bins`).
    """

    def __call__(
        self, log_probs: Tensor, old: Tensor, reference: Tensor, token_mask: Tensor, advantage: Tensor, mask: Tensor,
        *, clip_low: float, clip_high: float, kl_weight: float, terms: int | None = None,
    ) -> tuple[Tensor, dict[str, float]]: ...  # fmt: skip


@dataclass(frozen=True)
class Moves:
    """Masked sequences, on one device.

    moved       [P, L] log-probs less the old ones, 0 where no token counts
    k3          [P, L] the divergence of each token, 0 where no token counts
    token_mask  [P, L] bool, of the sequences that count
    tokens      [P] tokens that count, at least 1
    advantage   [P], mask [P] bool
    """

    moved: Tensor
    k3: Tensor
    token_mask: Tensor
    tokens: Tensor
    advantage: Tensor
    mask: Tensor

    @classmethod
    def of(
        cls, log_probs: Tensor, old: Tensor, reference: Tensor, token_mask: Tensor, advantage: Tensor, mask: Tensor
    ) -> Moves:
        """From the tensors that a `SequenceLoss` is given."""
        token_mask, mask, advantage = (t.to(log_probs.device) for t in (token_mask, mask, advantage))
        token_mask = token_mask & mask[:, None]  # 0 times an infinite ratio or a missing advantage is no 0
        moved = torch.where(token_mask, log_probs - old.detach(), 0.0)
        distance = torch.where(token_mask, reference.detach() - log_probs, 0.0)
        # exp(d) - 1 loses all of a small d's k3 to rounding, expm1 does not
        k3 = torch.expm1(distance) - distance
        return cls(moved, k3, token_mask, token_mask.sum(1).clamp_min(1), advantage, mask)

    def clipped(self, ratio: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
        """The pessimistic loss of ratios [P] or [P, L], and where the clip stops a gradient below and above 1."""
        advantage = self.advantage if ratio.ndim == 1 else self.advantage[:, None]
        policy = -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
        return policy, (ratio < 1 - low) & (advantage < 0), (ratio > 1 + high) & (advantage > 0)

    def bins(self, away: Tensor, low: float, high: float) -> dict[str, Tensor]:
        """Bins of ratios less 1, `away` [P] or [P, L], in clips: of a sequence [P] whether it is there, or the share of
        its tokens."""
        inside = ratio_bins(away / torch.where(away > 0, high, low))
        return inside if away.ndim == 1 else {name: self.by_token(own.double()) for name, own in inside.items()}

    def by_token(self, values: Tensor) -> Tensor:
        """Mean [P] over the counted tokens of values [P, L], 0 for a row without any."""
        return torch.where(self.token_mask, values, 0.0).sum(1) / self.tokens

    def mean(self, each: Tensor, metrics: dict[str, Tensor], terms: int | None) -> tuple[Tensor, dict[str, float]]:
        """Mean loss over the sequences that count, and that of the metrics; all are [P]."""

        def over(values: Tensor) -> Tensor:
            return torch.where(self.mask, values, 0.0).sum() / (
                self.mask.sum().clamp_min(1) if terms is None else terms
            )

        named = {"loss": each, **metrics}
        values = torch.stack([over(value.detach().double()) for value in named.values()]).tolist()
        return over(each), dict(zip(named, values, strict=True))
