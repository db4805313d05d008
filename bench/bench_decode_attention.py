"""One layer's attention of a planner's decoding step: 64 sequences of Qwen3-1.7B in a cache of 2,560 tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import OURS, Bench, Contender, Outputs
from csrc_triton import decode_attention
from csrc_triton.decode_attention import naive

HEADS, KEY_HEADS = 16, 8


def outputs(out: Tensor) -> Outputs:
    return {"out": out}


@torch.no_grad()
@pytest.mark.parametrize("used", [64, 4], ids=["all rows used", "4 rows used"])
def test_forward(bench: Bench, used: int) -> None:
    """Lengths spread over the cache; idle rows have length 1, since SDPA has no row without keys."""
    dtype = torch.bfloat16 if bench.real else torch.float32
    rows, keys, dim = bench.size(64, 6), bench.size(2560, 40), bench.size(128, 32)
    used = min(used, rows)
    q = torch.randn(rows, HEADS, dim, device=bench.device, dtype=dtype)
    k, v = (torch.randn(rows, KEY_HEADS, keys, dim, device=bench.device, dtype=dtype) for _ in range(2))
    lengths = torch.ones(rows, dtype=torch.int64, device=bench.device)
    lengths[:used] = torch.linspace(keys // 6, keys, used, device=bench.device).long()
    seen = torch.arange(keys, device=bench.device) < lengths[:, None]

    def grouped() -> Tensor:
        """Heads that share a key head as queries of one product, so that nothing is repeated."""
        mask = seen[:, None, None].expand(-1, -1, HEADS // KEY_HEADS, -1)
        return F.scaled_dot_product_attention(q.unflatten(1, (KEY_HEADS, -1)), k, v, attn_mask=mask).flatten(1, 2)

    def repeated() -> Tensor:
        """As transformers does where there is a mask."""
        each = HEADS // KEY_HEADS
        own = (x.repeat_interleave(each, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q[:, :, None], *own, attn_mask=seen[:, None, None])[:, :, 0]

    exact = naive.decode_attention(q.double(), k.double(), v.double(), lengths, dim**-0.5)
    nbytes = 2.0 * int(lengths.sum()) * KEY_HEADS * dim * k.element_size()
    contenders = [
        Contender(OURS, lambda: decode_attention(q, k, v, lengths), outputs, nbytes=nbytes),
        Contender("SDPA, grouped queries, mask", grouped, outputs, nbytes=nbytes),
        Contender("SDPA, repeated keys, mask", repeated, outputs, nbytes=nbytes),
    ]
    case = f"{rows} rows, {used} used, {keys} keys, {HEADS}/{KEY_HEADS} heads of {dim}, {str(dtype)[6:]}"
    bench.measure("decode_attention", case, contenders, outputs(exact), outputs(repeated()))
