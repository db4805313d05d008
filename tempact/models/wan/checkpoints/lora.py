"""LoRA adapters of the Wan transformer: LongLive's lora.pt, PEFT folders, diffusers' files; read, compared, written.

PEFT itself decides which linears an adapter changes: its configuration is applied to a transformer on the meta device,
and the adapter's tensors must be exactly those of the result. Settings that a merge cannot express are refused.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tempact.errors import UserError
from tempact.models.wan.checkpoints.files import PICKLES, listed, read_file, read_json, read_tensors, require_fit
from tempact.models.wan.checkpoints.names import DIFFUSERS, in_layout, layout_of, plain_names, to_wan, unwrapped
from tempact.models.wan.transformer import WanConfig, WanTransformer

log = logging.getLogger(__name__)

ENTRIES = ("generator_lora",)  # of LongLive's lora.pt, beside critic_lora; the file may also be the adapter alone
CONFIG = "adapter_config.json"
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
DIFFUSERS_METADATA = "lora_adapter_metadata"  # in that file's header, with the keys of adapter_config.json
PEFT_PREFIX, DIFFUSERS_PREFIX = "base_model.model.", "transformer."  # of tensor names
DEFAULT = "default"  # the name that PEFT gives an adapter
DOWN, UP = ".lora_A.weight", ".lora_B.weight"

# settings that may differ from PEFT's defaults: the merge follows them, or they do not concern the merged weights
FOLLOWED = {
    "r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora",
    "layers_to_transform", "layers_pattern", "lora_dropout", "init_lora_weights", "inference_mode", "peft_type",
    "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "ensure_weight_tying",
}  # fmt: skip
PLAIN_STARTS = (True, False, "gaussian")  # of init_lora_weights; other values change the weights below the adapter


@dataclass(frozen=True)
class Factor:
    """The summand of a linear's weight, scale * up @ down; down [rank, in], up [out, rank]."""

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits a transformer.

    config: PEFT's, with Wan names. factors: by Wan name of the linear.
    """

    files: tuple[Path, ...]
    config: LoraConfig
    factors: dict[str, Factor] = field(repr=False)


def is_adapter(path: Path) -> bool:
    """Whether `path` holds an adapter rather than weights, by the names of files and tensors."""
    if path.is_dir():
        return any((path / name).is_file() for name in (CONFIG, DIFFUSERS_FILE))
    content = read_file(path)
    if not isinstance(content, Mapping):
        return False
    return any(entry in content for entry in ENTRIES) or any(".lora_A." in str(name) for name in content)


def open_adapter(path: Path, config: WanConfig) -> Adapter:
    """Reads an adapter for a transformer of the sizes `config`.

    `path`: a PEFT folder (adapter_config.json beside adapter_model), a folder or file of diffusers
    (pytorch_lora_weights.safetensors), or LongLive's lora.pt, of which the generator's is taken. A file without a
    configuration has scale 1, as LongLive's (alpha equals the rank).

    Raises UserError in one line: files missing, cut off or unsafe; tensors missing, extra or of another shape than the
    configuration says; kinds of LoRA that are more than a product added to linears.
    """
    names = (*PEFT_FILES, DIFFUSERS_FILE)
    file = next((path / name for name in names if (path / name).is_file()), None) if path.is_dir() else path
    if file is None:
        raise UserError(f"{path}: found no adapter; accepted: a folder with {CONFIG} and {PEFT_FILES[0]}")
    if not file.is_file():
        raise UserError(f"{file}: found no file; accepted: an adapter's file or folder")
    content, settings = read_tensors([file], ENTRIES)[1], _settings_of(file)
    state = _wan_names(content, file)
    peft = _from_settings(settings, path) if settings is not None else None
    if peft is None or layout_of(content) == DIFFUSERS:
        peft = _from_tensors(state, peft, file)
    factors = _factors(state, peft, config, file)
    files = (file, file.with_name(CONFIG)) if file.name in PEFT_FILES else (file,)
    log.info("%s: adapter of rank %d on %d linears", path, peft.r, len(factors))
    return Adapter(files, peft, factors)


def _settings_of(file: Path) -> dict[str, Any] | None:
    """PEFT's settings beside or in a file of tensors, None if there are none."""
    if file.name in PEFT_FILES:
        return read_json(file.with_name(CONFIG))
    if file.suffix in PICKLES:
        return None
    with safe_open(file, "pt") as opened:
        header = (opened.metadata() or {}).get(DIFFUSERS_METADATA)
    try:
        return header and {key.removeprefix(DIFFUSERS_PREFIX): value for key, value in json.loads(header).items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: {DIFFUSERS_METADATA}: found no JSON object; accepted: PEFT's settings") from error


def _wan_names(content: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Wan's module names with PEFT's endings, whatever the file calls them."""
    for prefix in (PEFT_PREFIX, DIFFUSERS_PREFIX):
        if content and all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): tensor for name, tensor in content.items()}
    plain = unwrapped({re.sub(r"\.(lora_[AB])\.default\.", r".\1.", n): t for n, t in content.items()}, file)
    return {to_wan(name): t for name, t in plain.items()} if layout_of(plain) == DIFFUSERS else plain


def _from_settings(settings: dict[str, Any], path: Path) -> LoraConfig:
    """PEFT's configuration from its JSON; UserError for one that is more than a product added to linears."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{path}: peft_type: found {kind!r}; accepted: LORA")
    defaults = LoraConfig().to_dict()
    for key, value in settings.items():
        plain = defaults.get(key)
        if key not in FOLLOWED and value != plain and (value or plain):
            raise UserError(
                f"{path}: {key}: found {value!r}; accepted: {plain!r}, which can be merged into the weights"
            )
    start = settings.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        accepted = ", ".join(map(str, PLAIN_STARTS))
        raise UserError(f"{path}: init_lora_weights: found {start!r}, which changes the base; accepted: {accepted}")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not alpha > 0:  # type: ignore[operator]
        raise UserError(f"{path}: r, lora_alpha: found {rank!r}, {alpha!r}; accepted: a rank and a number above 0")
    targets = settings.get("target_modules")
    if isinstance(targets, list | tuple | set):
        targets = sorted(set(plain_names(map(str, targets)).values()))
    elif not isinstance(targets, str):
        raise UserError(f"{path}: target_modules: found {targets!r}; accepted: names of linears")
    followed = {key: value for key, value in settings.items() if key in FOLLOWED and key in defaults}
    kept = {"lora_dropout": 0.0, "init_lora_weights": True, "target_modules": targets}
    return LoraConfig(**{key: value for key, value in (followed | kept).items() if key != "peft_type"})


def _from_tensors(state: Mapping[str, Tensor], settings: LoraConfig | None, file: Path) -> LoraConfig:
    """The configuration that the tensors tell of; alpha is the rank, or as in `settings`.

    Every block must have the linears that any block has.
    """
    modules = [name.removesuffix(DOWN) for name in state if name.endswith(DOWN)]
    ranks = sorted({tensor.shape[0] for name, tensor in state.items() if name.endswith(DOWN) and tensor.ndim == 2})
    if len(ranks) != 1:
        found = f"ranks {ranks}" if ranks else f"{len(state)} tensors without a LoRA ({listed(sorted(state), 4)})"
        raise UserError(f"{file}: found {found}; accepted: an adapter of one rank, or a PEFT folder")
    if settings is not None and (settings.rank_pattern or settings.alpha_pattern or settings.r != ranks[0]):
        raise UserError(f"{file}: found rank {ranks[0]} under settings of rank {settings.r}; accepted: one rank")
    targets = sorted({re.sub(r"^blocks\.\d+\.", "", module) for module in modules})
    alpha, stable = (ranks[0], False) if settings is None else (settings.lora_alpha, settings.use_rslora)
    return LoraConfig(r=ranks[0], lora_alpha=alpha, use_rslora=stable, target_modules=targets)


def _factors(state: Mapping[str, Tensor], peft: LoraConfig, config: WanConfig, file: Path) -> dict[str, Factor]:
    """The adapter's matrices by linear, once they are what PEFT makes of its configuration."""
    accepted = f"an adapter of rank {peft.r} for this transformer ({config.layers} blocks of {config.dim} channels)"
    targets = peft.target_modules
    with torch.device("meta"):
        try:
            model = get_peft_model(WanTransformer(config), peft)
        except ValueError as error:
            shown = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
            raise UserError(
                f"{file}: target_modules: found {shown}; accepted: names of the Wan transformer's linears"
            ) from error
    made = get_peft_model_state_dict(model, adapter_name=DEFAULT)
    expected = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in made.items()}
    require_fit(expected, state, file, accepted)
    layers = dict(model.base_model.model.named_modules())
    factors = {}
    for module in dict.fromkeys(name.removesuffix(DOWN).removesuffix(UP) for name in expected):
        layer = layers[module]
        if not isinstance(layer, LoraLinear):
            raise UserError(f"{file}: found an adapter of {module}, which is no linear; accepted: {accepted}")
        factors[module] = Factor(state[module + DOWN], state[module + UP], layer.scaling[DEFAULT])
    return factors


def write_adapter(adapter: Adapter, folder: Path, layout: str, dtype: torch.dtype | None = None) -> None:
    """Writes an adapter into `folder`, as PEFT ("wan") or as diffusers ("diffusers") reads it.

    dtype: None keeps that of the tensors. PEFT's files are adapter_config.json and adapter_model.safetensors with Wan
    names, as TempAct's authors publish them. diffusers' file has scale 1: another scale is multiplied into the second
    matrix, since not every version of diffusers reads a scale.
    """
    tensors: dict[str, Tensor] = {}
    for module, factor in adapter.factors.items():
        own = (DIFFUSERS_PREFIX if layout == DIFFUSERS else PEFT_PREFIX) + in_layout(module, layout)
        scaled = layout == DIFFUSERS and factor.scale != 1.0
        up = (factor.up.double() * factor.scale).to(factor.up.dtype) if scaled else factor.up
        for ending, matrix in ((DOWN, factor.down), (UP, up)):
            tensors[own + ending] = matrix.to(dtype or matrix.dtype).contiguous()
    if layout == DIFFUSERS:
        save_file(tensors, folder / DIFFUSERS_FILE, metadata={"format": "pt"})
        return
    save_file(tensors, folder / PEFT_FILES[0], metadata={"format": "pt"})
    adapter.config.save_pretrained(str(folder))
    settings = json.loads((folder / CONFIG).read_text())
    if isinstance(settings["target_modules"], list):  # from a set: in another order, and hash, each time
        settings["target_modules"].sort()
    (folder / CONFIG).write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
