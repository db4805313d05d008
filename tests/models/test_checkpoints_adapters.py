"""Adapters of every published layout, merged as PEFT merges them; what merging cannot express is refused."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import synthesise
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from tempact.cli import lora_options
from tempact.errors import UserError
from tempact.models.wan.checkpoints.load import load_transformer, open_checkpoint
from tempact.models.wan.checkpoints.lora import open_adapter
from tempact.models.wan.transformer import WanConfig, WanTransformer

CPU = torch.device("cpu")
SMALL = WanConfig(dim=48, ffn_dim=80, freq_dim=32, text_dim=16, text_len=6, heads=2, layers=3, in_dim=4, out_dim=4)
RANK = 5
FIRST = "base_model.model.blocks.0.self_attn.q.lora_A.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "wan"
    return synthesise.wan_folder(folder, synthesise.random_state(SMALL), SMALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A PEFT folder as TempAct's authors publish them."""
    targets = synthesise.SELF_FORCING_TARGETS
    return synthesise.peft_folder(tmp_path / "lora", SMALL, targets, RANK, init_lora_weights="gaussian")


def merged_by_peft(base: Path, *folders: Path) -> dict[str, Tensor]:
    model = load_transformer(base, device=CPU)
    for folder in folders:
        model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    return dict(model.state_dict())


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-6) -> list[str]:
    """Names of the tensors that differ by more, relative to the largest value."""
    assert found.keys() == wanted.keys()
    return [n for n, t in wanted.items() if not (found[n] - t).abs().max() <= tolerance * t.abs().max().clamp_min(1)]


SETTINGS: dict[str, dict[str, Any]] = {
    "TempAct on Self-Forcing": {"targets": synthesise.SELF_FORCING_TARGETS, "init_lora_weights": "gaussian"},
    "TempAct on LongLive": {"targets": synthesise.ALL_LINEARS, "init_lora_weights": "gaussian"},
    "alpha other than rank": {"targets": ["q", "k"], "lora_alpha": 3},
    "rank-stabilised": {"targets": ["ffn.0"], "use_rslora": True},
    "patterns": {
        "targets": ["self_attn.v", "cross_attn.o"],
        "rank_pattern": {"blocks.1.self_attn.v": 2},
        "alpha_pattern": {"cross_attn.o": 11},
    },
    "some layers": {"targets": ["o"], "layers_to_transform": [0, 2], "layers_pattern": "blocks"},
    "outside of blocks": {"targets": ["text_embedding.2", "head.head"]},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_peft_folder_is_merged_as_peft_merges_it(tmp_path: Path, base: Path, case: str) -> None:
    folder = synthesise.peft_folder(tmp_path / "lora", SMALL, rank=RANK, **SETTINGS[case])
    before = load_transformer(base, device=CPU).state_dict()
    found = dict(load_transformer(base, device=CPU, adapters=[folder]).state_dict())
    assert same(found, merged_by_peft(base, folder)) == []
    touched = set(same(found, before))
    assert touched == {f"{module}.weight" for module in open_adapter(folder, SMALL).factors}


def test_target_expressions_are_followed(tmp_path: Path, base: Path) -> None:
    folder = synthesise.peft_folder(tmp_path / "lora", SMALL, ["q"], RANK)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["target_modules"] = r"blocks\.\d\.(self|cross)_attn\.q"
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    assert len(open_adapter(folder, SMALL).factors) == 2 * SMALL.layers


@pytest.mark.parametrize("raw", [False, True])
def test_longlives_lora_has_scale_one_on_all_linears(
    tmp_path: Path, base: Path, raw: bool, caplog: pytest.LogCaptureFixture
) -> None:
    file = synthesise.longlive_lora(tmp_path / "lora.pt", SMALL, RANK, raw=raw)
    with caplog.at_level(logging.INFO):
        adapter = open_adapter(file, SMALL)
    told = [] if raw else [f"{file}: entry generator_lora is taken; the file also holds critic_lora, step"]
    assert [record.getMessage() for record in caplog.records if "entry" in record.getMessage()] == told
    assert len(adapter.factors) == 10 * SMALL.layers
    assert {factor.scale for factor in adapter.factors.values()} == {1.0}
    before = load_transformer(base, device=CPU).state_dict()
    after = dict(load_transformer(base, device=CPU, adapters=[file]).state_dict())
    pairs = synthesise.lora_pairs(SMALL, synthesise.ALL_LINEARS, RANK)
    wanted = dict(before)
    for name in pairs:
        if name.endswith("A.weight"):
            up, down = pairs[name.replace("lora_A", "lora_B")], pairs[name]
            weight = name.removeprefix("base_model.model.").replace("lora_A.", "")
            wanted[weight] = before[weight] + up @ down
    assert len([name for name in wanted if wanted[name] is not before[name]]) == 10 * SMALL.layers
    assert same(after, wanted) == []


def test_adapters_are_merged_in_full_precision_and_then_cast(tmp_path: Path, folder: Path) -> None:
    """LongLive: base + lora.pt, and TempAct's on top; the sum is rounded once."""
    state = synthesise.random_state(SMALL, dtype=torch.bfloat16)
    base = synthesise.causal_forcing(tmp_path / "longlive_base.pt", state)
    lora = synthesise.longlive_lora(tmp_path / "lora.pt", SMALL, RANK)
    kwargs = {"device": CPU, "config": SMALL, "adapters": [lora, folder]}
    exact = load_transformer(base, precision="fp32", **kwargs).state_dict()
    rounded = load_transformer(base, precision="bf16", **kwargs).state_dict()
    assert [name for name, tensor in exact.items() if not torch.equal(rounded[name], tensor.bfloat16())] == []
    first, second = (open_adapter(path, SMALL).factors["blocks.1.ffn.2"] for path in (lora, folder))
    total = state["blocks.1.ffn.2.weight"].double()
    total += first.up.double() @ first.down.double() + second.up.double() @ second.down.double()
    assert torch.equal(exact["blocks.1.ffn.2.weight"], total.float())


@pytest.mark.gpu
def test_merging_is_as_exact_where_products_may_run_in_tf32(base: Path, folder: Path) -> None:
    wanted = load_transformer(base, device=CPU, adapters=[folder]).state_dict()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = load_transformer(base, device=torch.device("cuda"), adapters=[folder]).state_dict()
    finally:
        torch.set_float32_matmul_precision(before)
    assert same({name: tensor.cpu() for name, tensor in found.items()}, dict(wanted), 2e-7) == []


def renamed(folder: Path, rename: Callable[[str], str]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize("prefix", ["model.", "_fsdp_wrapped_module.", "model._fsdp_wrapped_module."])
def test_what_wrappers_leave_in_names_is_taken_off(folder: Path, prefix: str) -> None:
    plain = open_adapter(folder, SMALL).factors
    renamed(folder, lambda name: name.replace("base_model.model.", f"base_model.model.{prefix}"))
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["target_modules"] = [f"{prefix}{module}" for module in plain]
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    found = open_adapter(folder, SMALL).factors
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name].down, factor.down) for name, factor in plain.items())


def test_an_older_file_format_is_read(folder: Path) -> None:
    plain = open_adapter(folder, SMALL).factors
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    found = open_adapter(folder, SMALL).factors
    assert all(torch.equal(found[name].up, factor.up) for name, factor in plain.items())


def test_diffusers_own_files_are_read_with_their_scale(tmp_path: Path, base: Path) -> None:
    """Saved by diffusers from its model with an adapter, with a rank and alpha that differ."""
    pytest.importorskip("diffusers", reason="needs diffusers: pip install -e '.[test]'")
    from diffusers import WanPipeline

    model = synthesise.diffusers_model(open_checkpoint(base).tensors, SMALL)
    model.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_out.0", "net.0.proj"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    layers = {n.replace(".default", ""): p.detach() for n, p in model.named_parameters() if "lora_" in n}
    metadata = model.peft_config["default"].to_dict()
    WanPipeline.save_lora_weights(
        tmp_path / "lora", transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata
    )
    merged = load_transformer(base, device=CPU, adapters=[tmp_path / "lora"])
    assert open_adapter(tmp_path / "lora", SMALL).factors["blocks.0.ffn.0"].scale == 0.5
    assert len(open_adapter(tmp_path / "lora", SMALL).factors) == 5 * SMALL.layers
    x, text, sigma = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 6, 16), torch.full((1, 2), 0.5)
    with torch.no_grad():
        found = merged(x, sigma, merged.project_text(text), torch.arange(2))
        wanted = model(x, torch.tensor([500.0]), text).sample
        model.disable_adapters()
        without = model(x, torch.tensor([500.0]), text).sample
    assert (wanted - without).std() > 0.3 * without.std()
    assert ((found - wanted).pow(2).mean() / wanted.pow(2).mean()).sqrt() < 2e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 6}, r"found 36 tensors of another shape \(.*.self_attn.k.lora_A.weight \(5, 48\) for \(6, 48\)"),
        ({"r": 6}, r"accepted: an adapter of this transformer \(3 blocks of 48 channels\)"),
        ({"target_modules": ["self_attn.q"]}, r"30 tensors extra \(blocks.\{0-2\}.ffn.0.lora_A.weight, "),
        ({"target_modules": ["self_attn.q", "k", "v", "o", "ffn.0", "ffn.2"]},
         r"18 tensors missing \(blocks.\{0-2\}.cross_attn.k.lora_A.weight, "),
        ({"target_modules": ["q_proj", "v_proj"]}, "target_modules: found q_proj, v_proj; accepted: names of linears"),
        ({"target_modules": ["patch_embedding"]}, "missing"),
        ({"target_modules": None}, "target_modules: found None"),
        ({"target_modules": [1]}, r"target_modules: found \[1\]; accepted: names of linears"),
        ({"exclude_modules": [1]}, r"exclude_modules: found \[1\]; accepted: names of linears"),
        ({"exclude_modules": 1}, "exclude_modules: found 1; accepted: names of linears"),
        ({"layers_to_transform": ["a"]}, r"layers_to_transform: found \['a'\]; accepted: numbers of layers"),
        ({"layers_to_transform": [0], "layers_pattern": [1]}, r"layers_pattern: found \[1\]; accepted: names of l"),
        ({"layers_to_transform": [0], "layers_pattern": "blocks"}, r"24 tensors extra \(blocks.\{1-2\}.ffn"),
        ({"peft_type": "LOHA"}, "peft_type: found 'LOHA'; accepted: 'LORA'"),
        ({"use_dora": True}, "use_dora: found True; accepted: False"),
        ({"bias": "all"}, "bias: found 'all'; accepted: 'none'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: found True; accepted: False"),
        ({"modules_to_save": ["head"]}, r"modules_to_save: found \['head'\]; accepted: None"),
        ({"a_later_kind": {"x": 1}}, r"a_later_kind: found \{'x': 1\}; accepted: None"),
        ({"init_lora_weights": "pissa"}, "found 'pissa', which changes the base too: base or adapter must be converted "
         "with PEFT first; accepted: True, False, gaussian, eva, orthogonal$"),
        ({"r": 0}, "r, lora_alpha: found 0, 5; accepted: a rank above 0 and a number"),
        ({"lora_alpha": "5"}, "r, lora_alpha: found 5, '5'; accepted"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(folder: Path, base: Path, change: dict, message: str) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message) as error:
        load_transformer(base, device=CPU, adapters=[folder])
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)


def test_settings_nested_too_deeply_are_refused(folder: Path, base: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text("[" * 100_000)
    for read in (
        lambda: load_transformer(base, device=CPU, adapters=[folder]),
        lambda: lora_options(folder, "executor"),
    ):
        with pytest.raises(UserError, match="accepted: (a|the) JSON") as error:
            read()
        assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


def test_a_convolution_is_merged_as_peft_merges_it(tmp_path: Path, base: Path) -> None:
    folder = synthesise.peft_folder(tmp_path / "lora", SMALL, ["patch_embedding", "head.head"], RANK, lora_alpha=7)
    found = dict(load_transformer(base, device=CPU, adapters=[folder]).state_dict())
    assert same(found, merged_by_peft(base, folder)) == []
    assert open_adapter(folder, SMALL).factors.keys() == {"patch_embedding", "head.head"}


Change = Callable[[dict[str, Tensor]], dict[str, Any]]
PAIRS: dict[str, tuple[Change, str]] = {
    "a lost matrix": (
        lambda pairs: {n: t for n, t in pairs.items() if n != FIRST},
        r"found 1 tensors missing \(blocks.0.self_attn.q.lora_A.weight\); accepted: an adapter of this transformer",
    ),
    "another model's": (
        lambda pairs: {n.replace("self_attn.q", "self_attn.q_proj"): t for n, t in pairs.items()},
        r"found 6 tensors extra \(blocks.\{0-2\}.self_attn.q_proj.lora_A.weight, ",
    ),
    "another width": (
        lambda pairs: pairs | {FIRST: torch.zeros(RANK, 47)},
        r"found 1 tensors of another shape \(blocks.0.self_attn.q.lora_A.weight \(5, 47\) for \(5, 48\)\)",
    ),
    "two ranks": (
        lambda pairs: pairs | {FIRST: torch.zeros(2, 48)},
        r"found 1 tensors of another shape \(blocks.0.self_attn.q.lora_B.weight \(48, 5\) for \(48, 2\)\)",
    ),
    "no rank": (
        lambda pairs: pairs | {FIRST: torch.zeros(0, 48)},
        r"\(blocks.0.self_attn.q.lora_A.weight \(0, 48\) for \(1, 48\), ",
    ),
    "whole weights": (
        lambda pairs: {"blocks.0.self_attn.q.weight": torch.zeros(3)},
        r"found 1 tensors without a LoRA \(blocks.0.self_attn.q.weight\); accepted: an adapter",
    ),
    "two entries": (
        lambda pairs: {"a": pairs, "b": pairs}, "found entries a, b; accepted: one of generator_lora$",
    ),
    "integers": (
        lambda pairs: pairs | {FIRST: torch.zeros(RANK, 48, dtype=torch.int64)},
        r"found 1 tensors of another kind \(blocks.0.self_attn.q.lora_A.weight torch.int64\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PAIRS)
def test_a_file_of_pairs_that_does_not_fit_is_refused(tmp_path: Path, base: Path, case: str) -> None:
    change, message = PAIRS[case]
    file = tmp_path / "lora.pt"
    torch.save(change(synthesise.lora_pairs(SMALL, synthesise.ALL_LINEARS, RANK)), file)
    with pytest.raises(UserError, match=message) as error:
        load_transformer(base, device=CPU, adapters=[file])
    assert str(error.value).startswith(f"{file}: found ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("adapter_config.json", "adapter_config.json: cannot be read"),
        (
            "adapter_model.safetensors",
            "found no adapter; accepted: a folder with adapter_config.json and adapter_model",
        ),
    ],
)
def test_half_a_peft_folder_is_refused(folder: Path, base: Path, lost: str, message: str) -> None:
    (folder / lost).unlink()
    with pytest.raises(UserError, match=f"^{re.escape(str(folder))}.*{message}"):
        load_transformer(base, device=CPU, adapters=[folder])


def test_a_cut_adapter_is_refused(folder: Path, base: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"^{file}: found a damaged or cut-off file"):
        load_transformer(base, device=CPU, adapters=[folder])


def test_the_executors_own_adapter_can_be_merged(tmp_path: Path, base: Path) -> None:
    """A run's checkpoint is a PEFT folder of that kind: the merged model computes what the adapted one does."""
    from tempact.models.adapters import freeze_reference, save_adapter

    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["self_attn.q", "ffn.2"], init_lora_weights=False)
    model = load_transformer(base, device=CPU)
    peft = get_peft_model(model, lora)
    freeze_reference(peft, lora)
    save_adapter(peft, tmp_path / "executor")
    merged = load_transformer(base, device=CPU, adapters=[tmp_path / "executor"])
    plain = load_transformer(base, device=CPU)
    x, text, sigma = torch.randn(1, 4, 1, 4, 4), torch.randn(1, 6, 16), torch.full((1, 1), 0.5)

    def velocity(model: WanTransformer) -> Tensor:
        with torch.no_grad():
            return model(x, sigma, model.project_text(text), torch.arange(1))

    wanted = velocity(model)
    assert (velocity(plain) - wanted).abs().max() > 0.01
    assert (velocity(merged) - wanted).abs().max() < 1e-5
