"""Published checkpoints of the Wan transformer, read into `WanTransformer`: compared by name, merged, cast.

Paths that can be read:

    Wan2.1-T2V-1.3B/                       Wan's own release: diffusion_pytorch_model*.safetensors, config.json
    Wan2.1-T2V-1.3B-Diffusers/             diffusers: transformer/, or that folder itself
    self_forcing_dmd.pt, ode_init.pt       Self-Forcing
    chunkwise/causal_forcing.pt            Causal-Forcing, and its other files
    longlive_base.pt                       LongLive, with lora.pt as an adapter
    a folder that `python -m tempact.models.wan.checkpoints convert` has written

A file without a config.json must hold Wan2.1-T2V-1.3B or -14B. Source: docs/backbones.md section 4.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import torch
from torch import Tensor, nn

from tempact.config import ENTRIES
from tempact.config import EXECUTOR_PRECISIONS as PRECISIONS
from tempact.errors import UserError
from tempact.models.adapters import ENDING
from tempact.models.wan.checkpoints.files import (
    PICKLES,
    find_weights,
    listed,
    read_manifest,
    read_tensors,
    require_finite,
    require_fit,
)
from tempact.models.wan.checkpoints.lora import Adapter, open_adapter
from tempact.models.wan.checkpoints.names import expected_tensors, in_layout, layout_of, read_config, to_wan, unwrapped
from tempact.models.wan.transformer import WAN_14B, WanConfig, WanTransformer

log = logging.getLogger(__name__)

FP32_MODULES = ("time_embedding", "time_projection", "norm3", "norm_q", "norm_k")
FP32_TABLE = "modulation"
FP8_SCALES = (".scale_weight", ".weight_scale")  # of a linear's weight in fp8
FP8_NOTES = ("scaled_fp8", "comfy_quant", "scale_input", "input_scale")  # beside them: of fp8 products, not of weights


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose tensors are exactly those of a transformer of the sizes `config`.

    entry: name of the model in its file, or in the file that a conversion has read, "" if it has none. tensors: by Wan
    name, on the CPU, mapped from the files where possible; they must not be written to. scales: what a tensor in fp8 is
    multiplied by, one number or one a row.
    """

    source: Path
    files: tuple[Path, ...]
    entry: str
    layout: str
    config: WanConfig
    tensors: dict[str, Tensor]
    scales: dict[str, Tensor]

    def merged(self, adapters: Sequence[Adapter], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """All tensors by Wan name, one at a time, `adapters` added in their order; a tensor that changes is fp32."""
        for name, tensor in self.tensors.items():
            if name in self.scales:
                tensor = tensor.to(device).float() * self.scales[name].to(device).float().view(
                    -1, *[1] * (tensor.ndim - 1)
                )
            module = name.removesuffix(".weight") if name.endswith(".weight") else ""
            for adapter in adapters:
                factor, diff = adapter.factors.get(module), adapter.diffs.get(name)
                # fp64, rounded once: a process that lets fp32 products run as TF32 must not change what is merged
                if factor is not None:
                    down, up = (matrix.to(device, torch.float64).flatten(1) for matrix in (factor.down, factor.up))
                    whole = torch.addmm(tensor.to(device, torch.float64).flatten(1), up, down, alpha=factor.scale)
                    tensor = whole.view(tensor.shape)
                if diff is not None:
                    tensor = tensor.to(device, torch.float64) + diff.to(device, torch.float64)
            yield name, tensor.float() if tensor.dtype == torch.float64 else tensor


def load_transformer(
    path: Path,
    *,
    device: torch.device,
    precision: str = "fp32",
    adapters: Sequence[Path] = (),
    config: WanConfig | None = None,
    entry: str = "",
    block_made: Callable[[nn.Module], None] | None = None,
) -> WanTransformer:
    """The transformer at `path`, with adapters merged into it in their order.

    The weights are read tensor by tensor to where they belong: beside the model there is never more than one of them.

    Args:
        path: a file or folder of the module's docstring.
        device: where the model is made.
        precision: one of PRECISIONS, see `dtype_of`.
        adapters: LoRA files or PEFT folders, see `open_adapter`; merged in fp64, before the cast to `precision`.
        config: sizes; without it those of the config.json beside the weights, else the published ones.
        entry: of a .pt file that holds several models; "": the first of ENTRIES that it holds.
        block_made: called with each block before the next is made, so that a part of it may be all that stays.

    Raises:
        UserError: in one line, for anything that is not exactly the weights of that transformer.
    """
    checkpoint = open_checkpoint(path, config=config, entry=entry)
    opened = [open_adapter(adapter, checkpoint.config) for adapter in adapters]
    with torch.device("meta"):
        model = WanTransformer(checkpoint.config)
    shapes, merged = {n: tensor.shape for n, tensor in checkpoint.tensors.items()}, checkpoint.merged(opened, device)
    for block, names in groupby(shapes, lambda name: _block_of(name) if block_made else None):
        # memory of its own, so that the model outlives its files and may be trained in place; all of it before the
        # first tensor is read, since what is needed on the way would leave holes between tensors
        state = {n: torch.empty(shapes[n], dtype=dtype_of(n, precision), device=device) for n in names}
        for name, tensor in islice(merged, len(state)):
            state[name].copy_(tensor)
        model.load_state_dict(state, assign=True, strict=False)  # names and shapes have been compared
        if block_made and block is not None:
            block_made(model.blocks[block])
    sources = " + ".join(map(str, [path, *adapters]))
    log.info("%s: %d tensors, %s, %s", sources, len(shapes), checkpoint.layout, precision)
    return model


def _block_of(name: str) -> int | None:
    """Number of the block that a tensor is in."""
    first, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if first == "blocks" else None


def dtype_of(name: str, precision: str) -> torch.dtype:
    """The dtype of the parameter of that Wan name under a precision.

    "fp32" is exact. "bf16" is the published models' own (regime A). "bf16-fp32-gates" keeps the time MLP, the
    modulation tables and the norms' weights in fp32 (regime C, as Wan's own code): gates are not rounded.
    """
    assert precision in PRECISIONS
    if precision == "fp32":
        return torch.float32
    kept = name.endswith(FP32_TABLE) or any(part in FP32_MODULES for part in name.split("."))
    return torch.float32 if precision == "bf16-fp32-gates" and kept else torch.bfloat16


def set_precision(model: WanTransformer, precision: str) -> WanTransformer:
    """Casts a model in place, one that has no checkpoint."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype_of(name, precision))
    return model


def open_checkpoint(path: Path, *, config: WanConfig | None = None, entry: str = "") -> Checkpoint:
    """Reads and compares a checkpoint, without copying its tensors; arguments as for `load_transformer`.

    A model without a name is the one that an `entry` asks for, unless a conversion wrote it from another entry.

    Raises UserError that lists missing, extra and misshapen tensors, by the names they have in the file.
    """
    files = find_weights(path)
    taken, state = read_tensors(files, ENTRIES, entry)
    origin = read_manifest(files).get("entry", "")
    if entry and origin not in ("", entry):
        raise UserError(f"{path}: found the conversion of entry {origin!r}; accepted: that of {entry!r}")
    beside = files[0].with_name("config.json")
    if config is None and files[0].suffix not in PICKLES and beside.is_file():
        config = read_config(beside)
    state = unwrapped({name: tensor for name, tensor in state.items() if name.split(".")[-1] not in FP8_NOTES}, path)
    scales = {name: state.pop(name) for name in list(state) if name.endswith(FP8_SCALES)}
    layout = layout_of(state)
    if config is None:  # by the width, which all layouts have under one name
        large = state.get("patch_embedding.weight", torch.empty(0)).shape[:1] == (WAN_14B.dim,)
        config = WAN_14B if large else WanConfig()
    expected = expected_tensors(config)
    own_names = {name: in_layout(name, layout) for name in expected}
    _compare({own_names[name]: tensor for name, tensor in expected.items()}, state, config, path)
    tensors = {name: state[own] for name, own in own_names.items()}
    of_weights = {to_wan(f"{name.rpartition('.')[0]}.weight"): scale for name, scale in scales.items()}
    for name, scale in of_weights.items():
        if name not in tensors or scale.numel() not in (1, len(tensors[name])):
            accepted = "one number for each weight, or one a row"
            raise UserError(f"{path}: found a scale {tuple(scale.shape)} for {name}; accepted: {accepted}")
    require_finite(of_weights, path)
    return Checkpoint(path, tuple(files), taken or origin, layout, config, tensors, of_weights)


def _compare(expected: dict[str, Tensor], state: dict[str, Tensor], config: WanConfig, path: Path) -> None:
    accepted = (
        f"the {len(expected)} tensors of a Wan transformer of {config.layers} blocks, {config.dim} channels, "
        f"FFN {config.ffn_dim}"
    )
    if any(ENDING.search(name) for name in state):
        raise UserError(f"{path}: found a LoRA adapter; accepted: {accepted}, an adapter beside them")
    if len(expected.keys() & state.keys()) <= len(expected) // 10:  # too many differences to be told one by one
        names = listed(sorted(state), limit=4) or "none"
        raise UserError(f"{path}: found {len(state)} tensors of another model ({names}, ...); accepted: {accepted}")
    require_fit(expected, state, path, accepted)
