"""LoRA adapters, whichever tool wrote them: PEFT folders, diffusers', kohya's and ComfyUI's files, LongLive's lora.pt.

Keys are read by `models.adapters`. The rank of a module is that of its tensors; its scale is alpha / rank with the
alpha of the file, else that of PEFT's settings, else 1.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tempact.errors import UserError
from tempact.models.adapters import (
    CONFIG,
    DIFFUSERS_PREFIX,
    DOWN,
    ENDING,
    PEFT_FILES,
    PEFT_PREFIX,
    UP,
    Effect,
    effect_of,
    effects_of,
    plain_state,
    read_settings,
)
from tempact.models.wan.checkpoints.files import (
    PICKLES,
    listed,
    read_file,
    read_json,
    read_tensors,
    require_finite,
    require_fit,
)
from tempact.models.wan.checkpoints.names import DIFFUSERS, expected_tensors, in_layout
from tempact.models.wan.transformer import WanConfig

log = logging.getLogger(__name__)

ENTRIES = ("generator_lora",)  # of LongLive's lora.pt, beside critic_lora; the file may also be the adapter alone
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
DIFFUSERS_METADATA = "lora_adapter_metadata"  # in that file's header, with the keys of adapter_config.json


@dataclass(frozen=True)
class Factor:
    """The summand of a weight, scale * up @ down; down [rank, in], up [out, rank], of a convolution with its sides."""

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits a transformer.

    factors: by Wan name of the linear or convolution. diffs: summands of whole tensors, by their Wan name. targets: of
    PEFT, for exactly these factors.
    """

    files: tuple[Path, ...]
    targets: tuple[str, ...]
    factors: dict[str, Factor] = field(repr=False)
    diffs: dict[str, Tensor] = field(repr=False)

    @property
    def rank(self) -> int:
        """The largest of all modules; 0 for differences alone."""
        return max((len(factor.down) for factor in self.factors.values()), default=0)


def is_adapter(path: Path) -> bool:
    """Whether `path` holds an adapter rather than weights, by the names of files and tensors."""
    if path.is_dir():
        return any((path / name).is_file() for name in (CONFIG, DIFFUSERS_FILE))
    content = read_file(path)
    return isinstance(content, Mapping) and any(name in ENTRIES or ENDING.search(str(name)) for name in content)


def open_adapter(path: Path, config: WanConfig) -> Adapter:
    """Reads an adapter for a transformer of the sizes `config`.

    `path`: a PEFT folder (adapter_config.json beside adapter_model), a folder of diffusers, or a file of any tool, of
    which LongLive's lora.pt gives the generator's. Modules that a file has nothing of stay as they are; PEFT's settings
    say what must be there. Beside products a file may hold differences of weights, biases and modulation tables.

    Raises UserError in one line: files missing, cut off or unsafe; tensors unknown, missing, of another shape or not
    finite; settings that are more than products added to linears.
    """
    names = (*PEFT_FILES, DIFFUSERS_FILE)
    file = next((path / name for name in names if (path / name).is_file()), None) if path.is_dir() else path
    if file is None:
        raise UserError(f"{path}: found no adapter; accepted: a folder with {CONFIG} and {PEFT_FILES[0]}")
    content = read_tensors([file], ENTRIES)[1]
    tensors = expected_tensors(config)
    weights = {n.removesuffix(".weight"): own for n, own in tensors.items() if n.endswith(".weight") and own.ndim > 1}
    state, told = plain_state(content, {name.removesuffix(".weight").removesuffix(".bias") for name in tensors}, file)
    if not told:
        shown = listed(sorted(content), 4)
        raise UserError(f"{file}: found {len(content)} tensors without a LoRA ({shown}); accepted: an adapter")
    alphas = {name.removesuffix(".alpha"): state.pop(name) for name in list(state) if name.endswith(".alpha")}
    halves = {module for module in weights if module + DOWN in state or module + UP in state}
    effects = _effects(file, state, {module: name for module, name in told.items() if module in halves}, weights)
    for module, alpha in alphas.items():
        if module not in effects or alpha.numel() != 1 or not math.isfinite(alpha.item()):
            found = f"{module}.alpha {alpha.flatten()[:2].tolist()}"
            raise UserError(f"{file}: found {found}; accepted: one finite number beside the two matrices of a linear")
        effects[module] = effects[module]._replace(scale=alpha.item() / effects[module].rank)
    for name, tensor in state.items():  # a linear as a convolution of side 1
        own = weights.get(name.removesuffix(DOWN).removesuffix(UP))
        state[name] = tensor.flatten(1) if own is not None and own.ndim == 2 < tensor.ndim else tensor
    accepted = f"an adapter of this transformer ({config.layers} blocks of {config.dim} channels)"
    require_fit(_expected(effects, state, weights, tensors), state, file, accepted)
    require_finite(state, file)
    factors = {module: Factor(state[module + DOWN], state[module + UP], own.scale) for module, own in effects.items()}
    diffs = {_changed(name, tensors): tensor for name, tensor in state.items() if name.endswith((".diff", ".diff_b"))}
    log.info("%s: adapter of %d linears, and differences of %d tensors", path, len(factors), len(diffs))
    files = (file, file.with_name(CONFIG)) if file.name in PEFT_FILES else (file,)
    return Adapter(files, _targets(factors, weights), factors, diffs)


def _effects(
    file: Path, state: Mapping[str, Tensor], told: dict[str, str], weights: Iterable[str]
) -> dict[str, Effect]:
    """Of every module that must have both matrices."""
    settings, own = _settings_of(file), file.name in PEFT_FILES
    told = {module: name if own else name.removeprefix(DIFFUSERS_PREFIX) for module, name in told.items()}
    if settings is not None and (settings.target_modules or own):
        return effects_of(settings, told, weights, file)
    if settings is not None:
        return {module: effect_of(settings, name) for module, name in told.items()}
    sides = {o: state[o + DOWN].shape[:1] if o + DOWN in state else state[o + UP].shape[1:2] for o in told}
    return {module: Effect(max(1, side.numel()), 1.0) for module, side in sides.items()}


def _expected(
    effects: Mapping[str, Effect],
    state: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    tensors: dict[str, Tensor],
) -> dict[str, Tensor]:
    """What the adapter must hold by plain name, on the meta device."""
    expected = {}
    for module, (rank, _) in effects.items():
        out, *rest = weights[module].shape
        expected[module + DOWN] = torch.empty(rank, *rest, device="meta")
        expected[module + UP] = torch.empty(out, rank, *[1] * (len(rest) - 1), device="meta")
    changed = {name: _changed(name, tensors) for name in state if name.endswith((".diff", ".diff_b"))}
    return expected | {name: tensors[tensor] for name, tensor in changed.items() if tensor in tensors}


def _changed(name: str, tensors: Iterable[str]) -> str:
    """The tensor that a difference belongs to."""
    module, _, role = name.rpartition(".")
    return f"{module}.bias" if role == "diff_b" else module if module in tensors else f"{module}.weight"


def _targets(factors: Iterable[str], modules: Iterable[str]) -> tuple[str, ...]:
    """PEFT's target_modules for exactly these factors: names within a block where all blocks have them."""
    short = {re.sub(r"^blocks\.\d+\.", "", module) for module in factors}
    hit = {module for module in modules if any(module == end or module.endswith(f".{end}") for end in short)}
    return tuple(sorted(short if hit == set(factors) else factors))


def _settings_of(file: Path) -> LoraConfig | None:
    """PEFT's settings beside or in a file of tensors, None if there are none."""
    if file.name in PEFT_FILES:
        return read_settings(read_json(file.with_name(CONFIG)), file.with_name(CONFIG))
    if file.suffix in PICKLES:
        return None
    with safe_open(file, "pt") as opened:
        header = (opened.metadata() or {}).get(DIFFUSERS_METADATA)
    if header is None:
        return None
    try:
        found = {key.removeprefix(DIFFUSERS_PREFIX): value for key, value in json.loads(header).items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: {DIFFUSERS_METADATA}: found no JSON object; accepted: PEFT's settings") from error
    return read_settings({"peft_type": "LORA", "target_modules": ()} | found, file)


def write_adapter(adapter: Adapter, folder: Path, layout: str, dtype: torch.dtype | None = None) -> None:
    """Writes an adapter into `folder`, as PEFT ("wan") or as diffusers ("diffusers") reads it.

    dtype: None keeps that of the tensors. PEFT's files are adapter_config.json and adapter_model.safetensors with Wan
    names, as TempAct's authors publish them. diffusers' file has scale 1: another scale is multiplied into the second
    matrix, since not every version of diffusers reads a scale. UserError for differences, which neither can hold.
    """
    if adapter.diffs:
        found = f"differences of whole tensors ({listed(adapter.diffs)})"
        raise UserError(f"{adapter.files[0]}: found {found}; accepted: products alone, or weights to merge it into")
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
    _config(adapter).save_pretrained(str(folder))
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    settings["target_modules"] = list(adapter.targets)  # from a set: in another order, and hash, each time
    (folder / CONFIG).write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _config(adapter: Adapter) -> LoraConfig:
    """PEFT's configuration: the most frequent rank and alpha, and patterns for the others."""
    ranks = {module: len(factor.down) for module, factor in adapter.factors.items()}
    # rounded: a rank times alpha / rank may miss alpha by its last bit
    alphas = {module: round(factor.scale * ranks[module], 12) for module, factor in adapter.factors.items()}
    (rank, _), (alpha, _) = (Counter(own.values()).most_common(1)[0] for own in (ranks, alphas))
    return LoraConfig(
        r=rank, lora_alpha=int(alpha) if alpha.is_integer() else alpha, target_modules=list(adapter.targets),
        rank_pattern={module: own for module, own in ranks.items() if own != rank},
        alpha_pattern={module: own for module, own in alphas.items() if own != alpha},
    )  # fmt: skip
