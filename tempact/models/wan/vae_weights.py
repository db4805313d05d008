"""Weight files of the VAE, the tiny decoders and the text encoder: read safely, compared key by key."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tempact.errors import UserError
from tempact.models.wan.checkpoint_files import differences, read_file

EDGE_BYTES = 2**16  # of both ends of a file that go into its fingerprint


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth, .pt or .bin file, on the CPU, not copied where the file can be mapped.

    Pickles are read with `weights_only`. UserError for a file that is missing, of another kind, cut off, unsafe, or
    not a flat dictionary of tensors.
    """
    state = read_file(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: found no flat dictionary of tensors; accepted: names and tensors")
    return state


def fill(
    module: nn.Module, state: Mapping[str, Tensor], source: Path, dtype: torch.dtype, device: torch.device
) -> None:
    """Gives `module` (on the meta device) the tensors of `state`; every key must fit.

    UserError that lists missing, extra and misshapen keys.
    """
    expected = module.state_dict()
    found = differences({name: tensor.shape for name, tensor in expected.items()}, state)
    if found:
        raise UserError(f"{source}: found {found}; accepted: the {len(expected)} tensors of {type(module).__name__}")
    moved: dict[int, Tensor] = {}  # a tensor under two names stays one
    for tensor in state.values():
        moved.setdefault(id(tensor), tensor.to(device, dtype))
    module.load_state_dict({name: moved[id(tensor)] for name, tensor in state.items()}, assign=True)


def fingerprint(files: Iterable[Path]) -> str:
    """16 hex digits that tell weight files apart: names, sizes and both ends, which hold headers and tensors.

    Reading whole files would take longer than loading them.
    """
    digest = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(EDGE_BYTES))
            file.seek(max(0, size - EDGE_BYTES))
            digest.update(file.read(EDGE_BYTES))
    return digest.hexdigest()[:16]
