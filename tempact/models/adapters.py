"""Adapters as PEFT keeps them: those of a policy, and the reading of what other tools have written.

A policy has two: "default" is trained, "ref" is a frozen copy of its start. A key of an adapter's file is the name of
a module and an ending. Names are looked up in a table made of the model's own, endings in ENDING, so that all files
come to the same tensors; PEFT's settings are matched as PEFT matches them.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from tempact.config import NAME_PREFIXES, NAME_WRAPPERS
from tempact.errors import UserError
from tempact.files import usual_mode
from tempact.models.wan.checkpoints.files import listed, read_json, read_tensors, require_finite, require_fit
from tempact.models.wan.checkpoints.names import LAYOUTS, WAN, in_layout

log = logging.getLogger(__name__)

TRAINED, REFERENCE = "default", "ref"
CONFIG = "adapter_config.json"
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PEFT_PREFIX, DIFFUSERS_PREFIX = "base_model.model.", "transformer."  # of tensor names
TOOLS = ("unet.", "pipe.dit.", "lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")
PREFIXES = (*NAME_PREFIXES, PEFT_PREFIX, DIFFUSERS_PREFIX, *TOOLS)

# what a key's tensor is, by its end; PEFT may put the adapter's name before `.weight`
ENDING = re.compile(
    r"\.(?:(?P<down>lora_A|lora_down|lora\.down)|(?P<up>lora_B|lora_up|lora\.up))(?:(?:\.[^.]+)?\.weight)?$"
    r"|\.(?P<alpha>alpha)$|\.(?P<diff>diff|diff_m)$|\.(?P<diff_b>diff_b)$"
)
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
PLAIN = {"down": DOWN, "up": UP, "alpha": ".alpha", "diff": ".diff", "diff_b": ".diff_b"}

# settings that may differ from PEFT's defaults: they are followed, or they do not concern the weights
FOLLOWED = {
    "r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora",
    "layers_to_transform", "layers_pattern",
}  # fmt: skip
IDLE = {
    "lora_dropout", "init_lora_weights", "eva_config", "inference_mode", "task_type", "auto_mapping",
    "base_model_name_or_path", "revision", "peft_version", "ensure_weight_tying",
}  # fmt: skip
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # the others change the weights below the adapter


class Effect(NamedTuple):
    """The rank of a module's adapter and what its product is multiplied by."""

    rank: int
    scale: float


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


@contextmanager
def without_adapter(model: PeftModel) -> Iterator[None]:
    """Forward passes inside are those of the base model."""
    _activate(model, "")  # layers pass over a name that they do not have
    try:
        yield
    finally:
        _activate(model, TRAINED)


def _activate(model: PeftModel, name: str) -> None:
    # PeftModel.set_adapter would also toggle requires_grad; switching the layers alone keeps the optimiser's view
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module._active_adapter = [name]


@contextmanager
def lean_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, LoRA layers use copies of their active adapter, scaled, in the precision of the layer."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for layer in layers:
        (name,) = layer.active_adapters
        dtype = layer.base_layer.weight.dtype
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight * layer.scaling[name]
        layer.forward = partial(_lean, layer.base_layer, down.detach().to(dtype), up.detach().to(dtype))
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _lean(base: nn.Module, down: Tensor, up: Tensor, x: Tensor) -> Tensor:
    out: Tensor = base(x)
    out.flatten(0, -2).addmm_(F.linear(x, down).flatten(0, -2), up.t())
    return out


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors of the trained adapter into `folder`."""
    model.save_pretrained(folder, selected_adapters=[TRAINED])
    usual_mode(folder)


@torch.no_grad()
def load_adapter(model: PeftModel, folder: Path) -> None:
    """Loads a PEFT folder into the trained adapter, whose effect is then PEFT's; its rank and alpha stay as configured.

    Another scale of a module (alpha_pattern, use_rslora) is multiplied into its second matrix. A lower rank of
    rank_pattern is filled up with rows that have no effect yet, and so is a module that the settings leave out. Raises
    UserError for files, names, shapes and settings that do not fit, and for values that are not finite.
    """
    files = [Path(folder) / name for name in PEFT_FILES]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(f"{files[0]}: not found; accepted: a PEFT folder with {CONFIG} and this file")
    content = read_tensors([file])[1]
    config, configured = file.with_name(CONFIG), model.peft_config[TRAINED]
    settings = read_settings(read_json(config), config, configured)
    saved = get_peft_model_state_dict(model, adapter_name=TRAINED)
    own = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in saved.items()}
    layers = {n: layer for n, layer in model.base_model.model.named_modules() if isinstance(layer, BaseTunerLayer)}
    state, told = plain_state(content, layers, file)
    effects = effects_of(settings, told, layers, file)
    expected = dict(own)
    for name in (name for name in layers if name + DOWN in own):
        down, up = name + DOWN, name + UP
        if name in effects:
            rank = effects[name].rank if settings.rank_pattern else configured.r
            expected[down] = own[down].new_empty(rank, *own[down].shape[1:])
            expected[up] = own[up].new_empty(len(own[up]), rank, *own[up].shape[2:])
        elif name in told:  # PEFT passes over what its settings leave out
            del expected[down], expected[up]
        else:
            state |= {down: own[down], up: torch.zeros_like(own[up])}
    require_fit(expected, state, file, f"the {len(own)} tensors of this model's adapter")
    require_finite(state, file)
    for key in ("lora_alpha",) if settings.rank_pattern else ("r", "lora_alpha"):
        found, accepted = getattr(settings, key), getattr(configured, key)
        if found != accepted:
            raise UserError(f"{config}: {key}: found {found}; accepted: {accepted}, as configured")
    for name, (rank, scale) in effects.items():
        down, up, usual = name + DOWN, name + UP, layers[name].scaling[TRAINED]
        ratio = scale / usual
        if rank > configured.r or (ratio != 1.0 and down not in own):
            found = f"rank {rank} and scale {scale:g} for {name}"
            accepted = f"up to rank {configured.r}, as configured, and scale {usual:g} but for linears"
            raise UserError(f"{config}: rank_pattern, alpha_pattern: found {found}; accepted: {accepted}")
        if down in own:
            state[down] = torch.cat([state[down].to(own[down]), own[down][len(state[down]) :]])
            scaled = state[up] if ratio == 1.0 else state[up].double() * ratio
            state[up] = nn.functional.pad(scaled, (0, own[up].shape[1] - scaled.shape[1]))
    set_peft_model_state_dict(model, {PEFT_PREFIX + n: t for n, t in state.items()}, adapter_name=TRAINED)


def plain_state(
    content: Mapping[str, Tensor], modules: Iterable[str], file: Path
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by the module's own name and the ending of PLAIN, and the name that the file has for each module.

    modules: own names, of tables too. A key that is unknown stays, without PEFT's prefix and wrappers' parts.
    Raises UserError for two keys that come to the same.
    """
    table: dict[str, str] = {}
    for name in modules:
        block = [name.removesuffix(".modulation")] if name.endswith(".modulation") else []  # ends in diff_m there
        for alias in (name, *(in_layout(name, layout) for layout in LAYOUTS), *block):
            table |= {alias: name, alias.replace(".", "_"): name}
    state, keys, told = dict[str, Tensor](), dict[str, str](), dict[str, str]()
    for key, tensor in content.items():
        plain = ".".join(part for part in key.split(".") if part not in NAME_WRAPPERS)
        end = ENDING.search(plain)
        module = _located(plain[: end.start()], table) if end else None
        if end and module:
            told[module] = plain[: end.start()].rpartition(PEFT_PREFIX)[2]
            name = module + PLAIN[str(end.lastgroup)]
        else:
            name = plain.removeprefix(PEFT_PREFIX)
        if keys.setdefault(name, key) != key:
            raise UserError(f"{file}: found {keys[name]} and {key}; accepted: one tensor for {name}")
        state[name] = tensor
    return state, told


def _located(name: str, table: Mapping[str, str]) -> str | None:
    while name not in table:
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return None
        name = name.removeprefix(prefix)
    return table[name]


def effects_of(settings: LoraConfig, told: Mapping[str, str], modules: Iterable[str], file: Path) -> dict[str, Effect]:
    """The modules that PEFT adapts under these settings, matched by the names that they had when they were trained.

    told: names in the file by module. What they begin with, the other names begin with too; where that does not give
    the file's modules, the settings may name them with or without what a wrapper adds. UserError where none is adapted.
    """
    layout = next((own for own in LAYOUTS if all(name.endswith(in_layout(o, own)) for o, name in told.items())), WAN)
    outer = next((name.removesuffix(in_layout(module, layout)) for module, name in told.items()), "")
    tried: list[tuple[dict[str, str], dict[str, Effect]]] = []
    try:
        for prefix in dict.fromkeys((outer, "", *NAME_PREFIXES)):
            names = {module: prefix + in_layout(module, layout) for module in modules}
            hit = {module: name for module, name in names.items() if check_target_module_exists(settings, name)}
            tried.append((names, {module: effect_of(settings, name) for module, name in hit.items()}))
        names, effects = next((one for one in tried if one[1].keys() == told.keys()), tried[0])
        patterns = [*settings.rank_pattern, *settings.alpha_pattern]
        idle = [key for key in patterns if all(get_pattern_key([key], name) != key for name in names.values())]
    except re.error as error:
        raise UserError(f"{file}: found settings with a broken expression ({error}); accepted: names") from error
    if idle:
        log.warning("%s: rank_pattern, alpha_pattern: no linear is named %s", file, listed(idle))
    if not effects:
        found = settings.target_modules
        shown = found if isinstance(found, str) else listed(found or ())
        raise UserError(f"{file}: target_modules: found {shown}; accepted: names of linears of the model")
    return effects


def effect_of(settings: LoraConfig, name: str) -> Effect:
    """Of the module that had this name when it was trained."""
    rank = settings.rank_pattern.get(get_pattern_key(settings.rank_pattern, name), settings.r)
    alpha = settings.alpha_pattern.get(get_pattern_key(settings.alpha_pattern, name), settings.lora_alpha)
    return Effect(rank, alpha / (math.sqrt(rank) if settings.use_rslora else rank))


def read_settings(found: Mapping[str, Any], file: Path, own: LoraConfig | None = None) -> LoraConfig:
    """PEFT's configuration from its JSON, without wrappers' parts in names.

    own: configuration of the model that the adapter is for, whose values are accepted; None: PEFT's defaults. Raises
    UserError for settings that are more than products added to linears.
    """
    defaults = (own or LoraConfig()).to_dict() | {"peft_type": "LORA"}
    for key, value in {"peft_type": None, **found}.items():
        plain = defaults.get(key)
        if key not in FOLLOWED | IDLE and value != plain and (value or plain):
            raise UserError(f"{file}: {key}: found {value!r}; accepted: {plain!r}")
    start = found.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        found_start = f"found {start!r}, which changes the base too: base or adapter must be converted with PEFT first"
        raise UserError(f"{file}: init_lora_weights: {found_start}; accepted: {', '.join(map(str, PLAIN_STARTS))}")
    rank, alpha, targets = (found.get(key) for key in ("r", "lora_alpha", "target_modules"))
    if not _is_rank(rank) or not _is_alpha(alpha):
        raise UserError(f"{file}: r, lora_alpha: found {rank!r}, {alpha!r}; accepted: a rank above 0 and a number")
    for key, good in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        pattern = found.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(good, pattern.values())):
            raise UserError(f"{file}: {key}: found {pattern!r}; accepted: names, each with such a number")
    named = {"target_modules": targets} | {key: found.get(key) or () for key in ("exclude_modules", "layers_pattern")}
    for key, names in named.items():
        if not _are(str, names):
            raise UserError(f"{file}: {key}: found {names!r}; accepted: names of linears")
    if not _are(int, layers := found.get("layers_to_transform") or ()):
        raise UserError(f"{file}: layers_to_transform: found {layers!r}; accepted: numbers of layers")
    followed = {key: _unwrapped(value) for key, value in found.items() if key in FOLLOWED and value is not None}
    try:
        return LoraConfig(**followed)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: found settings that PEFT refuses ({error}); accepted: those of a LoRA") from error


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _are(kind: type, value: Any) -> bool:
    """Whether a setting is one of a kind or a list of them."""
    return all(type(one) is kind for one in (value if isinstance(value, list | tuple) else [value]))


def _unwrapped(value: Any) -> Any:
    """A setting's names and expressions without the parts that wrappers add to names."""
    if isinstance(value, str):
        return re.sub(rf"\b({'|'.join(NAME_WRAPPERS)})\\?\.", "", value)
    if isinstance(value, list | tuple):
        return [_unwrapped(one) for one in value]
    return {_unwrapped(key): one for key, one in value.items()} if isinstance(value, dict) else value
