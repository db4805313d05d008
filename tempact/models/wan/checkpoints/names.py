"""Tensor names and sizes of the published Wan transformers: the two layouts, wrappers' prefixes, config.json.

Layout "wan": names of Wan's own release, of Self-Forcing, Causal-Forcing and LongLive, and of `WanTransformer`.
Layout "diffusers": names of `WanTransformer3DModel`. Source: docs/backbones.md sections 1 and 4.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tempact.config import NAME_PREFIXES, NAME_WRAPPERS
from tempact.errors import UserError
from tempact.models.wan.checkpoints.files import read_json
from tempact.models.wan.transformer import WanConfig, WanTransformer

WAN, DIFFUSERS = "wan", "diffusers"
LAYOUTS = (WAN, DIFFUSERS)

# Wan's names of modules and tables to those of diffusers, outside of the blocks and in them
OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
INSIDE = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",  # Wan counts its norms in another order; the other two have no parameters
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{
        f"{kind}.{wan}": f"{other}.{diffusers}"
        for kind, other in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for wan, diffusers in ATTENTION.items()
    },
}
CLASSES = {WAN: ("WanModel", "CausalWanModel"), DIFFUSERS: ("WanTransformer3DModel",)}  # the first one is written

# fields of `WanConfig` and their keys in a config.json, of both layouts and of either
SHARED = {"ffn_dim": "ffn_dim", "freq_dim": "freq_dim", "text_dim": "text_dim", "layers": "num_layers"}
OWN = {
    WAN: {"dim": "dim", "in_dim": "in_dim", "out_dim": "out_dim", "heads": "num_heads", "text_len": "text_len"},
    DIFFUSERS: {
        "heads": "num_attention_heads", "head_dim": "attention_head_dim",
        "in_dim": "in_channels", "out_dim": "out_channels",
    },
}  # fmt: skip
# keys that may be missing: all published models share them, and diffusers' out_channels may be left to in_channels
OPTIONAL = {WAN: ("freq_dim", "text_dim", "text_len"), DIFFUSERS: ("freq_dim", "text_dim", "out_dim")}
WRITTEN: dict[str, dict[str, Any]] = {  # what else a config.json says
    WAN: {"model_type": "t2v", "qk_norm": True},
    DIFFUSERS: {
        "qk_norm": "rms_norm_across_heads", "image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": None,
        "rope_max_seq_len": 1024,
    },
}  # fmt: skip


def in_layout(name: str, layout: str) -> str:
    """The name in a layout of a tensor or module that has a Wan name; other names stay."""
    return _renamed(name, OUTSIDE, INSIDE) if layout == DIFFUSERS else name


def to_wan(name: str) -> str:
    """The Wan name of a tensor or module that has diffusers' name; other names stay."""
    return _renamed(name, {b: a for a, b in OUTSIDE.items()}, {b: a for a, b in INSIDE.items()})


def _renamed(name: str, outside: Mapping[str, str], inside: Mapping[str, str]) -> str:
    block = re.match(r"blocks\.\d+\.", name)
    start = block[0] if block else ""
    table, rest = (inside, name[len(start) :]) if block else (outside, name)
    for old, new in table.items():
        if rest == old or rest.startswith(f"{old}."):
            return f"{start}{new}{rest[len(old) :]}"
    return name


def layout_of(names: Iterable[str]) -> str:
    """The layout, one of LAYOUTS, that has these names."""
    return DIFFUSERS if any(re.search(r"^condition_embedder\.|^proj_out\.|\.attn[12]\.", n) for n in names) else WAN


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Each name, and the same without the parts that NAME_WRAPPERS and NAME_PREFIXES list."""
    plain = {name: ".".join(part for part in name.split(".") if part not in NAME_WRAPPERS) for name in names}
    for prefix in NAME_PREFIXES:
        if plain and all(name.startswith(prefix) for name in plain.values()):
            plain = {name: inner.removeprefix(prefix) for name, inner in plain.items()}
    return plain


def unwrapped(state: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The tensors by their plain names; UserError for two names that come to the same."""
    owners: dict[str, str] = {}
    for name, inner in plain_names(state).items():
        if owners.setdefault(inner, name) != name:
            raise UserError(f"{source}: found {owners[inner]} and {name}; accepted: one tensor for {inner}")
    return {inner: state[name] for inner, name in owners.items()}


def expected_tensors(config: WanConfig) -> dict[str, Tensor]:
    """All tensors by Wan name, on the meta device; 825 at the published sizes."""
    with torch.device("meta"):
        return dict(WanTransformer(config).state_dict())


def read_config(file: Path) -> WanConfig:
    """Sizes from a config.json of Wan's or diffusers' layout; UserError for another model or a variant of Wan."""
    content = read_json(file)
    name = content.get("_class_name")
    known = [kind for kinds in CLASSES.values() for kind in kinds]
    if name not in known:
        raise UserError(f"{file}: found _class_name {name!r}; accepted: {', '.join(known)}")
    layout = next(layout for layout, kinds in CLASSES.items() if name in kinds)
    _refuse_variants(content, file)
    try:
        return _sizes(content, layout)
    except KeyError as error:
        raise UserError(f"{file}: {error.args[0]} is missing; accepted: all sizes of the transformer") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: {error}; accepted: sizes of a Wan transformer") from error


def _sizes(content: dict[str, Any], layout: str) -> WanConfig:
    """KeyError for a size that has no default, ValueError for a size that cannot be."""
    default = WanConfig()
    keys = SHARED | OWN[layout]
    own = {name: content[key] for name, key in keys.items() if key in content or name not in OPTIONAL[layout]}
    if layout == DIFFUSERS:
        own["dim"] = own["heads"] * own.pop("head_dim")
        own["out_dim"] = own.get("out_dim") or own["in_dim"]
    for name, size in own.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"{name}: found {size!r}, which is no size")
    patch = tuple(content.get("patch_size", default.patch))
    if len(patch) != 3 or any(type(side) is not int or side < 1 for side in patch):
        raise ValueError(f"patch_size: found {patch}, which is no patch of frames, rows and columns")
    if own["dim"] % own["heads"] or own["dim"] // own["heads"] % 2:
        raise ValueError(f"found {own['dim']} channels for {own['heads']} heads, which leaves no even head size")
    return WanConfig(**own, patch=patch, eps=float(content.get("eps", default.eps)))


def _refuse_variants(content: dict[str, Any], file: Path) -> None:
    """UserError for settings that make another model of the same tensors, or one with more tensors."""
    plain: dict[str, tuple[Any, ...]] = {
        "model_type": ("t2v", None),
        "qk_norm": (True, "rms_norm_across_heads"),
        "cross_attn_norm": (True,),
        "window_size": ([-1, -1],),
        "image_dim": (None,),
        "added_kv_proj_dim": (None,),
        "pos_embed_seq_len": (None,),
        "vace_layers": (None,),
    }
    for key, values in plain.items():
        if key in content and content[key] not in values:
            raise UserError(
                f"{file}: {key}: found {content[key]!r}; accepted: {values[0]!r} (a Wan text-to-video model)"
            )


def config_json(config: WanConfig, layout: str) -> dict[str, Any]:
    """The config.json that Wan's own code or diffusers reads; `read_config` gives `config` back.

    diffusers has no place for text_len: reading assumes the published 512.
    """
    sizes = {key: getattr(config, name) for name, key in (SHARED | OWN[layout]).items()}
    shape = {"patch_size": list(config.patch), "eps": config.eps}
    return {"_class_name": CLASSES[layout][0], **sizes, **shape, "cross_attn_norm": True, **WRITTEN[layout]}
