"""The Wan VAE as a stream against diffusers' decode, its forks, its files and its sizes."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from tempact.errors import UserError
from tempact.models.wan import vae_decoder
from tempact.models.wan.checkpoints.files import EDGE_BYTES, fingerprint
from tempact.models.wan.codec import DecoderState, HostFrames, WanCodec, pixel_frames, to_bytes
from tempact.models.wan.vae import load_codec, load_vae
from tempact.models.wan.vae_decoder import DecodeOptions, WanDecoder

CPU = torch.device("cpu")
CHANNELS_LAST = DecodeOptions(channels_last=True, latents_per_call=3)
FULL_SIZE = (60, 104)


def make_vae(width: int = 8, dtype: torch.dtype = torch.float32) -> AutoencoderKLWan:
    """A VAE of Wan2.1's architecture whose norms and biases are not what they start as."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=width).eval()
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.normal_(parameter, 1.0, 0.3)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    return vae.to(dtype)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    return make_vae()


@torch.no_grad()
def whole(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """diffusers' own decode of normalised latents, [-1, 1]."""
    mean, std = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return vae.decode((latents * std + mean).to(vae.dtype)).sample


def streamed(decoder: WanDecoder, latents: torch.Tensor, calls: list[int]) -> torch.Tensor:
    states = [DecoderState() for _ in latents]
    return torch.cat([decoder.pixels(states, part) for part in latents.split(calls, dim=2)], dim=2)


def alone(decoder: WanCodec, videos: torch.Tensor) -> torch.Tensor:
    """Each video from its start, by itself."""
    return torch.cat([decoder.decode_chunk([decoder.start()], video[None]) for video in videos])


def test_a_stream_has_the_bits_of_diffusers_decode(vae: AutoencoderKLWan) -> None:
    latents = torch.randn(2, 16, 5, 4, 6)
    expected = whole(vae, latents)
    assert expected.shape == (2, 3, 17, 32, 48) and 0.2 < expected.std() < 0.9
    assert torch.equal(streamed(WanDecoder(vae, DecodeOptions()), latents, [1] * 5), expected)
    decoder, states = WanDecoder(vae, DecodeOptions()), [DecoderState(), DecoderState()]
    chunks = [decoder.decode_chunk(states, part) for part in latents.split([2, 3], dim=2)]
    assert torch.equal(torch.cat(chunks, dim=1), to_bytes(expected).transpose(1, 2))
    assert [chunk.shape[1] for chunk in chunks] == [5, 12]


def test_forks_share_memory_and_go_their_own_ways(vae: AutoencoderKLWan) -> None:
    decoder = WanDecoder(vae, DecodeOptions())
    videos = torch.randn(3, 16, 4, 4, 4)
    videos[:, :, :2] = videos[:1, :, :2]
    root = DecoderState()
    shared = torch.cat([decoder.pixels([root], videos[:1, :, at : at + 1]) for at in range(2)], dim=2)
    before = [slot.clone() for slot in root.slots]
    forks = root.fork(3)
    for fork in forks:
        pointers = [slot.data_ptr() for slot in fork.slots]
        assert pointers == [slot.data_ptr() for slot in root.slots]
    for video, fork in zip(videos, forks, strict=True):
        own = [decoder.pixels([fork], video[None, :, at : at + 1]) for at in (2, 3)]
        assert torch.equal(torch.cat([shared, *own], dim=2), whole(vae, video[None]))
    assert root.latents == 2 and forks[0].latents == 4
    assert all(torch.equal(a, b) for a, b in zip(before, root.slots, strict=True))


@pytest.mark.parametrize("fork_frames", [[3, 4], [0, 5]])
def test_continuations_of_a_plan_equal_videos_of_their_own(
    vae: AutoencoderKLWan, fork_frames: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.randn(2, 3, 16, 5, 2, 2)
    for p, fork in enumerate(fork_frames):
        latents[p, :, :, :fork] = latents[p, :1, :, :fork]
    decoder = WanDecoder(vae, DecodeOptions())
    work: list[int] = []
    inner = decoder.pixels

    def counted(states: list[DecoderState], part: torch.Tensor) -> torch.Tensor:
        work.append(len(states) * part.shape[2])
        return inner(states, part)

    monkeypatch.setattr(decoder, "pixels", counted)
    together = decoder.decode_forked(latents, fork_frames)
    assert sum(work) == sum(fork + 3 * (5 - fork) for fork in fork_frames)
    assert together.shape == (2, 3, 17, 3, 16, 16)
    single = alone(decoder, latents.flatten(0, 1)).view_as(together)
    # a convolution over several videos sums in another order
    assert (together.int() - single.int()).abs().max() <= 1
    monkeypatch.setattr(vae_decoder, "CALL_ELEMENTS", decoder.elements_per_position * 4)
    assert decoder.call_size((2, 2)) == (1, 1)
    assert torch.equal(decoder.decode_forked(latents, fork_frames), single)


@pytest.mark.parametrize("calls", [[1, 3, 1], [1, 1, 1, 1, 1]])
def test_channels_last_and_several_latents_a_call_change_rounding_only(calls: list[int]) -> None:
    latents = torch.randn(2, 16, 5, 4, 6)
    expected = whole(make_vae(), latents)
    for options in (DecodeOptions(latents_per_call=3), CHANNELS_LAST):
        got = streamed(WanDecoder(make_vae(), options), latents, calls)
        assert (got - expected).abs().max() < 2e-5, options


def test_half_precision_is_no_worse_than_diffusers() -> None:
    latents = torch.randn(1, 16, 4, 6, 6)
    exact = whole(make_vae(), latents)
    half = make_vae(dtype=torch.bfloat16)
    stock = (whole(half, latents).float() - exact).square().mean().sqrt()
    for options in (DecodeOptions(), CHANNELS_LAST):
        vae = make_vae(dtype=torch.bfloat16)
        ours = streamed(WanDecoder(vae, options), latents, [1, 1, 1, 1] if not options.channels_last else [1, 3])
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - exact).square().mean().sqrt() < 1.1 * stock, options


def test_input_channels_are_filled_up_with_zeros() -> None:
    """Widths 8 to 32 in steps of 12: 8 would need half as many more, 16 and 32 get 24 and 36."""
    latents = torch.randn(2, 16, 4, 4, 6)
    expected = whole(make_vae(), latents)
    decoder = WanDecoder(make_vae(), DecodeOptions(channels_last=True, input_step=12, latents_per_call=3))
    widths = {conv.in_channels: weight.shape[1] for conv, weight in decoder.filled.items()}
    assert widths == {8: 12, 16: 24, 32: 36} and decoder.head[0].shape[:2] == (8, 8)
    assert (streamed(decoder, latents, [1, 3]) - expected).abs().max() < 2e-5
    assert not WanDecoder(make_vae(), DecodeOptions(channels_last=True, input_step=64)).filled


def test_state_and_largest_tensor_at_full_size() -> None:
    """docs/backbones.md section 5: 33 slots of which 32 are used, 944 M elements a stream."""
    with torch.device("meta"):
        full = AutoencoderKLWan()
        latent = torch.empty(1, 16, 1, *FULL_SIZE)
    decoder, state = WanDecoder(full, DecodeOptions()), DecoderState()
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    for latents in (1, 2):
        with Largest():
            out = decoder.pixels([state], latent)
        assert out.shape == (1, 3, 1 if latents == 1 else 4, 480, 832)
    assert len(state.slots) == 32 and state.elements == 944_286_720
    # the buffers of the last level hold two frames more than the new ones: 96 channels of 6 frames
    assert largest == decoder.elements_per_position * 60 * 104 == 49_152 * 60 * 104
    fast = WanDecoder(full, DecodeOptions(latents_per_call=3))
    assert fast.call_size(FULL_SIZE) == (3, 1) and fast.call_size((90, 160)) == (1, 1)


def test_pixel_frames_and_bytes() -> None:
    assert [pixel_frames(n) for n in (0, 1, 2, 3, 21, 30, 60)] == [0, 1, 5, 9, 81, 117, 237]
    pixels = torch.tensor([-1.2, -1.0, 0.0, 0.999, 1.0, 1.7, -1 + 2 * 0.6 / 255, -1 + 2 * 0.4 / 255])
    assert to_bytes(pixels).tolist() == [0, 0, 128, 255, 255, 255, 1, 0]


def test_codec_has_wans_sizes_and_refuses_others(vae: AutoencoderKLWan) -> None:
    codec = WanDecoder(vae, DecodeOptions())
    assert codec.latent_size(480, 832) == FULL_SIZE and codec.pixel_frames(21) == 81
    assert (codec.latent_channels, codec.fps) == (16, 16.0)
    for call, message in (
        (lambda: codec.latent_size(488, 832), "executor.video_size: found 488x832; accepted: positive multiples of 16"),
        (lambda: WanDecoder(AutoencoderKLWan(base_dim=8, is_residual=True)), "vae: found is_residual True"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def original_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' names to those of Wan's own release, by the map of docs/backbones.md section 5."""
    parts = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    parts["conv_shortcut"] = "shortcut"
    upsamples = {("resnets", up, i): 4 * up + i for up in range(4) for i in range(3)}
    upsamples |= {("upsamplers", up, 0): 4 * up + 3 for up in range(3)}
    top = {"quant_conv": "conv1", "post_quant_conv": "conv2"}
    out = {}
    for name, tensor in state.items():
        words = name.split(".")
        tail = [parts.get(word, word) for word in words]
        if words[0] in top:
            renamed = [top[words[0]], *words[1:]]
        elif words[1] in ("conv_in", "norm_out", "conv_out"):
            renamed = [words[0], {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}[words[1]], *words[2:]]
        elif words[1] == "mid_block":
            place = 2 * int(words[3]) if words[2] == "resnets" else 1
            renamed = [words[0], "middle", str(place), *tail[4:]]
        elif words[1] == "down_blocks":
            renamed = [words[0], "downsamples", *tail[2:]]
        else:
            place = upsamples[words[3], int(words[2]), int(words[4])]
            renamed = [words[0], "upsamples", str(place), *tail[5:]]
        out[".".join(renamed)] = tensor
    return out


@pytest.mark.parametrize("layout", ["diffusers", "pipeline", "release", "file"])
def test_every_published_layout_gives_the_same_weights(vae: AutoencoderKLWan, tmp_path: Path, layout: str) -> None:
    state = vae.state_dict()
    original = original_names(state)
    assert len(original) == len(state) and "decoder.upsamples.3.time_conv.weight" in original
    path = tmp_path
    if layout == "diffusers":
        vae.save_pretrained(tmp_path)
    elif layout == "pipeline":
        vae.save_pretrained(tmp_path / "vae")
    elif layout == "release":
        torch.save(original, tmp_path / "Wan2.1_VAE.pth")
    else:
        path = tmp_path / "lightvae.safetensors"
        save_file({name: tensor.clone() for name, tensor in original.items()}, path)
    loaded = load_vae(path, torch.float32, CPU)
    assert loaded.config.base_dim == 8
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    latents = torch.randn(1, 16, 2, 2, 2)
    codec = load_codec(path, torch.float32, CPU)
    assert torch.equal(alone(codec, latents), to_bytes(whole(vae, latents)).transpose(1, 2))


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("executed",)


def test_bad_files_are_refused_in_one_line(vae: AutoencoderKLWan, tmp_path: Path) -> None:
    original = original_names(vae.state_dict())
    path = tmp_path / "Wan2.1_VAE.pth"

    def refused(message: str, where: Path = path) -> None:
        with pytest.raises(UserError, match=message) as error:
            load_vae(where, torch.float32, CPU)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)

    refused("found no VAE in this folder", tmp_path)
    refused("found no file")
    torch.save(original, path)
    whole_file = path.read_bytes()
    path.write_bytes(whole_file[: len(whole_file) // 2])
    refused("damaged or cut-off")
    path.write_bytes(pickle.dumps({"decoder.conv1.weight": Harmful()}, protocol=2))
    refused("not plain tensors")
    torch.save([1, 2], path)
    refused("found list; accepted: tensors by name")
    torch.save({"model": torch.zeros(2)}, path)
    refused("found no 'encoder.conv_in.weight'; accepted: the weights of Wan2.1's VAE")
    left = original.pop("decoder.middle.0.residual.0.gamma")
    torch.save(original | {"decoder.head.0.gamma": torch.ones(9, 1, 1, 1), "conv1.other": left}, path)
    refused(
        r"1 tensors missing \(decoder.mid_block.resnets.0.norm1.gamma\); 1 tensors extra \(.*\); 1 tensors of another "
        r"shape \(decoder.norm_out.gamma \(9, 1, 1, 1\) for \(8, 1, 1, 1\)\)"
    )
    vae.save_pretrained(tmp_path / "vae")
    config = tmp_path / "vae" / "config.json"
    config.write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    refused("found _class_name 'AutoencoderKL'", tmp_path)
    config.write_text("{")
    refused("cannot be read .*; accepted: a JSON object", tmp_path)


def test_fingerprints_tell_files_apart(tmp_path: Path) -> None:
    size = 3 * EDGE_BYTES
    seen = set()
    for name, at, length in (("a", 0, size), ("a", size - 1, size), ("a", 0, size - 1), ("b", 0, size)):
        data = bytearray(length)
        data[at] = 1
        path = tmp_path / name
        path.write_bytes(data)
        seen.add(fingerprint([path]))
    assert len(seen) == 4


def test_frames_for_the_host_on_a_cpu_are_there_at_once() -> None:
    host = HostFrames((2, 3), CPU)
    host.put((1, slice(0, 2)), torch.tensor([7, 8], dtype=torch.uint8))
    host.put((1, slice(2, 3)), torch.tensor([9], dtype=torch.uint8))
    assert host.wait()[1].tolist() == [7, 8, 9]


@pytest.mark.gpu
def test_frames_leave_a_gpu_without_waiting_for_it() -> None:
    device = torch.device("cuda")
    host = HostFrames((4, 1024), device)
    source = torch.arange(1024, device=device).remainder(256).to(torch.uint8)
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)  # some tenths of a second of work in front of the copies
    for row in range(4):
        host.put((row,), source)
    assert not host.done.query(), "put waited for the device"
    assert host.frames.is_pinned() and torch.equal(host.wait(), source.cpu().expand(4, -1))


@pytest.mark.gpu
def test_the_decode_on_a_gpu_equals_the_plain_one() -> None:
    device = torch.device("cuda")
    latents = torch.randn(2, 16, 5, 8, 12)
    exact = whole(make_vae(16), latents)
    stock = make_vae(16, torch.bfloat16).to(device)
    bound = (whole(stock, latents.to(device)).float().cpu() - exact).square().mean().sqrt()
    decoder = WanDecoder(make_vae(16, torch.bfloat16).to(device))
    assert decoder.options == DecodeOptions(channels_last=True, input_step=64, latents_per_call=3)
    got = streamed(decoder, latents.to(device), [1, 3, 1]).float().cpu()
    assert (got - exact).square().mean().sqrt() < 1.1 * bound
    forks = decoder.decode_forked(latents.to(device)[:, None], [2, 3])
    assert forks.is_pinned() and (forks[:, 0].int() - to_bytes(got).transpose(1, 2).int()).abs().max() <= 2
