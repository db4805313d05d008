"""Modulated LayerNorm, gates and residual adds in one pass forward and one backward.

A program takes a few tokens of one latent frame, whose vectors it loads once. Gradients of a frame's vectors are sums
over its tokens in two stages, in a fixed order: a partial sum a program, then the sum of these.
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

# Those of the sums are part of the result: they say how the sums over tokens are split.
TILINGS = {
    "norm": Tiling(rows=2),
    "norm_backward": Tiling(),
    "norm_backward_sums": Tiling(steps=64, stages=3, most=32),
    "gate": Tiling(rows=2),
    "gate_backward_sums": Tiling(steps=64, stages=3, most=32),
}


@triton.jit
def norm_kernel(
    x, y, gate, shift, scale, residual, out, mean, rstd,
    x_batch, x_token, y_batch, y_token, gate_batch, gate_frame, shift_batch, shift_frame, scale_batch, scale_frame,
    tokens, eps, PLUS_ONE: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """ROWS of a frame's `tokens`: residual = x + y gate, rounded, and its norm (scale, or 1 + scale) + shift.

    None: y and residual where nothing is added; gate where y is added as it is. mean, rstd [B, F * tokens] are kept
    for the backward.
    """
    frame = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keep = (token < tokens)[:, None]
    row = (frame * tokens + token).to(tl.int64)[:, None]
    to = batch * tl.num_programs(1) * tokens + row
    x_row = load_row(x + batch * x_batch + row * x_token, keep, DIM, CHUNK)
    if y is not None:
        y_row = load_row(y + batch * y_batch + row * y_token, keep, DIM, CHUNK)
        if gate is not None:
            gates = load_vector(gate + batch * gate_batch + frame * gate_frame, DIM, CHUNK)
    shifts = load_vector(shift + batch * shift_batch + frame * shift_frame, DIM, CHUNK)
    scales = load_vector(scale + batch * scale_batch + frame * scale_frame, DIM, CHUNK)
    added = ()
    total = tl.zeros([ROWS, CHUNK], tl.float32)
    for i in tl.static_range(0, DIM, CHUNK):
        value = x_row[i // CHUNK].to(tl.float32)
        if y is not None:
            step = y_row[i // CHUNK].to(tl.float32)
            if gate is not None:
                step *= gates[i // CHUNK].to(tl.float32)
            # normed as it is stored: the backward sees no more of it
            stored = (value + step).to(residual.dtype.element_ty)
            store_chunk(residual + to * DIM, stored, keep, i, DIM, CHUNK)
            value = stored.to(tl.float32)
        added = append(added, value)
        total += value
    centre = tl.sum(total, axis=1)[:, None] / DIM
    squares = tl.zeros([ROWS, CHUNK], tl.float32)
    for i in tl.static_range(0, DIM, CHUNK):
        gap = added[i // CHUNK] - centre
        if i + CHUNK > DIM:
            gap = tl.where(i + tl.arange(0, CHUNK)[None, :] < DIM, gap, 0.0)
        squares += gap * gap
    inverse = tl.rsqrt(tl.sum(squares, axis=1)[:, None] / DIM + eps)
    tl.store(mean + to, centre, mask=keep)
    tl.store(rstd + to, inverse, mask=keep)
    for i in tl.static_range(0, DIM, CHUNK):
        factor = scales[i // CHUNK].to(tl.float32)
        if PLUS_ONE:
            factor += 1.0
        value = (added[i // CHUNK] - centre) * inverse * factor + shifts[i // CHUNK].to(tl.float32)
        store_chunk(out + to * DIM, value, keep, i, DIM, CHUNK)


@triton.jit
def _slopes(
    grad_row, x_row, scales, centre, inverse,
    PLUS_ONE: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """n = (x - mean) rstd and g - mean(g) - n mean(g n), g = dout (1 + scale), as chunks."""
    normed = ()
    scaled = ()
    total = tl.zeros([ROWS, CHUNK], tl.float32)
    products = tl.zeros([ROWS, CHUNK], tl.float32)
    for i in tl.static_range(0, DIM, CHUNK):
        n = (x_row[i // CHUNK].to(tl.float32) - centre) * inverse
        factor = scales[i // CHUNK].to(tl.float32)
        if PLUS_ONE:
            factor += 1.0
        g = grad_row[i // CHUNK].to(tl.float32) * factor
        normed = append(normed, n)
        scaled = append(scaled, g)
        # past the end n is finite and g is 0
        total += g
        products += g * n
    g_sum, gn_sum = sum_both(total, products)
    sloped = ()
    for i in tl.static_range(0, DIM, CHUNK):
        slope = scaled[i // CHUNK] - g_sum[:, None] / DIM - normed[i // CHUNK] * (gn_sum[:, None] / DIM)
        sloped = append(sloped, slope)
    return normed, sloped


@triton.jit
def _add(sums, row, factors, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """sums + row * factors, as chunks; factors None: sums + row. Rows that are not there are 0."""
    added = ()
    for i in tl.static_range(0, DIM, CHUNK):
        value = row[i // CHUNK].to(tl.float32)
        if factors is not None:
            value *= factors[i // CHUNK]
        added = append(added, sums[i // CHUNK] + value)
    return added


@triton.jit
def norm_backward_kernel(
    grad, grad_residual, x, y, gate, scale, mean, rstd, dx, dy, dgates, dshifts, dscales,
    grad_batch, grad_token, grad_residual_batch, grad_residual_token, x_batch, x_token, y_batch, y_token,
    gate_batch, gate_frame, scale_batch, scale_frame, tokens,
    PLUS_ONE: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """STEPS * ROWS of a frame's `tokens`; x is what was normed.

    With n = (x - mean) rstd and g = dout (1 + scale): dx = rstd (g - mean(g) - n mean(g n)) + the gradient that came
    to the residual itself, dy = dx gate, and rows of partial sums of dscale = sum dout n, dshift = sum dout, dgate =
    sum dx y. None stands for what is not there and what is not wanted.
    """
    frame = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    scales = load_vector(scale + batch * scale_batch + frame * scale_frame, DIM, CHUNK)
    if dy is not None:
        gates = load_vector(gate + batch * gate_batch + frame * gate_frame, DIM, CHUNK)
    shift_sums = no_sums(dshifts, ROWS, DIM, CHUNK)
    scale_sums = no_sums(dscales, ROWS, DIM, CHUNK)
    gate_sums = no_sums(dgates, ROWS, DIM, CHUNK)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        token = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        keep = (token < tokens)[:, None]
        row = (frame * tokens + token).to(tl.int64)[:, None]
        to = batch * tl.num_programs(1) * tokens + row
        grad_row = load_row(grad + batch * grad_batch + row * grad_token, keep, DIM, CHUNK)
        x_row = load_row(x + batch * x_batch + row * x_token, keep, DIM, CHUNK)
        if grad_residual is not None:
            kept_row = load_row(
                grad_residual + batch * grad_residual_batch + row * grad_residual_token, keep, DIM, CHUNK
            )
        if dgates is not None:
            y_row = load_row(y + batch * y_batch + row * y_token, keep, DIM, CHUNK)
        centre = tl.load(mean + to, mask=keep, other=0.0)
        inverse = tl.load(rstd + to, mask=keep, other=0.0)
        normed, sloped = _slopes(grad_row, x_row, scales, centre, inverse, PLUS_ONE, ROWS, DIM, CHUNK)
        if dshifts is not None:
            shift_sums = _add(shift_sums, grad_row, None, DIM, CHUNK)
        if dscales is not None:
            scale_sums = _add(scale_sums, grad_row, normed, DIM, CHUNK)
        found = ()
        for i in tl.static_range(0, DIM, CHUNK):
            d = inverse * sloped[i // CHUNK]
            if grad_residual is not None:
                d += kept_row[i // CHUNK].to(tl.float32)
            if dx is not None:
                store_chunk(dx + to * DIM, d, keep, i, DIM, CHUNK)
            if dy is not None:
                store_chunk(dy + to * DIM, d * gates[i // CHUNK].to(tl.float32), keep, i, DIM, CHUNK)
            found = append(found, d)
        if dgates is not None:
            gate_sums = _add(gate_sums, y_row, found, DIM, CHUNK)
    program = (batch * tl.num_programs(1) + frame) * tl.num_programs(0) + tl.program_id(0)
    store_sums(dshifts, program, shift_sums, DIM, CHUNK)
    store_sums(dscales, program, scale_sums, DIM, CHUNK)
    store_sums(dgates, program, gate_sums, DIM, CHUNK)


@triton.jit
def gate_kernel(
    x, y, gate, out, x_batch, x_token, y_batch, y_token, gate_batch, gate_frame, tokens,
    ROWS: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out = x + y gate for ROWS of a frame's `tokens`; x None: y gate."""
    frame = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keep = (token < tokens)[:, None]
    row = (frame * tokens + token).to(tl.int64)[:, None]
    to = batch * tl.num_programs(1) * tokens + row
    y_row = load_row(y + batch * y_batch + row * y_token, keep, DIM, CHUNK)
    if x is not None:
        x_row = load_row(x + batch * x_batch + row * x_token, keep, DIM, CHUNK)
    gates = load_vector(gate + batch * gate_batch + frame * gate_frame, DIM, CHUNK)
    for i in tl.static_range(0, DIM, CHUNK):
        value = y_row[i // CHUNK].to(tl.float32) * gates[i // CHUNK].to(tl.float32)
        if x is not None:
            value += x_row[i // CHUNK].to(tl.float32)
        store_chunk(out + to * DIM, value, keep, i, DIM, CHUNK)


@triton.jit
def gate_backward_kernel(
    grad, y, gate, dy, dgates, grad_batch, grad_token, y_batch, y_token, gate_batch, gate_frame, tokens,
    STEPS: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """STEPS * ROWS of a frame's `tokens`: dy = dout gate (None: not wanted), and partial sums of dgate = sum dout y."""
    frame = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    if dy is not None:
        gates = load_vector(gate + batch * gate_batch + frame * gate_frame, DIM, CHUNK)
    sums = no_sums(dgates, ROWS, DIM, CHUNK)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        token = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        keep = (token < tokens)[:, None]
        row = (frame * tokens + token).to(tl.int64)[:, None]
        to = batch * tl.num_programs(1) * tokens + row
        grad_row = load_row(grad + batch * grad_batch + row * grad_token, keep, DIM, CHUNK)
        y_row = load_row(y + batch * y_batch + row * y_token, keep, DIM, CHUNK)
        added = ()
        for i in tl.static_range(0, DIM, CHUNK):
            dout = grad_row[i // CHUNK].to(tl.float32)
            added = append(added, sums[i // CHUNK] + dout * y_row[i // CHUNK].to(tl.float32))
            if dy is not None:
                store_chunk(dy + to * DIM, dout * gates[i // CHUNK].to(tl.float32), keep, i, DIM, CHUNK)
        sums = added
    program = (batch * tl.num_programs(1) + frame) * tl.num_programs(0) + tl.program_id(0)
    store_sums(dgates, program, sums, DIM, CHUNK)


def _strides(*tensors: Tensor | None) -> list[int]:
    """Over the first two dimensions; 0 for what is not there, or is one vector for all tokens."""
    return [s for t in tensors for s in ((0, 0) if t is None or t.ndim == 1 else t.stride()[:2])]


def _frames(vector: Tensor) -> int:
    return 1 if vector.ndim == 1 else vector.shape[1]


def _empty(x: Tensor, wanted: bool) -> Tensor:
    return x.new_empty(x.shape if wanted else (0,))


def norm(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The norm and the residual [B, F * T, dim] (no elements without y), mean and rstd [B, F * T] in fp32.

    shift, scale [B, F, dim]; or bias and weight [dim] in their places. gate [B, F, dim] of the same frames.
    """
    batch, length, dim = x.shape
    frames = _frames(shift if gate is None else gate)
    tokens, tiling = length // frames, TILINGS["norm"]
    out, residual = _empty(x, True), _empty(x, y is not None)
    mean, rstd = (x.new_empty((batch, length), dtype=torch.float32) for _ in range(2))
    norm_kernel[(triton.cdiv(tokens, tiling.rows), frames, batch)](
        x, y, gate, shift, scale, None if y is None else residual, out, mean, rstd,
        *_strides(x, y, gate, shift, scale), tokens, eps,
        PLUS_ONE=scale.ndim == 3, ROWS=tiling.rows, DIM=dim, CHUNK=tiling.chunk_of(dim),
        num_warps=tiling.warps_of(dim),
    )  # fmt: skip
    return out, residual, mean, rstd


def norm_backward(
    grad: Tensor, grad_residual: Tensor | None, x: Tensor, y: Tensor | None, gate: Tensor | None,
    shift: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x (and of y without a gate), y (with a gate), gate, shift and scale; no elements where not wanted.

    x is what was normed: the residual where there is one. y is there where the gate's gradient is wanted.
    """
    batch, length, dim = x.shape
    frames = _frames(shift if gate is None else gate)
    tokens, tiling = length // frames, TILINGS["norm_backward_sums" if any(wants[2:]) else "norm_backward"]
    steps = tiling.steps_of(batch * length)
    tiles = triton.cdiv(tokens, tiling.rows * steps)
    dx, dy = _empty(x, wants[0]), _empty(x, wants[1])
    grad, kept = as_rows(grad), None if grad_residual is None else as_rows(grad_residual)
    loaded = (2 + (kept is not None) + wants[2]) * dim * x.element_size()
    partials = [x.new_empty((batch * frames, tiles, dim), dtype=torch.float32) if want else None for want in wants[2:]]
    norm_backward_kernel[(tiles, frames, batch)](
        grad, kept, x, y if wants[2] else None, gate, scale, mean, rstd,
        dx if wants[0] else None, dy if wants[1] else None, *partials,
        *_strides(grad, kept, x, y, gate, scale), tokens,
        PLUS_ONE=scale.ndim == 3, STEPS=steps, STAGES=tiling.stages_of(loaded), ROWS=tiling.rows,
        DIM=dim, CHUNK=tiling.chunk_of(dim), num_warps=tiling.warps_of(dim),
    )  # fmt: skip
    dgate, dshift, dscale = (
        x.new_empty(0) if partial is None else _sum(partial, vector)
        for partial, vector in zip(partials, (gate, shift, scale), strict=True)
    )
    return dx, dy, dgate, dshift, dscale


def _sum(partials: Tensor, vector: Tensor | None) -> Tensor:
    """The gradient of `vector` from its partial sums [B * F, programs, dim]."""
    assert vector is not None
    if vector.ndim == 1:
        partials = partials.flatten(0, 1)[None]
    return sum_rows(partials, vector.dtype).view(vector.shape)


def gate(x: Tensor | None, y: Tensor, factor: Tensor) -> Tensor:
    """x + y factor, or y factor; x, y [B, F * T, dim], factor [B, F, dim]."""
    batch, length, dim = y.shape
    frames, tiling = factor.shape[1], TILINGS["gate"]
    tokens = length // frames
    y = as_rows(y)
    out = _empty(y, True)
    gate_kernel[(triton.cdiv(tokens, tiling.rows), frames, batch)](
        x, y, factor, out, *_strides(x, y, factor), tokens,
        ROWS=tiling.rows, DIM=dim, CHUNK=tiling.chunk_of(dim), num_warps=tiling.warps_of(dim),
    )  # fmt: skip
    return out


def gate_backward(grad: Tensor, y: Tensor, factor: Tensor, wants_y: bool) -> tuple[Tensor, Tensor]:
    """Gradients of y (no elements where not wanted) and of factor."""
    batch, length, dim = y.shape
    frames, tiling = factor.shape[1], TILINGS["gate_backward_sums"]
    tokens, steps = length // frames, tiling.steps_of(batch * length)
    tiles = triton.cdiv(tokens, tiling.rows * steps)
    rows, dy = as_rows(grad), _empty(y, wants_y)
    partials = y.new_empty((batch * frames, tiles, dim), dtype=torch.float32)
    gate_backward_kernel[(tiles, frames, batch)](
        rows, y, factor, dy if wants_y else None, partials, *_strides(rows, y, factor), tokens,
        STEPS=steps, STAGES=tiling.stages_of(2 * dim * y.element_size()), ROWS=tiling.rows,
        DIM=dim, CHUNK=tiling.chunk_of(dim), num_warps=tiling.warps_of(dim),
    )  # fmt: skip
    dfactor = _sum(partials, factor)
    return dy, dfactor
