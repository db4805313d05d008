"""Rotary position embedding in the interleaved layout of Wan: adjacent channels form a pair.

The pairs of a head are split between time, height and width: of head_dim / 2 pairs, head_dim // 6 each for height and
width and the rest for time (22 + 21 + 21 of the 64 at head_dim 128). An axis with `dims` channels turns its pair i at
position p by p * theta^(-2i / dims).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from csrc_triton.runtime import describe

THETA = 10_000.0


def rope_tables(
    head_dim: int, positions: Tensor, height: int, width: int, *, theta: float = THETA
) -> tuple[Tensor, Tensor]:
    """cos and sin for the tokens of F latent frames, as `qk_norm_rope` and `rotate` take them.

    Angles are computed in fp64, their cosines and sines rounded once. Returns fp32
    [F * height * width, head_dim / 2], tokens by frame, then row, then column, on the device of `positions`.

    Args:
        head_dim: channels of a head, even.
        positions: [F], the frames' absolute temporal positions, integers or floating point.
        height, width: of a latent frame in tokens (patches); rows and columns count from 0.
        theta: base of the rates, > 0.

    Raises:
        ValueError: naming the argument.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim: found {head_dim}; accepted: an even number of at least 2")
    if positions.ndim != 1 or positions.is_complex() or positions.dtype == torch.bool:
        raise ValueError(f"positions: found {describe(positions)}; accepted: [F], integers or floating point")
    if not theta > 0:
        raise ValueError(f"theta: found {theta}; accepted: a number above 0")
    _check_size(height, width)
    device = positions.device
    axes = positions, torch.arange(height, device=device), torch.arange(width, device=device)
    parts = []
    for index, pairs in zip(axes, _pairs(head_dim), strict=True):
        dims = 2 * pairs
        rates = theta ** -(torch.arange(0, dims, 2, device=device, dtype=torch.float64) / dims)
        parts.append(index.double()[:, None] * rates)
    angles = _spread(parts)
    return angles.cos().float(), angles.sin().float()


def rope_tables_from_complex(freqs: Tensor, positions: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """`rope_tables` read off a table of complex numbers exp(i * angle), as Wan's code and models derived from it hold.

    Returns fp32 [F * height * width, head_dim / 2], the parts of `freqs` rounded once, on the device of `freqs`.

    Args:
        freqs: [N, head_dim / 2] complex: row p has the pairs of time, of height and of width at position p side by
            side (there: `torch.cat` of three `rope_params`, N = 1024).
        positions: [F] integers in [0, N), the frames' absolute temporal positions, on the device of `freqs`.
        height, width: of a latent frame in tokens (patches), at most N.

    Raises:
        ValueError: naming the argument. Positions outside of the table are detected on the CPU only: on a GPU that
            would synchronise.
    """
    if freqs.ndim != 2 or not freqs.is_complex() or not freqs.shape[1]:
        raise ValueError(f"freqs: found {describe(freqs)}; accepted: complex [N, head_dim / 2]")
    integers = not (positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool)
    if positions.ndim != 1 or not integers or positions.device != freqs.device:
        raise ValueError(f"positions: found {describe(positions)}; accepted: integers [F] on {freqs.device}")
    _check_size(height, width)
    count = len(freqs)
    if max(height, width) > count:
        raise ValueError(f"height, width: found {height}, {width}; accepted: at most {count}, the rows of freqs")
    if positions.device.type == "cpu" and len(positions) and not torch.compiler.is_compiling():
        first, last = int(positions.min()), int(positions.max())
        if first < 0 or last >= count:
            raise ValueError(f"positions: found {first} to {last}; accepted: in [0, {count}), the rows of freqs")
    time, rows, columns = freqs.split(_pairs(2 * freqs.shape[1]), dim=1)
    turns = _spread([time.index_select(0, positions), rows[:height], columns[:width]])
    return turns.real.float(), turns.imag.float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates adjacent channel pairs (2i, 2i + 1) of x by the angle of their token and pair.

    The arithmetic is in fp32 (fp64 where x is), rounded once to the dtype of x.

    Args:
        x: [B, L, heads, head_dim].
        cos, sin: [L, head_dim / 2], of the angles; the same in every batch row and head.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def _pairs(head_dim: int) -> list[int]:
    """Channel pairs of time, height and width."""
    side = head_dim // 6
    return [head_dim // 2 - 2 * side, side, side]


def _spread(parts: Sequence[Tensor]) -> Tensor:
    """[F * height * width, pairs of all axes] of [F, pairs], [height, pairs] and [width, pairs]."""
    frames, height, width = map(len, parts)
    time, rows, columns = parts
    return torch.cat(
        [
            time[:, None, None].expand(-1, height, width, -1),
            rows[None, :, None].expand(frames, -1, width, -1),
            columns[None, None].expand(frames, height, -1, -1),
        ],
        dim=-1,
    ).flatten(0, 2)


def _check_size(height: int, width: int) -> None:
    if min(height, width) < 1:
        raise ValueError(f"height, width: found {height}, {width}; accepted: at least 1")
