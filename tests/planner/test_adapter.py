"""PEFT folders that a planner starts from: its logits are then those of PEFT's own model, or the folder is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models.test_checkpoints import Unsafe
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tempact.config import LoraConfig as PolicyLora
from tempact.errors import UserError

IDS = torch.arange(1, 12)[None]
FSDP = "_fsdp_wrapped_module"


@pytest.fixture
def write(make_planner, tmp_path) -> Callable[..., Path]:
    """A folder that PEFT has written from the planner's base model, with random matrices."""

    def write(**settings: Any) -> Path:
        targets = ["q_proj", "v_proj", "down_proj"]
        lora = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM", **settings})
        model = get_peft_model(make_planner().peft.unload(), lora)
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(tmp_path / "llm_lora")
        return tmp_path / "llm_lora"

    return write


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.fixture
def by_peft(make_planner) -> Callable[[Path], Tensor]:
    return lambda folder: logits(PeftModel.from_pretrained(make_planner().peft.unload(), str(folder)))


def assert_logits(make_planner: Callable, folder: Path, wanted: Tensor) -> None:
    planner = make_planner(adapter=folder)
    torch.testing.assert_close(logits(planner.peft), wanted, atol=2e-5, rtol=1e-5)
    planner.peft.set_adapter("ref")
    torch.testing.assert_close(logits(planner.peft), wanted, atol=2e-5, rtol=1e-5)
    assert (logits(make_planner().peft) - wanted).abs().max() > 0.05


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha_pattern": {"q_proj": 32}},
        {"alpha_pattern": {"model.layers.1.mlp.down_proj": 2, "layers.0.self_attn.v_proj": 16}},
        {"rank_pattern": {"model.layers.1.self_attn.q_proj": 2}},
        {"use_rslora": True},
        {"target_modules": ["v_proj"]},
        {"target_modules": r"model\.layers\.\d+\.self_attn\.[qv]_proj"},
        {"layers_to_transform": 1},
    ],
)
def test_settings_have_the_effect_that_peft_gives_them(make_planner, write, by_peft, settings):
    folder = write(**settings)
    assert_logits(make_planner, folder, by_peft(folder))


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (".weight", ".weight"),
        (".weight", ".default.weight"),
        (".layers.0.", f".layers.0.{FSDP}."),
        ("base_model.model.", f"{FSDP}.base_model.model.{FSDP}."),
        ("base_model.model.", "module.base_model.model._orig_mod."),
    ],
)
def test_names_and_files_of_trainers(make_planner, write, by_peft, old, new, file):
    folder = write(alpha_pattern={"model.layers.0.self_attn.q_proj": 32})
    wanted, stored = by_peft(folder), folder / "adapter_model.safetensors"
    state = {name.replace(old, new): tensor for name, tensor in load_file(stored).items()}
    stored.unlink()
    save_file(state, stored) if file.endswith(".safetensors") else torch.save(state, folder / file)
    assert_logits(make_planner, folder, wanted)


def test_a_resumed_run_has_the_same_planner(make_planner, write, by_peft, tmp_path):
    """Of an adapter with patterns, what a run saves is a plain one."""
    folder = write(alpha_pattern={"q_proj": 32}, rank_pattern={"v_proj": 2})
    make_planner(adapter=folder).save_adapter(tmp_path / "planner")
    assert not json.loads((tmp_path / "planner" / "adapter_config.json").read_text())["alpha_pattern"]
    assert_logits(make_planner, tmp_path / "planner", by_peft(folder))
    torch.testing.assert_close(by_peft(tmp_path / "planner"), by_peft(folder), atol=2e-5, rtol=1e-5)


def test_a_model_of_other_layers_comes_back(make_planner, move, tmp_path):
    """GPT-2's are transposed, and PEFT says so in its settings."""
    planner = make_planner(absolute_positions=True)
    move(planner)
    planner.save_adapter(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    again = make_planner(absolute_positions=True, adapter=tmp_path)
    assert torch.equal(logits(again.peft), logits(planner.peft))
    with pytest.raises(UserError, match="fan_in_fan_out: found True; accepted: False"):
        make_planner(adapter=tmp_path)


def test_adapters_of_the_head_and_the_embedding_come_back(make_planner, move, tmp_path):
    """Their folders hold the base's own tensors too; another scale of an embedding is refused."""
    lora = PolicyLora(4, 8, ("q_proj", "lm_head", "embed_tokens"))
    planner = make_planner(lora=lora)
    move(planner)
    planner.save_adapter(tmp_path)
    assert torch.equal(logits(make_planner(lora=lora, adapter=tmp_path).peft), logits(planner.peft))
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    for pattern in ({"lm_head": 16}, {"embed_tokens": 16}):
        file.write_text(json.dumps(settings | {"alpha_pattern": pattern}))
        if "lm_head" in pattern:
            make_planner(lora=lora, adapter=tmp_path)
            continue
        with pytest.raises(UserError, match="found rank 4 and scale 4 for model.embed_tokens; accepted: up to rank 4"):
            make_planner(lora=lora, adapter=tmp_path)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq"])
def test_an_adapter_of_another_base_is_refused(make_planner, write, start):
    folder = write()
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": start}))
    message = f"^{file}: init_lora_weights: found '{start}', which changes the base too: base or adapter must be conv"
    with pytest.raises(UserError, match=message):
        make_planner(adapter=folder)


def test_an_adapter_that_peft_has_converted_is_read(make_planner, by_peft, tmp_path):
    """What the refusal of a PiSSA says is accepted."""
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa")
    model = get_peft_model(make_planner().peft.unload(), lora)
    model.save_pretrained(tmp_path / "start")
    with pytest.raises(UserError, match="found 'pissa'"):
        make_planner(rank=2, adapter=tmp_path / "start")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    wanted = logits(model)
    model.save_pretrained(tmp_path / "new", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert (by_peft(tmp_path / "new") - wanted).abs().max() < 1e-4
    assert_logits(make_planner, tmp_path / "new", wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused(make_planner, move, tmp_path, value):
    planner = make_planner()
    move(planner)
    planner.save_adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    state["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"][0, 0] = value
    save_file(state, file)
    message = f"^{file}: found values that are not finite in model.layers.1.self_attn.q_proj.lora_A.weight; accepted: n"
    before = logits(planner.peft)
    for read in (lambda: planner.load_adapter(tmp_path), lambda: make_planner(adapter=tmp_path)):
        with pytest.raises(UserError, match=message):
            read()
    assert torch.equal(logits(planner.peft), before)


def test_an_adapters_pickle_runs_no_code(make_planner, write, tmp_path):
    folder, made = write(), tmp_path / "made"
    state, file = load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin"
    (folder / "adapter_model.safetensors").unlink()
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))):
        save({**state, "step": Unsafe(made)}, file)
        with pytest.raises(UserError, match=f"^{file}: found ") as error:
            make_planner(adapter=folder)
        assert "\n" not in str(error.value) and not made.exists()
