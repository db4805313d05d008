"""Optional Liger kernels for the planner (`pip install -e '.[liger]'`): RMSNorm, SwiGLU, RoPE, fused GRPO loss.

The fused loss makes logits a block of the vocabulary at a time and computes its gradient in the forward pass. With
sequence-level importance sampling and a mean over each sequence it is GSPO (docs/algorithm.md 2.4).
`check_fused_loss` refuses versions of Liger that compute something else.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import math
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tempact.errors import UserError

log = logging.getLogger(__name__)

NEEDED = ("beta", "epsilon_low", "epsilon_high", "loss_type", "importance_sampling_level", "use_ref_model", "compiled")


def choose(asked: str, plain: bool, device: torch.device) -> str:
    """The part of Liger in use: "off", "model" (kernels in the layers) or "all" (also the fused loss).

    Args:
        asked: `planner.liger`. "auto" is "off" without Liger or a CUDA device, else "all", or "model" with an adapter
            on the head.
        plain: the head is a linear layer without an adapter.
        device: the model's.

    Raises UserError for an unknown choice, a missing or unfit liger-kernel, and "all" with an adapter on the head.
    """
    installed = importlib.util.find_spec("liger_kernel") is not None
    if asked == "auto":
        asked = ("all" if plain else "model") if installed and device.type == "cuda" else "off"
    if asked == "off":
        return asked
    if not installed:
        raise UserError(
            f"planner.liger: found {asked!r} without liger-kernel; accepted here: auto, off, or any after "
            "pip install -e '.[liger]'"
        )
    if asked == "all":
        if not plain:
            raise UserError("planner.liger: found 'all' with an adapter on the head; accepted: auto, off, model")
        check_fused_loss()
    return asked


def use_kernels(model: PreTrainedModel) -> bool:
    """Puts Liger's RMSNorm, SwiGLU and RoPE into a Qwen3 on a CUDA device; returns False elsewhere."""
    if model.config.model_type != "qwen3" or model.device.type != "cuda":
        return False
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3
    from transformers.models.qwen3 import modeling_qwen3

    names = ("Qwen3RMSNorm", "Qwen3MLP", "apply_rotary_pos_emb")
    before = {name: getattr(modeling_qwen3, name) for name in names}
    apply_liger_kernel_to_qwen3(
        rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False, model=model
    )
    fused_rope = modeling_qwen3.apply_rotary_pos_emb
    # Liger changes the module for the whole process; later models, and those on the CPU, keep their own
    for name in names:
        setattr(modeling_qwen3, name, before[name])
    modeling_qwen3.apply_rotary_pos_emb = _by_device(fused_rope, before["apply_rotary_pos_emb"])
    return True


def _by_device(fused: Callable, plain: Callable) -> Callable:
    if getattr(plain, "by_device", False):  # a second model in this process
        return plain

    def apply_rotary_pos_emb(q: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        return (fused if q.is_cuda else plain)(q, *args, **kwargs)

    apply_rotary_pos_emb.by_device = True  # type: ignore[attr-defined]
    return apply_rotary_pos_emb


def fused_gspo_loss(
    hidden: Tensor,
    head: nn.Linear,
    ids: Tensor,
    advantage: float,
    old: Tensor | None,
    reference_hidden: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl_weight: float,
) -> Tensor:
    """GSPO loss of one sequence, a scalar with a gradient for `hidden` and none for the head.

    Args:
        hidden, reference_hidden: [n, width], states before the head at n counted tokens, of policy and reference.
        ids: [n] int64, the counted tokens. No token gives -advantage, the loss of ratio 1.
        old: [n] fp32 log-probs before the first update; None stands for the log-probs of `hidden`.
        clip_low, clip_high, kl_weight: as in `tempact.rl.gspo.gspo_loss`.
    """
    if not len(ids):
        return hidden.float().sum() - advantage  # an empty sum keeps the graph whole
    loss, _ = _loss_class()(
        beta=kl_weight, epsilon_low=clip_low, epsilon_high=clip_high, loss_type="grpo",
        importance_sampling_level="sequence", use_ref_model=kl_weight != 0, compiled=False,
    )(
        hidden[None], head.weight, ids[None], torch.ones(1, len(ids), device=hidden.device),
        torch.tensor([advantage], device=hidden.device), head.bias,
        old_per_token_logps=None if old is None else old[None],
        ref_input=reference_hidden[None] if kl_weight else None,
        ref_weight=head.weight if kl_weight else None,
        ref_bias=head.bias if kl_weight else None,
    )  # fmt: skip
    return loss


def _loss_class() -> type[nn.Module]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    return LigerFusedLinearGRPOLoss


def check_fused_loss() -> None:
    """Raises UserError if the installed fused loss lacks the sequence-level ratio, or takes the option and drops it.

    Older versions did one or the other. The test case is one sequence whose tokens' log-probs moved by different
    amounts: its loss is -advantage * exp(mean move).
    """
    found = f"planner.liger: found liger-kernel {version('liger-kernel')}, whose fused GRPO loss"
    accepted = "accepted: a newer liger-kernel, or --planner.liger model"
    missing = set(NEEDED) - inspect.signature(_loss_class().__init__).parameters.keys()
    if missing:
        raise UserError(f"{found} has no {', '.join(sorted(missing))}; {accepted}")
    generator = torch.Generator().manual_seed(0)
    head = nn.utils.skip_init(nn.Linear, 4, 8, bias=False).requires_grad_(False)  # draws nothing of the run's
    head.weight.copy_(torch.randn(8, 4, generator=generator))
    hidden, ids = torch.randn(3, 4, generator=generator), torch.tensor([1, 5, 2])
    log_probs = head(hidden).log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    moves = torch.tensor([0.9, -0.2, -0.1])
    loss = fused_gspo_loss(
        hidden.requires_grad_(), head, ids, 1.0, log_probs - moves, hidden, clip_low=0.9, clip_high=0.9, kl_weight=0.0
    )
    if not math.isclose(loss.item(), -math.exp(moves.mean().item()), rel_tol=1e-4):
        raise UserError(f"{found} drops the sequence-level ratio; {accepted}")
