"""Tiny decoders against a frame-by-frame reference, as a codec, and their files."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tempact.errors import UserError
from tempact.models.wan.codec import DecoderState, to_bytes
from tempact.models.wan.vae import TinyDecoder, TinyNetwork, load_codec, load_tiny_decoder

CPU = torch.device("cpu")
MEAN = [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508]
MEAN += [0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]
STD = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743]
STD += [3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]
MEMORY_LAYERS = (3, 4, 5, 9, 10, 11, 15, 16, 17)


@cache
def network() -> TinyNetwork:
    torch.manual_seed(0)
    net = TinyNetwork().eval()
    with torch.no_grad():  # pixels spread over [0, 1], few of them clamped
        net.decoder[22].weight *= 40
        net.decoder[22].bias.fill_(0.5)
    return net


Weights = dict[str, torch.Tensor]


def reference(weights: Weights, latents: torch.Tensor) -> torch.Tensor:
    """The published network one frame at a time, by depth first: latents [16, n, h, w] to [3, 4n - 3, 8h, 8w]."""
    past: dict[int, torch.Tensor] = {}
    frames: list[torch.Tensor] = []

    def conv(x: torch.Tensor, name: str, padding: int = 1) -> torch.Tensor:
        return F.conv2d(x, weights[f"decoder.{name}.weight"], weights.get(f"decoder.{name}.bias"), padding=padding)

    def walk(x: torch.Tensor, layer: int) -> None:
        if layer == 23:
            frames.append(x)
        elif layer == 0:
            walk(3 * torch.tanh(x / 3), 1)
        elif layer in MEMORY_LAYERS:
            h = torch.cat([x, past.get(layer, torch.zeros_like(x))], dim=1)
            past[layer] = x
            for i in (0, 2):
                h = conv(h, f"{layer}.conv.{i}").relu()
            walk((conv(h, f"{layer}.conv.4") + x).relu(), layer + 1)
        elif layer in (6, 12, 18):
            walk(x.repeat_interleave(2, 2).repeat_interleave(2, 3), layer + 1)
        elif layer in (7, 13, 19):
            for part in conv(x, f"{layer}.conv", 0).chunk(1 if layer == 7 else 2, dim=1):
                walk(part, layer + 1)
        elif layer in (2, 21):
            walk(x.relu(), layer + 1)
        else:
            walk(conv(x, str(layer)), layer + 1)

    for i in range(latents.shape[1]):
        walk(latents[None, :, i], 0)
    return torch.cat(frames[3:]).transpose(0, 1).clamp(0, 1) * 2 - 1


def streamed(decoder: TinyDecoder, latents: torch.Tensor, calls: list[int]) -> torch.Tensor:
    states = [DecoderState() for _ in latents]
    return torch.cat([decoder.pixels(states, part) for part in latents.split(calls, dim=2)], dim=2)


@torch.no_grad()
def test_streams_equal_the_network_frame_by_frame() -> None:
    latents = torch.randn(2, 16, 4, 2, 3)
    expected = torch.stack([reference(network().state_dict(), video) for video in latents])
    assert expected.shape == (2, 3, 13, 16, 24) and 0.2 < expected.std() < 0.9
    decoder = TinyDecoder(network(), scaled=False)
    for calls in ([1, 3], [1, 1, 2]):
        assert (streamed(decoder, latents, calls) - expected).abs().max() < 2e-5
    # alone and one latent frame at a time the sums are the reference's
    assert (streamed(decoder, latents[:1], [1] * 4) - expected[:1]).abs().max() < 5e-6


@torch.no_grad()
def test_lighttae_takes_latents_with_mean_and_deviation() -> None:
    latents = torch.randn(1, 16, 2, 2, 2)
    scaled = latents * torch.tensor(STD).view(1, 16, 1, 1, 1) + torch.tensor(MEAN).view(1, 16, 1, 1, 1)
    got = streamed(TinyDecoder(network(), scaled=True), latents, [1, 1])
    expected = streamed(TinyDecoder(network(), scaled=False), scaled, [1, 1])
    assert (got - expected).abs().max() < 1e-5
    assert (got - streamed(TinyDecoder(network(), scaled=False), latents, [1, 1])).abs().max() > 0.05


def test_a_tiny_decoder_serves_as_codec_with_forks() -> None:
    codec = TinyDecoder(network(), scaled=False, latents_per_call=1)
    latents = torch.randn(1, 2, 16, 3, 2, 2)
    latents[0, 1, :, :2] = latents[0, 0, :, :2]
    frames = codec.decode_forked(latents, [2])
    assert frames.shape == (1, 2, 9, 3, 16, 16)
    alone = codec.decode_chunk([codec.start(), codec.start()], latents[0])
    assert (frames[0].int() - alone.int()).abs().max() <= 1
    state = codec.start()
    codec.decode_chunk([state], latents[0, :1])
    # 34 M elements at 60x104 (docs/backbones.md section 5)
    assert state.elements * (60 * 104) // 4 == 3 * (256 + 4 * 128 + 16 * 64) * 60 * 104 == 33_546_240


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[3, 3], [1, 2, 3], [2, 4]])
def test_a_file_becomes_the_codec_of_generated_videos(tmp_path: Path, chunks: list[int]) -> None:
    """Chunk by chunk as the whole video and as the reference, with the VAE's sizes, and without a VAE."""
    path = tmp_path / "taew2_1.pth"
    torch.save(weights_with_encoder(), path)
    codec = load_codec(tmp_path / "no VAE here", torch.float32, CPU, decoder=path)
    assert (codec.latent_channels, codec.fps, codec.latent_size(480, 832)) == (16, 16.0, (60, 104))
    latents, states = torch.randn(1, 16, 6, 2, 3), [codec.start()]
    parts = [codec.decode_chunk(states, part) for part in latents.split(chunks, dim=2)]
    ends = [sum(chunks[: i + 1]) for i in range(len(chunks))]
    assert [sum(part.shape[1] for part in parts[: i + 1]) for i in range(len(parts))] == list(
        map(codec.pixel_frames, ends)
    )
    streamed, whole = torch.cat(parts, dim=1), codec.decode_chunk([codec.start()], latents)
    expected = to_bytes(reference(network().state_dict(), latents[0])).transpose(0, 1)
    for frames in (streamed[0], whole[0]):
        assert frames.shape == (21, 3, 16, 24) and (frames.int() - expected.int()).abs().max() <= 1
    assert (streamed != whole).float().mean() < 1e-3  # sums over other numbers of frames


def weights_with_encoder() -> Weights:
    return {**network().state_dict(), "encoder.0.weight": torch.zeros(64, 3, 3, 3)}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_published_files_load_whatever_encoder_they_hold(tmp_path: Path, suffix: str) -> None:
    weights = weights_with_encoder()
    # taew2_1.pth may hold two frames where the network makes one; the last one counts
    grown = weights["decoder.7.conv.weight"]
    weights["decoder.7.conv.weight"] = torch.cat([torch.randn_like(grown), grown])
    path = tmp_path / f"taew2_1{suffix}"
    if suffix == ".pth":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    latents = torch.randn(1, 16, 2, 2, 2)
    for kind, scaled in (("taew2_1", False), ("lighttaew2_1", True)):
        loaded = load_tiny_decoder(path.rename(tmp_path / f"{kind}{suffix}"), torch.float32, CPU)
        path = tmp_path / f"{kind}{suffix}"
        expected = streamed(TinyDecoder(network(), scaled), latents, [1, 1])
        assert torch.equal(streamed(loaded, latents, [1, 1]), expected)


def test_bad_files_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "taew2_1.pth"

    def refused(message: str, path: Path = path) -> None:
        with pytest.raises(UserError, match=message) as error:
            load_codec(tmp_path, torch.float32, CPU, decoder=path)
        assert "\n" not in str(error.value)

    refused("executor.decoder: found .*tae.pth; accepted: .* starts with taew2_1, lighttaew2_1", tmp_path / "tae.pth")
    refused("found no file")
    weights = weights_with_encoder()
    del weights["decoder.22.bias"]
    torch.save({**weights, "decoder.1.weight": torch.zeros(256, 48, 3, 3)}, path)
    refused(r"1 tensors missing \(decoder.22.bias\); 1 tensors of another shape \(decoder.1.weight \(256, 48, 3, 3\)")
    torch.save({"model": weights}, path)
    refused("found entries model; accepted: tensors by name")
    torch.save({"a.weight": torch.zeros(2)}, path)
    refused("64 tensors missing .*1 tensors extra .a.weight.; accepted: the 64 tensors of TinyNetwork")
