"""Cases of fork attention: what goes in, plain attention's results over written-out keys, and the error bound."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from kernel_checks import assert_as_good
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from csrc_triton import CacheView, fork_attention, runtime
from csrc_triton.fork_attention import naive

NAMES = ("out", "lse", "dq", "dk", "dv")
LOG_2 = 0.6931471805599453
Segments = Sequence[Sequence[tuple[int, int]]]
Context = CacheView | tuple[Tensor, Tensor] | None
FEW_NUMBERS = 2048
ONE: Segments = [[(3, 40)]]


@dataclass
class Case:
    """Queries, keys and values of branches, and the pools and segments of their contexts; all else there is NaN.

    index: the context of each branch; None: equal shares, in order.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    pools: tuple[Tensor, Tensor]
    segments: Segments
    scale: float
    index: Sequence[int] | None = None
    causal_block: int | None = None

    @property
    def view(self) -> CacheView | None:
        return CacheView.of(*self.pools, self.segments) if self.segments else None

    def past(self, branch: int) -> tuple[Tensor, Tensor]:
        """One branch's context written out, [1, Lc, heads, head_dim]."""
        which = branch * len(self.segments) // len(self.q) if self.index is None else self.index[branch]
        runs = self.segments[which] if self.segments else []
        k, v = (torch.cat([p[:0], *(p[row : row + n] for row, n in runs)])[None] for p in self.pools)
        return k, v


def make(
    device: torch.device | str, branches: int, length: int, heads: int, head_dim: int, dtype: torch.dtype,
    segments: Segments, integers: bool = False, *, own: int | None = None, kv_heads: int | None = None,
    index: Sequence[int] | None = None, causal_block: int | None = None,
) -> Case:  # fmt: skip
    """own, kv_heads: the own keys and their heads, if not those of the queries.

    integers: with a scale of log 2 all exponentials are powers of two, and sums of them are exact.
    """

    def draw(*shape: int) -> Tensor:
        if integers:
            return (torch.randint(-1, 2, shape) * (torch.rand(shape) < 0.1)).to(device, dtype)
        return torch.randn(*shape, device=device).to(dtype)

    kv_heads = heads if kv_heads is None else kv_heads
    q, grad = (draw(branches, length, heads, head_dim) for _ in range(2))
    k, v = (draw(branches, length if own is None else own, kv_heads, head_dim) for _ in range(2))
    rows = 7 + max((row + n for runs in segments for row, n in runs), default=0)
    pools = tuple(torch.full((rows, kv_heads, head_dim), float("nan"), device=device, dtype=dtype) for _ in range(2))
    for row, n in sorted({run for runs in segments for run in runs}):
        for pool in pools:
            pool[row : row + n] = draw(n, kv_heads, head_dim)
    scale = LOG_2 if integers else head_dim**-0.5
    return Case(q, k, v, grad, pools, segments, scale, index, causal_block)  # type: ignore[arg-type]


def draw_case(draw: random.Random, device: torch.device, most: int, dtypes: Sequence[torch.dtype]) -> Case:
    """Random shapes, windows, head sizes, groups of heads and options; chunks of up to `most` tokens."""
    few = device.type == "cpu"  # where an interpreter may run the kernels
    branches, contexts = draw.choice(
        [(1, 1), (2, 1), (2, 2), (1, 2)] if few else [(1, 1), (2, 1), (2, 2), (3, 2), (6, 3)]
    )
    kv_heads, group = draw.choice([(1, 1), (1, 2)] if few else [(1, 1), (2, 1), (1, 3), (2, 2), (1, 8)])
    length = draw.choice([1, draw.randint(1, most), draw.randint(1, most)])
    own = draw.choice([length, length, draw.randint(1, most), 0])
    segments: list[list[tuple[int, int]]] = []
    for _ in range(contexts):
        runs, row = [], 0
        for _ in range(draw.randint(0, 4)):
            row += draw.randint(0, 40)
            runs.append((row, draw.choice([0, draw.randint(1, 127), 128, draw.randint(1, most)])))
            row += runs[-1][1]
        segments.append(runs)
    index = [draw.randrange(contexts) for _ in range(branches)] if branches % contexts or draw.random() < 0.3 else None
    block = draw.choice([None, None, 1, draw.randint(1, most)])
    head_dim = draw.choice([8, 32, 64, 80, 96, 128, 160, 192, 256, 8 * draw.randint(1, 32)])
    # the largest error of a few numbers of 16 bits says little of another implementation's
    least = head_dim * kv_heads * min(length * group, own or length * group)
    dtype = torch.float32 if least < FEW_NUMBERS and torch.float32 in dtypes else draw.choice(dtypes)
    return make(
        device, branches, length, group * kv_heads, head_dim, dtype, segments,
        own=own, kv_heads=kv_heads, index=index, causal_block=block,
    )  # fmt: skip


def on_torch(
    case: Case, branch: int, dtype: torch.dtype, grad_lse: Tensor | None = None, exact: bool = False
) -> list[Tensor]:
    """Output, log-sum-exp and gradients of q, k and v of one branch by plain attention over written-out keys.

    exact: all by naive.py. Otherwise output and gradients are SDPA's, in 16 bits its flash backend's, whose arithmetic
    the kernels have (the maths of FlashAttention-2, weights and their gradients rounded to 16 bits): the largest error
    of another backend is often that of another element. The log-sum-exp and its gradient, which SDPA lacks, come from
    naive.py in fp32.
    """
    one = slice(branch, branch + 1)
    leaves = [t[one].detach().clone().to(dtype).requires_grad_() for t in (case.q, case.k, case.v)]
    past = tuple(p.to(dtype) for p in case.past(branch))
    working = torch.promote_types(dtype, torch.float32)
    own = (t.to(working) for t in leaves)
    out, lse = naive.fork_attention(*own, past, case.scale, causal_block=case.causal_block)
    if not exact:
        out = _on_sdpa(case, leaves, past)
    grads = torch.autograd.grad(out, leaves, case.grad[one].to(out.dtype), retain_graph=True)
    if grad_lse is not None:
        more = torch.autograd.grad(lse, leaves[:2], grad_lse[one].to(lse.dtype))
        grads = grads[0] + more[0], grads[1] + more[1], grads[2]
    return [out.detach().to(dtype), lse.detach(), *grads]


def _on_sdpa(case: Case, leaves: list[Tensor], past: tuple[Tensor, Tensor]) -> Tensor:
    """Queries that see no key, which come first, are left out."""
    length, own, behind = case.q.shape[1], case.k.shape[1], past[0].shape[1]
    blind = length if own + behind == 0 else 0
    mask = None
    if case.causal_block is not None:
        mask = naive.visible(length, own, behind, case.causal_block, case.q.device)
        blind = int((~mask.any(1)).sum())
        mask = mask[blind:]
    if blind == length:
        return 0 * leaves[0] + sum(t.sum() for t in leaves[1:])
    q, k, v = (t.transpose(1, 2) for t in (leaves[0][:, blind:], *naive.concatenate(*leaves[1:], past)))
    flash = q.is_cuda and q.dtype != torch.float32 and mask is None
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if flash else list(SDPBackend.__members__.values())):
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=case.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return F.pad(out.transpose(1, 2), (0, 0, 0, 0, blind, 0))


def on_kernel(case: Case, context: Context, grad_lse: Tensor | None = None, by: str = "triton") -> list[Tensor]:
    """The same of all branches from the implementation of backend `by`."""
    leaves = [t.detach().requires_grad_() for t in (case.q, case.k, case.v)]
    given = {"softmax_scale": case.scale, "context_index": case.index, "causal_block": case.causal_block}
    with runtime.backend(by):
        out, lse = fork_attention(*leaves, context, return_lse=True, **given)  # type: ignore[call-overload]
        wanted, grads = ((out,), (case.grad,)) if grad_lse is None else ((out, lse), (case.grad, grad_lse))
        return [out.detach(), lse.detach(), *torch.autograd.grad(wanted, leaves, grads)]


def assert_right(
    case: Case, got: list[Tensor], branches: Sequence[int] | None = None, grad_lse: Tensor | None = None,
    reference: torch.dtype = torch.float64, times: float = 2,
) -> None:  # fmt: skip
    """Every result is within the error bound, for the given branches (None: all); times: see assert_as_good."""
    for branch in range(len(case.q)) if branches is None else branches:
        same = on_torch(case, branch, case.q.dtype, grad_lse)
        exact = on_torch(case, branch, reference, grad_lse, exact=True)
        for name, a, b, c in zip(NAMES, got, same, exact, strict=True):
            # an fp32 reference is itself off by a few units in the last place of numbers around 10
            atol = 4e-6 if name == "lse" and reference == torch.float32 else 1e-6
            given = a[branch : branch + 1]
            if name == "lse":
                assert torch.equal(given == -torch.inf, c == -torch.inf), f"lse of branch {branch}: who sees no key"
                given, b, c = (t.nan_to_num(neginf=0.0) for t in (given, b.to(given.dtype), c))
                assert given.isfinite().all()
            assert_as_good(f"{name} of branch {branch}", given, b, c, atol, times)


def assert_exact(case: Case, out: Tensor) -> None:
    """The output of an integer case: sums are exact, so only the division rounds."""
    for branch in range(len(case.q)):
        own = [t[branch : branch + 1].double() for t in (case.q, case.k, case.v)]
        exact, _ = naive.fork_attention(*own, tuple(p.double() for p in case.past(branch)), case.scale)
        # the division is good to 2 units in the last place of fp32, the result is rounded to nearest; a zero of the
        # kernel is exact and one of the reference is not
        kept = torch.finfo(out.dtype)
        step = exact[0].abs() * kept.eps + kept.smallest_normal * kept.eps
        allowed = step / 2 + exact[0].abs() * 2 * torch.finfo(torch.float32).eps + 1e-12
        assert ((out[branch].double() - exact[0]).abs() / allowed).max() <= 1


def equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
