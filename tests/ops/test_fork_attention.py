"""Fork attention against plain attention over concatenated keys, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from csrc_triton import CacheView, ForkableKVCache, fork_attention, runtime


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(torch.einsum("blhd,bmhd->bhlm", q, k) * q.shape[-1] ** -0.5, -1)
    return torch.einsum("bhlm,bmhd->blhd", weights, v)


def view(rows: int = 6, contexts: int = 1, heads: int = 2, head_dim: int = 8) -> CacheView:
    pools = draw(rows, heads, head_dim), draw(rows, heads, head_dim)
    return CacheView.of(*pools, [[(0, 2), (3, 3)]] * contexts)


@pytest.mark.parametrize(("contexts", "branches"), [(1, 4), (2, 4), (4, 4)])
def test_shared_contexts_equal_expanded_ones(contexts: int, branches: int) -> None:
    q, k, v = (draw(branches, 5, 2, 8) for _ in range(3))
    past = draw(contexts, 7, 2, 8), draw(contexts, 7, 2, 8)
    each = branches // contexts
    full = [torch.cat([p.repeat_interleave(each, 0), own], 1) for p, own in zip(past, (k, v), strict=True)]
    assert torch.allclose(fork_attention(q, k, v, past), plain(q, *full), atol=1e-12)
    out, lse = fork_attention(q, k, v, past, return_lse=True)
    assert torch.allclose(out, plain(q, *full), atol=1e-12)
    scores = torch.einsum("blhd,bmhd->bhlm", q, full[0]) * 8**-0.5
    assert torch.allclose(lse, scores.logsumexp(-1).float())


def test_gradients_are_those_of_a_detached_context() -> None:
    leaves = [draw(2, 3, 2, 8).requires_grad_() for _ in range(3)]
    past = draw(2, 4, 2, 8), draw(2, 4, 2, 8)
    grad = draw(2, 3, 2, 8)
    got = torch.autograd.grad(fork_attention(*leaves, past), leaves, grad)
    q, k, v = leaves
    full = plain(q, torch.cat([past[0], k], 1), torch.cat([past[1], v], 1))
    for a, b in zip(got, torch.autograd.grad(full, leaves, grad), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_a_cache_view_equals_its_gathered_rows() -> None:
    own = ForkableKVCache(1, 2, 8, rows=4, dtype=torch.float64, device=torch.device("cpu"))
    branch = own.new_branch()
    blocks = []
    for _ in range(3):
        reservation = own.reserve([branch], 2)
        blocks.append((draw(1, 2, 2, 8), draw(1, 2, 2, 8)))
        own.write(reservation, 0, *blocks[-1])
        own.commit(reservation)
    q, k, v = (draw(1, 3, 2, 8) for _ in range(3))
    seen = own.views([branch], [(0, 2), (4, 6)])[0]
    past = [torch.cat([blocks[0][i], blocks[2][i]], 1) for i in range(2)]
    assert torch.equal(fork_attention(q, k, v, seen), fork_attention(q, k, v, tuple(past)))


def test_half_precision_log_sum_exp_is_summed_in_fp32() -> None:
    q, k, v = (draw(1, 300, 1, 8, dtype=torch.bfloat16) for _ in range(3))
    _, lse = fork_attention(q, k, v, return_lse=True)
    exact = (torch.einsum("blhd,bmhd->bhlm", q.double(), k.double()) * 8**-0.5).logsumexp(-1)
    assert lse.dtype == torch.float32
    assert (lse - exact).abs().max() < 1e-5


def test_own_tensors_that_do_not_fit_are_refused() -> None:
    q = draw(4, 5, 2, 8)
    accepted = "accepted: two of \\[4, Lk, kv_heads, 8\\] with kv_heads dividing 2"
    for k in (q[:3], q[..., :4], draw(4, 5, 3, 8), draw(4, 5, 0, 8), q[0]):
        with pytest.raises(ValueError, match=f"k, v: found .*{accepted}"):
            fork_attention(q, k, k)
    with pytest.raises(ValueError, match=f"k, v: found .*{accepted}"):
        fork_attention(q, q[:, :4], q)
    for given in (q[0], q[:, :0]):
        with pytest.raises(ValueError, match="q: found .*accepted: \\[B, Lq, heads, head_dim\\], none of them 0"):
            fork_attention(given, given, given)
    with pytest.raises(ValueError, match="k, v: found None for v alone; accepted: both or none of them"):
        fork_attention(q, q)
    with pytest.raises(ValueError, match="k, v: found None and no context; accepted: own keys, or a context"):
        fork_attention(q)
    with pytest.raises(ValueError, match="q, k, v: found torch.float64, torch.float32.*accepted: one floating-point"):
        fork_attention(q, q.float(), q)
    with pytest.raises(ValueError, match="q, k, v: found torch.int32"):
        fork_attention(q.int(), q.int(), q.int())
    with pytest.raises(ValueError, match="q, k, v: found them on cpu, cpu, meta; accepted: one device"):
        fork_attention(q, q, q.to("meta"))
    with pytest.raises(ValueError, match="k: found strides .*accepted: a contiguous last dimension"):
        fork_attention(q, draw(4, 5, 8, 2).transpose(2, 3), q)
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="softmax_scale: found .*; accepted: a positive number"):
            fork_attention(q, q, q, softmax_scale=scale)
    for block in (0, -3, 2.0, True):
        with pytest.raises(
            ValueError, match=f"causal_block: found {block}; accepted: None, or a number of tokens from 1"
        ):
            fork_attention(q, q, q, causal_block=block)  # type: ignore[call-overload]


def test_contexts_that_do_not_fit_are_refused() -> None:
    q = draw(4, 5, 2, 8)
    past = draw(1, 2, 2, 8)
    with pytest.raises(ValueError, match="context: found 3 contexts; accepted: a number that divides 4, or any with a"):
        fork_attention(q, q, q, (draw(3, 2, 2, 8), draw(3, 2, 2, 8)))
    with pytest.raises(ValueError, match="context: .*requires grad"):
        fork_attention(q, q, q, (draw(1, 2, 2, 8).requires_grad_(), past))
    with pytest.raises(ValueError, match="context: found .*accepted: two of \\[P, Lp, 2, 8\\]"):
        fork_attention(q, q, q, (draw(1, 2, 3, 8), draw(1, 2, 3, 8)))
    with pytest.raises(ValueError, match="context: found .*accepted: two of \\[P, Lp, 2, 8\\]"):
        fork_attention(q, q, q, (past[0], past[0]))
    with pytest.raises(ValueError, match="context: found torch.float32 on cpu; accepted: torch.float64 on cpu"):
        fork_attention(q, q, q, (past, past.float()))
    with pytest.raises(ValueError, match="context: found torch.float64 on meta; accepted: torch.float64 on cpu"):
        fork_attention(q, q, q, (past, past.to("meta")))
    with pytest.raises(ValueError, match="context: found strides .*accepted: a contiguous last dimension"):
        fork_attention(q, q, q, (past, draw(1, 2, 8, 2).transpose(2, 3)))


def test_an_index_of_contexts_that_does_not_fit_is_refused() -> None:
    q = draw(4, 5, 2, 8)
    past = draw(3, 2, 2, 8), draw(3, 2, 2, 8)
    for given in ([0, 1, 3, 0], torch.tensor([0, -1, 2, 0])):
        with pytest.raises(ValueError, match="context_index: found (3|-1); accepted: 0 to 2, a number of a context"):
            fork_attention(q, q, q, past, context_index=given)
    for given in (torch.zeros(3, dtype=torch.int32), torch.zeros(4)):
        with pytest.raises(ValueError, match="context_index: found .*; accepted: \\(4,\\) int32 or int64 on cpu"):
            fork_attention(q, q, q, past, context_index=given)
    for given in ([0, 1], [0, 1, 2, 0.5]):
        with pytest.raises(ValueError, match="context_index: found .*; accepted: 4 numbers, one a batch row"):
            fork_attention(q, q, q, past, context_index=given)
    with pytest.raises(ValueError, match="context_index: found one without a context; accepted: None, or a context"):
        fork_attention(q, q, q, context_index=[0, 0, 0, 0])


def test_views_that_do_not_fit_are_refused() -> None:
    q = draw(4, 5, 2, 8)
    with pytest.raises(ValueError, match="context.k, context.v: found .*accepted: two of \\[rows, 2, 8\\]"):
        fork_attention(q, q, q, view(heads=3))
    with pytest.raises(ValueError, match="context.table: found 3 contexts; accepted: a number that divides 4"):
        fork_attention(q, q, q, view(contexts=3))
    seen = view()
    with pytest.raises(ValueError, match="context.k: found a tensor that requires grad"):
        fork_attention(q, q, q, CacheView(seen.k.requires_grad_(), seen.v, seen.table))
    with pytest.raises(ValueError, match="context.k: found torch.float64 on cpu; accepted: torch.float32"):
        fork_attention(q.float(), q.float(), q.float(), view())
    with pytest.raises(ValueError, match="found 4 rows from row 3; accepted: rows in \\[0, 6\\)"):
        CacheView.of(seen.k.detach(), seen.v, [[(3, 4)]])


def test_a_forced_kernel_that_cannot_serve_is_an_error() -> None:
    double = draw(1, 5, 2, 32)
    with runtime.backend("triton"):
        for head_dim in (4, 20, 264):
            odd = draw(1, 5, 2, head_dim, dtype=torch.float32)
            with pytest.raises(
                ValueError, match=f"cannot serve: head_dim {head_dim}; accepted: multiples of 8 up to 256"
            ):
                fork_attention(odd, odd, odd)
        with pytest.raises(ValueError, match="fork_attention: .*cannot serve: torch.float64 tensors"):
            fork_attention(double, double, double)
    assert fork_attention(odd, odd, odd).shape == odd.shape
