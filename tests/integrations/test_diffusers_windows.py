"""Windows, prompt switches, guidance and precision of a diffusers Wan transformer run chunk by chunk."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("diffusers", reason="needs diffusers: pip install -e '.[diffusers]'")

from diffusers import WanTransformer3DModel
from integrations.test_diffusers import (  # noqa: F401
    CHANNELS,
    CHUNK,
    FRAME_TOKENS,
    HEIGHT,
    NOISY,
    WIDTH,
    call,
    committed,
    draw,
    stock,
    transformer,
)

from csrc_triton.integrations.diffusers import ForkedWan, Window
from csrc_triton.qk_norm_rope import rope_tables, rotate

FRAMES, SINK = 6, 1  # of the windows here


class Plain:
    """Self-attention over lists of K (before RoPE) and V by frame, turned anew at each call."""

    _attention_backend = _parallel_config = None

    def __init__(self) -> None:
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        self.seen: list[int] = []  # frames
        self.positions: list[int] = []  # of them and of the call's own

    def __call__(self, attn: Any, x: Tensor, *_: Any) -> Tensor:
        q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
        q, k, v = (each.unflatten(-1, (attn.heads, -1)) for each in (q, k, v))
        self.own = list(zip(k.split(FRAME_TOKENS, dim=1), v.split(FRAME_TOKENS, dim=1), strict=True))
        keys = torch.cat([*(self.k[frame] for frame in self.seen), k], dim=1)
        values = torch.cat([*(self.v[frame] for frame in self.seen), v], dim=1)
        rope = rope_tables(q.shape[-1], torch.tensor(self.positions), HEIGHT // 2, WIDTH // 2)
        q = rotate(q, *(table[-q.shape[1] :] for table in rope))
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, rotate(keys, *rope), values)))
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class PlainWan:
    """The transformer with `Plain` in every block, its frames and positions by explicit lists."""

    def __init__(self, model: WanTransformer3DModel):
        self.model, self.layers = copy.deepcopy(model), [Plain() for _ in model.blocks]
        for block, layer in zip(self.model.blocks, self.layers, strict=True):
            block.attn1.set_processor(layer)

    def __call__(self, x: Tensor, text: Tensor, timestep: float, seen: list[int], positions: list[int]) -> Tensor:
        for layer in self.layers:
            layer.seen, layer.positions = seen, positions
        return call(self.model, x, text, timestep)

    def keep(self, first: int) -> None:
        """The K and V of the latest call become those of frames `first`, ..."""
        for layer in self.layers:
            for i, (k, v) in enumerate(layer.own):
                layer.k[first + i : first + i + 1], layer.v[first + i : first + i + 1] = [k], [v]


def listed(start: int, relative: bool) -> tuple[list[int], list[int]]:
    """Frames that the chunk at `start` sees in a window of 6 with a sink of 1, and positions: written out."""
    seen = {0: [], 2: [0, 1], 4: [0, 1, 2, 3], 6: [0, 3, 4, 5], 8: [0, 5, 6, 7]}[start]
    turned = relative and start > 4
    return seen, [0, 1, 2, 3, 4, 5] if turned else [*seen, start, start + 1]


@pytest.mark.parametrize("relative", [False, True])
def test_windows_see_the_listed_frames_at_the_listed_positions(
    transformer: WanTransformer3DModel,  # noqa: F811
    relative: bool,
) -> None:
    x, text = draw(10)
    plain, expected = PlainWan(transformer), []
    for start in range(0, 10, CHUNK):
        chunk = x[:, :, start : start + CHUNK]
        expected.append(plain(chunk, text, NOISY, *listed(start, relative)))
        plain(chunk, text, 0.0, *listed(start, relative))
        plain.keep(start)
    wan = ForkedWan(transformer, frame_tokens=FRAME_TOKENS, frames=12, window=Window(FRAMES, SINK, relative))
    branch = wan.cache.new_branch()
    for start, own in zip(range(0, 10, CHUNK), expected, strict=True):
        chunk = x[:, :, start : start + CHUNK]
        with wan.chunk([branch], CHUNK):
            assert torch.allclose(call(transformer, chunk, text, NOISY), own, atol=2e-5), start
        with wan.chunk([branch], CHUNK, commit=True):
            call(transformer, chunk, text, 0.0)
    assert wan.cache.rows_used == 10 * FRAME_TOKENS  # turned sinks are given back
    assert wan.cache.branches == (branch,)


def test_relative_windows_go_on_beyond_the_model_positions(transformer: WanTransformer3DModel) -> None:  # noqa: F811
    x, text = draw(CHUNK)
    wan = ForkedWan(transformer, frame_tokens=FRAME_TOKENS, frames=16, window=Window(FRAMES, SINK, relative=True))
    branch = wan.cache.new_branch()
    for _ in range(8):  # 16 frames, and RoPE has positions up to 12
        with wan.chunk([branch], CHUNK, commit=True):
            call(transformer, x, text, 0.0)
    assert wan.cache.length(branch) == 16 * FRAME_TOKENS
    with pytest.raises(ValueError, match="frames: found 6; accepted: at most 5"), wan.chunk([branch], FRAMES):
        pass


@pytest.mark.parametrize("frames", [4, 8])
@pytest.mark.parametrize("relative", [False, True])
def test_a_new_text_rewrites_the_window_but_for_its_sink(
    transformer: WanTransformer3DModel,  # noqa: F811
    frames: int,
    relative: bool,
) -> None:
    x, text = draw(10)
    new = draw(1)[1]
    plain = PlainWan(transformer)
    wan = ForkedWan(transformer, frame_tokens=FRAME_TOKENS, frames=12, window=Window(FRAMES, SINK, relative))
    root = wan.cache.new_branch()
    for start in range(0, frames, CHUNK):
        chunk = x[:, :, start : start + CHUNK]
        plain(chunk, text, 0.0, *listed(start, relative))
        plain.keep(start)
        with wan.chunk([root], CHUNK, commit=True):
            call(transformer, chunk, text, 0.0)
    branch, old = wan.cache.fork(root, 2)
    first, seen = (0, []) if frames == 4 else (3, [0])  # the window of 6 without its sink
    positions = [*range(6)] if relative and seen else [*seen, *range(first, frames)]
    plain(x[:, :, first:frames], new, 0.0, seen, positions)
    plain.keep(first)
    with pytest.raises(RuntimeError, match="stop"), wan.recache([branch]):
        raise RuntimeError("stop")
    with wan.recache([branch]) as rewritten:
        assert rewritten == range(first, frames)
        call(transformer, x[:, :, first:frames], new, 0.0)
    last = x[:, :, 8:10]
    expected = plain(last, new, NOISY, *listed(frames, relative))
    with wan.chunk([branch], CHUNK):
        assert torch.allclose(call(transformer, last, new, NOISY), expected, atol=2e-5)
    with wan.chunk([old], CHUNK):  # the other branch keeps what it had
        assert not torch.allclose(call(transformer, last, new, NOISY), expected, atol=1e-2)


def test_guidance_has_several_rows_a_branch(transformer: WanTransformer3DModel) -> None:  # noqa: F811
    x, text = draw(2 * CHUNK)
    wan, root = committed(transformer, x, text)
    branches = wan.cache.fork(root, 2)
    own, texts = draw(CHUNK, batch=2)[0], draw(1, batch=2)[1]
    with wan.chunk(branches, CHUNK, commit=True):  # now the branches differ
        call(transformer, own, text.expand(2, -1, -1), 0.0)
    noisy = draw(CHUNK)[0]
    expected = []
    for branch in branches:
        for words in texts:
            with wan.chunk([branch], CHUNK):
                expected.append(call(transformer, noisy, words[None], NOISY))
    rows = noisy.expand(4, -1, -1, -1, -1)
    with wan.chunk(branches, CHUNK):
        found = call(transformer, rows, texts.repeat(2, 1, 1), NOISY)
    assert torch.allclose(found, torch.cat(expected), atol=1e-5)
    with wan.chunk(branches * 2, CHUNK):  # the texts one after the other, as pipelines stack them
        found = call(transformer, rows, texts.repeat_interleave(2, 0), NOISY)
    assert torch.allclose(found[[0, 2, 1, 3]], torch.cat(expected), atol=1e-5)
    assert (expected[0] - expected[2]).abs().max() > 1e-2 < (expected[0] - expected[1]).abs().max()


@pytest.mark.parametrize("made", ["inside", "before"])
def test_autocast_computes_in_its_precision(transformer: WanTransformer3DModel, made: str) -> None:  # noqa: F811
    x, text = draw(2 * CHUNK)
    exact = stock(transformer, x, text)
    autocast = torch.autocast("cpu", torch.bfloat16)
    with autocast:
        rounded = stock(transformer, x, text)
    with torch.autocast("cpu", torch.bfloat16, enabled=made == "inside"):
        wan = ForkedWan(transformer, frame_tokens=FRAME_TOKENS, frames=4)
    branch = wan.cache.new_branch()
    with autocast:
        with wan.chunk([branch], CHUNK, commit=True):
            call(transformer, x[:, :, :CHUNK], text, 0.0)
        with wan.chunk([branch], CHUNK):
            own = call(transformer, x[:, :, CHUNK:], text, NOISY)
    k = wan.cache.views([branch], [(0, 1)])[0].k
    assert k.dtype == (torch.bfloat16 if made == "inside" else torch.float32)
    limit = 2 * (rounded - exact).abs().mean()
    assert (own - exact).abs().mean() <= limit


def test_rope_tables_are_made_of_the_chunk_alone(
    transformer: WanTransformer3DModel,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from csrc_triton.integrations import diffusers

    made: list[int] = []

    def count(head_dim: int, positions: Tensor, *size: int) -> tuple[Tensor, Tensor]:
        made.append(len(positions))
        return rope_tables(head_dim, positions, *size)

    monkeypatch.setattr(diffusers, "rope_tables", count)
    x, text = draw(10)
    wan, branch = committed(transformer, x, text)
    made.clear()
    with wan.chunk([branch], CHUNK):
        for _ in range(3):
            call(transformer, x[:, :, -CHUNK:], text, NOISY)
    assert made == [CHUNK]


def test_rows_are_reserved_when_the_block_is_entered(transformer: WanTransformer3DModel) -> None:  # noqa: F811
    wan = ForkedWan(transformer, frame_tokens=FRAME_TOKENS, frames=4)
    branch = wan.cache.new_branch()
    with wan.chunk([branch], CHUNK, commit=True):
        assert wan.cache.rows_reserved == CHUNK * FRAME_TOKENS
        call(transformer, torch.zeros(1, CHANNELS, CHUNK, HEIGHT, WIDTH), draw(1)[1], 0.0)
        assert wan.cache.rows_reserved == CHUNK * FRAME_TOKENS


def test_gradient_checkpointing_outside_of_the_block_is_refused(transformer: WanTransformer3DModel) -> None:  # noqa: F811
    x, text = draw(CHUNK)
    wan = ForkedWan(transformer, frame_tokens=FRAME_TOKENS, frames=4)
    transformer.train()
    transformer.enable_gradient_checkpointing()
    with wan.chunk([wan.cache.new_branch()], CHUNK):
        loss = call(transformer, x, text, NOISY).square().mean()
    with pytest.raises(ValueError, match="outside of `chunk`.*recomputed ones too"):
        loss.backward()
