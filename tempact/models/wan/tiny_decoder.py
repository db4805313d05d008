"""Tiny decoders for Wan2.1's latents: TAEHV's `taew2_1` and LightX2V's `lighttaew2_1`, decoded as streams.

A few percent of the VAE's work, for previews. As a reward's decoder one may serve only after the rank correlation of
its rewards with those of the full decoder has been reported: `compare`, `Agreement`, `allow_as_reward_decoder`.
Facts: BACKBONES.md section 5.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from tempact.errors import UserError
from tempact.models.wan.checkpoints.files import fill, fingerprint, read_weights
from tempact.models.wan.codec import LATENT_STRIDE, DecoderState
from tempact.models.wan.vae_decoder import CALL_ELEMENTS
from tempact.types import Scored

WIDTHS = (256, 128, 64, 64)  # channels at 1, 2, 4 and 8 times the latents' rows and columns
TIME = (1, 2, 2)  # frames that each of the three enlargements makes of one
MEMORIES = 3  # memory blocks before an enlargement
LATENT_CHANNELS = 16
LATENTS_PER_CALL = 3
KINDS = {"taew2_1": False, "lighttaew2_1": True}  # does the network take latents times std plus mean?


class Squash(nn.Module):
    """Soft clamp to (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Memory(nn.Module):
    """A residual block that also sees the frame before."""

    def __init__(self, width: int):
        super().__init__()
        first, *rest = (nn.Conv2d(width * inputs, width, 3, padding=1) for inputs in (2, 1, 1))
        self.conv = nn.Sequential(first, *(layer for conv in rest for layer in (nn.ReLU(), conv)))

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """x [n, C, H, W] and each frame's predecessor."""
        return F.relu(self.conv(torch.cat([x, past], dim=1)) + x)


class Grow(nn.Module):
    """Every frame becomes `times` frames: [n, C, H, W] to [n*times, C, H, W]."""

    def __init__(self, width: int, times: int):
        super().__init__()
        self.times = times
        self.conv = nn.Conv2d(width, width * times, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).unflatten(1, (self.times, -1)).flatten(0, 1)


class TinyNetwork(nn.Module):
    """The published decoder: names and shapes are the checkpoints', `decoder.0` to `decoder.22`."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [Squash(), nn.Conv2d(LATENT_CHANNELS, WIDTHS[0], 3, padding=1), nn.ReLU()]
        for width, narrower, times in zip(WIDTHS, WIDTHS[1:], TIME, strict=False):
            layers += [Memory(width) for _ in range(MEMORIES)]
            layers += [nn.Upsample(scale_factor=2), Grow(width, times)]
            layers += [nn.Conv2d(width, narrower, 3, padding=1, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(WIDTHS[-1], 3, 3, padding=1))


class TinyDecoder:
    """A tiny decoder as a `StreamDecoder`. `scaled`: the network takes un-normalised latents, as lighttaew2_1 does."""

    def __init__(self, network: TinyNetwork, scaled: bool, source: str = "", latents_per_call: int = LATENTS_PER_CALL):
        self.network, self.scaled, self.source = network.requires_grad_(False), scaled, source
        self.latents_per_call = latents_per_call
        for parameter in network.parameters():
            if parameter.device.type == "cuda" and parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
            self.dtype, self.device = parameter.dtype, parameter.device
        mean, std = _latent_statistics()
        self.mean, self.std = mean.to(self.device), std.to(self.device)

    @classmethod
    def load(cls, path: Path, kind: str, dtype: torch.dtype, device: torch.device) -> TinyDecoder:
        """The decoder in a taew2_1 or lighttaew2_1 file; an encoder in it is left alone.

        `kind` is a name in KINDS: nothing in the files tells the two apart. UserError names what does not fit.
        """
        if kind not in KINDS:
            raise UserError(f"tiny decoder: found kind {kind!r}; accepted: {', '.join(KINDS)}")
        state = {name: tensor for name, tensor in read_weights(path).items() if not name.startswith("encoder.")}
        with torch.device("meta"):
            network = TinyNetwork()
        for i, layer in enumerate(network.decoder):
            name = f"decoder.{i}.conv.weight"
            if isinstance(layer, Grow) and name in state:
                # files of the family may hold more frames than this network makes; its own are the last ones
                state[name] = state[name][-layer.conv.out_channels :]
        fill(network, state, path, dtype, device)
        return cls(network.eval(), KINDS[kind], f"{kind}:{fingerprint([path])}")

    def videos_per_call(self, latents: int, size: tuple[int, int]) -> int:
        """How many videos of `size` (H, W) fit into one call with `latents` frames each; 0 if not even one."""
        frames = latents * math.prod(TIME)
        return CALL_ELEMENTS // (frames * size[0] * size[1] * 64 * WIDTHS[-1])

    @torch.no_grad()
    def pixels(self, states: Sequence[DecoderState], latents: Tensor) -> Tensor:
        """The next frames of B videos; see `StreamDecoder.pixels`."""
        first = states[0].latents == 0
        assert not first or latents.shape[2] == 1, "the first latent frame comes alone"
        x = latents.float()
        if self.scaled:
            x = x * self.std + self.mean
        b, slots = len(states), states[0].slots
        x = x.to(self.dtype).transpose(1, 2).flatten(0, 1)
        kept: list[Tensor] = []
        for layer in self.network.decoder:
            if isinstance(layer, Memory):
                frames = x.unflatten(0, (b, -1))
                if slots:
                    before = torch.stack([_held(state, len(kept)) for state in states])[:, None]
                else:
                    before = torch.zeros_like(frames[:, :1])
                kept.append(frames[:, -1].clone())
                x = layer(x, torch.cat([before, frames[:, :-1]], dim=1).flatten(0, 1))
            else:
                x = layer(x)
        for i, state in enumerate(states):
            state.slots = [slot[i] for slot in kept]
            state.latents += latents.shape[2]
        out = x.unflatten(0, (b, -1)).transpose(1, 2)
        # three frames come before the video's first one
        out = out[:, :, LATENT_STRIDE - 1 :] if first else out
        return out.clamp(0.0, 1.0) * 2.0 - 1.0


def _held(state: DecoderState, slot: int) -> Tensor:
    held = state.slots[slot]
    assert held is not None
    return held


def _latent_statistics() -> tuple[Tensor, Tensor]:
    """Wan2.1's latents_mean and latents_std, [1, 16, 1, 1, 1]: the defaults of diffusers' class."""
    with torch.device("meta"):
        config = AutoencoderKLWan(base_dim=4).config
    shape = (1, -1, 1, 1, 1)
    return torch.tensor(config.latents_mean).view(shape), torch.tensor(config.latents_std).view(shape)


@dataclass(frozen=True)
class Agreement:
    """How a tiny decoder's rewards rank videos as the full decoder's do.

    decoder: kind and fingerprint of the tiny decoder, its `source`. groups, videos: what went in. For each reward the
    mean over groups (continuations of one plan, which training compares) of Spearman's correlation in [-1, 1]; NaN if
    no group had two different scores of both decoders.
    """

    decoder: str
    groups: int
    videos: int
    temporal_following: float
    step_following: float
    aesthetics: float

    def save(self, path: Path) -> None:
        text = json.dumps({key: None if value != value else value for key, value in asdict(self).items()}, indent=2)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Agreement:
        """UserError for a file that is missing or is no such report."""
        names = {field.name for field in fields(cls)}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: found no report of a tiny decoder ({error}); accepted: its JSON file") from error
        if not isinstance(found, dict) or found.keys() != names:
            keys = sorted(found) if isinstance(found, dict) else type(found).__name__
            raise UserError(f"{path}: found {keys}; accepted: a report with {', '.join(sorted(names))}")
        decoder, groups, videos = str(found.pop("decoder")), found.pop("groups"), found.pop("videos")
        correlations = {name: math.nan if value is None else value for name, value in found.items()}
        return cls(decoder, groups, videos, **correlations)


def compare(full: Scored, tiny: Scored, decoder: str) -> Agreement:
    """Rank correlation of the rewards of the same videos, decoded by the full and by a tiny decoder.

    `decoder` is the tiny decoder's `source`. Missing scores (NaN) of either leave their video out.
    """
    videos = full.temporal_following.numel()
    return Agreement(
        decoder,
        len(full.temporal_following),
        videos,
        _mean_spearman(full.temporal_following, tiny.temporal_following),
        _mean_spearman(full.step_following, tiny.step_following),
        _mean_spearman(full.aesthetics, tiny.aesthetics),
    )


def _mean_spearman(a: Tensor, b: Tensor) -> float:
    """Mean over rows [P, N] of Spearman's correlation; NaN entries and rows without two ranks on each side left out."""
    found = []
    for x, y in zip(a.double(), b.double(), strict=True):
        valid = ~(torch.isnan(x) | torch.isnan(y))
        ranks = torch.stack([_ranks(x[valid]), _ranks(y[valid])])
        ranks = ranks - ranks.mean(dim=1, keepdim=True)
        spread = ranks.square().sum(dim=1).prod().sqrt()
        if spread > 0:
            found.append(float((ranks[0] * ranks[1]).sum() / spread))
    return sum(found) / len(found) if found else math.nan


def _ranks(x: Tensor) -> Tensor:
    """Ranks of the entries of x [n], equal ones sharing their mean rank."""
    below = (x[None] < x[:, None]).sum(dim=1)
    equal = (x[None] == x[:, None]).sum(dim=1)
    return below + (equal + 1) / 2.0


def allow_as_reward_decoder(decoder: TinyDecoder, report: Path | None) -> Agreement:
    """The report that lets a tiny decoder serve rewards; UserError if there is none, or it is of another decoder."""
    if report is None:
        raise UserError(
            "tiny decoder: found no report of its rank correlation with the full decoder; accepted as reward decoder: "
            "one whose report is given"
        )
    agreement = Agreement.load(report)
    if not decoder.source or agreement.decoder != decoder.source:
        raise UserError(
            f"{report}: found a report of decoder {agreement.decoder!r}; accepted: one of {decoder.source!r}, the "
            "weights in use"
        )
    return agreement
