"""Fork attention against plain attention over concatenated keys."""

from __future__ import annotations

import pytest
import torch

from csrc_triton import ForkableKVCache, fork_attention

torch.manual_seed(0)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = torch.softmax(torch.einsum("blhd,bmhd->bhlm", q, k) * q.shape[-1] ** -0.5, -1)
    return torch.einsum("bhlm,bmhd->blhd", weights, v)


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
    view = own.views([branch], [(0, 2), (4, 6)])[0]
    past = [torch.cat([blocks[0][i], blocks[2][i]], 1) for i in range(2)]
    assert torch.equal(fork_attention(q, k, v, view), fork_attention(q, k, v, tuple(past)))


def test_bad_input_names_the_argument() -> None:
    q = draw(4, 5, 2, 8)
    with pytest.raises(ValueError, match="q, k, v: found"):
        fork_attention(q, q[:, :4], q)
    with pytest.raises(ValueError, match="context: found 3 contexts; accepted: a number that divides 4"):
        fork_attention(q, q, q, (draw(3, 2, 2, 8), draw(3, 2, 2, 8)))
    with pytest.raises(ValueError, match="context: .*requires grad"):
        fork_attention(q, q, q, (draw(1, 2, 2, 8).requires_grad_(), draw(1, 2, 2, 8)))
    with pytest.raises(ValueError, match="context: found"):
        fork_attention(q, q, q, (draw(1, 2, 3, 8), draw(1, 2, 3, 8)))
