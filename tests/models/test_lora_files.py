"""LoRA files as people bring them, from every tool: the merged weight is W + scale * up @ down, in fp64."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import synthesise
from models.test_checkpoints import Unsafe
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from tempact.errors import UserError
from tempact.models.wan.checkpoints.convert import convert, verify
from tempact.models.wan.checkpoints.load import load_transformer, open_checkpoint
from tempact.models.wan.checkpoints.lora import is_adapter, open_adapter
from tempact.models.wan.checkpoints.names import in_layout
from tempact.models.wan.transformer import WanConfig

CPU = torch.device("cpu")
SMALL = WanConfig(dim=48, ffn_dim=80, freq_dim=32, text_dim=16, text_len=6, heads=2, layers=3, in_dim=4, out_dim=4)
RANK = 4
LINEARS = [f"blocks.{i}.{name}" for i in range(SMALL.layers) for name in synthesise.ALL_LINEARS]
STATE = synthesise.random_state(SMALL)
Summands = dict[str, Tensor]  # by the name of the tensor that they are added to


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesise.wan_folder(tmp_path_factory.mktemp("base") / "wan", STATE, SMALL)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / max(shape) ** 0.5


def pair(module: str, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """down and up of a module."""
    weight, seed = STATE[f"{module}.weight"], sum(map(ord, module))
    return draw(rank, weight[0].numel(), seed=seed), draw(len(weight), rank, seed=seed + 1)


def product(module: str, scale: float, rank: int = RANK) -> Summands:
    down, up = pair(module, rank)
    return {f"{module}.weight": scale * (up.double() @ down.double()).view_as(STATE[f"{module}.weight"])}


def products(scale: float) -> Summands:
    return {name: summand for module in LINEARS for name, summand in product(module, scale).items()}


def keys(
    name: Callable[[str], str], down: str, up: str, alpha: Tensor | None = None, modules: list[str] = LINEARS,
    rank: int = RANK,
) -> dict[str, Tensor]:  # fmt: skip
    content = {}
    for module in modules:
        content |= dict(zip((f"{name(module)}.{down}", f"{name(module)}.{up}"), pair(module, rank), strict=True))
        content |= {} if alpha is None else {f"{name(module)}.alpha": alpha.clone()}
    return content


def kohya(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


def comfy(module: str) -> str:
    return f"diffusion_model.{module}"


def by_diffusers(module: str) -> str:
    return "transformer." + in_layout(module, "diffusers")


def distilled() -> tuple[dict[str, Tensor], Summands]:
    """As step-distilled models are published: products, and differences of biases, norms and modulation."""
    content, wanted = keys(comfy, "lora_down.weight", "lora_up.weight"), products(1.0)
    for key, name in (
        ("blocks.0.self_attn.q.diff_b", "blocks.0.self_attn.q.bias"),
        ("blocks.0.self_attn.norm_q.diff", "blocks.0.self_attn.norm_q.weight"),
        ("blocks.1.norm3.diff", "blocks.1.norm3.weight"),
        ("blocks.1.norm3.diff_b", "blocks.1.norm3.bias"),
        ("blocks.0.diff_m", "blocks.0.modulation"),
        ("head.diff_m", "head.modulation"),
        ("blocks.2.modulation.diff", "blocks.2.modulation"),
        ("patch_embedding.diff", "patch_embedding.weight"),
        ("time_embedding.2.diff", "time_embedding.2.weight"),
        ("blocks.0.self_attn.k.diff", "blocks.0.self_attn.k.weight"),  # beside a product
    ):
        content[comfy(key)] = draw(*STATE[name].shape, seed=len(name))
        wanted[name] = content[comfy(key)].double() + wanted.get(name, 0.0)
    return content, wanted


def extracted() -> tuple[dict[str, Tensor], Summands]:
    left = [module for module in LINEARS if module not in ("blocks.0.ffn.2", "blocks.0.self_attn.q")]
    wanted = {name: summand for module in left for name, summand in product(module, 1.0).items()}
    return keys(comfy, "lora_down.weight", "lora_up.weight", modules=left), wanted


def two_ranks() -> tuple[dict[str, Tensor], Summands]:
    wide, thin = ([m for m in LINEARS if (".ffn." in m) is thin] for thin in (False, True))
    content = keys(comfy, "lora_A.weight", "lora_B.weight", modules=wide)
    content |= keys(comfy, "lora_A.weight", "lora_B.weight", modules=thin, rank=2)
    wanted: Summands = {}
    for module in LINEARS:
        wanted |= product(module, 1.0, 2 if module in thin else RANK)
    return content, wanted


def as_convolutions() -> tuple[dict[str, Tensor], Summands]:
    content = keys(kohya, "lora_down.weight", "lora_up.weight", torch.tensor(8))
    wide = {key: tensor[:, :, None, None] if tensor.ndim else tensor for key, tensor in content.items()}
    down, up = pair("patch_embedding")
    wide |= {
        "lora_unet_patch_embedding.lora_down.weight": down.view(RANK, 4, 1, 2, 2),
        "lora_unet_patch_embedding.lora_up.weight": up.view(48, RANK, 1, 1, 1),
    }
    return wide, products(2.0) | product("patch_embedding", 1.0)


def mixed() -> tuple[dict[str, Tensor], Summands]:
    """One file, several manners, an alpha for some."""
    first, second, third = LINEARS[0], LINEARS[7], "head.head"
    content = keys(comfy, "lora_A.weight", "lora_B.weight", torch.tensor([6.0]), [first])
    content |= keys(kohya, "lora_down.weight", "lora_up.weight", modules=[second])
    content |= keys(by_diffusers, "lora.down.weight", "lora.up.weight", torch.tensor(-1.0), [third])
    return content, product(first, 1.5) | product(second, 1.0) | product(third, -0.25)


BF16_2, TWO = torch.tensor(2.0, dtype=torch.bfloat16), torch.tensor(2.0)
FFN = [module for module in LINEARS if ".ffn." in module]
WRAPPED = "module._orig_mod.blocks._checkpoint_wrapped_module"
FILES: dict[str, Callable[[], tuple[Mapping[str, Tensor], Summands]]] = {
    "ComfyUI's with a bf16 alpha": lambda: (keys(comfy, "lora_A.weight", "lora_B.weight", BF16_2), products(0.5)),
    "kohya's": lambda: (keys(kohya, "lora_down.weight", "lora_up.weight", TWO), products(0.5)),
    "kohya's, an integer alpha": lambda: (
        keys(kohya, "lora_down.weight", "lora_up.weight", torch.tensor([12])), products(3.0)
    ),
    "kohya's of diffusers' names": lambda: (
        keys(lambda m: kohya(in_layout(m, "diffusers")), "lora_down.weight", "lora_up.weight", TWO), products(0.5)
    ),
    "kohya's, two underscores": lambda: (
        keys(lambda m: kohya(f".{m}"), "lora_down.weight", "lora_up.weight"), products(1.0)
    ),
    "OneTrainer's": lambda: (
        keys(lambda m: kohya(m).replace("unet", "transformer"), "lora_down.weight", "lora_up.weight", TWO),
        products(0.5),
    ),
    "no prefix": lambda: (keys(str, "lora_A.weight", "lora_B.weight", TWO), products(0.5)),
    "bare matrices": lambda: (keys(comfy, "lora_A", "lora_B"), products(1.0)),
    "PEFT's with a name": lambda: (
        keys(lambda m: f"base_model.model.{m}", "lora_A.my-lora.weight", "lora_B.my-lora.weight"), products(1.0)
    ),
    "wrapped": lambda: (
        keys(lambda m: m.replace("blocks", WRAPPED), "lora_A.default.weight", "lora_B.default.weight"), products(1.0)
    ),
    "packed twice": lambda: (keys(lambda m: f"model.{comfy(m)}", "lora_A.weight", "lora_B.weight"), products(1.0)),
    "diffusers'": lambda: (keys(by_diffusers, "lora_A.weight", "lora_B.weight", TWO), products(0.5)),
    "diffusers' of the ffn alone": lambda: (
        keys(by_diffusers, "lora_A.weight", "lora_B.weight", modules=FFN),
        {name: s for module in FFN for name, s in product(module, 1.0).items()},
    ),
    "distilled": distilled,
    "extracted": extracted,
    "two ranks": two_ranks,
    "as convolutions": as_convolutions,
    "mixed": mixed,
    "differences alone": lambda: (
        {"diffusion_model.blocks.0.norm3.diff_b": draw(48, seed=1)}, {"blocks.0.norm3.bias": draw(48, seed=1).double()}
    ),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("case", FILES)
def test_every_tools_file_is_merged(tmp_path: Path, base: Path, case: str, suffix: str) -> None:
    content, summands = FILES[case]()
    file = tmp_path / f"lora{suffix}"
    plain = {key: tensor.contiguous() for key, tensor in content.items()}
    save_file(plain, file) if suffix == ".safetensors" else torch.save(plain, file)
    assert is_adapter(file)
    found = load_transformer(base, device=CPU, adapters=[file]).state_dict()
    for name, tensor in STATE.items():
        wanted = (tensor.double() + summands[name]).float() if name in summands else tensor
        assert torch.allclose(found[name], wanted, rtol=1e-6, atol=1e-6), name
        assert name not in summands or not torch.allclose(found[name], tensor, atol=1e-3), name


def test_half_precision_matrices_are_multiplied_in_full(tmp_path: Path, base: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        content = keys(comfy, "lora_A.weight", "lora_B.weight", modules=LINEARS[:1])
        content = {key: tensor.to(dtype) for key, tensor in content.items()}
        save_file(content, tmp_path / "lora.safetensors")
        down, up = (tensor.double() for tensor in content.values())
        found = load_transformer(base, device=CPU, adapters=[tmp_path / "lora.safetensors"]).state_dict()
        name = f"{LINEARS[0]}.weight"
        assert torch.equal(found[name], torch.addmm(STATE[name].double(), up, down).float())


HEADERS: dict[str, tuple[dict[str, Any], dict[str, int], dict[str, float]]] = {  # settings, ranks, scales; else 4 and 1
    "both patterns": (
        {"r": 4, "lora_alpha": 2, "rank_pattern": {"blocks.1.attn1.to_q": 2}, "alpha_pattern": {"net.2": 8}},
        {"blocks.1.self_attn.q": 2},
        dict.fromkeys(LINEARS, 0.5) | {m: 2.0 for m in LINEARS if m.endswith("ffn.2")} | {"blocks.1.self_attn.q": 1.0},
    ),
    "one rank": (
        {"r": 4, "lora_alpha": 4, "alpha_pattern": {"attn2.to_q": 16}}, {},
        {m: 4.0 for m in LINEARS if m.endswith("cross_attn.q")},
    ),
    "anchored": (
        {"r": 4, "lora_alpha": 4, "alpha_pattern": {"^blocks.2.attn1.to_k": 8, "blocks\\.[01]\\.ffn.*": 12}}, {},
        {"blocks.2.self_attn.k": 2.0} | {m: 3.0 for m in FFN if "blocks.2" not in m},
    ),
    "rank-stabilised": ({"r": 4, "lora_alpha": 4, "use_rslora": True}, {}, dict.fromkeys(LINEARS, 2.0)),
}  # fmt: skip


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("case", HEADERS)
def test_a_header_is_followed_as_diffusers_follows_it(tmp_path: Path, base: Path, case: str, whole: bool) -> None:
    """whole: all of PEFT's settings, as diffusers writes them, which it then fuses to the same weights."""
    settings, ranks, scales = HEADERS[case]
    content: dict[str, Tensor] = {}
    for module in LINEARS:
        content |= keys(by_diffusers, "lora_A.weight", "lora_B.weight", None, [module], ranks.get(module, RANK))
    if whole:
        names = [in_layout(module, "diffusers") for module in LINEARS]
        settings = LoraConfig(target_modules=names, **settings).to_dict()
        settings["target_modules"] = sorted(settings["target_modules"])
    header = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(content, file, metadata={"format": "pt", "lora_adapter_metadata": header})
    found = load_transformer(base, device=CPU, adapters=[tmp_path]).state_dict()
    for module in LINEARS:
        name = f"{module}.weight"
        wanted = STATE[name].double() + product(module, scales.get(module, 1.0), ranks.get(module, RANK))[name]
        assert torch.allclose(found[name], wanted.float(), rtol=1e-6, atol=1e-6), name
    if whole:
        pytest.importorskip("diffusers", reason="needs diffusers: pip install -e '.[test]'")
        model = synthesise.diffusers_model({name: tensor.clone() for name, tensor in STATE.items()}, SMALL)
        model.load_lora_adapter(load_file(file), metadata={f"transformer.{k}": v for k, v in settings.items()})
        model.fuse_lora()
        fused = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
        for module in LINEARS:
            theirs = fused[f"{in_layout(module, 'diffusers')}.weight"]
            assert torch.allclose(found[f"{module}.weight"], theirs, rtol=1e-5, atol=1e-5), module


def test_a_header_nested_too_deeply_is_refused(tmp_path: Path, base: Path) -> None:
    file = tmp_path / "pytorch_lora_weights.safetensors"
    content = keys(by_diffusers, "lora_A.weight", "lora_B.weight", None, LINEARS, RANK)
    save_file(content, file, metadata={"format": "pt", "lora_adapter_metadata": "[" * 100_000})
    with pytest.raises(
        UserError, match="lora_adapter_metadata: found no JSON object; accepted: PEFT's settings"
    ) as error:
        load_transformer(base, device=CPU, adapters=[tmp_path])
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


A, B = (f"diffusion_model.blocks.0.self_attn.q.lora_{side}.weight" for side in "AB")
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "one half": ({B: ...}, r"found 1 tensors missing \(blocks.0.self_attn.q.lora_B.weight\); accepted: an adapter of"),
    "the other half": ({A: ...}, r"found 1 tensors missing \(blocks.0.self_attn.q.lora_A.weight\)"),
    "an image's": ({A.replace(".q.", ".k_img."): torch.zeros(4, 48)}, r"1 tensors extra \(.*self_attn.k_img.lora_A"),
    "a block more": ({A.replace("s.0.", "s.3."): torch.zeros(4, 48)}, r"1 tensors extra \(.*blocks.3.self_attn.q.lora"),
    "a text encoder's": ({"lora_te1_x.lora_up.weight": torch.zeros(4, 4)}, r"extra \(lora_te1_x.lora_up.weight\)"),
    "another network's": ({f"text_encoders.{A}": torch.zeros(4, 48)}, r"1 tensors extra \(text_encoders.diffusion_mo"),
    "DoRA": ({A.replace("lora_A.weight", "dora_scale"): torch.zeros(48, 1)}, r"1 tensors extra \(.*q.dora_scale\)"),
    "a bias of the second matrix": ({B.replace("weight", "bias"): torch.zeros(48)}, r"extra \(.*q.lora_B.bias\)"),
    "LoKr": ({A.replace("lora_A.weight", "lokr_w1"): torch.zeros(2, 2)}, r"1 tensors extra \(.*q.lokr_w1\)"),
    "a norm's pair": ({A.replace(".q.", ".norm_q."): torch.zeros(4, 48)}, r"1 tensors extra \(.*norm_q.lora_A.weight"),
    "a norm's bias": ({"blocks.0.self_attn.norm_q.diff_b": torch.zeros(48)}, r"extra \(.*norm_q.diff_b\)"),
    "a difference of another shape": ({"blocks.1.diff_m": torch.zeros(6, 48)}, r"\(6, 48\) for \(1, 6, 48\)"),
    "one tensor twice": (
        {"lora_unet_blocks_0_self_attn_q.lora_down.weight": torch.zeros(4, 48)},
        f"found {A} and lora_unet_blocks_0_self_attn_q.lora_down.weight; accepted: one tensor for blocks.0.self_attn.q",
    ),
    "a wide alpha": (
        {"blocks.0.self_attn.q.alpha": torch.ones(2)},
        r"found blocks.0.self_attn.q.alpha \[1.0, 1.0\]; accepted: one finite number beside the two matrices",
    ),
    "an alpha alone": (
        {"blocks.1.self_attn.norm_q.alpha": torch.tensor(1.0)}, r"found blocks.1.self_attn.norm_q.alpha \[1.0\]; accep"
    ),
    "an alpha that is NaN": (
        {"blocks.0.self_attn.q.alpha": torch.tensor(math.nan)}, r"found blocks.0.self_attn.q.alpha \[nan\]; accepted"
    ),
    "NaN": (
        {B: torch.full((48, 4), math.nan)}, r"values that are not finite in blocks.0.self_attn.q.lora_B.weight; accep"
    ),
    "infinite, in bf16": (
        {A: torch.full((4, 48), math.inf).bfloat16()}, r"that are not finite in blocks.0.self_attn.q.lora_A.weight"
    ),
    "a NaN difference": (
        {"head.diff_m": torch.full((1, 2, 48), math.nan)}, "values that are not finite in head.modulation.diff; accept"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused(tmp_path: Path, base: Path, case: str) -> None:
    change, message = REFUSED[case]
    content = keys(comfy, "lora_A.weight", "lora_B.weight") | change
    file = tmp_path / "lora.safetensors"
    save_file({key: tensor for key, tensor in content.items() if tensor is not ...}, file)
    with pytest.raises(UserError, match=message) as error:
        load_transformer(base, device=CPU, adapters=[file])
    assert str(error.value).startswith(f"{file}: found ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", ["ComfyUI's with a bf16 alpha", "kohya's", "extracted", "two ranks", "mixed"])
@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_conversion_keeps_ranks_scales_and_names(tmp_path: Path, base: Path, case: str, layout: str) -> None:
    save_file(dict(FILES[case]()[0]), tmp_path / "lora.safetensors")
    convert(tmp_path / "lora.safetensors", tmp_path / "new", layout=layout, config=SMALL)
    verify(tmp_path / "new")
    before, after = (open_adapter(tmp_path / path, SMALL).factors for path in ("lora.safetensors", "new"))
    assert before.keys() == after.keys()
    for module, factor in before.items():
        assert torch.equal(after[module].down, factor.down.flatten(1))
        assert torch.allclose(after[module].scale * after[module].up, factor.scale * factor.up.flatten(1))
        assert layout == "diffusers" or after[module].scale == factor.scale
    if layout == "wan":
        from peft import PeftModel

        merged = PeftModel.from_pretrained(load_transformer(base, device=CPU), str(tmp_path / "new")).merge_and_unload()
        ours = load_transformer(base, device=CPU, adapters=[tmp_path / "lora.safetensors"]).state_dict()
        for name, tensor in merged.state_dict().items():
            assert torch.allclose(ours[name], tensor, rtol=1e-5, atol=1e-5), name


def test_differences_are_merged_but_not_converted(tmp_path: Path, base: Path) -> None:
    content, summands = distilled()
    save_file(content, tmp_path / "lora.safetensors")
    accepted = "accepted: products alone, or weights to merge it into"
    with pytest.raises(
        UserError, match=rf"found differences of whole tensors \(blocks.\{{0,2\}}.modulation, .*{accepted}"
    ):
        convert(tmp_path / "lora.safetensors", tmp_path / "new", config=SMALL)
    assert not (tmp_path / "new").exists()
    convert(base, tmp_path / "merged", adapters=[tmp_path / "lora.safetensors"])
    found = open_checkpoint(tmp_path / "merged").tensors
    for name, summand in summands.items():
        assert torch.allclose(found[name], (STATE[name].double() + summand).float(), rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("name", ["lora.pt", "lora.ckpt", "adapter_model.bin"])
def test_an_adapters_pickle_runs_no_code(tmp_path: Path, base: Path, name: str) -> None:
    """Nor where it is only asked what the file is."""
    made, content = tmp_path / "made", keys(comfy, "lora_A.weight", "lora_B.weight")
    folder = synthesise.peft_folder(tmp_path / "lora", SMALL, ["q"], RANK)
    file = folder / name
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))):
        write({**content, "step": Unsafe(made)}, file)
        for read in (
            lambda: load_transformer(base, device=CPU, adapters=[file]),
            lambda: convert(file, tmp_path / "new", config=SMALL),
            lambda: is_adapter(file),
        ):
            with pytest.raises(UserError, match=f"^{file}: found ") as error:
                read()
            assert "\n" not in str(error.value) and not made.exists()
