"""A diffusers Wan transformer run chunk by chunk, against the same one with its own processors and a mask."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs diffusers: pip install -e '.[diffusers]'")

from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from csrc_triton import runtime
from csrc_triton.integrations.diffusers import ForkedWan, Window

CHUNK, HEIGHT, WIDTH = 2, 4, 6
FRAME_TOKENS = HEIGHT * WIDTH // 4
CHANNELS, TEXT_LEN, TEXT_DIM = 4, 5, 16
NOISY = 700.0


@pytest.fixture
def transformer() -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=32, in_channels=CHANNELS,
        out_channels=CHANNELS, text_dim=TEXT_DIM, freq_dim=16, ffn_dim=48, num_layers=3, rope_max_seq_len=12,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def draw(frames: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Latents and text."""
    return torch.randn(batch, CHANNELS, frames, HEIGHT, WIDTH), torch.randn(batch, TEXT_LEN, TEXT_DIM)


def call(model: WanTransformer3DModel, x: Tensor, text: Tensor, timestep: float) -> Tensor:
    return model(x, torch.full((x.shape[0],), timestep), text).sample


class BlockCausal(WanAttnProcessor):
    """The stock processor with a mask: frames see their own chunk and those of `seen` that are earlier."""

    def __init__(self, mask: Tensor):
        super().__init__()
        self.mask = mask

    def __call__(self, attn: Any, hidden: Tensor, text: Any = None, mask: Any = None, rotary: Any = None) -> Tensor:
        return super().__call__(attn, hidden, text, self.mask, rotary)


def stock(model: WanTransformer3DModel, x: Tensor, text: Tensor, hidden: tuple[int, ...] = ()) -> Tensor:
    """The whole video in one call: clean frames at timestep 0, the last chunk noisy; returns the last chunk.

    hidden: chunks that the last one does not see.
    """
    model = copy.deepcopy(model)
    chunk_of = torch.arange(x.shape[2]).repeat_interleave(FRAME_TOKENS) // CHUNK
    last = int(chunk_of[-1])
    mask = chunk_of[:, None] >= chunk_of[None]
    for chunk in hidden:
        mask &= ~((chunk_of[:, None] == last) & (chunk_of[None] == chunk))
    for block in model.blocks:
        block.attn1.set_processor(BlockCausal(mask))
    timestep = torch.where(chunk_of == last, NOISY, 0.0).expand(x.shape[0], -1)
    return model(x, timestep, text).sample[:, :, -CHUNK:]


def committed(model: WanTransformer3DModel, x: Tensor, text: Tensor) -> tuple[ForkedWan, int]:
    """A branch that holds all but the last chunk of x [1, ...]."""
    wan = ForkedWan(model, frame_tokens=FRAME_TOKENS, frames=x.shape[2])
    branch = wan.cache.new_branch()
    for clean in x.split(CHUNK, dim=2)[:-1]:
        with wan.chunk([branch], CHUNK, commit=True):
            call(model, clean, text, 0.0)
    return wan, branch


@pytest.mark.parametrize("fused", [False, True])
def test_without_context_it_is_the_stock_processor(transformer: WanTransformer3DModel, fused: bool) -> None:
    x, text = draw(CHUNK, batch=2)
    expected = call(transformer, x, text, NOISY)
    if fused:
        transformer.fuse_qkv_projections()
    wan = ForkedWan(transformer, frame_tokens=FRAME_TOKENS, frames=4)
    with wan.chunk([wan.cache.new_branch(), wan.cache.new_branch()], CHUNK):
        own = call(transformer, x, text, NOISY)
    assert torch.allclose(own, expected, atol=1e-5)
    wan.remove()
    assert torch.allclose(call(transformer, x, text, NOISY), expected, atol=1e-6)


@pytest.mark.parametrize("chunks", [2, 4])
def test_chunk_by_chunk_is_block_causal_attention(transformer: WanTransformer3DModel, chunks: int) -> None:
    x, text = draw(chunks * CHUNK)
    expected, without_first = stock(transformer, x, text), stock(transformer, x, text, hidden=(0,))
    wan, branch = committed(transformer, x, text)
    with wan.chunk([branch], CHUNK):
        own = call(transformer, x[:, :, -CHUNK:], text, NOISY)
    assert torch.allclose(own, expected, atol=1e-5)
    assert not torch.allclose(own, without_first, atol=1e-2)


def test_the_kernels_serve_it(transformer: WanTransformer3DModel) -> None:
    x, text = draw(2 * CHUNK)
    expected = stock(transformer, x, text)
    with runtime.backend("triton"):
        wan, branch = committed(transformer, x, text)
        with wan.chunk([branch], CHUNK):
            own = call(transformer, x[:, :, -CHUNK:], text, NOISY)
    assert torch.allclose(own, expected, atol=1e-5)


def test_only_the_attended_frames_count(transformer: WanTransformer3DModel) -> None:
    x, text = draw(4 * CHUNK)
    expected = stock(transformer, x, text, hidden=(1,))
    wan, branch = committed(transformer, x, text)
    with wan.chunk([branch], CHUNK, attended=[(0, CHUNK), (2 * CHUNK, 3 * CHUNK)]):
        own = call(transformer, x[:, :, -CHUNK:], text, NOISY)
    assert torch.allclose(own, expected, atol=1e-5)


def test_forks_share_the_past_and_part_after_it(transformer: WanTransformer3DModel) -> None:
    shared, text = draw(2 * CHUNK)
    own, _ = draw(2 * CHUNK, batch=3)
    videos = [torch.cat([shared[:, :, :CHUNK], each[None]], dim=2) for each in own]
    expected = torch.cat([stock(transformer, video, text) for video in videos])
    wan, root = committed(transformer, shared, text)
    rows = wan.cache.rows_used
    branches, texts = wan.cache.fork(root, 3), text.expand(3, -1, -1)
    assert wan.cache.rows_used == rows
    with wan.chunk(branches, CHUNK, commit=True):
        call(transformer, own[:, :, :CHUNK], texts, 0.0)
    with wan.chunk(branches, CHUNK):
        found = call(transformer, own[:, :, CHUNK:], texts, NOISY)
    assert torch.allclose(found, expected, atol=1e-5)


def test_gradients_are_those_of_block_causal_attention(transformer: WanTransformer3DModel) -> None:
    x, text = draw(3 * CHUNK)
    weight = torch.randn(1, CHANNELS, CHUNK, HEIGHT, WIDTH)
    whole = x.clone().requires_grad_()
    (stock(transformer, whole, text) * weight).sum().backward()
    wan, branch = committed(transformer, x, text)
    last = x[:, :, -CHUNK:].clone().requires_grad_()
    with wan.chunk([branch], CHUNK):
        (call(transformer, last, text, NOISY) * weight).sum().backward()
    assert last.grad is not None and whole.grad is not None
    assert torch.allclose(last.grad, whole.grad[:, :, -CHUNK:], atol=1e-5)


def test_gradient_checkpointing_recomputes_the_same_chunk(transformer: WanTransformer3DModel) -> None:
    x, text = draw(2 * CHUNK)
    wan, branch = committed(transformer, x, text)
    grads = []
    for checkpointing in (False, True):
        transformer.train(checkpointing)
        transformer.enable_gradient_checkpointing() if checkpointing else None
        transformer.zero_grad()
        with wan.chunk([branch], CHUNK):
            call(transformer, x[:, :, -CHUNK:], text, NOISY).square().mean().backward()
        grads.append([p.grad.clone() for p in transformer.parameters() if p.grad is not None])
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-6)


def test_a_context_pass_that_fails_leaves_the_branch_as_it_was(transformer: WanTransformer3DModel) -> None:
    x, text = draw(2 * CHUNK)
    wan, branch = committed(transformer, x, text)
    held = wan.cache.length(branch), wan.cache.rows_used
    with pytest.raises(RuntimeError, match="stop"):
        with wan.chunk([branch], CHUNK, commit=True):
            call(transformer, x[:, :, -CHUNK:], text, 0.0)
            raise RuntimeError("stop")
    assert (wan.cache.length(branch), wan.cache.rows_used) == held


def test_what_does_not_fit_is_named(transformer: WanTransformer3DModel) -> None:
    x, text = draw(3 * CHUNK)
    wan, branch = committed(transformer, x, text)
    last = x[:, :, -CHUNK:]
    with pytest.raises(ValueError, match="outside of `chunk`"):
        call(transformer, last, text, NOISY)
    twice = last.expand(2, -1, -1, -1, -1), text.expand(2, -1, -1)
    with (
        pytest.raises(ValueError, match="found 2 rows; accepted: 1, a row a branch$"),
        wan.chunk([branch], CHUNK, commit=True),
    ):
        call(transformer, *twice, 0.0)
    with pytest.raises(ValueError, match="found 1 rows; accepted: 2,.* multiple"), wan.chunk([branch] * 2, CHUNK):
        call(transformer, last, text, NOISY)
    with pytest.raises(ValueError, match="2 frames of 4 tokens; accepted: 2 frames of 6"), wan.chunk([branch], CHUNK):
        call(transformer, last[..., :4], text, NOISY)
    with pytest.raises(ValueError, match="2 frames of 6 tokens; accepted: 3 frames of 6"), wan.chunk([branch], 3):
        call(transformer, last, text, NOISY)
    with pytest.raises(ValueError, match="branches: .* one length"), wan.chunk([branch, wan.cache.new_branch()], CHUNK):
        pass
    with pytest.raises(ValueError, match="one at a time"), wan.chunk([branch], CHUNK), wan.chunk([branch], 1):
        pass
    with pytest.raises(ValueError, match="no call of the transformer"), wan.chunk([branch], CHUNK, commit=True):
        pass
    with pytest.raises(ValueError, match="up to 13; accepted: 12 at most"), wan.chunk([branch], 9):
        pass
    with pytest.raises(ValueError, match="frames: found 0"), wan.chunk([branch], 0):
        pass
    with pytest.raises(ValueError, match="without frames"), wan.recache([wan.cache.new_branch()]):
        pass
    with pytest.raises(ValueError, match="no call of the transformer"), wan.recache([branch]):
        pass
    with pytest.raises(ValueError, match="a sink of 3 in 3 frames"):
        Window(3, sink=3)
    with pytest.raises(ValueError, match=f"branch {branch}"), wan.chunk([branch], CHUNK, attended=[(0, 9)]):
        pass
    with pytest.raises(ValueError, match="transformer: found Linear"):
        ForkedWan(torch.nn.Linear(1, 1), frame_tokens=1, frames=1)
