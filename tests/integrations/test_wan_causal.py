"""A causal Wan model of the Self-Forcing family with its own attention, and the same one with the integration."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from integrations.causal_wan import (
    CHANNELS,
    CHUNK,
    FRAME_TOKENS,
    HEIGHT,
    POSITIONS,
    TEXT_DIM,
    WIDTH,
    Cache,
    CausalModel,
    ReportingModel,
    empty_cache,
)
from torch import Tensor, nn

from csrc_triton import runtime
from csrc_triton.integrations.wan_causal import ForkedCausalWan, Window

SIGMAS = (1000.0, 500.0)
CLOSE = {"atol": 2e-5, "rtol": 1e-5}
LONG = 16  # frames that the models' own caches hold without a window


def draw(frames: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Latents and text."""
    return torch.randn(batch, CHANNELS, frames, HEIGHT, WIDTH), torch.randn(batch, 5, TEXT_DIM)


def call(model: nn.Module, x: Tensor, text: Tensor, t: float, cache: Cache, start: int) -> Tensor:
    """start: in tokens."""
    out: Tensor = model(x, torch.full((x.shape[0], x.shape[2]), t), text, kv_cache=cache, current_start=start)
    return out


@torch.no_grad()
def stock(model: CausalModel, x: Tensor, text: Tensor, cache: Cache) -> list[Tensor]:
    """Velocities of every denoising call, as the models' pipelines roll out."""
    found = []
    for first in range(0, x.shape[2], CHUNK):
        own = x[:, :, first : first + CHUNK]
        found += [call(model, own, text, t, cache, first * FRAME_TOKENS) for t in SIGMAS]
        call(model, own, text, 0.0, cache, first * FRAME_TOKENS)
    return found


@torch.no_grad()
def forked(wan: ForkedCausalWan, model: nn.Module, x: Tensor, text: Tensor, branches: list[int]) -> list[Tensor]:
    """The same with the integration."""
    found = []
    for own in x.split(CHUNK, dim=2):
        with wan.chunk(branches, CHUNK):
            found += [call(model, own, text, t, wan.kv_cache, wan.start) for t in SIGMAS]
        with wan.chunk(branches, CHUNK, commit=True):
            call(model, own, text, 0.0, wan.kv_cache, wan.start)
    return found


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) > 0
    for own, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, plain, **CLOSE)


@pytest.mark.parametrize("make", [CausalModel, ReportingModel])
@pytest.mark.parametrize(("size", "sink"), [(-1, 0), (6, 0), (9, 3)])
def test_a_roll_out_is_that_of_the_models_own_attention(make: type[CausalModel], size: int, sink: int) -> None:
    model = make(size, sink)
    x, text = draw(15)
    expected = stock(model, x, text, empty_cache(LONG if size == -1 else size))
    wan = ForkedCausalWan(model, frame_tokens=FRAME_TOKENS, frames=15)
    assert wan.window == (None if size == -1 else Window(size, sink))
    assert_close(forked(wan, model, x, text, [wan.cache.new_branch()]), expected)
    wan.remove()
    again = stock(model, x, text, empty_cache(LONG if size == -1 else size))
    assert all(torch.equal(own, plain) for own, plain in zip(again, expected, strict=True))


def test_the_kernels_serve_it() -> None:
    model = CausalModel()
    model.blocks = model.blocks[:1]
    x, text = draw(2 * CHUNK)
    expected = stock(model, x, text, empty_cache(LONG)[:1])
    wan = ForkedCausalWan(model, frame_tokens=FRAME_TOKENS, frames=6)
    with runtime.backend("triton"):
        assert_close(forked(wan, model, x, text, [wan.cache.new_branch()]), expected)


def test_forks_share_the_past_and_part_after_it() -> None:
    model = CausalModel()
    past, text = draw(6)
    own, _ = draw(6, batch=3)
    expected = []
    for video in own:
        whole = torch.cat([past, video[None]], dim=2)
        expected.append(torch.stack(stock(model, whole, text, empty_cache(LONG))[-4:]))
    wan = ForkedCausalWan(model, frame_tokens=FRAME_TOKENS, frames=6)
    root = wan.cache.new_branch()
    forked(wan, model, past, text, [root])
    rows = wan.cache.rows_used
    branches = wan.cache.fork(root, 3)
    assert wan.cache.rows_used == rows
    found = forked(wan, model, own, text.expand(3, -1, -1), branches)
    assert_close([torch.stack(found)], [torch.cat(expected, dim=1)])


@pytest.mark.parametrize("make", [CausalModel, ReportingModel])
@pytest.mark.parametrize("frames", [6, 12])
def test_a_new_text_rewrites_the_window_but_for_its_sink(make: type[CausalModel], frames: int) -> None:
    size, sink = 9, 3
    model = make(size, sink)
    x, text = draw(15)
    new = draw(1)[1]
    old = empty_cache(size)
    stock(model, x[:, :, :frames], text, old)
    cache, first = empty_cache(size), 0 if frames == 6 else 6
    if first:  # what the sink had before stays
        for own, before in zip(cache, old, strict=True):
            for name in ("k", "v"):
                own[name][:, : sink * FRAME_TOKENS] = before[name][:, : sink * FRAME_TOKENS]
            own["local_end_index"].fill_(sink * FRAME_TOKENS)
            own["global_end_index"].fill_(first * FRAME_TOKENS)
    last, start = x[:, :, 12:], frames * FRAME_TOKENS
    with torch.no_grad():
        call(model, x[:, :, first:frames], new, 0.0, cache, first * FRAME_TOKENS)
        expected = call(model, last, new, 500.0, cache, start)
    wan = ForkedCausalWan(model, frame_tokens=FRAME_TOKENS, frames=15)
    branch = wan.cache.new_branch()
    forked(wan, model, x[:, :, :frames], text, [branch])
    with torch.no_grad(), wan.chunk([branch], CHUNK):
        before = call(model, last, new, 500.0, wan.kv_cache, wan.start)
    with wan.recache([branch]) as rewritten:
        assert (rewritten, wan.start) == (range(first, frames), first * FRAME_TOKENS)
        call(model, x[:, :, first:frames], new, 0.0, wan.kv_cache, wan.start)
    with torch.no_grad(), wan.chunk([branch], CHUNK):
        assert_close([call(model, last, new, 500.0, wan.kv_cache, wan.start)], [expected])
    assert not torch.allclose(before, expected, atol=1e-2)


def test_gradients_of_a_chunk_are_those_of_the_models_own_attention() -> None:
    model = CausalModel()
    x, text = draw(6)
    weight = torch.randn(1, CHANNELS, CHUNK, HEIGHT, WIDTH)

    def gradients(prepare: Callable[[nn.Module], Tensor]) -> list[Tensor]:
        own = copy.deepcopy(model)
        (prepare(own) * weight).sum().backward()
        return [parameter.grad for parameter in own.parameters() if parameter.grad is not None]

    def plain(own: nn.Module) -> Tensor:
        cache = empty_cache(LONG)
        with torch.no_grad():
            call(own, x[:, :, :CHUNK], text, 0.0, cache, 0)
        return call(own, x[:, :, CHUNK:], text, 500.0, cache, CHUNK * FRAME_TOKENS)

    def integrated(own: nn.Module) -> Tensor:
        wan = ForkedCausalWan(own, frame_tokens=FRAME_TOKENS, frames=6)
        branch = wan.cache.new_branch()
        with wan.chunk([branch], CHUNK, commit=True):
            call(own, x[:, :, :CHUNK], text, 0.0, wan.kv_cache, wan.start)
        with wan.chunk([branch], CHUNK):
            return call(own, x[:, :, CHUNK:], text, 500.0, wan.kv_cache, wan.start)

    ours, theirs = gradients(integrated), gradients(plain)
    assert len(ours) == len(theirs) > 30
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, atol=1e-4 * float(other.abs().max()) + 1e-7, rtol=1e-4)


def test_a_relative_window_without_a_sink_turns_nothing() -> None:
    model = CausalModel(6, 0)
    x, text = draw(12)
    expected = stock(model, x, text, empty_cache(6))
    wan = ForkedCausalWan(model, frame_tokens=FRAME_TOKENS, frames=12, window=Window(6, relative=True))
    assert_close(forked(wan, model, x, text, [wan.cache.new_branch()]), expected)


def test_relative_windows_go_on_beyond_the_models_table() -> None:
    model = CausalModel(6, 3)
    x, text = draw(CHUNK)
    wan = ForkedCausalWan(model, frame_tokens=FRAME_TOKENS, frames=40, window=Window(6, 3, relative=True))
    branch = wan.cache.new_branch()
    for start in range(0, POSITIONS + 4, CHUNK):
        with wan.chunk([branch], CHUNK, commit=True):
            call(model, x, text, 0.0, wan.kv_cache, start * FRAME_TOKENS)
    assert wan.cache.length(branch) > POSITIONS * FRAME_TOKENS


def test_wrappers_and_reduced_precision() -> None:
    model = CausalModel().bfloat16()
    wrapper = SimpleNamespace(model=torch.compile(model))
    wan = ForkedCausalWan(wrapper, frame_tokens=FRAME_TOKENS, frames=6)  # type: ignore[arg-type]
    assert [attention.q for attention in wan.layers] == [block.self_attn.q for block in model.blocks]
    x, text = (each.bfloat16() for each in draw(CHUNK))
    branch = wan.cache.new_branch()
    with wan.chunk([branch], CHUNK, commit=True):
        call(model, x, text, 0.0, wan.kv_cache, wan.start)
    assert wan.cache.views([branch], [(0, 1)])[0].k.dtype == torch.bfloat16


def test_what_does_not_fit_is_named() -> None:
    def made(model: object) -> ForkedCausalWan:
        return ForkedCausalWan(model, frame_tokens=FRAME_TOKENS, frames=6)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="found Linear without blocks; accepted: a causal Wan model"):
        made(nn.Linear(1, 1))
    for name in ("norm_q", "num_heads", "o"):
        model = CausalModel()
        delattr(model.blocks[1].self_attn, name)
        with pytest.raises(ValueError, match=rf"found CausalModel without blocks\[1\]\.self_attn\.{name}"):
            made(model)
    model = CausalModel()
    model.blocks[0].self_attn = None
    with pytest.raises(ValueError, match=r"without blocks\[0\]\.self_attn; accepted"):
        made(model)
    model = CausalModel()
    model.blocks[2].self_attn.forward = lambda x, grid_sizes, freqs: x
    with pytest.raises(ValueError, match=r"without an argument kv_cache of blocks\[2\]\.self_attn\.forward"):
        made(model)
    model = CausalModel()
    wan = made(model)
    branch = wan.cache.new_branch()
    x, text = draw(CHUNK)
    with pytest.raises(ValueError, match="outside of `chunk`"):
        call(model, x, text, 0.0, wan.kv_cache, 0)
    with pytest.raises(ValueError, match="outside of `chunk`"):
        assert wan.start
    with pytest.raises(ValueError, match="current_start: found 18; accepted: 0"), wan.chunk([branch], CHUNK):
        call(model, x, text, 0.0, wan.kv_cache, 18)
    with pytest.raises(ValueError, match=r"grid_sizes: found \[\(3, 2, 3\)\]; accepted: one size, 4 frames"):
        with wan.chunk([branch], 4):
            call(model, x, text, 0.0, wan.kv_cache, 0)
    with pytest.raises(ValueError, match="batch: found 1 rows; accepted: 2,"), wan.chunk([branch] * 2, CHUNK):
        call(model, x, text, 0.0, wan.kv_cache, 0)
    with pytest.raises(ValueError, match="kv_cache: found None"), wan.chunk([branch], CHUNK):
        model(x, torch.zeros(1, CHUNK), text)
    with pytest.raises(ValueError, match=f"accepted: {POSITIONS} at most"), wan.chunk([branch], POSITIONS + 1):
        pass
    with pytest.raises(ValueError, match="no call"), wan.chunk([branch], CHUNK, commit=True):
        pass
    assert wan.cache.rows_used == 0
