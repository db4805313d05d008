"""Weight files of the VAE, the tiny decoders and the text encoder: read safely, compared key by key."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tempact.errors import UserError

PICKLES = (".pth", ".pt", ".bin")
SHOWN = 4  # keys that an error lists
EDGE_BYTES = 2**16  # of both ends of a file that go into its fingerprint


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth, .pt or .bin file, on the CPU, not copied where the file can be mapped.

    Pickles are read with `weights_only`. UserError for a file that is missing, of another kind, cut off, unsafe, or
    not a flat dictionary of tensors.
    """
    if not path.is_file():
        raise UserError(f"{path}: found no file; accepted: weights in .safetensors, {', '.join(PICKLES)}")
    if path.suffix not in (".safetensors", *PICKLES):
        raise UserError(f"{path}: found {path.suffix or 'no suffix'}; accepted: .safetensors, {', '.join(PICKLES)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: found a pickle that is not plain tensors ({reason}); accepted: tensors") from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: found a damaged or cut-off file ({reason}); accepted: a whole one") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: found no flat dictionary of tensors; accepted: names and tensors")
    return state


def _is_zip(path: Path) -> bool:
    """Only torch's zip format can be mapped."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def fill(
    module: nn.Module, state: Mapping[str, Tensor], source: Path, dtype: torch.dtype, device: torch.device
) -> None:
    """Gives `module` (on the meta device) the tensors of `state`; every key must fit.

    UserError that lists missing, extra and misshapen keys.
    """
    expected = module.state_dict()
    problems = [
        _listed("missing", sorted(expected.keys() - state.keys())),
        _listed("extra", sorted(state.keys() - expected.keys())),
        _listed(
            "of another shape",
            [
                f"{name} {tuple(state[name].shape)} for {tuple(tensor.shape)}"
                for name, tensor in expected.items()
                if name in state and state[name].shape != tensor.shape
            ],
        ),
    ]
    found = "; ".join(problem for problem in problems if problem)
    if found:
        raise UserError(f"{source}: found {found}; accepted: the {len(expected)} tensors of {type(module).__name__}")
    moved: dict[int, Tensor] = {}  # a tensor under two names stays one
    for tensor in state.values():
        moved.setdefault(id(tensor), tensor.to(device, dtype))
    module.load_state_dict({name: moved[id(tensor)] for name, tensor in state.items()}, assign=True)


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} tensors {what} ({', '.join(names[:SHOWN])}{more})"


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
