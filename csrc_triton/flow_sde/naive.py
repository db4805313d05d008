"""One stochastic denoising step in plain PyTorch (docs/algorithm.md 2.1), and the generator of its noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from csrc_triton.flow_sde.coefficients import Coefficients

WORD = 0xFFFFFFFF  # 32 bits
# Philox-4x32: round multipliers and key increments (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11)
PHILOX_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
PHILOX_WEYL = 0x9E3779B9, 0xBB67AE85
PHILOX_ROUNDS = 10
UNIFORM_SCALE = 4.6566127342e-10  # the largest for which (2**31 - 1) * scale is below 1 in fp32
UNIFORM_FLOOR = 1e-7  # of what a logarithm is taken


def flow_sde_step(
    x: Tensor, v: Tensor, noise: Tensor, coefficients: Coefficients
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample [B, ...], mean [B, ...], std [B], mean per-dimension log-density of the sample [B].

    The coefficients are 0-d or [B]. The sample is a constant for its own log-density.
    """
    wide = [c.view(-1, *(1,) * (x.ndim - 1)) if c.ndim else c for c in coefficients]
    decay, kappa, std = (c.to(x.dtype) if c.ndim else c for c in wide)
    mean = decay * x - kappa * v
    sample = (mean + std * noise).detach()
    drawn = torch.where(std > 0, std, torch.ones_like(std))  # no 0 / 0 in the gradient of a deterministic row
    # equals (sample - mean) / std; subtracting the sample itself would round the noise away
    residual = noise + (mean.detach() - mean) / drawn
    per_sample = coefficients.std.to(x.dtype) if coefficients.std.ndim else coefficients.std
    constant = per_sample.log() + 0.5 * math.log(2 * math.pi)
    constant = torch.where(per_sample > 0, constant, torch.full_like(constant, math.nan))
    log_prob = -0.5 * residual.square().flatten(1).mean(1) - constant
    return sample, mean, torch.ones_like(log_prob.detach()) * per_sample, log_prob


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox-4x32-10: four 32-bit words for each counter of four words; int64 tensors hold the words.

    Their products wrap in 64 bits, whose pattern is the unsigned product's.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        a, b = PHILOX_MULTIPLIERS[0] * c0, PHILOX_MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (b >> 32) & WORD ^ c1 ^ k0, b & WORD, (a >> 32) & WORD ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + PHILOX_WEYL[0]) & WORD, (k1 + PHILOX_WEYL[1]) & WORD
    return c0, c1, c2, c3


def normal_noise(seed: int, offset: int, rows: int, elements: int, device: torch.device) -> Tensor:
    """Standard normals [rows, elements], fp32: numbers offset, offset + 1, ... of the stream of `seed`, row by row.

    Number e is word e mod 4 of Philox's counter e div 4, by Box and Muller: words 0 and 1 make the cosine and the
    sine of one pair, words 2 and 3 of the next. So the value depends on seed and e alone, and counter c holds what
    Triton's `tl.randn4x(seed, c)` returns, to a few units in the last place.
    """
    first = offset + elements * torch.arange(rows, device=device, dtype=torch.int64)
    counter = (first >> 2)[:, None] + torch.arange(elements // 4 + 2, device=device)
    zero = torch.zeros_like(counter)
    words = philox((counter & WORD, counter >> 32, zero, zero), (seed & WORD, seed >> 32))
    u = [_uniform(word) for word in words]
    normals = torch.stack([*_box_muller(u[0], u[1]), *_box_muller(u[2], u[3])], dim=2).flatten(1)
    return normals.gather(1, (first & 3)[:, None] + torch.arange(elements, device=device))


def _uniform(word: Tensor) -> Tensor:
    """fp32 in [0, 1): the word as a signed number, folded, scaled."""
    signed = torch.where(word > WORD >> 1, word - WORD - 1, word)
    return torch.where(signed < 0, -signed - 1, signed).float() * UNIFORM_SCALE


def _box_muller(u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Two normals of two fp32 uniforms: exact up to the last rounding."""
    radius = (-2 * u.clamp(min=UNIFORM_FLOOR).double().log()).sqrt()
    angle = 2 * math.pi * w.double()
    return (radius * angle.cos()).float(), (radius * angle.sin()).float()
