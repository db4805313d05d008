"""Weight files: found in a folder, read safely and without a copy, written whole or not at all.

Weight files of the VAE, the tiny decoders and the text encoder: read safely, compared key by key.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tempact.errors import UserError

SAFETENSORS = ".safetensors"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
WEIGHTS = "diffusion_pytorch_model"  # the name of weights in Wan's own and in diffusers' folders
INDEX = f"{WEIGHTS}{SAFETENSORS}.index.json"  # which shard holds which tensor
MANIFEST = "MANIFEST.json"  # what a conversion wrote, with hashes
LFS_POINTER = b"version https://git-lfs"


def read_file(path: Path) -> Any:
    """What a .safetensors, .pt, .pth, .bin or .ckpt file holds, on the CPU.

    Tensors stay on disk until they are used where the file can be mapped, which only old pickles cannot. Pickles are
    read with `weights_only`: tensors and plain containers, never code. UserError for a file that is missing, of
    another kind, cut off or unsafe.
    """
    kinds = ", ".join((SAFETENSORS, *PICKLES))
    if not path.is_file():
        raise UserError(f"{path}: found no file; accepted: weights in {kinds}")
    if path.suffix not in (SAFETENSORS, *PICKLES):
        raise UserError(f"{path}: found {path.suffix or 'no suffix'}; accepted: weights in {kinds}")
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise UserError(f"{path}: found Git LFS's note of where the file is; accepted: the file (git lfs pull)")
        if path.suffix == SAFETENSORS:
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=start[:2] == b"PK")
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        found = f"a pickle that is not plain tensors (it would run {unsafe[1]})" if unsafe else "no pickle of tensors"
        raise UserError(f"{path}: found {found}; accepted: tensors in plain containers") from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: found a damaged or cut-off file ({reason}); accepted: a whole one") from error


def find_weights(path: Path) -> list[Path]:
    """The weight files at `path`: itself, or those of a folder.

    A folder holds `diffusion_pytorch_model` in one safetensors file or in shards, there or in transformer/, or else a
    single .pt file. UserError for none, for several that could be meant, and for a shard that is missing.
    """
    if not path.is_dir():
        return [path]
    for folder in (path, path / "transformer"):
        if (folder / INDEX).is_file():
            return [_existing(folder / name, folder / INDEX) for name in sorted(set(read_index(folder).values()))]
        if (folder / f"{WEIGHTS}{SAFETENSORS}").is_file():
            return [folder / f"{WEIGHTS}{SAFETENSORS}"]
        shards = sorted(folder.glob(f"{WEIGHTS}-*-of-*{SAFETENSORS}"))
        if shards:
            return _whole_set(shards)
    pickles = sorted(path.glob("*.pt"))
    if len(pickles) == 1:
        return pickles
    found = f"several ({', '.join(file.name for file in pickles)})" if pickles else "none"
    accepted = f"{WEIGHTS}{SAFETENSORS}, its shards, or one .pt file"
    raise UserError(f"{path}: found {found} where weights should be; accepted: {accepted}")


def _whole_set(shards: list[Path]) -> list[Path]:
    """Shards without an index: their names say how many there are."""
    count = re.fullmatch(r".*-of-(\d+)", shards[0].stem)
    assert count is not None
    stem, digits = f"{shards[0].parent}/{WEIGHTS}", len(count[1])
    expected = [Path(f"{stem}-{i + 1:0{digits}}-of-{count[1]}{SAFETENSORS}") for i in range(int(count[1]))]
    for shard in shards:
        if shard not in expected:
            raise UserError(f"{shard}: found beside {shards[0].name}; accepted: shards of one set")
    return [_existing(shard, shards[0]) for shard in expected]


def _existing(file: Path, named_by: Path) -> Path:
    if not file.is_file():
        raise UserError(f"{file}: found no such shard; accepted: all that {named_by.name} tells of")
    return file


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name to file name; UserError for an index that says no such thing."""
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) and "/" not in name for name in listed.values()):
        raise UserError(f"{folder / INDEX}: found no weight_map; accepted: tensor names with the file of each")
    return listed


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UserError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); accepted: a JSON object") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: found {type(content).__name__}; accepted: a JSON object")
    return content


def read_sharded(files: Iterable[Path]) -> dict[str, Any]:
    """What several safetensors files hold together; UserError for a tensor that is in two of them."""
    together: dict[str, Any] = {}
    for file in files:
        part = read_file(file)
        twice = together.keys() & part.keys()
        if twice:
            raise UserError(f"{file}: found {min(twice)}, which another shard holds too; accepted: each tensor once")
        together |= part
    return together


def pick_entry(content: Any, entries: Sequence[str], file: Path, *, may_be_flat: bool) -> tuple[str, dict[str, Tensor]]:
    """The first of `entries` in what a .pt file holds, or all of it ("") if it is tensors by name."""
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{file}: found {type(content).__name__}; accepted: tensors by name")
    name = next((name for name in entries if isinstance(content.get(name), Mapping)), "")
    state = content[name] if name else content
    if not name and not (may_be_flat and isinstance(next(iter(content.values())), Tensor)):
        found = listed(map(str, content))
        raise UserError(f"{file}: found entries {found}; accepted: one of {', '.join(entries)}")
    odd = [str(key) for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if odd:
        raise UserError(f"{file}: found {listed(odd)} among the tensors; accepted: tensors only")
    return name, dict(state)


def check_manifest(files: Sequence[Path]) -> dict[str, Any] | None:
    """What a conversion wrote beside these files, None if no conversion did; UserError if a file has another size.

    Hashes are compared by `checkpoint_conversion.verify`: reading everything takes longer than loading it.
    """
    manifest = files[0].with_name(MANIFEST)
    if not manifest.is_file():
        return None
    content = read_json(manifest)
    sizes = content.get("files")
    if not isinstance(sizes, dict) or not all(file.name in sizes for file in files):
        raise UserError(f"{manifest}: found no entry for {files[0].name}; accepted: the manifest of these files")
    for file in files:
        size, expected = file.stat().st_size, sizes[file.name].get("bytes")
        if size != expected:
            raise UserError(f"{file}: found {size} bytes; accepted: {expected}, as {MANIFEST} says")
    return content


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listed(names: Iterable[str], limit: int = 12) -> str:
    """Names in one line; those that differ in the number of their block only are written as one.

    The numbers are shown as ranges: blocks.{0-3,7}.norm3.bias.
    """
    groups: dict[str, list[int]] = {}
    for name in names:
        block = re.match(r"(.*?\bblocks\.)(\d+)(\..*)", name)
        key = f"{block[1]}{{}}{block[3]}" if block else name
        groups.setdefault(key, []).extend([int(block[2])] if block else [])
    shown = [key.replace("{}", _ranges(numbers)) if numbers else key for key, numbers in sorted(groups.items())]
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"


def differences(expected: Mapping[str, torch.Size], found: Mapping[str, Tensor]) -> str:
    """In words, how the names and shapes of tensors differ from what is expected; "" if they do not."""
    shapes = [
        f"{n} {tuple(found[n].shape)} for {tuple(s)}" for n, s in expected.items() if n in found and found[n].shape != s
    ]
    odd = [f"{name} {tensor.dtype}" for name, tensor in found.items() if not tensor.is_floating_point()]
    parts = {
        "missing": [name for name in expected if name not in found],
        "extra": [name for name in found if name not in expected],
        "of another shape": shapes,
        "of another kind": odd,
    }
    return "; ".join(f"{len(names)} tensors {what} ({listed(names)})" for what, names in parts.items() if names)


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Makes `folder` with what `fill` writes into it, whole or not at all.

    UserError for a folder that holds something already, and for a place that cannot be written or is full.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: found something there already; accepted: a new folder")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        fill(partial)
        for file in (*partial.iterdir(), partial):
            _sync(file)
        partial.replace(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written ({error}); accepted: a place with room for it") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
