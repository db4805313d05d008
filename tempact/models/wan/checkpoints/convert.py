"""Conversion of checkpoints to safetensors with hashes, in Wan's, diffusers' or PEFT's layout.

DST/diffusion_pytorch_model.safetensors, config.json    weights, layout "wan" or "diffusers"
DST/adapter_model.safetensors, adapter_config.json      an adapter, layout "wan": a PEFT folder
DST/pytorch_lora_weights.safetensors                    an adapter, layout "diffusers"
DST/MANIFEST.json                                       sources and entry; sizes and SHA-256 of all files
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tempact.errors import UserError
from tempact.files import file_hash, partial_of, sync, usual_mode
from tempact.models.wan.checkpoints.files import (
    MANIFEST,
    SAFETENSORS,
    WEIGHTS,
    listed,
    read_json,
    read_manifest,
    require_finite,
)
from tempact.models.wan.checkpoints.load import Checkpoint, open_checkpoint
from tempact.models.wan.checkpoints.lora import Adapter, is_adapter, open_adapter, write_adapter
from tempact.models.wan.checkpoints.names import LAYOUTS, config_json, in_layout, read_config
from tempact.models.wan.transformer import WanConfig

STORED = "stored"
DTYPES = {STORED: None, "fp32": torch.float32, "bf16": torch.bfloat16}


def convert(
    source: Path,
    folder: Path,
    *,
    adapters: Sequence[Path] = (),
    layout: str = "wan",
    dtype: str = STORED,
    entry: str = "",
    config: WanConfig | None = None,
) -> dict[str, Any]:
    """Reads weights or an adapter, compares them with the model they belong to, and writes them anew.

    Args:
        source: anything that `open_checkpoint` or `open_adapter` reads.
        folder: new; it appears whole or not at all.
        adapters: merged into the weights, in their order; the tensors they change are fp32 unless `dtype` is another.
        layout: one of LAYOUTS.
        dtype: one of DTYPES; "stored" leaves every tensor in its own.
        entry: as for `open_checkpoint`, but of a file that has entries.
        config: sizes of the transformer, where no config.json beside the source tells them.

    Returns the manifest. Raises UserError in one line, with nothing written.
    """
    for key, value, accepted in (("layout", layout, LAYOUTS), ("dtype", dtype, tuple(DTYPES))):
        if value not in accepted:
            raise UserError(f"{key}: found {value!r}; accepted: {', '.join(accepted)}")
    manifest: dict[str, Any] = {"layout": layout, "dtype": dtype}
    if is_adapter(source):
        if adapters or entry:
            raise UserError(f"{source}: found an adapter, and an entry or adapters to merge; accepted: it alone")
        adapter = open_adapter(source, config or WanConfig())
        manifest |= {"rank": adapter.rank, "sources": _hashes(adapter.files)}
        with _new_folder(folder.absolute(), manifest) as partial:
            write_adapter(adapter, partial, layout, DTYPES[dtype])
        return manifest
    checkpoint = open_checkpoint(source, config=config, entry=entry)
    if checkpoint.entry != entry != "":
        raise UserError(f"{source}: found one model without entries; accepted: no entry")
    opened = [open_adapter(path, checkpoint.config) for path in adapters]
    parameters = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    manifest |= {"entry": checkpoint.entry, "tensors": len(checkpoint.tensors), "parameters": parameters}
    manifest["sources"] = _hashes(checkpoint.files)
    _compare(checkpoint.files, read_manifest(checkpoint.files).get("files", {}), manifest["sources"])
    manifest["adapters"] = [_hashes(adapter.files) for adapter in opened]
    with _new_folder(folder.absolute(), manifest) as partial:
        _save_weights(checkpoint, opened, partial, layout, DTYPES[dtype])
    return manifest


@contextmanager
def _new_folder(folder: Path, manifest: dict[str, Any]) -> Iterator[Path]:
    """The place where the content of `folder` is to be written: it becomes `folder` whole or not at all.

    The manifest, to which the hashes of all files are added, is written last.
    UserError for a folder that holds something already, and for a place that cannot be written or is full.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: found something there already; accepted: a new folder")
    partial = partial_of(folder)
    try:
        partial.mkdir(parents=True)
        yield partial
        usual_mode(partial)
        manifest["files"] = _hashes(sorted(partial.iterdir()))
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for file in (*partial.iterdir(), partial):
            sync(file)
        partial.replace(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written ({error}); accepted: a place with room for it") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save_weights(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], folder: Path, layout: str, dtype: torch.dtype | None
) -> None:
    tensors: dict[str, Tensor] = {}
    for name, tensor in checkpoint.merged(adapters, torch.device("cpu")):
        tensors[in_layout(name, layout)] = tensor.to(dtype or tensor.dtype).contiguous()
    require_finite(tensors, checkpoint.source)
    save_file(tensors, folder / f"{WEIGHTS}{SAFETENSORS}", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps(config_json(checkpoint.config, layout), indent=1) + "\n", encoding="utf-8"
    )


def _hashes(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    return {file.name: {"bytes": file.stat().st_size, "sha256": file_hash(file)} for file in files}


def verify(folder: Path) -> dict[str, Any]:
    """Compares every file of a converted folder with its hash, and weights with config.json name by name.

    Returns the manifest; raises UserError for the first difference.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: found no {MANIFEST}; accepted: a folder that a conversion has written")
    manifest = read_json(folder / MANIFEST)
    recorded = manifest.get("files")
    if not isinstance(recorded, dict) or not recorded:
        raise UserError(f"{folder / MANIFEST}: found no files; accepted: names, sizes and hashes")
    missing = [name for name in recorded if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: found no {listed(missing)}; accepted: all files that {MANIFEST} names")
    files = [folder / name for name in recorded]
    _compare(files, recorded, _hashes(files))
    if not is_adapter(folder):
        open_checkpoint(folder, config=read_config(folder / "config.json"))
    return manifest


def _compare(files: Sequence[Path], recorded: Mapping[str, Any], found: Mapping[str, dict[str, Any]]) -> None:
    """UserError for a file that has another size or hash than recorded, if anything is."""
    for file in files if recorded else ():
        if recorded[file.name] != found[file.name]:
            raise UserError(
                f"{file}: found {found[file.name]['bytes']} bytes with SHA-256 {found[file.name]['sha256'][:12]}...; "
                f"accepted: those that {MANIFEST} tells of"
            )
