"""PEFT folders, merged into weights and loaded into a policy's adapter: both ways to what PEFT itself computes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import synthesise
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tempact.cli import lora_options
from tempact.errors import UserError
from tempact.models.adapters import CONFIG, TRAINED, adapted, load_adapter, save_adapter
from tempact.models.wan.checkpoints.load import load_transformer
from tempact.models.wan.transformer import WanConfig, WanTransformer

CPU = torch.device("cpu")
SMALL = WanConfig(dim=48, ffn_dim=80, freq_dim=32, text_dim=16, text_len=6, heads=2, layers=3, in_dim=4, out_dim=4)
RANK = 4
TARGETS = ["self_attn.q", "self_attn.v", "ffn.2"]
FSDP = "_fsdp_wrapped_module"


class Wrapper(nn.Module):
    """As trainers wrap the transformer: its names get a prefix."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "wan"
    return synthesise.wan_folder(folder, synthesise.random_state(SMALL), SMALL)


def written(folder: Path, base: Path, wrap: Callable[[nn.Module], nn.Module] = Wrapper, **settings: Any) -> Path:
    """A folder that PEFT has written from a transformer, wrapped unless told otherwise, with random matrices."""
    lora = LoraConfig(**{"r": RANK, "lora_alpha": RANK, "target_modules": TARGETS, **settings})
    model = get_peft_model(wrap(load_transformer(base, device=CPU)), lora)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def by_peft(folder: Path, base: Path, wrap: Callable[[nn.Module], nn.Module] = Wrapper) -> dict[str, Tensor]:
    merged = PeftModel.from_pretrained(wrap(load_transformer(base, device=CPU)), str(folder)).merge_and_unload()
    return {name.removeprefix("model."): tensor for name, tensor in merged.state_dict().items()}


def policy(base: Path, targets: list[str] = TARGETS, **settings: Any) -> PeftModel:
    """As the executor's."""
    lora = LoraConfig(**{"r": RANK, "lora_alpha": RANK, "target_modules": targets, **settings})
    torch.manual_seed(7)
    return adapted(load_transformer(base, device=CPU), lora, "executor")


def merged_policy(model: PeftModel) -> dict[str, Tensor]:
    return dict(model.merge_and_unload(adapter_names=[TRAINED]).state_dict())


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, rtol=1e-5, atol=1e-5), name


def renamed(folder: Path, rename: Callable[[str], str]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file)


def changed(folder: Path, **settings: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


PATTERNS: dict[str, dict[str, Any]] = {
    "alpha by the end of a name": {"alpha_pattern": {"self_attn.q": 16}},
    "alpha with the wrapper's prefix": {"alpha_pattern": {"model.blocks.1.self_attn.q": 16}},
    "rank with the wrapper's prefix": {"rank_pattern": {"model.blocks.1.self_attn.q": 2}},
    "an anchored name": {"alpha_pattern": {r"^model\.blocks\.2\.ffn\.2": 8}, "rank_pattern": {"^blocks.1.ffn.2": 2}},
    "the first of two": {"alpha_pattern": {"blocks.1.self_attn.q": 2, "self_attn.q": 8, "q": 32}},
    "an expression": {"alpha_pattern": {r"blocks\.[02]\.(self_attn\.q|ffn\.2)": 12}, "rank_pattern": {"..ffn.*": 1}},
    "nothing's name": {"alpha_pattern": {"cross_attn.q": 16, "self_attn": 16}},
    "rank-stabilised": {"use_rslora": True, "rank_pattern": {"self_attn.v": 1}},
    "an expression of targets": {"target_modules": r"model\.blocks\.\d\.(self_attn\.[qv]|ffn\.2)"},
    "some blocks": {"layers_to_transform": [0, 2], "layers_pattern": "blocks"},
    "an exclusion": {"exclude_modules": ["model.blocks.1.self_attn.q"]},
    "fewer targets": {"target_modules": ["self_attn.q"]},
    "from activations": {"init_lora_weights": "orthogonal"},
}  # fmt: skip


@pytest.mark.parametrize("wrap", [Wrapper, nn.Module], ids=["wrapped", "plain"])
@pytest.mark.parametrize("case", PATTERNS)
def test_peft_matches_names_and_so_do_we(tmp_path: Path, base: Path, case: str, wrap: type[nn.Module]) -> None:
    settings = PATTERNS[case]
    if wrap is nn.Module:
        settings = json.loads(json.dumps(settings).replace("model.", "").replace(r"model\\.", ""))
    wrapped = Wrapper if wrap is Wrapper else (lambda model: model)
    folder = written(tmp_path / "lora", base, wrapped, **settings)
    wanted = by_peft(folder, base, wrapped)
    assert_same(dict(load_transformer(base, device=CPU, adapters=[folder]).state_dict()), wanted)
    model = policy(base)
    load_adapter(model, folder)
    assert_same(merged_policy(model), wanted)


RENAMED: dict[str, Callable[[str], str]] = {
    "an adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "another adapter's name": lambda name: name.replace(".weight", ".generator-lora.weight"),
    "FSDP": lambda name: name.replace("blocks.1.", f"blocks.1.{FSDP}."),
    "FSDP everywhere": lambda name: name.replace("model.blocks.", f"{FSDP}.model.{FSDP}.blocks.{FSDP}."),
    "DDP": lambda name: f"module.{name}",
    "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "checkpointed": lambda name: name.replace(".ffn.", "._checkpoint_wrapped_module.ffn."),
}  # fmt: skip


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("case", RENAMED)
def test_what_trainers_leave_in_names_changes_nothing(tmp_path: Path, base: Path, case: str, file: str) -> None:
    folder = written(tmp_path / "lora", base, alpha_pattern={"model.blocks.1.ffn.2": 16}, rank_pattern={"ffn.2": 2})
    wanted = by_peft(folder, base)
    renamed(folder, RENAMED[case])
    if "FSDP" in case:
        changed(folder, alpha_pattern={f"model.blocks.1.{FSDP}.ffn.2": 16})
    if file.endswith(".bin"):
        torch.save(load_file(folder / "adapter_model.safetensors"), folder / file)
        (folder / "adapter_model.safetensors").unlink()
    assert_same(dict(load_transformer(base, device=CPU, adapters=[folder]).state_dict()), wanted)
    model = policy(base)
    load_adapter(model, folder)
    assert_same(merged_policy(model), wanted)


def test_settings_may_name_modules_with_the_wrapper_where_tensors_do_not(tmp_path: Path, base: Path) -> None:
    folder = written(tmp_path / "lora", base)
    wanted = by_peft(folder, base)
    names = [name.removeprefix("base_model.model.") for name in load_file(folder / "adapter_model.safetensors")]
    changed(folder, target_modules=sorted({name.rsplit(".lora_", 1)[0] for name in names}))
    renamed(folder, lambda name: name.replace("model.blocks", "blocks").replace("base_model.model.", ""))
    assert_same(dict(load_transformer(base, device=CPU, adapters=[folder]).state_dict()), wanted)


def test_a_pattern_that_peft_passes_over_is_told(tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = written(tmp_path / "lora", base, alpha_pattern={"q_proj": 16, "self_attn.q": 8})
    with caplog.at_level(logging.WARNING):
        load_transformer(base, device=CPU, adapters=[folder])
    told = f"{folder}/adapter_model.safetensors: rank_pattern, alpha_pattern: no linear is named q_proj"
    assert [record.getMessage() for record in caplog.records] == [told]


def test_a_policys_own_folder_comes_back_to_the_bit(tmp_path: Path, base: Path) -> None:
    model, again = policy(base), policy(base)
    for name, parameter in model.named_parameters():
        if f".{TRAINED}." in name:
            nn.init.normal_(parameter)
    save_adapter(model, tmp_path)
    load_adapter(again, tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items()
               if ".ref." not in name)  # fmt: skip


def test_rows_without_effect_are_trained(tmp_path: Path, base: Path) -> None:
    """A lower rank is filled up as a fresh adapter is: the first matrix random, the second zero."""
    folder = written(tmp_path / "lora", base, rank_pattern={"self_attn.q": 2})
    model = policy(base)
    load_adapter(model, folder)
    layer = model.base_model.model.blocks[1].self_attn.q
    down, up = layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight
    assert (down[2:].norm(dim=1) > 0.1).all() and not up[:, 2:].any()


Broken = Callable[[Path], object]
STARTS = ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq", "mica")
REFUSED: dict[str, tuple[Broken, str]] = {
    "NaN": (
        lambda folder: spoiled(folder, float("nan")),
        "adapter_model.safetensors: found values that are not finite in blocks.1.self_attn.q.lora_B.weight; accepted",
    ),
    "infinite": (
        lambda folder: spoiled(folder, float("-inf")), "that are not finite in blocks.1.self_attn.q.lora_B.weight"
    ),
    "no expression": (
        lambda folder: changed(folder, alpha_pattern={"q(": 3}), "found settings with a broken expression (missing ), "
    ),
    "a negative rank": (
        lambda folder: changed(folder, rank_pattern={"self_attn.q": -2}),
        "adapter_config.json: rank_pattern: found {'self_attn.q': -2}; accepted: names, each with such a number",
    ),
    "alpha in words": (
        lambda folder: changed(folder, alpha_pattern={"self_attn.q": "8"}), "alpha_pattern: found {'self_attn.q': '8'}"
    ),
    "a list of patterns": (lambda folder: changed(folder, alpha_pattern=[8]), "alpha_pattern: found [8]; accepted"),
    "a rank that is not the tensors'": (
        lambda folder: changed(folder, rank_pattern={"blocks.1.ffn.2": 3}), "of another shape (blocks.1.ffn.2.lora_A"
    ),
    "a module that the settings leave out": (
        lambda folder: changed(folder, target_modules=["self_attn.v", "ffn.2"]), "found 6 tensors extra (blocks.{0-2}."
    ),
    "DoRA": (lambda folder: changed(folder, use_dora=True), "use_dora: found True; accepted: False"),
    "a bias": (lambda folder: changed(folder, lora_bias=True), "lora_bias: found True; accepted: False"),
    **{
        start: (
            lambda folder, start=start: changed(folder, init_lora_weights=start),
            f"init_lora_weights: found '{start}', which changes the base too: base or adapter must be converted with ",
        )
        for start in STARTS
    },
}  # fmt: skip


def spoiled(folder: Path, value: float) -> None:
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    state["base_model.model.blocks.1.self_attn.q.lora_B.weight"][3, 1] = value
    save_file(state, file)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_peft_is_refused_by_both_readers(tmp_path: Path, base: Path, case: str) -> None:
    folder = written(tmp_path / "lora", base, lambda model: model)
    spoil, message = REFUSED[case]
    spoil(folder)
    model = policy(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for read in (
        lambda: load_transformer(base, device=CPU, adapters=[folder]),
        lambda: load_adapter(model, folder),
    ):
        with pytest.raises(UserError) as error:
            read()
        assert message in str(error.value)
        assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_ranks_up_to_the_configured_one_are_loaded(tmp_path: Path, base: Path) -> None:
    """What the refusal says is accepted."""
    folder = written(tmp_path / "lora", base, rank_pattern={"blocks.1.ffn.2": 8})
    with pytest.raises(
        UserError, match="found rank 8 and scale 0.5 for blocks.1.ffn.2; accepted: up to rank 4, as configured"
    ):
        load_adapter(policy(base), folder)
    model = policy(base, r=8)
    load_adapter(model, folder)
    assert_same(merged_policy(model), by_peft(folder, base))
    changed(folder, rank_pattern={"blocks.1.ffn.2": 5})  # not the tensors'
    with pytest.raises(UserError, match=r"found 2 tensors of another shape \(blocks.1.ffn.2.lora_A.weight"):
        load_adapter(policy(base, r=8), folder)


def test_generate_takes_ranks_and_targets_of_a_wrapped_folder(tmp_path: Path, base: Path) -> None:
    """`generate --adapter` makes the executor's adapter by the folder's settings."""
    full = [f"model.blocks.{i}.{name}" for i in range(SMALL.layers) for name in TARGETS]
    folder = written(tmp_path / "lora", base, target_modules=full, rank_pattern={"model.blocks.1.ffn.2": 8})
    changed(folder, target_modules=[name.replace("blocks", f"{FSDP}.blocks") for name in full])
    rank, alpha, targets = (lora_options(folder, "executor")[i] for i in (slice(0, 2), slice(2, 4), slice(4, None)))
    assert (rank, alpha) == (["--executor.lora.rank", "8"], ["--executor.lora.alpha", "4"])
    assert targets == ["--executor.lora.targets", *sorted(name.removeprefix("model.") for name in full)]
    model = policy(base, targets[1:], r=8)
    load_adapter(model, folder)
    changed(folder, target_modules=full)
    assert_same(merged_policy(model), by_peft(folder, base))


def test_the_velocity_is_that_of_pefts_model(tmp_path: Path, base: Path) -> None:
    folder = written(tmp_path / "lora", base, lambda model: model, alpha_pattern={"self_attn.q": 16}, use_rslora=True)
    theirs = PeftModel.from_pretrained(load_transformer(base, device=CPU), str(folder))
    ours = policy(base)
    load_adapter(ours, folder)
    x, text, sigma = torch.randn(1, 4, 1, 4, 4), torch.randn(1, 6, 16), torch.full((1, 1), 0.5)

    def velocity(model: PeftModel) -> Tensor:
        inner: WanTransformer = model.base_model.model
        with torch.no_grad():
            return inner(x, sigma, inner.project_text(text), torch.arange(1))

    with theirs.disable_adapter():
        without = velocity(theirs)
    assert (velocity(theirs) - without).abs().max() > 0.05
    assert (velocity(ours) - velocity(theirs)).abs().max() < 1e-5
