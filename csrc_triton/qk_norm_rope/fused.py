"""RMS norm, RoPE and the write into cache rows in one pass; the backward in one pass too.

A program takes a few tokens: a query's row and a key's of 3,072 bytes each (1536 channels of 2 bytes) are loaded before
anything is computed, stay in registers, and share the token's angles, which repeat from head to head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton._channels import (
    Tiling,
    append,
    as_rows,
    load_row,
    load_vector,
    no_sums,
    store_chunk,
    store_sums,
    sum_both,
    sum_rows,
)

# "backward_sums" is part of its result: it says how the sums over tokens are split.
TILINGS = {"forward": Tiling(), "backward": Tiling(), "backward_sums": Tiling(steps=64, stages=3, most=32)}


@triton.jit
def _rotate(x, cos, sin, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Turns adjacent channels; cos, sin [ROWS, CHUNK / 2]. Pairs lie within a thread: nothing is shuffled."""
    even, odd = tl.split(tl.reshape(x, [ROWS, CHUNK // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [ROWS, CHUNK])


@triton.jit
def _angles(cos, sin, token, keep, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr):
    """cos and sin [ROWS, CHUNK / 2] of every chunk: a chunk has whole heads."""
    pair = tl.arange(0, CHUNK // 2) % (HEAD_DIM // 2)
    at = token[:, None] * (HEAD_DIM // 2) + pair[None, :]
    return tl.load(cos + at, mask=keep, other=0.0), tl.load(sin + at, mask=keep, other=0.0)


@triton.jit
def _norm_store(
    row, weight, cos, sin, out, pool, keep, eps,
    ROPED_POOL: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Norms rows and stores them, with RoPE if there are angles, at `out` and `pool` [ROWS, 1] (or None)."""
    weights = load_vector(weight, DIM, CHUNK)  # before the stores, which no later load may pass
    squares = tl.zeros([ROWS, CHUNK], tl.float32)
    for i in tl.static_range(0, DIM, CHUNK):
        x = row[i // CHUNK].to(tl.float32)
        squares += x * x
    inverse = tl.rsqrt(tl.sum(squares, axis=1) / DIM + eps)[:, None]
    for i in tl.static_range(0, DIM, CHUNK):
        plain = row[i // CHUNK].to(tl.float32) * inverse * weights[i // CHUNK].to(tl.float32)
        roped = plain
        if cos is not None:
            roped = _rotate(plain, cos, sin, ROWS, CHUNK)
        if out is not None:
            store_chunk(out, roped, keep, i, DIM, CHUNK)
        if pool is not None:
            store_chunk(pool, roped if ROPED_POOL else plain, keep, i, DIM, CHUNK)


@triton.jit
def forward_kernel(
    q, k, v, weight_q, weight_k, cos, sin, q_out, k_out, pool_k, pool_v, first_rows,
    q_batch, q_token, k_batch, k_token, v_batch, v_token, pool_k_row, pool_v_row, length, page, eps,
    ROPED_POOL: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one batch row. None stands for what is not there: q or k; cos and sin where nothing is turned;
    the outputs, or v and the pools, where they are not written. first_rows: of every `page` tokens of a batch row."""
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keep = (token < length)[:, None]
    row = token.to(tl.int64)[:, None]
    to = (batch * length + row) * DIM
    if q is not None:
        q_row = load_row(q + batch * q_batch + row * q_token, keep, DIM, CHUNK)
    if k is not None:
        k_row = load_row(k + batch * k_batch + row * k_token, keep, DIM, CHUNK)
    if pool_v is not None:
        v_row = load_row(v + batch * v_batch + row * v_token, keep, DIM, CHUNK)
    c = cos
    s = sin
    if cos is not None:
        c, s = _angles(cos, sin, token, keep, HEAD_DIM, CHUNK)
    if pool_v is not None:
        pages = first_rows + batch * (length // page)
        pool_row = tl.load(pages + (token // page)[:, None], mask=keep, other=0) + (token % page)[:, None]
        v_at = pool_v + pool_row * pool_v_row
        for i in tl.static_range(0, DIM, CHUNK):
            store_chunk(v_at, v_row[i // CHUNK], keep, i, DIM, CHUNK)
    if q is not None:
        _norm_store(q_row, weight_q, c, s, q_out + to, None, keep, eps, False, ROWS, DIM, CHUNK)
    if k is not None:
        out_at = None
        pool_at = None
        if k_out is not None:
            out_at = k_out + to
        if pool_k is not None:
            pool_at = pool_k + pool_row * pool_k_row
        _norm_store(k_row, weight_k, c, s, out_at, pool_at, keep, eps, ROPED_POOL, ROWS, DIM, CHUNK)


@triton.jit
def backward_kernel(
    grad, x, weight, cos, sin, dx, partials, grad_batch, grad_token, x_batch, x_token, length, eps,
    STEPS: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """STEPS * ROWS tokens of one batch row of q or of k: dx, and one row of partial sums for the weight's gradient.

    y = R(w x r), r = (mean x^2 + eps)^-1/2, g = R^T(dy): dx = r w g - x r^3 sum(w g x) / DIM and dw = sum of g x r.
    None stands for angles that are not there, and for gradients that are not wanted.
    """
    batch = tl.program_id(1).to(tl.int64)
    weights = load_vector(weight, DIM, CHUNK)
    sums = no_sums(partials, ROWS, DIM, CHUNK)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        token = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        keep = (token < length)[:, None]
        row = token.to(tl.int64)[:, None]
        grad_row = load_row(grad + batch * grad_batch + row * grad_token, keep, DIM, CHUNK)
        x_row = load_row(x + batch * x_batch + row * x_token, keep, DIM, CHUNK)
        c = cos
        s = sin
        if cos is not None:
            c, s = _angles(cos, sin, token, keep, HEAD_DIM, CHUNK)
        turned = ()
        squares = tl.zeros([ROWS, CHUNK], tl.float32)
        products = tl.zeros([ROWS, CHUNK], tl.float32)
        for i in tl.static_range(0, DIM, CHUNK):
            g = grad_row[i // CHUNK].to(tl.float32)
            if cos is not None:
                g = _rotate(g, c, -s, ROWS, CHUNK)
            turned = append(turned, g)
            x_at = x_row[i // CHUNK].to(tl.float32)
            squares += x_at * x_at
            products += g * weights[i // CHUNK].to(tl.float32) * x_at
        square, product = sum_both(squares, products)
        inverse = tl.rsqrt(square / DIM + eps)[:, None]
        pull = product[:, None] * inverse * inverse * inverse / DIM
        added = ()
        for i in tl.static_range(0, DIM, CHUNK):
            x_at = x_row[i // CHUNK].to(tl.float32)
            g = turned[i // CHUNK]
            if dx is not None:
                slope = weights[i // CHUNK].to(tl.float32) * inverse
                store_chunk(dx + (batch * length + row) * DIM, g * slope - x_at * pull, keep, i, DIM, CHUNK)
            if partials is not None:
                added = append(added, sums[i // CHUNK] + tl.where(keep, g * x_at * inverse, 0.0))
        sums = added
    store_sums(partials, batch * tl.num_programs(0) + tl.program_id(0), sums, DIM, CHUNK)


def _strides(*tensors: Tensor | None) -> list[int]:
    """Over batch and tokens, of tensors [B, L, dim]; 0 for what is not there."""
    return [stride for tensor in tensors for stride in ((0, 0) if tensor is None else tensor.stride()[:2])]


def forward(
    q: Tensor | None, k: Tensor | None, v: Tensor | None, weight_q: Tensor | None, weight_k: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, q_out: Tensor | None, k_out: Tensor | None,
    pool_k: Tensor | None, pool_v: Tensor | None, first_rows: Tensor | None,
    head_dim: int, eps: float, write_roped: bool,
) -> None:  # fmt: skip
    """Fills q_out and k_out [B, L, heads, head_dim] and the pools' rows, whichever are there."""
    some = q if q is not None else k
    assert some is not None
    batch, length, dim = some.shape
    tiling = TILINGS["forward"]
    pool_rows = (0, 0) if pool_k is None or pool_v is None else (pool_k.stride(0), pool_v.stride(0))
    page = length if first_rows is None else batch * length // first_rows.numel()
    with torch.cuda.device_of(some):
        forward_kernel[(triton.cdiv(length, tiling.rows), batch)](
            q, k, v, weight_q, weight_k, cos, sin, q_out, k_out, pool_k, pool_v, first_rows,
            *_strides(q, k, v), *pool_rows, length, page, eps,
            ROPED_POOL=write_roped, ROWS=tiling.rows, DIM=dim, HEAD_DIM=head_dim, CHUNK=tiling.chunk_of(dim),
            num_warps=tiling.warps_of(dim),
        )  # fmt: skip


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None,
    eps: float, wants_x: bool, wants_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of x (q or k) [B, L, dim] and of its weight, from that of its output [B, L, heads, head_dim].

    They have no elements where they are not wanted.
    """
    batch, length, dim = x.shape
    tiling = TILINGS["backward_sums" if wants_weight else "backward"]
    steps = tiling.steps_of(batch * length)
    tiles = triton.cdiv(length, tiling.rows * steps)
    rows = as_rows(grad)
    loaded = 2 * dim * x.element_size() + 4 * grad.shape[-1]
    dx = x.new_empty(x.shape if wants_x else (0,))
    partials = x.new_empty((1, batch * tiles, dim), dtype=torch.float32) if wants_weight else None
    with torch.cuda.device_of(x):
        backward_kernel[(tiles, batch)](
            rows, x, weight, cos, sin, dx if wants_x else None, partials, *_strides(rows, x), length, eps,
            STEPS=steps, STAGES=tiling.stages_of(loaded), ROWS=tiling.rows,
            DIM=dim, HEAD_DIM=grad.shape[-1], CHUNK=tiling.chunk_of(dim), num_warps=tiling.warps_of(dim),
        )  # fmt: skip
        dweight = weight.new_empty(0) if partials is None else sum_rows(partials, weight.dtype)[0]
    return dx, dweight
