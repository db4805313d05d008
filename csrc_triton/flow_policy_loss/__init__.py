"""Policy-gradient terms of a batch of recorded denoising transitions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from csrc_triton import runtime
from csrc_triton._samples import why_unfit
from csrc_triton.flow_policy_loss import naive


class FlowPolicyTerms(NamedTuple):
    """Terms of the policy loss of each transition, [B], fp32 (fp64 where v is fp64).

    loss       max(-A r, -A clip(r, 1 - clip, 1 + clip))
    kl         mean((v - v_ref)^2)
    ratio      r = exp(log_ratio)
    log_ratio  z = -mean(noise * (v - v_old))
    clipped    bool, True where the clip stopped the policy gradient
    """

    loss: Tensor
    kl: Tensor
    ratio: Tensor
    log_ratio: Tensor
    clipped: Tensor


def flow_policy_loss(
    v: Tensor, v_old: Tensor, v_ref: Tensor | None, noise: Tensor, advantage: Tensor, *, clip: float
) -> FlowPolicyTerms:
    """Clipped policy loss, closed-form ratio and velocity KL of B transitions (docs/algorithm.md 2.2, 2.3).

    The ratio is exactly 1 where v equals v_old. Only v gets a gradient. v_old may be v itself or share its memory; the
    fused path then reads it once. Transitions that are not contiguous are copied first. Where the weights of the terms
    are known before the loss, `flow_policy_loss_and_grad` moves fewer bytes.

    Args:
        v, v_old, v_ref, noise: [B, ...], one shape, floating point. `noise` is the noise that the roll-out drew for
            the transition. v_ref None: the KL is 0.
        advantage: [B].
        clip: epsilon of the ratio clip, in (0, 1). It scales with 1 / sqrt(elements of a transition); see
            `clip_velocity_rms` in docs/algorithm.md 2.2.

    Raises:
        ValueError: naming the argument, for shapes, dtypes or devices that do not fit and a clip out of range.
    """
    _check(v, v_old, v_ref, noise, advantage, clip)
    old, ref, draw, gain = v_old.detach(), None if v_ref is None else v_ref.detach(), noise.detach(), advantage.detach()
    if runtime.choose("flow_policy_loss", v.device, v.dtype, unfit=_unfit(v, v_old, v_ref, noise)) == "triton":
        from csrc_triton.flow_policy_loss import fused

        loss, kl, ratio, log_ratio, _, clipped = fused.terms_op(v, old, ref, draw, gain, clip)
        return FlowPolicyTerms(loss, kl, ratio, log_ratio, clipped)
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    old, ref, draw, gain = (t.to(dtype) for t in (old, v.detach() if ref is None else ref, draw, gain))
    return FlowPolicyTerms(*naive.flow_policy_loss(v.to(dtype), old, ref, draw, gain, clip))


def flow_policy_loss_and_grad(
    v: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    noise: Tensor,
    advantage: Tensor,
    *,
    clip: float,
    loss_weight: float | Tensor = 1.0,
    kl_weight: float | Tensor = 0.0,
) -> tuple[FlowPolicyTerms, Tensor]:
    """Terms of `flow_policy_loss`, and the gradient of sum(loss_weight * loss + kl_weight * kl) in v.

    `v.backward(gradient)` is then equal to the backward pass of that sum. Where v_old is v or shares its memory (the
    first update after a roll-out) the fused path needs one pass over memory, 4 elements moved in place of 7; off policy
    it moves as many as forward and backward of `flow_policy_loss`. The outputs are detached.

    Args:
        loss_weight, kl_weight: numbers, or tensors [B].
        v, v_old, v_ref, noise, advantage, clip: as for `flow_policy_loss`.

    Returns:
        The terms, and the gradient [B, ...] in the dtype of v.

    Raises:
        ValueError: as `flow_policy_loss`, and for weights of another shape.
    """
    _check(v, v_old, v_ref, noise, advantage, clip)
    weights = {"loss_weight": loss_weight, "kl_weight": kl_weight}
    for name, weight in weights.items():
        if isinstance(weight, Tensor) and weight.shape != v.shape[:1]:
            raise ValueError(f"{name}: found shape {tuple(weight.shape)}; accepted: a number or {tuple(v.shape[:1])}")
    chosen = runtime.choose("flow_policy_loss_and_grad", v.device, v.dtype, unfit=_unfit(v, v_old, v_ref, noise))
    if chosen == "triton":
        from csrc_triton.flow_policy_loss import fused

        constants = [None if t is None else t.detach() for t in (v, v_old, v_ref, noise, advantage)]
        rows = [
            weight.detach().to(v.device, torch.float32) if isinstance(weight, Tensor)
            else v.new_full(v.shape[:1], weight, dtype=torch.float32)
            for weight in weights.values()
        ]  # fmt: skip
        skip_kl = v_ref is None or (not isinstance(kl_weight, Tensor) and kl_weight == 0)
        *found, gradient = fused.terms_and_gradient_op(*constants, clip, rows[0], None if skip_kl else rows[1])
        return FlowPolicyTerms(*found), gradient

    def weighted(leaf: Tensor) -> tuple[Tensor, FlowPolicyTerms]:
        terms = flow_policy_loss(leaf, v_old, v_ref, noise, advantage, clip=clip)
        return (loss_weight * terms.loss + kl_weight * terms.kl).sum(), terms

    if torch.compiler.is_compiling():  # it traces torch.func.grad, which refuses hooks of saved tensors
        gradient, terms = torch.func.grad(weighted, has_aux=True)(v.detach())
    else:
        with torch.enable_grad():
            leaf = v.detach().requires_grad_()
            total, terms = weighted(leaf)
            (gradient,) = torch.autograd.grad(total, leaf)
    return FlowPolicyTerms(*(term.detach() for term in terms)), gradient.detach()


def _check(v: Tensor, v_old: Tensor, v_ref: Tensor | None, noise: Tensor, advantage: Tensor, clip: float) -> None:
    constants = {"v_old": v_old, "noise": noise} | ({} if v_ref is None else {"v_ref": v_ref})
    if v.ndim < 2 or not v.is_floating_point():
        found = f"{v.dtype} {tuple(v.shape)}"
        raise ValueError(f"v: found {found}; accepted: floating point [B, ...] with at least 2 dimensions")
    for name, tensor in constants.items():
        if tensor.shape != v.shape or not tensor.is_floating_point():
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{name}: found {found}; accepted: floating point {tuple(v.shape)}, the shape of v")
    if advantage.shape != v.shape[:1]:
        raise ValueError(f"advantage: found shape {tuple(advantage.shape)}; accepted: {tuple(v.shape[:1])}")
    for name, tensor in {**constants, "advantage": advantage}.items():
        if tensor.device != v.device:
            raise ValueError(f"{name}: found on {tensor.device}; accepted: {v.device}, the device of v")
    if not 0 < clip < 1:
        raise ValueError(f"clip: found {clip}; accepted: a number in (0, 1)")


def _unfit(v: Tensor, v_old: Tensor, v_ref: Tensor | None, noise: Tensor) -> str | None:
    return why_unfit("v", "transition", v, v_old=v_old, v_ref=v_ref, noise=noise)
