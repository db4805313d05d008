"""The transformer's linears in float8: for videos alone, with the adapter inside."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from csrc_triton import fp8_rows, runtime
from tempact.cli import from_yaml, to_yaml
from tempact.errors import UserError
from tempact.evaluate import main as evaluate
from tempact.executor import fp8
from tempact.executor.executor import Executor
from tempact.executor.fp8 import LINEARS, round_linears
from tempact.executor.lora import LoraLinear
from tempact.executor.sampler import gaussian_noise
from tempact.models.wan import fp8 as module
from tempact.models.wan.fp8 import Fp8Linear
from tempact.models.wan.transformer import ChunkAttention, TextKV, WanTransformer
from tempact.policies import build_policies
from tempact.presets import get_preset
from tempact.runs.run import train
from tempact.train import main as train_command
from tempact.types import Plan, Step

PLAN = Plan("i", (Step(0, 9, "a cat"), Step(9, 18, "a dog")))
KEY = "executor.fp8_linears: found True; accepted: False but in tempact.generate: training needs"


def adapted(executor: Executor) -> Executor:
    """With an adapter that has an effect."""
    for name, parameter in executor.parameters().items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return executor


def inputs(model: WanTransformer) -> tuple[Tensor, Tensor, TextKV, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, words = torch.randn(2, 3, 3, 8, 8, generator=generator), torch.randn(2, 4, 8, generator=generator)
    text = model.project_text(words.to(model.device, model.dtype))
    return x.to(model.device), torch.full((2, 3), 0.7, device=model.device), text, torch.arange(3, device=model.device)


@torch.no_grad()
def velocity(executor: Executor) -> Tensor:
    with executor.precision(), executor.merged():
        return executor.model(*inputs(executor.model)).float()


def relative(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_velocities_are_close_to_those_of_the_adapted_weights(
    make_executor: Callable[..., Executor], dtype: torch.dtype
) -> None:
    executor = adapted(make_executor())
    executor.model.to(dtype)
    wanted = velocity(executor)
    with executor.reference():
        start = velocity(executor)
    round_linears(executor.model)
    found = velocity(executor)
    difference = (found - wanted).abs().mean() / wanted.abs().mean()
    assert 1e-3 < difference < 0.1
    assert relative(start, wanted) > 5 * relative(found, wanted)  # the adapter is inside


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="needs sm_90")
def test_a_gpus_products_are_near_those_in_fp32(make_executor: Callable[..., Executor]) -> None:
    """As near as roundings are: a last place of bf16 before one may be a step of float8 after it. Bits repeat."""
    executor = adapted(make_executor())
    executor.model.to("cuda", torch.bfloat16)
    before = velocity(executor)
    round_linears(executor.model)
    found = velocity(executor)
    with runtime.backend("torch"):
        emulated = velocity(executor)
    assert torch.equal(velocity(executor), found)
    assert relative(found, emulated) < 0.05 and relative(found, before) < 0.05


def test_the_linears_of_the_blocks_are_replaced_and_nothing_else(make_executor: Callable[..., Executor]) -> None:
    executor = adapted(make_executor())
    before = {name: tensor.clone() for name, tensor in executor.model.state_dict().items()}
    round_linears(executor.model)
    names = {name for name, linear in executor.model.named_modules() if isinstance(linear, Fp8Linear)}
    assert names == {f"blocks.{layer}.{name}" for layer in range(2) for name in LINEARS}
    kept = executor.model.state_dict()
    own = {name for name in kept if any(name.startswith(f"{linear}.") for linear in names)}
    assert {name: kept[name].dtype for name in own if name.endswith("values")} == {
        f"{name}.values": torch.float8_e4m3fn for name in names
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in kept.items() if name not in own)
    assert type(executor.model.blocks[0].cross_attn.v) is nn.Linear
    assert not [name for name in executor.parameters() if "self_attn" in name or "ffn" in name]


def test_an_adapter_is_merged_before_the_only_rounding(make_executor: Callable[..., Executor]) -> None:
    executor = adapted(make_executor())
    layer = executor.model.blocks[1].self_attn.v
    assert isinstance(layer, LoraLinear)
    a, b = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
    merged = layer.get_base_layer().weight + layer.scaling["default"] * b @ a
    plain = executor.model.blocks[1].cross_attn.o
    rows, own = fp8_rows(merged.detach()), fp8_rows(plain.weight.detach())
    round_linears(executor.model)
    for name, wanted in (("self_attn.v", rows), ("cross_attn.o", own)):
        linear = executor.model.blocks[1].get_submodule(name)
        torch.testing.assert_close(linear.scales, wanted.scales, rtol=1e-6, atol=0)
        assert (linear.values.float() != wanted.values.float()).float().mean() < 1e-2  # of the order of sums


def test_query_key_and_value_share_a_rounding(
    make_executor: Callable[..., Executor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six roundings a block, the hidden rows' with the GELU inside; one where K and V alone are stored."""
    executor = make_executor()
    round_linears(executor.model)
    calls: list[bool] = []

    def counted(x: Tensor, *, gelu: bool = False) -> object:
        calls.append(gelu)
        return fp8_rows(x, gelu=gelu)

    monkeypatch.setattr(module, "fp8_rows", counted)
    velocity(executor)
    assert calls == 2 * [False, False, False, False, False, True]
    calls.clear()
    with torch.no_grad():
        executor.model.write_context(*inputs(executor.model), ChunkAttention())
    assert calls == [False, False, False, False, False, True, False]


def test_a_call_is_the_product_of_what_was_rounded(make_executor: Callable[..., Executor]) -> None:
    """Written out in fp64 for the feed-forward part and for one linear."""
    block = make_executor().model.blocks[0]
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(2))

    def weight(linear: Fp8Linear) -> Tensor:
        return linear.values.double() * linear.scales.double()

    def twice(x: Tensor) -> Tensor:
        rows = fp8_rows(x)
        return rows.values.double() * rows.scales.double()

    round_linears(WithBlock(block))  # type: ignore[arg-type]
    up, _, down = block.ffn
    hidden = twice(x) @ weight(up).T + up.bias
    wanted = twice(nn.functional.gelu(hidden, approximate="tanh").float()) @ weight(down).T + down.bias
    assert relative(block.ffn(x).double(), wanted) < 1e-2  # a hidden number may round to a neighbour
    o = block.cross_attn.o
    torch.testing.assert_close(o(x).double(), twice(x) @ weight(o).T + o.bias, rtol=1e-5, atol=1e-5)


class WithBlock:
    """A model of one block, as far as `round_linears` looks."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, block: nn.Module):
        self.blocks = [block]
        self.config = type("Config", (), {"dim": 48, "ffn_dim": 64})


def test_where_the_products_are_emulated_is_said(
    make_executor: Callable[..., Executor], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING):
        round_linears(make_executor().model)
    (told,) = caplog.messages
    assert told.startswith("executor.fp8_linears: ") and "slower: tensors on cpu; accepted: NVIDIA GPUs" in told
    caplog.clear()
    monkeypatch.setattr(fp8, "why_plain", lambda *arguments: None)
    with caplog.at_level(logging.WARNING):
        round_linears(make_executor().model)
        assert not caplog.messages
        with runtime.backend("torch"):
            round_linears(make_executor().model)
    assert len(caplog.messages) == 1 and "the kernels of torch are asked for" in caplog.messages[0]


def test_whole_videos_are_close(make_executor: Callable[..., Executor]) -> None:
    executor = adapted(make_executor())
    noise = gaussian_noise(3, executor.noise_shape(1, 1), executor.device)
    with torch.no_grad():
        wanted = executor.roll_out([PLAN], [0], noise)[0]
        round_linears(executor.model)
        found = executor.roll_out([PLAN], [0], noise)[0]
        again = executor.roll_out([PLAN], [0], noise)[0]
    assert torch.equal(found, again)
    assert 1e-3 < relative(found, wanted) < 0.3


def test_training_and_evaluation_refuse_rounded_linears(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = get_preset("shapeworld")
    rounded = replace(config, executor=replace(config.executor, fp8_linears=True), output=str(tmp_path / "run"))
    for refused in (build_policies, train):
        with pytest.raises(UserError, match=KEY):
            refused(rounded)
    option = ["--executor.fp8_linears", "true"]
    for command, words in ((train_command, ["shapeworld", "--dry-run"]), (evaluate, ["shapeworld"])):
        assert command([*words, *option]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {KEY}")
    assert not (tmp_path / "run").exists()
    (tmp_path / "c.yaml").write_text(to_yaml(rounded))
    assert from_yaml(tmp_path / "c.yaml").executor.fp8_linears  # a file of generate may hold it
