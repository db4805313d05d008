"""The executor's LoRA linear against PEFT's own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from csrc_triton import runtime
from tempact.executor.lora import LoraLinear, merged
from tempact.models.adapters import freeze_reference, reference_active
from tempact.models.wan.transformer import FeedForward
from tempact.rl import EMA

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_feed_forward(dtype: torch.dtype, **changes: object) -> nn.Module:
    """A feed-forward part with adapters on both linears, the base in `dtype`, the adapters as PEFT keeps them."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"], **changes)
    config._register_custom_module({nn.Linear: LoraLinear})
    model = get_peft_model(FeedForward(8, 24).to(dtype), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.to(DEVICE)


def differentiated(model: nn.Module, x: Tensor, backend: str) -> tuple[Tensor, list[Tensor]]:
    x = x.detach().requires_grad_()
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    with runtime.backend(backend):
        out = model(x)
        return out, list(torch.autograd.grad(out.sin().sum(), leaves))


def test_output_and_gradients_are_those_of_peft() -> None:
    model = make_feed_forward(torch.float64).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64, device=DEVICE)
    (plain, expected), (fused, found) = (differentiated(model, x, backend) for backend in ("torch", "triton"))
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    assert len(found) == 5  # of the input, and of A and B of both linears
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU merges where kernels serve")
def test_a_cpu_merges_into_fp32_weights_and_trains_as_peft_does() -> None:
    """Unless the torch path is asked for by name."""
    model, x = make_feed_forward(torch.float32), torch.randn(4, 8)
    plain, own = (differentiated(model, x, backend) for backend in ("torch", "auto"))
    assert all(torch.equal(a, b) for a, b in zip([plain[0], *plain[1]], [own[0], *own[1]], strict=True))
    with runtime.backend("torch"), merged(model):
        assert torch.equal(output(model, x, "torch"), plain[0]) and not merged_weights(model)
    with runtime.backend("auto"), merged(model):
        inside = differentiated(model, x, "auto")
        assert all(torch.equal(a, b) for a, b in zip([plain[0], *plain[1]], [inside[0], *inside[1]], strict=True))
        assert torch.equal(output(model, x, "auto"), output_merged(model, x)) and len(merged_weights(model)) == 2
    half = make_feed_forward(torch.bfloat16)
    with runtime.backend("auto"), merged(half):
        assert not merged_weights(half)


def test_fp32_adapters_on_a_bf16_base_are_as_good_as_peft() -> None:
    model, x = make_feed_forward(torch.bfloat16), torch.randn(4, 32, 8, device=DEVICE)
    exact = differentiated(make_feed_forward(torch.bfloat16).double(), x.bfloat16().double(), "torch")
    with torch.autocast(DEVICE.type, torch.bfloat16):
        plain, fused = (differentiated(model, x.bfloat16(), backend) for backend in ("torch", "triton"))
    assert fused[0].dtype == torch.bfloat16 and [g.dtype for g in fused[1]] == [g.dtype for g in plain[1]]
    for ours, theirs, right in zip([fused[0], *fused[1]], [plain[0], *plain[1]], [exact[0], *exact[1]], strict=True):
        assert (ours - right).abs().max() <= 2 * (theirs - right).abs().max() + 1e-6


@pytest.mark.parametrize("merging", [False, True])
def test_autocast_to_another_precision_computes_as_peft_does(merging: bool) -> None:
    model, x = make_feed_forward(torch.float32), torch.randn(4, 32, 8, device=DEVICE)
    found = []
    for backend in ("torch", "triton"):
        with runtime.backend(backend), torch.no_grad(), merged(model) if merging else nullcontext():
            with torch.autocast(DEVICE.type, torch.bfloat16):
                found.append(model(x))
    assert found[0].dtype == torch.bfloat16 and torch.equal(*found)


def kept_bytes(run: Callable[[], Tensor]) -> int:
    """Of the distinct tensors that autograd keeps for the backward, parameters apart."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()  # noqa: F841 - storages must not be reused while they are counted
    return sum(seen.values())


def test_keeps_the_inputs_alone() -> None:
    model, rows = make_feed_forward(torch.bfloat16), 64
    x = torch.randn(rows, 8, dtype=torch.bfloat16, device=DEVICE)
    kept = {}
    for backend in ("torch", "triton"):
        with runtime.backend(backend), torch.autocast(DEVICE.type, torch.bfloat16):
            kept[backend] = kept_bytes(lambda: model(x))
    assert kept["triton"] == rows * (8 + 3) * 2  # the input, and A x of the second linear
    assert kept["torch"] > kept["triton"] + 2 * rows * 24 * 2  # the hidden rows before and after the GELU, and copies


@pytest.mark.parametrize("changes", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}])
def test_other_adapters_compute_as_peft_does(changes: dict[str, object]) -> None:
    model, x = make_feed_forward(torch.float32, **changes), torch.randn(3, 8, device=DEVICE)
    found = []
    for backend in ("torch", "triton"):
        torch.manual_seed(1)
        found.append(differentiated(model, x, backend)[0])
    assert torch.equal(*found)


def test_no_adapter_is_the_base() -> None:
    model, x = make_feed_forward(torch.float32), torch.randn(3, 8, device=DEVICE)
    with runtime.backend("triton"), model.disable_adapter():
        without = model(x)
    with runtime.backend("torch"), model.disable_adapter():
        assert torch.equal(without, model(x))
    assert not torch.equal(without, model(x))


@torch.no_grad()
def output(model: nn.Module, x: Tensor, backend: str = "triton") -> Tensor:
    with runtime.backend(backend):
        return model(x)


@torch.no_grad()
def output_merged(model: nn.Module, x: Tensor) -> Tensor:
    with runtime.backend("triton"), merged(model):
        return model(x)


def layers_of(model: nn.Module) -> list[LoraLinear]:
    return [layer for layer in model.modules() if isinstance(layer, LoraLinear)]


def merged_weights(model: nn.Module) -> list[Tensor]:
    return [layer._merged.linear.weight for layer in layers_of(model) if layer._merged is not None]


def sums(model: nn.Module, adapter: str = "default") -> list[Tensor]:
    """W + (alpha / r) B A in fp64."""
    found = []
    for layer in layers_of(model):
        change = layer.lora_B[adapter].weight.double() @ layer.lora_A[adapter].weight.double()
        found.append(layer.get_base_layer().weight.double() + layer.scaling[adapter] * change)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_the_sum_rounded_once(dtype: torch.dtype) -> None:
    model, x = make_feed_forward(dtype), torch.randn(4, 8, dtype=dtype, device=DEVICE)
    model.requires_grad_(False)
    base = [layer.get_base_layer().weight.clone() for layer in layers_of(model)]
    last_place = torch.finfo(dtype).eps
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        plain, found = output(model, x), output_merged(model, x)
    assert len(merged_weights(model)) == 2
    for own, exact in zip(merged_weights(model), sums(model), strict=True):
        assert own.dtype == dtype
        rounding = 0.5 * last_place * exact.abs() + 1e-6 * exact.abs().max()
        assert bool(((own - exact).abs() <= rounding).all())
    assert not torch.equal(found, plain)
    torch.testing.assert_close(found, plain, rtol=0, atol=8 * last_place * float(plain.abs().max()))
    assert all(
        torch.equal(layer.get_base_layer().weight, was) for layer, was in zip(layers_of(model), base, strict=True)
    )


@pytest.mark.parametrize("change", ["AdamW", "AdamW, foreach", "average", "load", "in place"])
def test_a_changed_adapter_is_merged_anew_into_the_same_memory(change: str) -> None:
    model, x = make_feed_forward(torch.float32), torch.randn(4, 8, device=DEVICE)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = output_merged(model, x)
    places = [weight.data_ptr() for weight in merged_weights(model)]
    assert torch.equal(output_merged(model, x), before)
    if change.startswith("AdamW"):
        optimiser = torch.optim.AdamW(parameters.values(), lr=0.1, foreach="foreach" in change)
        differentiated_loss = model(x).square().sum()
        differentiated_loss.backward()
        optimiser.step()
    elif change == "average":
        average = EMA(parameters, 0.9)
        with torch.no_grad():
            for value in average.average.values():
                value.mul_(1.5)
        with average.applied(parameters):
            torch.testing.assert_close(output_merged(model, x), output(model, x))
            assert not torch.allclose(output_merged(model, x), before)
        assert torch.equal(output_merged(model, x), before)
        return
    elif change == "load":
        model.load_state_dict({name: 1.5 * value for name, value in model.state_dict().items()})
    else:
        with torch.no_grad():
            next(iter(parameters.values())).add_(0.1)
    after = output_merged(model, x)
    torch.testing.assert_close(after, output(model, x))
    assert not torch.allclose(after, before)
    assert [weight.data_ptr() for weight in merged_weights(model)] == places


def test_gradients_and_other_adapters_are_never_merged() -> None:
    model, x = make_feed_forward(torch.float32), torch.randn(4, 8, device=DEVICE)
    freeze_reference(model, model.peft_config["default"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter.mul_(1.5)
    with reference_active(model):
        reference = output(model, x)
    leaves = [p for p in model.parameters() if p.requires_grad]
    plain = differentiated(model, x, "triton")
    with runtime.backend("triton"), merged(model):
        inside = differentiated(model, x, "triton")
        assert torch.equal(inside[0], plain[0]) and len(inside[1]) == len(leaves) + 1
        assert all(torch.equal(a, b) for a, b in zip(inside[1], plain[1], strict=True))
        with reference_active(model):
            assert torch.equal(output(model, x), reference)
            torch.testing.assert_close(output_merged(model, x), reference)
            torch.testing.assert_close(merged_weights(model), [own.float() for own in sums(model, "ref")])
        # the memory holds the reference now, which is not what is active
        assert torch.equal(output(model, x), output_unmerged(model, x))
        with model.disable_adapter():
            assert torch.equal(output(model, x), output(model, x, "torch"))
        assert torch.equal(output(model, x, "torch"), output_unmerged(model, x, "torch"))
    torch.testing.assert_close(output_merged(model, x), output(model, x))


def output_unmerged(model: nn.Module, x: Tensor, backend: str = "triton") -> Tensor:
    before = [layer.merging for layer in layers_of(model)]
    for layer in layers_of(model):
        layer.merging = False
    try:
        return output(model, x, backend)
    finally:
        for layer, merging in zip(layers_of(model), before, strict=True):
            layer.merging = merging


def test_merging_ends_with_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make_feed_forward(torch.float32), torch.randn(4, 8, device=DEVICE)
    state = list(model.state_dict())
    plain = output(model, x)
    with runtime.backend("triton"), merged(model):
        inside = output(model, x)
        with pytest.raises(KeyError), merged(model):
            raise KeyError
        assert torch.equal(output(model, x), inside) and not torch.equal(inside, plain)
    with pytest.raises(KeyError), runtime.backend("triton"), merged(model):
        raise KeyError
    assert torch.equal(output(model, x), plain) and list(model.state_dict()) == state
    failing = layers_of(model)[1]
    monkeypatch.setattr(failing, "merge_beside", lambda: {}["no memory"])
    with pytest.raises(KeyError), runtime.backend("triton"), merged(model):
        pytest.fail("not to be entered")
    assert torch.equal(output(model, x), plain)


@pytest.mark.parametrize("changes", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}])
def test_other_adapters_are_not_merged(changes: dict[str, object]) -> None:
    model, x = make_feed_forward(torch.float32, **changes).eval(), torch.randn(3, 8, device=DEVICE)
    assert torch.equal(output_merged(model, x), output(model, x)) and not merged_weights(model)


def test_the_torch_path_merges_nothing() -> None:
    model, x = make_feed_forward(torch.float32), torch.randn(3, 8, device=DEVICE)
    plain, generator = output(model, x, "torch"), torch.random.get_rng_state()
    with runtime.backend("torch"), merged(model):
        assert torch.equal(output(model, x, "torch"), plain)
    assert not merged_weights(model)
    output_merged(model, x)
    assert len(merged_weights(model)) == 2 and torch.equal(torch.random.get_rng_state(), generator)
