"""Flow-GRPO on few-step transitions (ALGORITHM.md 2.2, 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from csrc_triton import flow_policy_loss
from csrc_triton.flow_sde import cps


def flow_grpo_loss(
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
    """The share of one micro-batch in the mean clipped policy loss plus velocity KL.

    Args:
        velocity, old, reference, noise: [B, C, c, H, W] fp32, one recorded transition a row; only velocity
            gets a gradient.
        advantage, mask: [B]; rows whose mask is False count for nothing.
        clip: epsilon of the ratio clip (see `clip_epsilon`).
        kl_weight: beta_v.
        terms: counted rows of the whole update, so that the micro-batches' losses and gradients add up.

    Returns:
        The loss and its metrics, each a share that adds up over micro-batches: kl, ratio, clip_ratio/low and
        /high (rows whose gradient the clip cut), ratio_deviation (mean distance of the ratio from 1). Metrics are
        fp64 scalars on the loss's device, which nothing here waits for.
    """
    each = flow_policy_loss(velocity, old, reference, noise, torch.where(mask, advantage, 0.0), clip=clip)

    def share(values: Tensor) -> Tensor:
        return torch.where(mask, values, 0.0).sum() / terms

    loss = share(each.loss + kl_weight * each.kl)
    shares = {
        "loss": each.loss + kl_weight * each.kl,
        "kl": each.kl,
        "ratio": each.ratio,
        "ratio_deviation": torch.expm1(each.log_ratio).abs(),
        "clip_ratio/low": each.clipped & (advantage < 0),
        "clip_ratio/high": each.clipped & (advantage > 0),
    }
    # fp64, so that ratios of 1 have mean 1 after the micro-batches' shares are added
    return loss, {name: share(value.detach().double()) for name, value in shares.items()}


def rollout_gap(
    velocity: Tensor, states: Tensor, following: Tensor, noise: Tensor, sigma: float, next_sigma: float, eta: float
) -> Tensor:
    """How far training's log-probs are from the roll-out's: |z| with the roll-out's velocity as the old one, [B].

    The velocity that the roll-out used is the one that took it from `states` to `following` with `noise`: the mean of
    the step is linear in it (ALGORITHM.md 2.1). 0 where both compute alike, up to rounding.

    Args:
        velocity: of training, [B, C, c, H, W], at `states` [B, C, c, H, W], from noise level `sigma`.
        following, noise: the state at `next_sigma` and what was drawn on the way there.
    """
    decay, kappa, std = cps(sigma, next_sigma, eta)
    used = (decay * states + std * noise - following) / kappa
    return (noise * (velocity - used)).flatten(1).mean(dim=1).abs()


def clip_epsilon(clip_velocity_rms: float, elements: int) -> float:
    """The ratio's clip for transitions of `elements` numbers (ALGORITHM.md 2.2).

    One standard deviation of the log-ratio where v - v_old has that rms, so that chunk size and resolution
    do not change its meaning.
    """
    return clip_velocity_rms / elements**0.5
