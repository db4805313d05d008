"""PEFT adapters of a policy: "default" is trained, "ref" is a frozen copy of where it started."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from tempact.errors import UserError

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
    """Inside, forwards use the frozen reference adapter."""
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
    """Loads a PEFT folder into "default"; UserError if files, names or shapes do not fit."""
    file = Path(folder) / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(f"{file}: not found; accepted: a PEFT folder with adapter_config.json and this file")
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file}: not a readable safetensors file ({error})") from error
    own = get_peft_model_state_dict(model, adapter_name=TRAINED)
    for name in sorted(own.keys() ^ state.keys()):
        place = "missing" if name in own else "unexpected"
        raise UserError(f"{file}: {place} tensor {name}; accepted: the {len(own)} tensors of this model's adapter")
    for name, value in state.items():
        if value.shape != own[name].shape:
            raise UserError(f"{file}: {name} has shape {tuple(value.shape)}; accepted: {tuple(own[name].shape)}")
    _check_scale(model.peft_config[TRAINED], Path(folder) / "adapter_config.json")
    with torch.no_grad():
        set_peft_model_state_dict(model, state, adapter_name=TRAINED)


def _check_scale(own: LoraConfig, file: Path) -> None:
    """What changes an adapter's effect without changing a tensor's shape must agree too."""
    try:
        theirs = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable ({error}); accepted: the JSON that PEFT writes") from error
    for key in ("lora_alpha", "use_rslora", "use_dora"):
        expected, found = getattr(own, key), theirs.get(key, getattr(own, key))
        if found != expected:
            raise UserError(f"{file}: {key}: found {found}; accepted: {expected}, as configured")
