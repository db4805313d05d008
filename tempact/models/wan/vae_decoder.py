"""The decoder of diffusers' `AutoencoderKLWan` as a stream.

diffusers' modules hold the weights; the forward pass is written for a GPU: each causal convolution reads one buffer
[past, new frames] that the norm before it writes in place, norms add biases and residuals (`csrc_triton.feature_maps`),
and nothing is padded in time or cloned but the two frames that a convolution remembers.
Source: docs/backbones.md section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock
from torch import Tensor, nn

from csrc_triton.feature_maps import enlarge, norm_silu
from tempact.errors import UserError
from tempact.models.wan.codec import LATENT_STRIDE, DecoderState, WanCodec

MEMORY = 2  # frames that a causal convolution looks back
# numbers of the largest tensor in one call: 3 latent frames at 480x832; with it the workspace stays at a few GiB, and
# under 2**31, where cuDNN's kernels stop
CALL_ELEMENTS = 2**30


@dataclass(frozen=True)
class DecodeOptions:
    """Memory format and batching of the decoder.

    channels_last: feature maps and weights in channels-last memory, which cuDNN's tensor-core kernels read and write.
    input_step: in channels-last memory, input channels of causal convolutions are filled up with zeros to the next
    multiple of this number, if that adds at most half as many. latents_per_call: latent frames in one call. With one
    latent frame a call and plain memory, the result has the bits of diffusers' decode.
    """

    channels_last: bool = False
    input_step: int = 1
    latents_per_call: int = 1

    @classmethod
    def of(cls, device: torch.device) -> DecodeOptions:
        """The fastest options on a GPU, those with diffusers' bits elsewhere."""
        # Hopper's kernels take 64 channels at a time; for 96 of them cuDNN takes one of Ampere's, at half the speed
        return cls(channels_last=True, input_step=64, latents_per_call=3) if device.type == "cuda" else cls()


Fill = Callable[[Tensor], object]  # writes the new frames of a convolution into its buffer


class _Stream(NamedTuple):
    """A feature map x + update + bias, added by the pass that reads it; bias [C]."""

    x: Tensor
    update: Tensor | None = None
    bias: Tensor | None = None


class WanDecoder(WanCodec):
    """The decoder of a VAE as a codec.

    If the options ask for it, the module's weights change their memory format, and nothing else.
    Raises UserError for a VAE of another family.
    """

    def __init__(self, vae: AutoencoderKLWan, options: DecodeOptions | None = None):
        config = vae.config
        if config.is_residual or config.patch_size is not None or config.z_dim != len(config.latents_mean):
            raise UserError(
                f"vae: found is_residual {config.is_residual}, patch_size {config.patch_size}, z_dim {config.z_dim}; "
                f"accepted: Wan2.1's VAE (False, None, {len(config.latents_mean)})"
            )
        self.vae, self.decoder = vae.requires_grad_(False), vae.decoder
        weight = vae.post_quant_conv.weight
        self.options = options = options or DecodeOptions.of(weight.device)
        assert options.channels_last or options.input_step == 1, "channels are filled up in channels-last memory only"
        self.latents_per_call = options.latents_per_call
        shape = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(config.latents_mean, device=weight.device).view(shape)
        self.std = torch.tensor(config.latents_std, device=weight.device).view(shape)
        # the biases that a residual block's last convolution and its shortcut leave to one sum
        self.block_bias: dict[nn.Module, Tensor] = {}
        self.head = (self.decoder.conv_out.weight, self.decoder.conv_out.bias)
        self.filled: dict[nn.Module, Tensor] = {}  # weights of more input channels than the module has
        if options.channels_last:
            self._to_channels_last()

    def _to_channels_last(self) -> None:
        for module in self.decoder.modules():
            if isinstance(module, nn.Conv3d | nn.Conv2d):
                last = torch.channels_last_3d if isinstance(module, nn.Conv3d) else torch.channels_last
                module.weight.data = module.weight.data.contiguous(memory_format=last)
                if isinstance(module, nn.Conv3d) and module.kernel_size[0] > 1 and module is not self.decoder.conv_out:
                    self._fill_up(module)
            if isinstance(module, WanResidualBlock):
                biases = [conv.bias.float() for conv in (module.conv2, module.conv_shortcut) if hasattr(conv, "bias")]
                self.block_bias[module] = nn.Parameter(torch.stack(biases).sum(0), requires_grad=False)
        # tensor-core kernels write channels by eights: with three of them cuDNN takes a slow way
        weight, bias = self.head
        padded = F.pad(weight, (0, 0) * 4 + (0, -len(weight) % 8)).contiguous(memory_format=torch.channels_last_3d)
        self.head = (padded, bias)

    def _fill_up(self, conv: nn.Conv3d) -> None:
        more = -conv.in_channels % self.options.input_step
        if 0 < 2 * more <= conv.in_channels:
            wide = F.pad(conv.weight, (0, 0) * 3 + (0, more)).contiguous(memory_format=torch.channels_last_3d)
            self.filled[conv] = nn.Parameter(wide, requires_grad=False)

    def videos_per_call(self, latents: int, size: tuple[int, int]) -> int:
        return CALL_ELEMENTS // (latents * size[0] * size[1] * self.elements_per_position)

    @property
    def elements_per_position(self) -> int:
        """Numbers of the largest feature map for one position of one latent frame."""
        largest, area, frames = 1, 1, 1
        for block in self.decoder.up_blocks:
            largest = max(largest, area * frames * max(block.resnets[0].in_dim, block.resnets[-1].out_dim))
            if block.upsamplers is not None:
                frames *= 2 if block.upsamplers[0].mode == "upsample3d" else 1
                area *= 4
                largest = max(largest, area * frames * block.resnets[-1].out_dim)
        return largest

    @torch.no_grad()
    def pixels(self, states: Sequence[DecoderState], latents: Tensor) -> Tensor:
        """See `WanCodec.pixels`; in the VAE's dtype."""
        first = states[0].latents == 0
        assert not first or latents.shape[2] == 1, "the first latent frame comes alone"
        weight = self.vae.post_quant_conv.weight
        x = (latents.float() * self.std + self.mean).to(weight.dtype)
        x = F.conv3d(x, weight, self.vae.post_quant_conv.bias)
        walk = _Walk(self, states, first)
        out = walk.decode(x)
        expected = latents.shape[2] * (1 if first else LATENT_STRIDE)
        assert out.shape[2] == expected, (out.shape, expected)
        for i, state in enumerate(states):
            state.slots = [None if kept is None else kept[i] for kept in walk.kept]
            state.latents += latents.shape[2]
        return out


class _Walk:
    """Forward pass of a few latent frames; `kept` collects the frames that each convolution remembers."""

    def __init__(self, decoder: WanDecoder, states: Sequence[DecoderState], first: bool):
        self.states, self.first = states, first
        self.module, self.head = decoder.decoder, decoder.head
        self.block_bias, self.filled, self.options = decoder.block_bias, decoder.filled, decoder.options
        self.kept: list[Tensor | None] = []

    def decode(self, x: Tensor) -> Tensor:
        """Un-normalised latents [b, C, n, H, W] to pixels [b, 3, T, 8H, 8W], clamped."""
        module = self.module
        stream = self._convolved(module.conv_in, x, lambda out: _copy_into(out, x))
        stream = self._resnet(module.mid_block.resnets[0], stream)
        for attention, resnet in zip(module.mid_block.attentions, module.mid_block.resnets[1:], strict=True):
            stream = self._resnet(resnet, _Stream(self._ordered(attention(self._joined(stream)))))
        for block in module.up_blocks:
            for resnet in block.resnets:
                stream = self._resnet(resnet, stream)
            if block.upsamplers is not None:
                stream = self._upsampled(block.upsamplers[0], stream)
        _, fill = self._norm_silu(module.norm_out, stream)
        weight, bias = self.head
        if not self.options.channels_last:
            return self._convolve(weight, bias, stream.x, fill).clamp(-1.0, 1.0)
        out = self._convolve(weight, None, stream.x, fill)[:, :3]
        return (out.float() + bias.view(1, -1, 1, 1, 1)).clamp(-1.0, 1.0).to(out.dtype)

    def _ordered(self, x: Tensor) -> Tensor:
        """x in channels-last memory if the options ask for it; copied only if a CPU's convolution chose otherwise."""
        return x.contiguous(memory_format=torch.channels_last_3d) if self.options.channels_last else x

    def _empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        last = torch.channels_last_3d if self.options.channels_last else torch.contiguous_format
        return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=last)

    def _convolve(self, weight: Tensor, bias: Tensor | None, like: Tensor, fill: Fill) -> Tensor:
        """A causal convolution over the remembered frames and the new ones, of the shape of `like`, that `fill` writes.

        The buffer has as many channels as `weight` takes; those that `like` has not are zeros.
        """
        b, channels, t, height, width = like.shape
        buffer = self._empty((b, weight.shape[1], MEMORY + t, height, width), like)
        for own, state in zip(buffer, self.states, strict=True):
            past = state.slots[len(self.kept)] if state.slots else None
            known = 0 if past is None else channels
            own[known:, :MEMORY].zero_()
            if past is not None:
                own[:known, :MEMORY].copy_(past)
        fill(buffer[:, :, MEMORY:])
        # a slice of the buffer would keep all of it alive
        self.kept.append(self._empty((b, channels, MEMORY, height, width), like).copy_(buffer[:, :channels, -MEMORY:]))
        rim = weight.shape[-1] // 2
        return self._ordered(F.conv3d(buffer, weight, bias, padding=(0, rim, rim)))

    def _convolved(self, conv: nn.Conv3d, like: Tensor, fill: Fill) -> _Stream:
        if self.options.channels_last:
            return _Stream(self._convolve(self.filled.get(conv, conv.weight), None, like, fill), None, conv.bias)
        return _Stream(self._convolve(conv.weight, conv.bias, like, fill))

    def _joined(self, stream: _Stream, out: Tensor | None = None) -> Tensor:
        """The stream's sum as a tensor, in `out` if it is given."""
        if not self.options.channels_last:
            total = stream.x if stream.update is None else stream.update + stream.x
            return total if out is None else out.copy_(total)
        if out is None:
            if stream.update is None and stream.bias is None:
                return stream.x
            out = self._empty(stream.x.shape, stream.x)
        update = None if stream.update is None else positions(stream.update)
        norm_silu(positions(stream.x), None, out=positions(out), update=update, bias=stream.bias)
        return out

    def _norm_silu(self, norm: Any, stream: _Stream, *, keep_sum: bool = True) -> tuple[Tensor, Fill]:
        """The stream's sum, and a function that writes SiLU(norm(sum)).

        The sum may be complete only after that function has run; without `keep_sum`, only its shape counts.
        """
        if not self.options.channels_last:
            joined = self._joined(stream)
            return joined, lambda out: out.copy_(F.silu(norm(joined)))
        x, update = stream.x, None if stream.update is None else positions(stream.update)
        summed = keep_sum and not (stream.update is None and stream.bias is None)
        total = self._empty(x.shape, x) if summed else x
        return total, lambda out: norm_silu(
            positions(x), norm.gamma.view(-1), out=positions(out), update=update, bias=stream.bias,
            total=positions(total) if summed else None,
        )  # fmt: skip

    def _resnet(self, block: Any, stream: _Stream) -> _Stream:
        """(norm, SiLU, convolution) twice, plus the input, through a 1x1x1 convolution where widths differ."""
        x, fill = self._norm_silu(block.norm1, stream)
        inner = self._convolved(block.conv1, x, fill)
        outer = self._convolved(block.conv2, *self._norm_silu(block.norm2, inner, keep_sum=False))
        shortcut = block.conv_shortcut
        if self.options.channels_last:
            skip = self._ordered(F.conv3d(x, shortcut.weight)) if isinstance(shortcut, nn.Conv3d) else x
            return _Stream(skip, outer.x, self.block_bias[block])
        return _Stream(shortcut(x), outer.x)

    def _upsampled(self, resample: Any, stream: _Stream) -> _Stream:
        """Twice the rows and columns, and twice the frames in "upsample3d" behind a video's first latent frame."""
        parts, b = 1, stream.x.shape[0]
        if resample.mode == "upsample3d":
            if self.first:
                self.kept.append(None)
            else:
                before, parts = stream, 2
                stream = self._convolved(resample.time_conv, before.x, lambda out: self._joined(before, out))
        conv = resample.resample[1]
        if self.options.channels_last:
            update = None if stream.update is None else maps(stream.update)
            large = enlarge(maps(stream.x), update=update, bias=stream.bias, parts=parts)
            out = F.conv2d(large.permute(0, 3, 1, 2), conv.weight, None, padding=1)
            return _Stream(self._ordered(out.unflatten(0, (b, -1)).transpose(1, 2)), None, conv.bias)
        out = F.conv2d(_enlarge_planes(self._joined(stream), parts), conv.weight, conv.bias, padding=1)
        return _Stream(out.unflatten(0, (b, -1)).transpose(1, 2))


def _copy_into(out: Tensor, x: Tensor) -> None:
    out[:, : x.shape[1]].copy_(x)
    out[:, x.shape[1] :].zero_()


def positions(x: Tensor) -> Tensor:
    """[b, C, T, H, W] in channels-last memory seen as [b, T*H*W, C]; T may be a slice of a longer buffer."""
    b, channels, t, height, width = x.shape
    return x.permute(0, 2, 3, 4, 1).view(b, t * height * width, channels)


def maps(x: Tensor) -> Tensor:
    """The same seen as [b*T, H, W, C]; T must not be a slice."""
    b, channels, t, height, width = x.shape
    return x.permute(0, 2, 3, 4, 1).view(b * t, height, width, channels)


def _enlarge_planes(x: Tensor, parts: int) -> Tensor:
    """Nearest-neighbour x2 in plain memory: [b, parts*C, T, H, W] to [b*T*parts, C, 2H, 2W], as `enlarge`."""
    b, channels, t, height, width = x.shape
    split = x.reshape(b, parts, channels // parts, t, height, 1, width, 1).permute(0, 3, 1, 2, 4, 5, 6, 7)
    spread = split.expand(-1, -1, -1, -1, -1, 2, -1, 2)
    return spread.reshape(b * t * parts, channels // parts, 2 * height, 2 * width)
