"""The transformer against the published sizes and against itself."""

from __future__ import annotations

import math

import torch

from tempact.models.wan.codec import PixelCodec
from tempact.models.wan.text_padding import cut_length
from tempact.models.wan.transformer import ChunkAttention, WanConfig, WanTransformer, timestep_waves

SMALL = WanConfig(
    dim=48, ffn_dim=96, freq_dim=32, text_dim=16, text_len=6, heads=2, layers=2, in_dim=3, out_dim=3, patch=(1, 4, 4)
)


def small(**changes: object) -> WanTransformer:
    torch.manual_seed(0)
    model = WanTransformer(WanConfig(**{**vars(SMALL), **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.double()


def test_full_size_has_the_published_tensors() -> None:
    with torch.device("meta"):
        model = WanTransformer(WanConfig())
    state = model.state_dict()
    assert len(state) == 825
    assert sum(p.numel() for p in model.parameters()) == 1_418_996_800
    shapes = {
        "patch_embedding.weight": (1536, 16, 1, 2, 2),
        "text_embedding.0.weight": (1536, 4096),
        "time_embedding.0.weight": (1536, 256),
        "time_projection.1.weight": (9216, 1536),
        "blocks.29.modulation": (1, 6, 1536),
        "blocks.0.self_attn.norm_q.weight": (1536,),
        "blocks.0.cross_attn.o.bias": (1536,),
        "blocks.0.norm3.bias": (1536,),
        "blocks.0.ffn.0.weight": (8960, 1536),
        "head.modulation": (1, 2, 1536),
        "head.head.weight": (64, 1536),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def test_texts_of_frame_groups_equal_separate_runs() -> None:
    """Two texts a video, each on half of its frames, is what the chunks of pretraining use."""
    model = small()
    x = torch.randn(1, 3, 2, 8, 8).double()
    text = torch.randn(2, 6, 16).double()
    sigma, positions = torch.full((1, 2), 0.7), torch.arange(2)

    class OwnFrame(ChunkAttention):
        def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (t.unflatten(1, (2, -1)).flatten(0, 1).transpose(1, 2) for t in (q, k, v))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return out.transpose(1, 2).unflatten(0, (1, 2)).flatten(1, 2)

    together = model(x, sigma, model.project_text(text), positions, OwnFrame())
    for frame in range(2):
        alone = model(
            x[:, :, frame : frame + 1],
            sigma[:, :1],
            model.project_text(text[frame : frame + 1]),
            positions[frame : frame + 1],
        )
        assert torch.allclose(together[:, :, frame : frame + 1], alone, atol=1e-10)


def test_x0_prediction_is_the_same_network_read_otherwise() -> None:
    velocity, x0 = small(), small(prediction="x0")
    x, sigma = torch.randn(1, 3, 1, 8, 8).double(), torch.full((1, 1), 0.5)
    text = velocity.project_text(torch.randn(1, 6, 16).double())
    raw = velocity(x, sigma, text, torch.arange(1))
    assert torch.allclose(x0(x, sigma, text, torch.arange(1)), (x - raw) / 0.5)


def test_the_timestep_embedding_is_that_of_the_published_code_in_fp64() -> None:
    """10000^(-j / 128) with a constant in fp64: rounding its logarithm to fp32 moves the embedding by 5e-6."""
    sigmas = [1.0, 0.9375, 2.5 / 3, 0.625, 0.0]
    waves = timestep_waves(torch.tensor(sigmas, dtype=torch.float64)[None], 256)
    assert waves.shape == (1, 5, 256) and waves.dtype == torch.float64
    angles = [[1000.0 * sigma / 10_000 ** (j / 128) for j in range(128)] for sigma in sigmas]
    expected = [[*map(math.cos, row), *map(math.sin, row)] for row in angles]
    torch.testing.assert_close(waves[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    # pinned: what a rounded constant gives differs from the sixth digit on
    pinned = [0.5623790762907029, 0.7896147286335048, -0.8390715290764524, 0.9942316442775075]
    torch.testing.assert_close(waves[0, 0, [0, 1, 64, 127]], torch.tensor(pinned, dtype=torch.float64))


def test_timesteps_are_per_frame() -> None:
    model = small()
    x, text = torch.randn(1, 3, 2, 8, 8).double(), None
    text = model.project_text(torch.randn(1, 6, 16).double())

    class Nobody(ChunkAttention):
        def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return q

    a = model(x, torch.tensor([[0.9, 0.1]]), text, torch.arange(2), Nobody())
    b = model(x, torch.tensor([[0.9, 0.8]]), text, torch.arange(2), Nobody())
    assert torch.equal(a[:, :, 0], b[:, :, 0])
    assert not torch.allclose(a[:, :, 1], b[:, :, 1])


def test_texts_cut_behind_their_end_are_attended_as_whole_ones() -> None:
    """Velocities and gradients, of a batch whose longest text has 9 of 40 rows."""
    texts = torch.randn(2, 40, 16).double()
    texts[0, 9:], texts[1, 3:] = 0.0, 0.0
    x, sigma = torch.randn(2, 3, 1, 8, 8).double(), torch.full((2, 1), 0.6)
    results = []
    for rows in (40, cut_length(9, 40), cut_length(9, 40, 16)):
        model = small(text_len=40, text_multiple=16)
        velocity = model(x, sigma, model.project_text(texts[:, :rows]), torch.arange(1))
        velocity.square().sum().backward()
        results.append([velocity, *(parameter.grad for parameter in model.parameters())])
    for cut in results[1:]:
        for whole, other in zip(results[0], cut, strict=True):
            assert torch.allclose(whole, other, rtol=1e-9, atol=1e-9)


def test_pixels_survive_the_codec() -> None:
    frames = torch.randint(0, 256, (2, 4, 3, 8, 8), dtype=torch.uint8)
    codec = PixelCodec()
    latents = (frames.float() / 127.5 - 1.0).transpose(1, 2)
    states = [codec.start(), codec.start()]
    assert torch.equal(codec.decode_chunk(states, latents), frames) and states[1].latents == 4
    forked = codec.decode_forked(latents[:, None].expand(-1, 3, -1, -1, -1, -1), [2, 0])
    assert torch.equal(forked, frames[:, None].expand(-1, 3, -1, -1, -1, -1))
    assert codec.pixel_frames(4) == 4
