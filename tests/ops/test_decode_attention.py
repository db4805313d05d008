"""Attention of one new token a sequence against the formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from interpreter import rounds_to_nearest  # noqa: F401 - used by every test here
from kernel_checks import assert_as_good, compiled_kernels
from torch import Tensor

from csrc_triton import decode_attention, runtime

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(
    device: torch.device, batch: int, heads: int, key_heads: int, keys: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(keys + dim)
    shapes = (batch, heads, dim), (batch, key_heads, keys, dim), (batch, key_heads, keys, dim)
    q, k, v = (torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes)
    return q, k, v


def attended(backend: str, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, **scale: float) -> Tensor:
    with runtime.backend(backend):
        return decode_attention(q, k, v, lengths, **scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "key_heads", "dim", "keys"), [(4, 2, 32, 100), (2, 2, 64, 257), (6, 1, 16, 64), (16, 8, 128, 513)]
)
def test_as_good_as_torchs(
    device: torch.device, heads: int, key_heads: int, dim: int, keys: int, dtype: torch.dtype
) -> None:
    lengths = torch.tensor([keys, 1, keys // 2 + 1, 64], device=device)
    q, k, v = draw(device, 4, heads, key_heads, keys, dim, dtype)
    exact = attended("torch", q.double(), k.double(), v.double(), lengths)
    # what SDPA makes of it in the same precision
    seen = (torch.arange(keys, device=device) < lengths[:, None])[:, None, None]
    each = heads // key_heads
    same = F.scaled_dot_product_attention(
        q[:, :, None], k.repeat_interleave(each, 1), v.repeat_interleave(each, 1), attn_mask=seen
    )[:, :, 0]
    assert_as_good("out", attended("triton", q, k, v, lengths), same, exact)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_key_gives_its_value_and_none_zeros(device: torch.device, backend: str) -> None:
    q, k, v = draw(device, 3, 4, 2, 40, 32, torch.float32)
    for kind in (torch.int32, torch.int64):
        out = attended(backend, q, k, v, torch.tensor([1, 0, 1], device=device, dtype=kind))
        assert not out[1].any()
        torch.testing.assert_close(out[[0, 2]], v[[0, 2], :, 0].repeat_interleave(2, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_lies_beyond_a_length_is_not_read(device: torch.device, backend: str) -> None:
    q, k, v = draw(device, 2, 2, 1, 600, 16, torch.float32)
    lengths = torch.tensor([300, 5], device=device)
    before = attended(backend, q, k, v, lengths)
    k[0, :, 300:], v[0, :, 300:], k[1, :, 5:], v[1, :, 5:] = (1e4,) * 4
    assert torch.equal(attended(backend, q, k, v, lengths), before)


def test_a_sequence_has_the_same_bits_beside_any_others_and_in_any_buffer(device: torch.device) -> None:
    q, k, v = draw(device, 3, 4, 2, 700, 32, torch.float32)
    lengths = torch.tensor([699, 300, 20], device=device)
    together = attended("triton", q, k, v, lengths)
    for row, length in enumerate(lengths.tolist()):
        for keys in (length, min(700, length + 130), 700):
            own = (q[row : row + 1], k[row : row + 1, :, :keys], v[row : row + 1, :, :keys], lengths[row : row + 1])
            assert torch.equal(attended("triton", *own)[0], together[row])


def test_views_and_a_scale(device: torch.device) -> None:
    """Keys of one layer of a larger cache, and a query that is a slice of a projection."""
    q, k, v = draw(device, 2, 4, 2, 90, 32, torch.float32)
    lengths = torch.tensor([80, 7], device=device)
    wanted = attended("torch", q, k[:, :, :80], v[:, :, :80], lengths, softmax_scale=0.3)
    wide = torch.cat([q, q], dim=1)[:, :4].transpose(0, 1).contiguous().transpose(0, 1)
    swapped = k.transpose(1, 2).contiguous().transpose(1, 2)
    got = attended("triton", wide, swapped[:, :, :80], v[:, :, :80], lengths, softmax_scale=0.3)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, attended("torch", q, k, v, lengths), atol=1e-3)


def test_other_heads_are_served_by_torch(device: torch.device) -> None:
    q, k, v = draw(device, 1, 2, 1, 10, 24, torch.float32)
    lengths = torch.tensor([10], device=device)
    assert torch.isfinite(attended("auto", q, k, v, lengths)).all()
    with pytest.raises(ValueError, match="heads of 24; accepted: 16, 32, 64, 128, 256"):
        attended("triton", q, k, v, lengths)


def attention(**changes: object) -> Callable[[], object]:
    given: dict[str, object] = {
        "q": torch.zeros(2, 4, 16), "k": torch.zeros(2, 2, 8, 16), "v": torch.zeros(2, 2, 8, 16),
        "lengths": torch.ones(2, dtype=torch.int64),
    }  # fmt: skip
    return lambda: decode_attention(**(given | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (attention(q=torch.zeros(2, 16)), "q: found .*accepted: floating point .B, heads, head_dim"),
        (attention(k=torch.zeros(3, 2, 8, 16)), "k: found .*accepted: .2, key heads, keys, 16"),
        (attention(v=torch.zeros(2, 2, 9, 16)), "v: found .*k and v alike"),
        (attention(v=torch.zeros(2, 2, 8, 16).double()), "v: found .*float32 on cpu"),
        (attention(k=torch.zeros(2, 2, 16, 8).mT), "k: found strides"),
        (attention(k=torch.zeros(2, 3, 8, 16), v=torch.zeros(2, 3, 8, 16)), "k: found 3 key heads; .* 4 heads"),
        (attention(lengths=torch.ones(2)), "lengths: found .*int32 or int64"),
        (attention(lengths=torch.ones(3, dtype=torch.int64)), "lengths: found .3,."),
    ],
)
def test_unfit_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_planners_batch(device: torch.device, dtype: torch.dtype) -> None:
    """64 plans of Qwen3-1.7B, of any lengths up to 2,560 tokens."""
    q, k, v = draw(device, 64, 16, 8, 2560, 128, dtype)
    lengths = torch.randint(0, 2561, (64,), device=device, generator=torch.Generator(device).manual_seed(0))
    exact, same = attended("torch", q.double(), k.double(), v.double(), lengths), attended("torch", q, k, v, lengths)
    assert_as_good("out", attended("triton", q, k, v, lengths), same, exact)


def test_every_kernel_compiles_ahead_of_time_without_a_spill() -> None:
    rows = compiled_kernels("ahead_decode_attention")
    assert len(rows) == 16 and all(row["stack"] == 0 for row in rows), rows
