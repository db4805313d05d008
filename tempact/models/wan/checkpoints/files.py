"""Weight files: finding them in a folder, reading them safely, comparing them with a model, naming what differs; and
weights that wait on the host while they are not used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tempact.errors import UserError

log = logging.getLogger(__name__)

SAFETENSORS = ".safetensors"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
WEIGHTS = "diffusion_pytorch_model"  # the name of weights in Wan's own and in diffusers' folders
INDEX = f"{WEIGHTS}{SAFETENSORS}.index.json"  # which shard holds which tensor
MANIFEST = "MANIFEST.json"  # of a folder that a conversion has written: its files with sizes and hashes
LFS_POINTER = b"version https://git-lfs"
EDGE_BYTES = 2**16  # of both ends of a file that go into its fingerprint


def read_file(path: Path) -> Any:
    """Content of a .safetensors, .pt, .pth, .bin or .ckpt file, on the CPU.

    Tensors stay on disk until they are used if the file can be mapped; only pickles of old torch versions cannot.
    Pickles are read with `weights_only`: tensors and plain containers, never code.

    Raises UserError for a file that is missing, of another kind, cut off or unsafe.
    """
    kinds = ", ".join((SAFETENSORS, *PICKLES))
    if not path.is_file():
        raise UserError(f"{path}: found no file; accepted: weights in {kinds}")
    if path.suffix not in (SAFETENSORS, *PICKLES):
        raise UserError(f"{path}: found {path.suffix or 'no suffix'}; accepted: weights in {kinds}")
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
        if start != LFS_POINTER and path.suffix == SAFETENSORS:
            return load_file(path)
        if start != LFS_POINTER:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=start[:2] == b"PK")
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        found = f"a pickle that is not plain tensors (it would run {unsafe[1]})" if unsafe else "no pickle of tensors"
        raise UserError(f"{path}: found {found}; accepted: tensors in plain containers") from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: found a damaged or cut-off file ({reason}); accepted: a whole one") from error
    raise UserError(f"{path}: found Git LFS's note of where the file is; accepted: the file (git lfs pull)")


def read_tensors(
    files: Sequence[Path], entries: Sequence[str] = (), entry: str | None = None
) -> tuple[str, dict[str, Tensor]]:
    """Name of the model that was read ("" if it has none) and its tensors by name, on the CPU.

    Args:
        files: one file, or the shards of one model.
        entries: names under which a file may hold one of several models; the first that is there is taken, else the
            only entry that is tensors. Without any, a file must be the tensors of one model.
        entry: the name to take instead, "" or None for none; a model that lies in its file without a name is taken
            nevertheless. None: the caller has no way to give one.

    Raises UserError for an entry that is not there, content that is not tensors, and a tensor in two shards.
    """
    taken, together = "", dict[str, Tensor]()
    for file in files:
        content = read_file(file)
        if not isinstance(content, Mapping) or not content:
            raise UserError(f"{file}: found {type(content).__name__}; accepted: tensors by name")
        taken = _pick(content, entries, entry, file)
        part = content[taken] if taken else content
        odd = [str(key) for key, value in part.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
        if odd:
            raise UserError(f"{file}: found {listed(odd)} among the tensors; accepted: tensors only")
        twice = together.keys() & part.keys()
        if twice:
            raise UserError(f"{file}: found {min(twice)}, which another shard holds too; accepted: each tensor once")
        together |= part
    return taken, together


def _pick(content: Mapping[str, Any], entries: Sequence[str], entry: str | None, file: Path) -> str:
    """Name of the entry to take, "" for a file that is the tensors of one model."""
    inner = {name: own for name, own in content.items() if isinstance(name, str) and isinstance(own, Mapping) and own}
    models = [name for name, own in inner.items() if all(isinstance(value, Tensor) for value in own.values())]
    known = (entry,) if entry else (*entries, *(models if entries and len(models) == 1 else ()))
    taken = next((name for name in known if name in inner), "")
    if taken:
        others = listed(str(name) for name in content if name != taken)
        log.info("%s: entry %s is taken; the file also holds %s", file, taken, others or "nothing else")
    elif entry and inner:
        raise UserError(f"{file}: found no entry {entry!r}; accepted: {listed(models)}")
    elif not isinstance(next(iter(content.values())), Tensor):
        named = f", or the name of another: {listed(models)}" if entry is not None and models else ""
        accepted = f"one of {', '.join(entries)}{named}" if entries else "tensors by name"
        raise UserError(f"{file}: found entries {listed(map(str, content))}; accepted: {accepted}")
    return taken


def find_weights(path: Path) -> list[Path]:
    """The weight files at `path`: itself, or those of a folder.

    A folder holds `diffusion_pytorch_model` in one safetensors file or in shards, there or in transformer/, or else a
    single .pt file. Raises UserError for none, for several candidates, and for a shard that is missing.
    """
    if not path.is_dir():
        return [path]
    for folder in (path, path / "transformer"):
        if (folder / INDEX).is_file():
            return _existing({folder / name for name in _read_index(folder).values()}, INDEX)
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


def _read_index(folder: Path) -> dict[str, str]:
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) and "/" not in name for name in names.values()):
        raise UserError(f"{folder / INDEX}: found no weight_map; accepted: tensor names with the file of each")
    return names


def _whole_set(shards: list[Path]) -> list[Path]:
    """Shards without an index: their names say how many there are."""
    count = re.fullmatch(r".*-of-(\d+)", shards[0].stem)
    assert count is not None
    stem, digits = f"{shards[0].parent}/{WEIGHTS}", len(count[1])
    expected = [Path(f"{stem}-{i + 1:0{digits}}-of-{count[1]}{SAFETENSORS}") for i in range(int(count[1]))]
    for shard in shards:
        if shard not in expected:
            raise UserError(f"{shard}: found beside {shards[0].name}; accepted: shards of one set")
    return _existing(expected, shards[0].name)


def _existing(files: Iterable[Path], named_by: str) -> list[Path]:
    for file in sorted(files):
        if not file.is_file():
            raise UserError(f"{file}: found no such shard; accepted: all that {named_by} tells of")
    return sorted(files)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UserError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); accepted: a JSON object") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: found {type(content).__name__}; accepted: a JSON object")
    return content


def read_manifest(files: Sequence[Path]) -> dict[str, Any]:
    """What a conversion wrote of these files, {} if no conversion made them; UserError if a file has another size.

    `convert.verify` compares hashes: reading everything takes longer than loading it.
    """
    manifest = files[0].with_name(MANIFEST)
    if not manifest.is_file():
        return {}
    content = read_json(manifest)
    sizes = content.get("files")
    if not isinstance(sizes, dict) or not all(file.name in sizes for file in files):
        raise UserError(f"{manifest}: found no entry for {files[0].name}; accepted: the manifest of these files")
    for file in files:
        size, expected = file.stat().st_size, sizes[file.name].get("bytes")
        if size != expected:
            raise UserError(f"{file}: found {size} bytes; accepted: {expected}, as {MANIFEST} says")
    return content


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


def require_fit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: Path, accepted: str) -> None:
    """UserError that lists tensors missing, extra, of another shape or not of floating point; `expected` by name."""
    shapes = [
        f"{name} {tuple(found[name].shape)} for {tuple(own.shape)}"
        for name, own in expected.items()
        if name in found and found[name].shape != own.shape
    ]
    odd = [f"{name} {tensor.dtype}" for name, tensor in found.items() if not tensor.is_floating_point()]
    parts = {
        "missing": [name for name in expected if name not in found],
        "extra": [name for name in found if name not in expected],
        "of another shape": shapes,
        "of another kind": odd,
    }
    words = "; ".join(f"{len(names)} tensors {what} ({listed(names)})" for what, names in parts.items() if names)
    if words:
        raise UserError(f"{source}: found {words}; accepted: {accepted}")


def require_finite(tensors: Mapping[str, Tensor], source: Path) -> None:
    """UserError that lists tensors with a value that is NaN or infinite."""
    broken = [name for name, tensor in tensors.items() if not tensor.float().isfinite().all()]  # fp8 knows no isfinite
    if broken:
        raise UserError(f"{source}: found values that are not finite in {listed(broken)}; accepted: numbers")


def require_weights(module: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """UserError unless names and shapes of `state` are those of `module`'s tensors."""
    expected = module.state_dict()
    require_fit(expected, state, source, f"the {len(expected)} tensors of {type(module).__name__}")


def assign_weights(
    module: nn.Module, state: Mapping[str, Tensor], source: Path, dtype: torch.dtype, device: torch.device
) -> None:
    """Gives `module`, which is on the meta device, the tensors of `state`; UserError unless names and shapes are its.

    A tensor under two names stays one.
    """
    require_weights(module, state, source)
    moved: dict[int, Tensor] = {}
    for tensor in state.values():
        moved.setdefault(id(tensor), tensor.to(device, dtype))
    module.load_state_dict({name: moved[id(tensor)] for name, tensor in state.items()}, assign=True)


@contextmanager
def visiting(weights: Sequence[Tensor], device: torch.device | None) -> Iterator[None]:
    """Inside, the weights are on `device`, as copies that are dropped at the end: they must not be changed.

    None: they are used where they are.
    """
    waiting = [weight.data for weight in weights]
    try:
        for weight in weights if device is not None else ():
            weight.data = weight.data.to(device, non_blocking=True)
        yield
    finally:
        for weight, own in zip(weights, waiting, strict=True):
            weight.data = own


def listed(names: Iterable[str], limit: int = 12) -> str:
    """Names in one line; names that differ in the number of their block only are written as one.

    Numbers are shown as ranges: blocks.{0-3,7}.norm3.bias.
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
