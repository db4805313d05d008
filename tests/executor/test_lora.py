"""The executor's LoRA linear against PEFT's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from csrc_triton import runtime
from tempact.executor.lora import LoraLinear
from tempact.models.wan.transformer import FeedForward

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


def test_fp32_adapters_on_a_bf16_base_are_as_good_as_peft() -> None:
    model, x = make_feed_forward(torch.bfloat16), torch.randn(4, 32, 8, device=DEVICE)
    exact = differentiated(make_feed_forward(torch.bfloat16).double(), x.bfloat16().double(), "torch")
    with torch.autocast(DEVICE.type, torch.bfloat16):
        plain, fused = (differentiated(model, x.bfloat16(), backend) for backend in ("torch", "triton"))
    assert fused[0].dtype == torch.bfloat16 and [g.dtype for g in fused[1]] == [g.dtype for g in plain[1]]
    for ours, theirs, right in zip([fused[0], *fused[1]], [plain[0], *plain[1]], [exact[0], *exact[1]], strict=True):
        assert (ours - right).abs().max() <= 2 * (theirs - right).abs().max() + 1e-6


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
