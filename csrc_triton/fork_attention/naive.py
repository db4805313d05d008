"""Fork attention as plain maths, in the precision of its inputs (fp32 or fp64 for a reference)."""

from __future__ import annotations

import torch
from torch import Tensor


def fork_attention(
    q: Tensor, k: Tensor, v: Tensor, context: tuple[Tensor, Tensor] | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """One softmax over the frozen context and the own chunk.

    q, k, v [B, L, heads, head_dim]; context k, v [P, Lp, heads, head_dim] with P dividing B, batch b
    reading context b // (B / P). Returns the output and the log-sum-exp [B, heads, L].
    """
    if context is not None:
        k, v = concatenate(k, v, context)
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * softmax_scale
    lse = torch.logsumexp(scores, dim=-1)
    return torch.einsum("bhlm,bmhd->blhd", torch.exp(scores - lse[..., None]), v), lse


def concatenate(k: Tensor, v: Tensor, context: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Context then own keys, with the context expanded to every branch and cut off from gradients."""
    branches = k.shape[0] // context[0].shape[0]
    past_k, past_v = (c.detach().to(k.dtype).repeat_interleave(branches, dim=0) for c in context)
    return torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1)
