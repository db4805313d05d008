"""Conversion of checkpoints to safetensors with hashes, in Wan's, diffusers' or PEFT's layout.

DST/diffusion_pytorch_model.safetensors, config.json    weights, layout "wan" or "diffusers"
DST/adapter_model.safetensors, adapter_config.json      an adapter, layout "wan": a PEFT folder
DST/pytorch_lora_weights.safetensors                    an adapter, layout "diffusers"
DST/MANIFEST.json                                       what it was made of; sizes and SHA-256 of all files
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tempact.errors import UserError
from tempact.models.wan.checkpoints.files import (
    MANIFEST,
    SAFETENSORS,
    WEIGHTS,
    check_manifest,
    listed,
    read_json,
    sha256,
    write_folder,
)
from tempact.models.wan.checkpoints.load import Checkpoint, open_checkpoint
from tempact.models.wan.checkpoints.lora import Adapter, is_adapter, open_adapter, save_adapter
from tempact.models.wan.checkpoints.names import DIFFUSERS, LAYOUTS, config_json, read_config, to_diffusers
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
    """Reads weights or an adapter, compares them with what they should be, and writes them anew.

    Args:
        source: anything that `open_checkpoint` or `open_adapter` reads.
        folder: new; it appears whole or not at all.
        adapters: merged into the weights, in their order; what they touch is fp32 unless `dtype` says otherwise.
        layout: one of LAYOUTS.
        dtype: one of DTYPES; "stored" leaves every tensor in its own.
        entry: as for `open_checkpoint`.
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
        manifest |= {"rank": adapter.config.r, "sources": _hashes(adapter.files)}

        def fill(partial: Path) -> None:
            save_adapter(adapter, partial, layout, DTYPES[dtype])
            _write_manifest(partial, manifest)
    else:
        checkpoint = open_checkpoint(source, config=config, entry=entry)
        opened = [open_adapter(path, checkpoint.config) for path in adapters]
        manifest |= {"entry": checkpoint.entry, "tensors": len(checkpoint.tensors)}
        manifest |= {"parameters": sum(tensor.numel() for tensor in checkpoint.tensors.values())}
        manifest["sources"] = _hashes(checkpoint.files)
        _check_hashes(checkpoint.files, manifest["sources"])
        manifest["adapters"] = [_hashes(adapter.files) for adapter in opened]

        def fill(partial: Path) -> None:
            _save_weights(checkpoint, opened, partial, layout, DTYPES[dtype])
            _write_manifest(partial, manifest)

    write_folder(folder.absolute(), fill)
    return manifest


def _save_weights(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], folder: Path, layout: str, dtype: torch.dtype | None
) -> None:
    tensors: dict[str, Tensor] = {}
    broken = []
    for name, tensor in checkpoint.merged(adapters, torch.device("cpu")):
        own = to_diffusers(name) if layout == DIFFUSERS else name
        tensors[own] = tensor.to(dtype or tensor.dtype).contiguous()
        if not torch.isfinite(tensors[own]).all():
            broken.append(own)
    if broken:
        raise UserError(f"{checkpoint.source}: found values that are not finite in {listed(broken)}; accepted: numbers")
    save_file(tensors, folder / f"{WEIGHTS}{SAFETENSORS}", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_json(checkpoint.config, layout), indent=1) + "\n")


def _hashes(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    return {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files}


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["files"] = _hashes(sorted(folder.iterdir()))
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def verify(folder: Path) -> dict[str, Any]:
    """Compares every file of a converted folder with its hash, and weights with config.json name by name.

    Returns the manifest; UserError for the first thing that is not as it was written.
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
    if is_adapter(folder):
        return manifest
    open_checkpoint(folder, config=read_config(folder / "config.json"))
    return manifest


def _check_hashes(files: Sequence[Path], found: Mapping[str, dict[str, Any]]) -> None:
    """Of sources that a conversion has written: their hashes must still be those."""
    manifest = check_manifest(files)
    if manifest is not None:
        _compare(files, manifest["files"], found)


def _compare(files: Sequence[Path], recorded: Mapping[str, Any], found: Mapping[str, dict[str, Any]]) -> None:
    for file in files:
        if recorded[file.name] != found[file.name]:
            raise UserError(
                f"{file}: found {found[file.name]['bytes']} bytes with SHA-256 {found[file.name]['sha256'][:12]}...; "
                f"accepted: those that {MANIFEST} tells of"
            )
