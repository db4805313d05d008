"""DiffusionNFT: forward-process RL with an implicit negative policy (docs/algorithm.md 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from tempact.config import ExecutorConfig
from tempact.rl.levels import of_levels

LEAST_ERROR = 1e-5  # of a prediction, below which its loss is no longer normalised


def diffusion_nft_gradient(
    velocity: Tensor,
    old: Tensor,
    reference: Tensor,
    target: Tensor,
    sigma: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    beta: float,
    advantage_clip: float,
    kl_weight: float,
    terms: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient of DiffusionNFT's loss (arXiv 2509.16117) plus velocity KL: `velocity.backward(gradient)`.

    The clean chunk of a continuation is noised to sigma, as in flow matching. A positive policy beta velocity +
    (1 - beta) old and a negative one, its mirror image in old, predict the clean chunk; the errors of the two are
    weighted by r and 1 - r, r = 1/2 + advantage / (2 advantage_clip) in [0, 1]. Each error is divided by its mean size,
    and the loss is scaled by advantage_clip / beta, so that the gradient on policy depends on the advantage alone.

    Args:
        velocity, old, reference, target: [B, C, c, H, W] fp32, one noised chunk a row; target: noise less clean chunk.
        sigma: [B], noise level of the row, in (0, 1].
        advantage, mask: [B]; rows with a False mask do not count, whatever their numbers (NaN too).
        beta: distance of the two policies from the old one, in distances of the trained one; above 0.
        advantage_clip: the size of an advantage at which r is 0 or 1.
        kl_weight: beta_v.
        terms: counted rows of the whole update, so that losses and gradients of its micro-batches add up.

    Returns:
        The gradient in `velocity`, [B, C, c, H, W], and metrics that add up over micro-batches: loss, kl, clean_error
        (mean size of the error with which `velocity` predicts the clean chunk) and velocity_change (mean square of
        velocity less old). Metrics are fp64 scalars on the device of `velocity`; none of them is waited for.
    """
    velocity, old = velocity.detach(), old.detach()
    wide = (-1, *[1] * (velocity.ndim - 1))
    level, moved, error = sigma.view(wide), velocity - old, old - target
    share = (0.5 + advantage / (2 * advantage_clip)).clamp(0.0, 1.0)
    gradient, policy = torch.zeros_like(velocity), torch.zeros_like(share)
    for sign, weight in ((1.0, share), (-1.0, 1.0 - share)):
        own = level * (error + sign * beta * moved)  # the prediction's error, up to its sign
        size = own.abs().flatten(1).mean(1).clamp_min(LEAST_ERROR)
        policy += weight * own.square().flatten(1).mean(1) / size
        gradient += sign * (weight / size).view(wide) * level * own
    scale = advantage_clip / beta
    elements, away = velocity[0].numel(), velocity - reference
    gradient = 2.0 / elements * (advantage_clip * gradient + kl_weight * away)
    gradient = torch.where(mask.view(wide), gradient / terms, 0.0)
    kl = away.square().flatten(1).mean(1)
    shares = {
        "loss": scale * policy + kl_weight * kl,
        "kl": kl,
        "clean_error": (level * (velocity - target)).abs().flatten(1).mean(1),
        "velocity_change": moved.square().flatten(1).mean(1),
    }
    return gradient, {name: torch.where(mask, value.double(), 0.0).sum() / terms for name, value in shares.items()}


class DiffusionNFT:
    """`executor.loss diffusion_nft` (`ExecutorLoss`): all K calls are trained, on noise of their own."""

    forward = True

    def __init__(self, config: ExecutorConfig, sigmas: tuple[float, ...]):
        self.config, self.sigmas = config, sigmas

    def __call__(
        self, velocity: Tensor, old: Tensor, reference: Tensor, recorded: Tensor, levels: Tensor, advantage: Tensor,
        mask: Tensor, *, terms: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        config, sigma = self.config, of_levels(self.sigmas, levels)
        return diffusion_nft_gradient(
            velocity, old, reference, recorded, sigma, advantage, mask, beta=config.nft_beta,
            advantage_clip=config.advantage_clip, kl_weight=config.kl_weight, terms=terms,
        )  # fmt: skip
