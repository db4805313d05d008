"""PEFT adapters of a policy: "default" is trained, "ref" is a frozen copy of its start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from tempact.errors import UserError
from tempact.models.wan.checkpoints.files import read_json, read_tensors, require_fit

TRAINED, REFERENCE = "default", "ref"


def adapted(model: nn.Module, lora: LoraConfig, policy: str, adapter: Path | None = None) -> PeftModel:
    """`model`, frozen, with a trained adapter and its frozen copy, the reference.

    The adapter starts from the PEFT folder `adapter`, or fresh from torch's global generator. Raises UserError, which
    names the key `policy`.lora.targets, for targets that the model lacks, and as `load_adapter` does.
    """
    try:
        peft = get_peft_model(model.requires_grad_(False), lora)
    except ValueError as error:
        found = f"{policy}.lora.targets: found {sorted(lora.target_modules or ())}"
        raise UserError(f"{found}; accepted: module names of the {policy}") from error
    if adapter is not None:
        load_adapter(peft, adapter)
    freeze_reference(peft, lora)
    return peft


def freeze_reference(model: PeftModel, config: LoraConfig) -> None:
    """Adds (or renews) "ref" as a frozen copy of the current "default" adapter."""
    if REFERENCE not in model.peft_config:
        model.add_adapter(REFERENCE, config)
    set_peft_model_state_dict(model, get_peft_model_state_dict(model, adapter_name=TRAINED), adapter_name=REFERENCE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{TRAINED}." in name)


@contextmanager
def reference_active(model: PeftModel) -> Iterator[None]:
    """Forward passes inside use the frozen reference adapter."""
    _activate(model, REFERENCE)
    try:
        yield
    finally:
        _activate(model, TRAINED)


def _activate(model: PeftModel, name: str) -> None:
    # PeftModel.set_adapter would also toggle requires_grad; switching the layers alone keeps the optimiser's view
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module._active_adapter = [name]


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors of the trained adapter into `folder`."""
    model.save_pretrained(folder, selected_adapters=[TRAINED])


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Loads a PEFT folder into the trained adapter; UserError if files, names, shapes or the scale do not fit."""
    file, config = Path(folder) / "adapter_model.safetensors", Path(folder) / "adapter_config.json"
    if not file.is_file():
        raise UserError(f"{file}: not found; accepted: a PEFT folder with adapter_config.json and this file")
    state = read_tensors([file])[1]
    own = get_peft_model_state_dict(model, adapter_name=TRAINED)
    require_fit(own, state, file, f"the {len(own)} tensors of this model's adapter")
    theirs = read_json(config)
    for key in ("lora_alpha", "use_rslora", "use_dora"):  # they change an adapter's effect, but no tensor's shape
        expected = getattr(model.peft_config[TRAINED], key)
        found = theirs.get(key, expected)
        if found != expected:
            raise UserError(f"{config}: {key}: found {found}; accepted: {expected}, as configured")
    with torch.no_grad():
        set_peft_model_state_dict(model, state, adapter_name=TRAINED)
