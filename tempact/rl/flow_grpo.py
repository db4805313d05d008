"""Flow-GRPO on few-step transitions (docs/algorithm.md 2.2, 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from csrc_triton import flow_policy_loss_and_grad
from csrc_triton.flow_sde import cps
from tempact.config import ExecutorConfig
from tempact.rl.histograms import ratio_bins
from tempact.rl.levels import of_levels
from tempact.rl.plain_ratio import plain_ratio_gradient, rectifying, scales


def flow_grpo_gradient(
    velocity: Tensor,
    old: Tensor,
    reference: Tensor,
    noise: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    clip: float,
    kl_weight: float,
    terms: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient of the mean clipped policy loss plus velocity KL, for one micro-batch: `velocity.backward(gradient)`.

    The loss has a closed form, so that value and gradient come from one call. On policy, where `old` is
    `velocity.detach()` and shares its memory, the fused kernel reads and writes each tensor once.

    Args:
        velocity, old, reference, noise: [B, C, c, H, W] fp32, one recorded transition a row.
        advantage, mask: [B]; rows with a False mask do not count, whatever their numbers (NaN too).
        clip: epsilon of the ratio clip (see `clip_epsilon`).
        kl_weight: beta_v.
        terms: counted rows of the whole update, so that losses and gradients of its micro-batches add up.

    Returns:
        The gradient in `velocity`, [B, C, c, H, W], and metrics that add up over micro-batches: loss, kl, ratio,
        clip_ratio/low and /high (share of rows whose gradient the clip stopped), ratio_deviation (mean distance of the
        ratio from 1), ratio_histogram/00 and on (`ratio_bins`). Metrics are fp64 scalars on the device of `velocity`;
        none of them is waited for.
    """
    weight = mask.to(velocity.dtype) / terms
    each, gradient = flow_policy_loss_and_grad(
        velocity, old, reference, noise, advantage, clip=clip, loss_weight=weight, kl_weight=kl_weight * weight
    )
    # a weight of 0 times an infinite ratio or a missing advantage is no 0
    gradient = gradient.masked_fill_(~mask.view(-1, *[1] * (gradient.ndim - 1)), 0.0)
    shares = {
        "loss": each.loss + kl_weight * each.kl,
        "kl": each.kl,
        "ratio": each.ratio,
        "ratio_deviation": torch.expm1(each.log_ratio).abs(),
        "clip_ratio/low": each.clipped & (advantage < 0),
        "clip_ratio/high": each.clipped & (advantage > 0),
        **ratio_bins(torch.expm1(each.log_ratio) / clip),
    }
    # fp64, so that ratios of 1 have mean 1 after the micro-batches' shares are added
    return gradient, {name: torch.where(mask, value.double(), 0.0).sum() / terms for name, value in shares.items()}


def rollout_gap(
    velocity: Tensor, states: Tensor, following: Tensor, noise: Tensor, sigma: float, next_sigma: float, eta: float
) -> Tensor:
    """Distance of training's log-probs from the roll-out's: |log-ratio| [B] with the roll-out's velocity as old.

    The mean of a step is linear in the velocity (docs/algorithm.md 2.1), so the velocity that the roll-out used follows
    from the two recorded states and the noise. 0, up to rounding, where training and roll-out compute alike.

    Args:
        velocity: training's velocity at `states`, [B, C, c, H, W].
        states, following: recorded states at the levels `sigma` and `next_sigma`, [B, C, c, H, W].
        noise: the noise drawn between them, [B, C, c, H, W].
        eta: of the CPS step, in (0, 1].
    """
    decay, kappa, std = cps(sigma, next_sigma, eta)
    used = (decay * states + std * noise - following) / kappa
    return (noise * (velocity - used)).flatten(1).mean(dim=1).abs()


def clip_epsilon(clip_velocity_rms: float, elements: int) -> float:
    """Epsilon of the ratio clip for transitions of `elements` numbers (docs/algorithm.md 2.2).

    It is one standard deviation of the log-ratio where v - v_old has the given root mean square, so that its meaning
    does not depend on chunk size and resolution.
    """
    return clip_velocity_rms / elements**0.5


class FlowGRPO:
    """`executor.loss flow_grpo` (`ExecutorLoss`): the roll-out's T stochastic transitions are trained."""

    forward = False

    def __init__(self, config: ExecutorConfig, sigmas: tuple[float, ...]):
        self.config = config
        self.k = scales(sigmas, config.eta)
        self.weights = rectifying(self.k) if config.reweight else [1.0] * len(self.k)

    def __call__(
        self, velocity: Tensor, old: Tensor, reference: Tensor, recorded: Tensor, levels: Tensor, advantage: Tensor,
        mask: Tensor, *, terms: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        config = self.config
        clip = clip_epsilon(config.clip_velocity_rms, velocity[0].numel())
        rows = velocity, old, reference, recorded
        if config.ratio_norm:
            return flow_grpo_gradient(*rows, advantage, mask, clip=clip, kl_weight=config.kl_weight, terms=terms)
        k, weight = of_levels(self.k, levels), of_levels(self.weights, levels)
        return plain_ratio_gradient(
            *rows, k, weight, advantage, mask, clip=clip, kl_weight=config.kl_weight, terms=terms
        )
