"""Fork attention as plain maths, in the precision of its inputs (fp32 or fp64 for a reference)."""

from __future__ import annotations

import torch
from torch import Tensor


def fork_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: tuple[Tensor, Tensor] | None,
    softmax_scale: float,
    *,
    index: Tensor | None = None,
    causal_block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One softmax over the frozen context and the own chunk.

    q [B, Lq, heads, head_dim]; k, v [B, Lk, kv_heads, head_dim] with kv_heads dividing heads; context k, v
    [P, Lp, kv_heads, head_dim] with P dividing B, batch b reading context b // (B / P), or context index[b].
    causal_block: as `visible`. Returns the output and the log-sum-exp [B, heads, Lq]; a query that sees no key gives
    zeros and -inf.
    """
    own = k.shape[1]
    if context is not None:
        k, v = concatenate(k, v, context, index)
    if causal_block is None:
        return attention(q, k, v, softmax_scale)
    return attention(q, k, v, softmax_scale, visible(q.shape[1], own, k.shape[1] - own, causal_block, q.device))


def attention(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Plain attention and its log-sum-exp; mask [Lq, keys]: which keys each query sees, None for all."""
    k, v = (each.repeat_interleave(q.shape[2] // each.shape[2], dim=2) for each in (k, v))
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * softmax_scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.clamp_min(torch.finfo(lse.dtype).min)[..., None])
    return torch.einsum("bhlm,bmhd->blhd", weights, v), lse


def concatenate(
    k: Tensor, v: Tensor, context: tuple[Tensor, Tensor], index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Context then own keys, with the context expanded to every branch and cut off from gradients."""
    past_k, past_v = (
        c.detach().to(k.dtype).repeat_interleave(k.shape[0] // c.shape[0], dim=0)
        if index is None
        else c.detach().to(k.dtype).index_select(0, index)
        for c in context
    )
    return torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1)


def visible(queries: int, own: int, past: int, causal_block: int, device: torch.device) -> Tensor:
    """Which of `past` + `own` keys each query sees in a causal own chunk, bool [queries, past + own].

    Query i stands at own key i + own - queries: the last query at the last key. It sees the context and own key j if
    j // causal_block <= (i + own - queries) // causal_block.
    """
    position = torch.arange(own - queries, own, device=device)[:, None]
    key = torch.arange(-past, own, device=device)[None, :]
    return (key < 0) | (key // causal_block <= position // causal_block)
