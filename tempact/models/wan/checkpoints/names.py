"""Names and sizes of the published Wan checkpoints: layouts, what wrappers leave in names, config.json.

Tensor names are told apart by layout: "wan" is that of Wan's own release, of Self-Forcing, Causal-Forcing and
LongLive, and of `WanTransformer`; "diffusers" is that of `WanTransformer3DModel`. Facts: BACKBONES.md sections 1 and 4.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tempact.errors import UserError
from tempact.models.wan.checkpoints.files import listed, read_json
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
WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}  # parts of a name, anywhere in it
PREFIXES = ("module.", "model.", "diffusion_model.")  # of all names, from the outside in
CLASSES = {WAN: ("WanModel", "CausalWanModel"), DIFFUSERS: ("WanTransformer3DModel",)}  # the first one is written


def to_diffusers(name: str) -> str:
    """diffusers' name of a tensor or module that has a Wan name; other names stay."""
    return _renamed(name, OUTSIDE, INSIDE)


def to_wan(name: str) -> str:
    """The reverse of `to_diffusers`."""
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
    """The layout whose names these are."""
    return DIFFUSERS if any(re.search(r"^condition_embedder\.|^proj_out\.|\.attn[12]\.", n) for n in names) else WAN


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Each name without what FSDP, compilation, checkpointing and wrapping modules put into it."""
    plain = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names}
    for prefix in PREFIXES:
        if plain and all(name.startswith(prefix) for name in plain.values()):
            plain = {name: inner.removeprefix(prefix) for name, inner in plain.items()}
    return plain


def unwrapped(state: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The tensors by their plain names; UserError for two names that come to the same."""
    plain = plain_names(state)
    owners: dict[str, str] = {}
    for name, inner in plain.items():
        if owners.setdefault(inner, name) != name:
            raise UserError(f"{source}: found {owners[inner]} and {name}; accepted: one tensor for {inner}")
    return {inner: state[name] for name, inner in plain.items()}


def expected_shapes(config: WanConfig) -> dict[str, torch.Size]:
    """Wan names and shapes of all tensors; 825 at the published sizes."""
    with torch.device("meta"):
        model = WanTransformer(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def read_config(file: Path) -> WanConfig:
    """Sizes from a config.json of Wan's or diffusers' layout; UserError for another model or a variant of Wan."""
    content = read_json(file)
    name = content.get("_class_name")
    known = [kind for kinds in CLASSES.values() for kind in kinds]
    if name not in known:
        raise UserError(f"{file}: found _class_name {name!r}; accepted: {', '.join(known)}")
    layout = next(layout for layout, kinds in CLASSES.items() if name in kinds)
    _refuse_variants(content, layout, file)
    try:
        return _sizes(content, layout)
    except KeyError as error:
        raise UserError(f"{file}: {error.args[0]} is missing; accepted: all sizes of the transformer") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: {error}; accepted: sizes of a Wan transformer") from error


def _sizes(content: dict[str, Any], layout: str) -> WanConfig:
    """KeyError for a size that has no default, ValueError for one that cannot be."""
    default = WanConfig()
    own = {
        name: content.get(name, getattr(default, name)) for name in ("freq_dim", "text_dim", "text_len")
    }  # what every published model shares need not be there
    own["ffn_dim"] = content["ffn_dim"]
    if layout == WAN:
        own |= {name: content[name] for name in ("dim", "in_dim", "out_dim")}
        own |= {"heads": content["num_heads"], "layers": content["num_layers"]}
    else:
        heads, channels = content["num_attention_heads"], content["in_channels"]
        own |= {"dim": heads * content["attention_head_dim"], "heads": heads, "layers": content["num_layers"]}
        own |= {"in_dim": channels, "out_dim": content.get("out_channels") or channels}
    for name, size in own.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"{name}: found {size!r}, which is no size")
    patch = tuple(content.get("patch_size", default.patch))
    if len(patch) != 3 or any(type(side) is not int or side < 1 for side in patch):
        raise ValueError(f"patch_size: found {patch}, which is no patch of frames, rows and columns")
    if own["dim"] % own["heads"] or own["dim"] // own["heads"] % 2:
        raise ValueError(f"found {own['dim']} channels for {own['heads']} heads, which leaves no even head size")
    return WanConfig(**own, patch=patch, eps=float(content.get("eps", default.eps)))


def _refuse_variants(content: dict[str, Any], layout: str, file: Path) -> None:
    """Settings that make another model of the same tensors, or one with more of them."""
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

    diffusers has no place for text_len; the published 512 is what reading assumes.
    """
    shared = {
        "_class_name": CLASSES[layout][0],
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "text_dim": config.text_dim,
        "num_layers": config.layers,
        "patch_size": list(config.patch),
        "eps": config.eps,
        "cross_attn_norm": True,
    }
    if layout == WAN:
        own: dict[str, Any] = {
            "model_type": "t2v",
            "dim": config.dim,
            "in_dim": config.in_dim,
            "out_dim": config.out_dim,
            "num_heads": config.heads,
            "text_len": config.text_len,
            "qk_norm": True,
        }
    else:
        own = {
            "num_attention_heads": config.heads,
            "attention_head_dim": config.head_dim,
            "in_channels": config.in_dim,
            "out_channels": config.out_dim,
            "qk_norm": "rms_norm_across_heads",
            "image_dim": None,
            "added_kv_proj_dim": None,
            "pos_embed_seq_len": None,
            "rope_max_seq_len": 1024,
        }
    return shared | own


def other_model(names: Iterable[str], expected: Iterable[str]) -> str:
    """A few of the names, if they have hardly any in common with what is expected; "" otherwise."""
    found, wanted = set(names), set(expected)
    return "" if len(found & wanted) > len(wanted) // 10 else listed(sorted(found), limit=4) or "none"
