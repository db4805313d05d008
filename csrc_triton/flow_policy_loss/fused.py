"""The policy loss in two launches forward (a pass of partial sums, a small sum a sample) and one backward.

Bytes a transition moves, in elements: forward 4 reads; backward 3 reads (1 without KL) and 1 write. Where v_old is v,
z is 0 before anything is read: forward is 3 reads, and `terms_and_gradient` needs one pass, 3 reads and 1 write, in
place of 6 and 1. Off policy no such pass exists: the gradient's scale needs all of z.
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

# The blocks of "forward" and "one_pass" are part of their results: they say how the sums are split.
CONFIGS = {"forward": Config(2048, 4), "backward": Config(2048, 4), "one_pass": Config(2048, 4)}


@triton.jit
def policy_kernel(
    v, v_old, v_ref, noise, partials, dv, slope, ratio, grad_loss, grad_ratio, grad_log_ratio, grad_kl,
    v_stride, old_stride, ref_stride, noise_stride, elements, blocks, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one transition: its partial sums of noise (v - v_old) and (v - v_ref)^2 into partials
    [2, rows * blocks], its part of dv, or both. None stands for what is not there or not wanted; v_old None is v."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    at = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    if v is not None:
        v_at = tl.load(v + row * v_stride + at, mask=inside, other=0.0).to(tl.float32)
    if noise is not None:
        noise_at = tl.load(noise + row * noise_stride + at, mask=inside, other=0.0).to(tl.float32)
    if v_ref is not None:
        apart = v_at - tl.load(v_ref + row * ref_stride + at, mask=inside, other=0.0).to(tl.float32)
    if partials is not None:
        old_at = v_at  # v - v is 0, but NaN where v is not finite
        if v_old is not None:
            old_at = tl.load(v_old + row * old_stride + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(partials + program, tl.sum(noise_at * (v_at - old_at), axis=0))
        if v_ref is not None:
            tl.store(partials + tl.num_programs(0) + program, tl.sum(apart * apart, axis=0))
    if dv is not None:
        gradient = tl.zeros([BLOCK], tl.float32)
        if noise is not None:
            scale = 0.0  # of log_ratio
            if grad_loss is not None:
                scale += tl.load(grad_loss + row) * tl.load(slope + row)
            if grad_ratio is not None:
                scale += tl.load(grad_ratio + row) * tl.load(ratio + row)
            if grad_log_ratio is not None:
                scale += tl.load(grad_log_ratio + row)
            gradient -= (scale / elements) * noise_at
        if v_ref is not None:
            gradient += (2.0 * tl.load(grad_kl + row) / elements) * apart
        tl.store(dv + row * elements + at, gradient.to(dv.dtype.element_ty), mask=inside)


@triton.jit
def _total(partials, row, blocks, BLOCK: tl.constexpr):
    """Sum of one transition's partial sums, in fp64 and in a fixed order."""
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, blocks, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += tl.load(partials + row.to(tl.int64) * blocks + at, mask=at < blocks, other=0.0).to(tl.float64)
    return tl.sum(sums, axis=0)


@triton.jit
def terms_kernel(
    partials, advantage, loss, kl, ratio, log_ratio, slope, clipped,
    low, high, elements, blocks, KL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The terms of one transition, and slope, d loss / d log_ratio. The clip decides on the log-ratio in fp32."""
    row = tl.program_id(0)
    z = (-_total(partials, row, blocks, BLOCK) / elements).to(tl.float32)
    mean = 0.0
    if KL:
        mean = (_total(partials + tl.num_programs(0).to(tl.int64) * blocks, row, blocks, BLOCK) / elements).to(
            tl.float32
        )
    gain = tl.load(advantage + row).to(tl.float32)
    raised = gain > 0.0
    bounded = tl.where(raised, tl.minimum(z, high), tl.maximum(z, low))
    bounded = tl.where(z == z, bounded, z)
    # fp64: next to 1 the fast fp32 exponential is coarser than torch's
    surrogate = -gain * tl.exp(bounded.to(tl.float64)).to(tl.float32)
    stopped = (raised & (z > high)) | ((gain < 0.0) & (z < low))
    tl.store(loss + row, surrogate)
    tl.store(kl + row, mean)
    tl.store(ratio + row, tl.exp(z.to(tl.float64)).to(tl.float32))
    tl.store(log_ratio + row, z)
    tl.store(slope + row, tl.where(stopped, 0.0, surrogate))
    tl.store(clipped + row, stopped.to(tl.int8))


def _launch(
    tensors: tuple[Tensor | None, ...], partials: Tensor | None, dv: Tensor | None, scales: tuple[Tensor | None, ...],
    config: Config,
) -> None:  # fmt: skip
    """tensors: v, v_old, v_ref, noise; scales: slope, ratio and the upstream gradients [B] of the kernel."""
    flat = [None if t is None else as_rows(t) for t in tensors]
    rows, elements = next(t.shape for t in flat if t is not None)
    blocks = triton.cdiv(elements, config.block)
    policy_kernel[(rows * blocks,)](
        *flat, partials, dv, *(None if t is None else t.contiguous() for t in scales),
        *(0 if t is None else t.stride(0) for t in flat), elements, blocks,
        BLOCK=config.block, num_warps=config.warps,
    )  # fmt: skip


def _partials(v: Tensor, config: Config) -> Tensor:
    blocks = triton.cdiv(math.prod(v.shape[1:]), config.block)
    return torch.empty(2, v.shape[0], blocks, dtype=torch.float32, device=v.device)


def _terms(partials: Tensor, advantage: Tensor, clip: float, elements: int, kl: bool) -> tuple[Tensor, ...]:
    _, rows, blocks = partials.shape
    wide = [torch.empty(rows, dtype=torch.float32, device=partials.device) for _ in range(5)]
    clipped = torch.empty(rows, dtype=torch.bool, device=partials.device)
    terms_kernel[(rows,)](
        partials, advantage.contiguous(), *wide, clipped, math.log1p(-clip), math.log1p(clip), elements, blocks,
        KL=kl, BLOCK=SUM_BLOCK, num_warps=1,
    )  # fmt: skip
    return *wide, clipped


def _one_storage(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


def terms(
    v: Tensor, v_old: Tensor, v_ref: Tensor | None, noise: Tensor, advantage: Tensor, clip: float
) -> tuple[Tensor, ...]:
    """loss, kl, ratio, log_ratio, slope (d loss / d log_ratio), clipped [B]."""
    partials = _partials(v, CONFIGS["forward"])
    old = None if _one_storage(v, v_old) else v_old
    _launch((v, old, v_ref, noise), partials, None, (None,) * 6, CONFIGS["forward"])
    return _terms(partials, advantage, clip, math.prod(v.shape[1:]), v_ref is not None)


def gradient(
    v: Tensor, v_ref: Tensor | None, noise: Tensor, slope: Tensor, ratio: Tensor, grad_loss: Tensor | None,
    grad_ratio: Tensor | None, grad_log_ratio: Tensor | None, grad_kl: Tensor | None,
) -> Tensor:  # fmt: skip
    """dv [like v] of upstream gradients [B]; reads noise, or v and v_ref, only where a gradient comes through them."""
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    policy = any(grad is not None for grad in (grad_loss, grad_ratio, grad_log_ratio))
    kl = v_ref is not None and grad_kl is not None
    tensors = v if kl else None, None, v_ref if kl else None, noise if policy else None
    if not (policy or kl):
        return dv.zero_()
    _launch(tensors, None, dv, (slope, ratio, grad_loss, grad_ratio, grad_log_ratio, grad_kl), CONFIGS["backward"])
    return dv


def terms_and_gradient(
    v: Tensor, v_old: Tensor, v_ref: Tensor | None, noise: Tensor, advantage: Tensor, clip: float,
    loss_weight: Tensor, kl_weight: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The terms without the slope, and dv of the sum of loss_weight * loss + kl_weight * kl; weights [B] fp32."""
    if not _one_storage(v, v_old):
        loss, kl, ratio, log_ratio, slope, clipped = terms(v, v_old, v_ref, noise, advantage, clip)
        dv = gradient(v, v_ref, noise, slope, ratio, loss_weight, None, None, kl_weight)
        return loss, kl, ratio, log_ratio, clipped, dv
    partials, dv = _partials(v, CONFIGS["one_pass"]), torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if v_ref is not None and kl_weight is None:
        kl_weight = torch.zeros_like(loss_weight)
    slope = -advantage.float()  # z is 0: nothing is clipped and the ratio is 1
    scales = slope, None, loss_weight, None, None, kl_weight
    _launch((v, None, v_ref, noise), partials, dv, scales, CONFIGS["one_pass"])
    loss, kl, ratio, log_ratio, _, clipped = _terms(
        partials, advantage, clip, math.prod(v.shape[1:]), v_ref is not None
    )
    return loss, kl, ratio, log_ratio, clipped, dv


terms_op = custom_op(
    "flow_policy_loss",
    schema="(Tensor v, Tensor v_old, Tensor? v_ref, Tensor noise, Tensor advantage, float clip) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)(terms)  # fmt: skip
gradient_op = custom_op(
    "flow_policy_loss_backward",
    schema="(Tensor v, Tensor? v_ref, Tensor noise, Tensor slope, Tensor ratio, Tensor? grad_loss, Tensor? grad_ratio,"
    " Tensor? grad_log_ratio, Tensor? grad_kl) -> Tensor",
)(gradient)  # fmt: skip
terms_and_gradient_op = custom_op(
    "flow_policy_loss_and_grad",
    schema="(Tensor v, Tensor v_old, Tensor? v_ref, Tensor noise, Tensor advantage, float clip, Tensor loss_weight,"
    " Tensor? kl_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)(terms_and_gradient)  # fmt: skip


def _fake_terms(v: Tensor, count: int) -> list[Tensor]:
    wide = [v.new_empty(v.shape[0], dtype=torch.float32) for _ in range(count)]
    return [*wide, v.new_empty(v.shape[0], dtype=torch.bool)]


@terms_op.register_fake
def _(v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(_fake_terms(v, 5))


@gradient_op.register_fake
def _(v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(v.shape)


@terms_and_gradient_op.register_fake
def _(v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return *_fake_terms(v, 4), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    v, _, v_ref, noise = inputs[:4]
    _, _, ratio, _, slope, clipped = output
    ctx.mark_non_differentiable(slope, clipped)
    ctx.set_materialize_grads(False)  # a gradient of zeros would be read like any other
    ctx.save_for_backward(v, v_ref, noise, slope, ratio)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    loss, kl, ratio, log_ratio, _, _ = grads
    nothing = (None,) * 5
    if loss is kl is ratio is log_ratio is None:
        return None, *nothing
    return gradient_op(*ctx.saved_tensors, loss, ratio, log_ratio, kl), *nothing


differentiable(terms_op, _differentiate, setup_context=_save)
