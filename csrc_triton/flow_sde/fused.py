"""The denoising step in two launches: one pass over the latents, then one small sum a sample.

The pass leaves one partial sum of squared noise a block; the second launch adds them up in a fixed order, in fp64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton._registration import custom_op, differentiable
from csrc_triton._samples import SUM_BLOCK, Config, as_rows
from csrc_triton.flow_sde import naive
from csrc_triton.flow_sde.coefficients import KINDS, cps_shares

# The block of "step" is part of its result: it says how the sum is split.
CONFIGS = {"step": Config(2048, 4), "step_drawn": Config(2048, 4), "backward": Config(4096, 4)}

_SCALE = tl.constexpr(naive.UNIFORM_SCALE)
_FLOOR = tl.constexpr(naive.UNIFORM_FLOOR)


@triton.jit
def _uniform(word):
    signed = word.to(tl.int32, bitcast=True)
    return tl.where(signed < 0, -signed - 1, signed).to(tl.float32) * _SCALE


@triton.jit
def _box_muller(u, w):
    """radius * (cos, sin)(2 pi w). Whole quarter turns are taken off exactly; the rest, at most pi / 4, goes into
    Taylor polynomials: closer than a rounded angle, and without the slow path of a general sine."""
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(u, _FLOOR)))
    turns = 4.0 * w
    nearest = tl.floor(turns + 0.5)
    angle = (turns - nearest) * 1.5707963267948966
    z = angle * angle
    sine = angle + angle * z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880))))
    cosine = 1.0 - 0.5 * z + z * z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320 - z * (1 / 3628800))))
    quarter = nearest.to(tl.int32)
    odd = (quarter & 1) == 1
    along = tl.where(odd, sine, cosine)
    across = tl.where(odd, cosine, sine)
    along = tl.where(((quarter + 1) & 2) == 2, -along, along)
    across = tl.where((quarter & 2) == 2, -across, across)
    return radius * along, radius * across


@triton.jit
def _four_normals(seed, counter):
    a, b, c, d = tl.randint4x(seed, counter)
    n0, n1 = _box_muller(_uniform(a), _uniform(b))
    n2, n3 = _box_muller(_uniform(c), _uniform(d))
    return n0, n1, n2, n3


@triton.jit
def _wide(high, low):
    """int64 of two 32-bit halves: a number's size never asks for another compilation."""
    return (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def _noise(seed, first, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers first .. first + BLOCK - 1 of the stream; four share a counter, which ALIGNED starts at its first."""
    if ALIGNED:
        n0, n1, n2, n3 = _four_normals(seed, (first >> 2) + tl.arange(0, BLOCK // 4))
        normals = tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [BLOCK])
    else:
        number = first + tl.arange(0, BLOCK)
        n0, n1, n2, n3 = _four_normals(seed, number >> 2)
        word = number & 3
        normals = tl.where(word < 2, tl.where(word == 0, n0, n1), tl.where(word == 2, n2, n3))
    return normals


@triton.jit
def _coefficients(s, n, first, second, KIND: tl.constexpr):
    """coefficients.KINDS in fp64. first, second: of coefficients.cps_shares for "cps", else first is eta."""
    if KIND == "renoise":
        decay = 1.0 - n
        kappa = decay * s
        std = n
    elif KIND == "cps":
        kept = n * second
        decay = 1.0 - n + kept
        kappa = (1.0 - n) * s - kept * (1.0 - s)
        std = n * first
    else:
        gain = first
        if KIND == "flow_grpo":
            gain = first * tl.sqrt(s / (1.0 - tl.where(s < 1.0, s, n)))
        delta = s - n
        pull = 0.5 * gain * gain * delta / s
        decay = 1.0 - pull
        kappa = delta + pull * (1.0 - s)
        std = gain * tl.sqrt(delta)
    return decay, kappa, std


@triton.jit
def _load_coefficients(sigma, sigma_next, row, first, second, KIND: tl.constexpr):
    s = tl.load(sigma + row).to(tl.float64)
    n = tl.load(sigma_next + row).to(tl.float64)
    return _coefficients(s, n, first, second, KIND)


@triton.jit(do_not_specialize=["seed_high", "seed_low", "offset_high", "offset_low"])
def step_kernel(
    x, v, noise, sample, mean, drawn, partials, sigma, sigma_next,
    x_stride, v_stride, noise_stride, elements, blocks,
    decay, kappa, std, first, second,
    seed_high, seed_low, offset_high, offset_low,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one sample. None stands for what is not there: noise where it is drawn, else drawn; sigma and
    sigma_next where decay, kappa, std are given, for all samples; mean where it is not wanted."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    at = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    out = row * elements
    if sigma is not None:  # before the loads: fp64 division needs many registers
        d, kap, dev = _load_coefficients(sigma, sigma_next, row, first, second, KIND)
        decay, kappa, std = d.to(tl.float32), kap.to(tl.float32), dev.to(tl.float32)
    x_at = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    v_at = tl.load(v + row * v_stride + at, mask=inside, other=0.0).to(tl.float32)
    if noise is not None:
        noise_at = tl.load(noise + row * noise_stride + at, mask=inside, other=0.0).to(tl.float32)
    else:
        begin = _wide(offset_high, offset_low) + out + (program % blocks) * BLOCK
        noise_at = tl.where(inside, _noise(_wide(seed_high, seed_low), begin, ALIGNED, BLOCK), 0.0)
        tl.store(drawn + out + at, noise_at, mask=inside)
    mean_at = decay * x_at - kappa * v_at
    tl.store(sample + out + at, mean_at + std * noise_at, mask=inside)
    if mean is not None:
        tl.store(mean + out + at, mean_at, mask=inside)
    tl.store(partials + program, tl.sum(noise_at * noise_at, axis=0))


@triton.jit
def finish_kernel(
    partials, table, log_prob, sigma, sigma_next, elements, blocks,
    decay, kappa, std, k, constant, first, second,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sample: log_prob [B], and decay, kappa, std, k into table [4, B]."""
    row = tl.program_id(0)
    rows = tl.num_programs(0)
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, blocks, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += tl.load(partials + row.to(tl.int64) * blocks + at, mask=at < blocks, other=0.0).to(tl.float64)
    if sigma is not None:
        d, kap, dev = _load_coefficients(sigma, sigma_next, row, first, second, KIND)
        decay, kappa, std, k = d.to(tl.float32), kap.to(tl.float32), dev.to(tl.float32), (kap / dev).to(tl.float32)
        logarithm = tl.log(dev) + 0.9189385332046727  # log(2 pi) / 2
        constant = tl.where(dev > 0.0, logarithm, float("nan"))
    total = tl.sum(sums, axis=0)
    tl.store(log_prob + row, (-0.5 * total / elements - constant).to(tl.float32))
    tl.store(table + row, decay)
    tl.store(table + rows + row, kappa)
    tl.store(table + 2 * rows + row, std)
    tl.store(table + 3 * rows + row, k)


@triton.jit
def backward_kernel(
    noise, table, grad_log_prob, grad_mean, dx, dv, noise_stride, elements, blocks, rows, BLOCK: tl.constexpr
):
    """d log_prob / d v = -(kappa / std) noise / elements and d log_prob / d x = (decay / std) noise / elements; the
    mean's are -kappa and decay. A row without spread counts as in naive.py, with std 1. None: not there, not wanted."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    at = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    decay = tl.load(table + row)
    kappa = tl.load(table + rows + row)
    gradient = tl.zeros([BLOCK], tl.float32)
    if grad_log_prob is not None:
        std = tl.load(table + 2 * rows + row)
        scale = tl.load(grad_log_prob + row) / (tl.where(std > 0.0, std, 1.0) * elements)
        gradient += scale * tl.load(noise + row * noise_stride + at, mask=inside, other=0.0).to(tl.float32)
    if grad_mean is not None:
        gradient += tl.load(grad_mean + row * elements + at, mask=inside, other=0.0)
    if dx is not None:
        tl.store(dx + row * elements + at, (decay * gradient).to(dx.dtype.element_ty), mask=inside)
    if dv is not None:
        tl.store(dv + row * elements + at, (-kappa * gradient).to(dv.dtype.element_ty), mask=inside)


def _halves(number: int) -> tuple[int, int]:
    """The high and the low 32 bits, each as a signed number."""
    return number >> 32, ((number & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def step(
    x: Tensor, v: Tensor, noise: Tensor | None, sigma: Tensor | None, sigma_next: Tensor | None,
    numbers: list[float], kind: str, seed: int, offset: int, return_mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """sample, mean, drawn noise [like x] (the latter two empty where not wanted), log_prob [B], table [4, B]."""
    config = CONFIGS["step" if noise is not None else "step_drawn"]
    rows, elements = x.shape[0], math.prod(x.shape[1:])
    blocks = triton.cdiv(elements, config.block)
    sample, mean, drawn = (torch.empty(s, dtype=torch.float32, device=x.device) for s in _shapes(x, noise, return_mean))
    partials = torch.empty(rows * blocks, dtype=torch.float32, device=x.device)
    log_prob = torch.empty(rows, dtype=torch.float32, device=x.device)
    table = torch.empty(4, rows, dtype=torch.float32, device=x.device)
    flat_x, flat_v, flat_noise = as_rows(x), as_rows(v), None if noise is None else as_rows(noise)
    given, shares = ((0.0,) * 5, numbers) if sigma is not None else (numbers, (0.0,) * 2)
    aligned = noise is None and offset % 4 == 0 and elements % 4 == 0
    step_kernel[(rows * blocks,)](
        flat_x, flat_v, flat_noise, sample, mean if return_mean else None, None if noise is not None else drawn,
        partials, sigma, sigma_next,
        flat_x.stride(0), flat_v.stride(0), 0 if flat_noise is None else flat_noise.stride(0), elements, blocks,
        *given[:3], *shares, *_halves(seed), *_halves(offset),
        KIND=kind, ALIGNED=aligned, BLOCK=config.block, num_warps=config.warps,
    )  # fmt: skip
    finish_kernel[(rows,)](
        partials, table, log_prob, sigma, sigma_next, elements, blocks, *given, *shares,
        KIND=kind, BLOCK=SUM_BLOCK, num_warps=1,
    )  # fmt: skip
    return sample, mean, drawn, log_prob, table


def _shapes(x: Tensor, noise: Tensor | None, return_mean: bool) -> tuple[tuple[int, ...], ...]:
    full, none = tuple(x.shape), (0,)
    return full, full if return_mean else none, full if noise is None else none


def backward(
    noise: Tensor, table: Tensor, grad_log_prob: Tensor | None, grad_mean: Tensor | None,
    x_dtype: torch.dtype | None, v_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x and v [like noise], each in its dtype; empty where that is None."""
    config = CONFIGS["backward"]
    rows, elements = noise.shape[0], math.prod(noise.shape[1:])
    blocks = triton.cdiv(elements, config.block)
    dx, dv = (_gradient(noise, dtype) for dtype in (x_dtype, v_dtype))
    flat = as_rows(noise)
    backward_kernel[(rows * blocks,)](
        flat, table, None if grad_log_prob is None else grad_log_prob.contiguous(),
        None if grad_mean is None else grad_mean.contiguous(),
        None if x_dtype is None else dx, None if v_dtype is None else dv, flat.stride(0), elements, blocks, rows,
        BLOCK=config.block, num_warps=config.warps,
    )  # fmt: skip
    return dx, dv


def _gradient(noise: Tensor, dtype: torch.dtype | None) -> Tensor:
    return torch.empty(noise.shape if dtype is not None else (0,), dtype=dtype, device=noise.device)


step_op = custom_op(
    "flow_sde_step",
    schema="(Tensor x, Tensor v, Tensor? noise, Tensor? sigma, Tensor? sigma_next, float[] numbers, str kind, int seed,"
    " int offset, bool return_mean) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)(step)  # fmt: skip
backward_op = custom_op(
    "flow_sde_step_backward",
    schema="(Tensor noise, Tensor table, Tensor? grad_log_prob, Tensor? grad_mean, ScalarType? x_dtype,"
    " ScalarType? v_dtype) -> (Tensor, Tensor)",
)(backward)  # fmt: skip


@step_op.register_fake
def _(x: Tensor, v: Tensor, noise: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    wide = [x.new_empty(shape, dtype=torch.float32) for shape in _shapes(x, noise, rest[-1])]
    return *wide, x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty((4, x.shape[0]), dtype=torch.float32)


@backward_op.register_fake
def _(noise: Tensor, table: Tensor, grad_log_prob: Any, grad_mean: Any, x_dtype: Any, v_dtype: Any) -> Any:
    return _gradient(noise, x_dtype), _gradient(noise, v_dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, v, noise = inputs[:3]
    sample, mean, drawn, _, table = output
    ctx.mark_non_differentiable(sample, drawn, table)
    ctx.set_materialize_grads(False)  # a gradient of zeros would be read like any other
    ctx.has_mean = mean.numel() > 0
    ctx.save_for_backward(drawn if noise is None else noise, table)
    ctx.dtypes = x.dtype, v.dtype


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    _, grad_mean, _, grad_log_prob, _ = grads
    nothing = (None,) * 8
    if not ctx.has_mean:
        grad_mean = None  # of a tensor without elements
    if grad_mean is None and grad_log_prob is None:
        return None, None, *nothing
    needed = ctx.needs_input_grad[:2]
    dtypes = (dtype if need else None for dtype, need in zip(ctx.dtypes, needed, strict=True))
    found = backward_op(*ctx.saved_tensors, grad_log_prob, grad_mean, *dtypes)
    return *(gradient if need else None for gradient, need in zip(found, needed, strict=True)), *nothing


differentiable(step_op, _differentiate, setup_context=_save)


def flow_sde_step(
    x: Tensor, v: Tensor, noise: Tensor | None, sigma: float | Tensor, sigma_next: float | Tensor,
    *, kind: str, eta: float, seed: int, offset: int, return_mean: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """sample, mean or None, std [B], log_prob [B], k [B], noise. Levels are floats, or tensors on the device of x."""
    levels: list[Tensor | None] = [None, None]
    if isinstance(sigma, Tensor) or isinstance(sigma_next, Tensor):
        levels = [
            level.contiguous() if isinstance(level, Tensor) else x.new_full(x.shape[:1], level, dtype=torch.float64)
            for level in (sigma, sigma_next)
        ]
        numbers = list(cps_shares(eta)) if kind == "cps" else [eta, 0.0]
    else:
        decay, kappa, std = KINDS[kind](sigma, sigma_next, eta)
        constant = math.log(std) + 0.5 * math.log(2 * math.pi) if std > 0 else math.nan
        numbers = [decay, kappa, std, kappa / std if std > 0 else math.inf, constant]
    sample, mean, drawn, log_prob, table = step_op(x, v, noise, *levels, numbers, kind, seed, offset, return_mean)
    used = drawn if noise is None else noise
    return sample, mean if return_mean else None, table[2], log_prob, table[3], used
