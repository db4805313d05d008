"""Published checkpoints of the Wan transformer to `WanTransformer`: read, compared name by name, merged, cast.

What can be read, each from its path:

    Wan2.1-T2V-1.3B/                       Wan's own release: diffusion_pytorch_model*.safetensors, config.json
    Wan2.1-T2V-1.3B-Diffusers/             diffusers: transformer/, or that folder itself
    self_forcing_dmd.pt, ode_init.pt       Self-Forcing
    chunkwise/causal_forcing.pt            Causal-Forcing, and its other files
    longlive_base.pt                       LongLive, with lora.pt as an adapter
    a folder that a conversion has written (`python -m tempact.models.wan.checkpoints`)

A file without a config.json must hold Wan2.1-T2V-1.3B. Facts: BACKBONES.md section 4.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tempact.config import ENTRIES
from tempact.config import EXECUTOR_PRECISIONS as PRECISIONS
from tempact.errors import UserError
from tempact.models.wan.checkpoints.files import (
    PICKLES,
    check_manifest,
    differences,
    find_weights,
    pick_entry,
    read_file,
    read_sharded,
)
from tempact.models.wan.checkpoints.lora import Adapter, open_adapter
from tempact.models.wan.checkpoints.names import (
    DIFFUSERS,
    expected_shapes,
    layout_of,
    other_model,
    read_config,
    to_diffusers,
    unwrapped,
)
from tempact.models.wan.transformer import WanConfig, WanTransformer

log = logging.getLogger(__name__)

FP32_MODULES = ("time_embedding", "time_projection", "norm3", "norm_q", "norm_k")
FP32_TABLE = "modulation"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose tensors are exactly those of a transformer of the sizes `config`.

    tensors: by Wan name, on the CPU, mapped from the files where that can be; they must not be written to.
    """

    source: Path
    files: tuple[Path, ...]
    entry: str
    layout: str
    config: WanConfig
    tensors: dict[str, Tensor]

    def merged(self, adapters: Sequence[Adapter], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """All tensors by Wan name, one at a time, with `adapters` added in their order; what these touch is fp32."""
        for name, tensor in self.tensors.items():
            yield name, add_adapters(name, tensor, adapters, device)


def add_adapters(name: str, tensor: Tensor, adapters: Sequence[Adapter], device: torch.device) -> Tensor:
    """The tensor of that Wan name with the products of the adapters added; the tensor itself if there are none."""
    module = name.removesuffix(".weight")
    factors = [adapter.factors[module] for adapter in adapters if module in adapter.factors and module != name]
    if not factors:
        return tensor
    # fp64, rounded once: a process that lets fp32 products run as TF32 must not change what is merged
    total = tensor.to(device, torch.float64)
    for factor in factors:
        down, up = (matrix.to(device, torch.float64) for matrix in (factor.down, factor.up))
        total = torch.addmm(total, up, down, alpha=factor.scale)
    return total.float()


def load_transformer(
    path: Path,
    *,
    device: torch.device,
    precision: str = "fp32",
    adapters: Sequence[Path] = (),
    config: WanConfig | None = None,
    entry: str = "",
) -> WanTransformer:
    """The transformer at `path`, with adapters merged into it in their order.

    The weights are read tensor by tensor to where they belong: beside the model there is never more than one of them.

    Args:
        path: a file or folder of the module's docstring.
        precision: one of PRECISIONS, see `dtype_of`.
        adapters: LoRA files or PEFT folders, see `open_adapter`; merged in fp64, before the cast to `precision`.
        config: sizes; without it those of the config.json beside the weights, else the published ones.
        entry: of a .pt file that holds several models; without it the first of ENTRIES that it holds.

    Raises:
        UserError: in one line, for anything that is not exactly the weights of that transformer.
    """
    checkpoint = open_checkpoint(path, config=config, entry=entry)
    opened = [open_adapter(adapter, checkpoint.config) for adapter in adapters]
    with torch.device("meta"):
        model = WanTransformer(checkpoint.config)
    # memory of its own, so that the model outlives its files and may be trained in place; all of it before the first
    # tensor is read, since what is needed on the way would leave holes between tensors
    state = {
        name: torch.empty(tensor.shape, dtype=dtype_of(name, precision), device=device)
        for name, tensor in checkpoint.tensors.items()
    }
    for name, tensor in checkpoint.merged(opened, device):
        state[name].copy_(tensor)
    model.load_state_dict(state, assign=True)
    log.info("%s: %d tensors, %s%s, %s", path, len(state), checkpoint.layout, _merges(opened), precision)
    return model


def _merges(adapters: Sequence[Adapter]) -> str:
    return "".join(f" + {adapter.source}" for adapter in adapters)


def dtype_of(name: str, precision: str) -> torch.dtype:
    """The dtype of the parameter of that Wan name under a precision.

    "fp32" is exact. "bf16" is what the published models are run in (regime A). "bf16-fp32-gates" keeps the time MLP,
    the modulation tables and the norms' weights in fp32 (regime C, as Wan's own code): gates are not rounded.
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

    UserError that lists missing, extra and misshapen tensors, by the names they have in the file.
    """
    files = find_weights(path)
    if len(files) == 1 and files[0].suffix in PICKLES:
        names = (entry,) if entry else ENTRIES
        taken, state = pick_entry(read_file(files[0]), names, files[0], may_be_flat=not entry)
    elif entry:
        raise UserError(f"{path}: found safetensors, which have no entry {entry!r}; accepted: no entry")
    else:
        taken, state = "", read_sharded(files)
    check_manifest(files)
    beside = files[0].with_name("config.json")
    if config is None and files[0].suffix not in PICKLES and beside.is_file():
        config = read_config(beside)
    config = config or WanConfig()
    state = unwrapped(state, path)
    layout = layout_of(state)
    shapes = expected_shapes(config)
    own_names = {name: to_diffusers(name) if layout == DIFFUSERS else name for name in shapes}
    _compare({own_names[name]: shape for name, shape in shapes.items()}, state, config, path)
    tensors = {name: state[own] for name, own in own_names.items()}
    return Checkpoint(path, tuple(files), taken, layout, config, tensors)


def _compare(shapes: dict[str, torch.Size], state: Mapping[str, Tensor], config: WanConfig, path: Path) -> None:
    accepted = (
        f"the {len(shapes)} tensors of a Wan transformer of {config.layers} blocks, {config.dim} channels, "
        f"FFN {config.ffn_dim}"
    )
    if any(".lora_A." in name or ".lora_B." in name for name in state):
        raise UserError(f"{path}: found a LoRA adapter; accepted: {accepted}, an adapter beside them")
    other = other_model(state, shapes)
    if other:
        raise UserError(f"{path}: found {len(state)} tensors of another model ({other}, ...); accepted: {accepted}")
    found = differences(shapes, state)
    if found:
        raise UserError(f"{path}: found {found}; accepted: {accepted}")
