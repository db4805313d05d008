"""Merging the parts of a Hopper kernel's last tiles: an ordinary Triton kernel, so anywhere."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from csrc_triton.fork_attention.hopper.parts import TILE, Split, merge

LENGTH, WIDTH, PARTS = TILE + 40, 32, 3  # a whole tile and a partial one, for each of two branches


def test_attention_in_parts(device: torch.device) -> None:
    """Parts of very different size: their tops are 40 powers of two apart, and their totals count."""
    split = Split(whole=3, others=1, parts=PARTS, programs=6)  # of the second branch, the partial tile
    scores = [torch.randn(TILE, n, device=device) + base for n, base in ((5, 0.0), (70, 40.0), (1, 39.0))]
    values = [torch.randn(each.shape[1], WIDTH, device=device) for each in scores]
    sums, tops = split.sums(WIDTH, device), split.sums(2, device)
    for part, (each, value) in enumerate(zip(scores, values, strict=True)):
        top = each.max(1).values
        weights = torch.exp2(each - top[:, None])
        sums[part], tops[part] = weights @ value, torch.stack([top, weights.sum(1)], 1)
    # the third branch is memory of others
    outs = torch.full((3, LENGTH, 1, WIDTH), float("nan"), device=device)
    lses = torch.full((3, 1, LENGTH), float("nan"), device=device)
    out, lse = outs[:2], lses[:2]
    merge(split, sums, out, tops, lse)
    assert outs[2].isnan().all() and lses[2].isnan().all()
    whole = math.log(2) * torch.cat(scores, 1).double()[:40]
    exact = torch.softmax(whole, 1) @ torch.cat(values).double()
    assert (out[1, TILE:, 0] - exact).abs().max() < 1e-5
    assert (lse[1, 0, TILE:] - whole.logsumexp(1)).abs().max() < 1e-5
    assert (
        out[0].isnan().all() and out[1, :TILE].isnan().all() and lse[0].isnan().all() and lse[1, 0, :TILE].isnan().all()
    )


def test_sums_in_parts(device: torch.device) -> None:
    """Two heads and two tiles that are cut: the parts of a tile lie `others` tiles apart."""
    split = Split(whole=2, others=2, parts=PARTS, programs=8)
    sums = split.sums(WIDTH, device)
    sums.copy_(torch.randint(-9, 9, sums.shape))
    out = torch.full((1, LENGTH, 2, WIDTH), float("nan"), device=device)
    merge(split, sums, out)
    exact = sums.unflatten(0, (PARTS, 2)).sum(0).flatten(0, 1)[:LENGTH]
    assert torch.equal(out[0, :, 1], exact)
    assert out[0, :, 0].isnan().all()
