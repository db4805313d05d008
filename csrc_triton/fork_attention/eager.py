"""Fork attention in plain PyTorch, for calls that no kernel serves: the same calls and dtypes, also under autocast."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from csrc_triton._tables import CacheView
from csrc_triton.fork_attention import naive

SCORES = 2**24  # that are in memory at once where the log-sum-exp is asked for: 64 MiB in fp32

Both = tuple[Tensor, Tensor | None]  # the output and, where it is asked for, the log-sum-exp


def fork_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: CacheView | tuple[Tensor, Tensor] | None,
    softmax_scale: float,
    return_lse: bool,
    index: Tensor | None,
    causal_block: int | None,
) -> Both:
    """As the public function, with k and v given. Waits for the device where a view was made from a table alone, and
    for the index where the contexts of a view differ in length.
    """
    options = softmax_scale, return_lse, causal_block
    with _without_autocast(q.device):
        if not isinstance(context, CacheView):
            return _attend(q, k, v, context, index, *options)
        if not context.ragged:
            return _attend(q, k, v, context.gather(), index, *options)
        pairs = context.gather_each()
        share = len(q) // len(pairs)
        if index is not None:
            pairs, share = [pairs[i] for i in index.tolist()], 1
        rows = [slice(i * share, (i + 1) * share) for i in range(len(pairs))]
        found = [_attend(q[at], k[at], v[at], pair, None, *options) for at, pair in zip(rows, pairs, strict=True)]
        return _joined(found, 0, 0)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    # asked by name: torch.amp.is_autocast_available is one that torch 2.11 does not compile
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pair: tuple[Tensor, Tensor] | None,
    index: Tensor | None,
    softmax_scale: float,
    return_lse: bool,
    causal_block: int | None,
) -> Both:
    length, own = q.shape[1], k.shape[1]
    if pair is not None:
        k, v = naive.concatenate(k, v, pair, index)
    past = k.shape[1] - own
    if past + own == 0:
        return _nothing(q, k, v, return_lse)
    # queries that see no key come first
    blind = max(length - own, 0) if causal_block is not None and past == 0 else 0
    seeing = q[:, blind:]
    mask = None
    if causal_block is not None:
        mask = naive.visible(length - blind, own, past, causal_block, q.device)
    out, lse = (_with_lse if return_lse else _without_lse)(seeing, k, v, softmax_scale, mask)
    if blind:
        out = F.pad(out, (0, 0, 0, 0, blind, 0))
        lse = None if lse is None else F.pad(lse, (blind, 0), value=-torch.inf)
    return out, lse


def _nothing(q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> Both:
    """Of queries without any key: zeros that autograd knows as results of q, k and v."""
    none = q[:, :0] + (k.sum() + v.sum())
    out = F.pad(none, (0, 0, 0, 0, q.shape[1], 0))
    lse = F.pad(none.sum(-1).transpose(1, 2).float(), (q.shape[1], 0), value=-torch.inf)
    return out, lse if return_lse else None


def _without_lse(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, mask: Tensor | None) -> Both:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale, enable_gqa=grouped)
    return out.transpose(1, 2), None


def _with_lse(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, mask: Tensor | None) -> Both:
    """Some queries of one head of keys at a time where there are many scores; the backward pass makes them again."""
    (batch, length, heads, _), (keys, kv_heads) = q.shape, k.shape[1:3]
    if batch * heads * length * keys <= SCORES:
        return _in_fp32(q, k, v, softmax_scale, mask)
    group = heads // kv_heads
    rows = max(1, SCORES // (group * keys))
    found: dict[tuple[int, int], Both] = {}
    for b, head in itertools.product(range(batch), range(kv_heads)):
        each_k, each_v = (t[b : b + 1, :, head : head + 1] for t in (k, v))
        of_head = q[b : b + 1, :, head * group : (head + 1) * group]
        parts = []
        for row in range(0, length, rows):
            part = None if mask is None else mask[row : row + rows]
            given = of_head[:, row : row + rows], each_k, each_v, softmax_scale, part
            parts.append(checkpoint(_in_fp32, *given, use_reentrant=False, preserve_rng_state=False))
        found[b, head] = _joined(parts, 1, 2)
    branches = [_joined([found[b, head] for head in range(kv_heads)], 2, 1) for b in range(batch)]
    return _joined(branches, 0, 0)


def _in_fp32(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, mask: Tensor | None) -> Both:
    working = torch.promote_types(q.dtype, torch.float32)
    out, lse = naive.attention(q.to(working), k.to(working), v.to(working), softmax_scale, mask)
    return out.to(q.dtype), lse.float()


def _joined(parts: list[Both], of_out: int, of_lse: int) -> Both:
    """Parts side by side: along dimension `of_out` of the outputs and `of_lse` of the log-sum-exps."""
    lses = [lse for _, lse in parts if lse is not None]
    return torch.cat([out for out, _ in parts], of_out), torch.cat(lses, of_lse) if lses else None
