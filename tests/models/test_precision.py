"""The named precisions against fp32 and against diffusers at the same precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import synthesise
from torch import Tensor

from tempact.models.wan.checkpoints.load import PRECISIONS, load_transformer
from tempact.models.wan.transformer import Block, WanConfig, WanTransformer

CPU = torch.device("cpu")
SMALL = WanConfig(dim=96, ffn_dim=128, freq_dim=32, text_dim=16, text_len=6, heads=2, layers=6, in_dim=4, out_dim=4)
SIGMAS = torch.tensor([0.9375, 0.625, 0.0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = synthesise.random_state(SMALL)
    return synthesise.diffusers_folder(tmp_path_factory.mktemp("precision") / "pipeline", state, SMALL)


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, WanTransformer]:
    return {p: load_transformer(folder, device=CPU, config=SMALL, precision=p) for p in PRECISIONS}


def draw() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 4, 3, 8, 8), torch.randn(2, 6, 16)


@torch.no_grad()
def velocity(model: WanTransformer, x: Tensor, text: Tensor, *, autocast: bool) -> Tensor:
    """As the executor calls it, latents in fp32 under autocast, or all in the dtype of the weights."""
    dtype = model.patch_embedding.weight.dtype
    low = autocast and dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=low, cache_enabled=False):
        words = model.project_text(text.to(dtype))
        out = model(x if low else x.to(dtype), SIGMAS.expand(2, 3), words, torch.arange(3))
    return out.float()


def error(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).pow(2).mean() / wanted.pow(2).mean()).sqrt())


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_errs_as_diffusers_does(folder: Path, models: dict[str, WanTransformer], autocast: bool) -> None:
    """diffusers keeps gates in fp32 as "bf16-fp32-gates" does; "bf16" rounds them too, which costs more."""
    pytest.importorskip("diffusers", reason="needs diffusers: pip install -e '.[test]'")
    from diffusers import WanTransformer3DModel

    theirs = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.bfloat16).eval()
    errors: dict[str, float] = dict.fromkeys(("bf16", "bf16-fp32-gates", "diffusers"), 0.0)
    for _ in range(3):
        x, text = draw()
        exact = velocity(models["fp32"], x, text, autocast=False)
        for precision in ("bf16", "bf16-fp32-gates"):
            errors[precision] += error(velocity(models[precision], x, text, autocast=autocast), exact) / 3
        timestep = (1000.0 * SIGMAS).repeat_interleave(16).expand(2, -1)
        with torch.no_grad():
            stock = theirs(x.bfloat16(), timestep, text.bfloat16()).sample
        errors["diffusers"] += error(stock.float(), exact) / 3
    assert 0.002 < errors["bf16-fp32-gates"] < 1.1 * errors["diffusers"]
    assert errors["bf16-fp32-gates"] < errors["bf16"] < 2 * errors["diffusers"]


@pytest.mark.parametrize("autocast", [False, True])
def test_gates_are_rounded_only_where_they_are_said_to_be(models: dict[str, WanTransformer], autocast: bool) -> None:
    """The block's modulation vectors: fp32 values under "bf16-fp32-gates", also under autocast."""
    x, text = draw()
    gates: dict[str, Tensor] = {}
    for precision, model in models.items():

        def keep(block: Block, given: tuple, kept: str = precision) -> None:
            gates[kept] = block.modulation + given[1]

        handle = model.blocks[3].register_forward_pre_hook(keep)
        velocity(model, x, text, autocast=autocast)
        handle.remove()
    exact = gates["fp32"]
    assert gates["bf16"].dtype == torch.bfloat16
    assert 1e-3 < error(gates["bf16"].float(), exact) < 2e-2
    assert gates["bf16-fp32-gates"].dtype == torch.float32
    assert error(gates["bf16-fp32-gates"], exact) < 1e-6


def test_bf16_is_the_whole_model_in_bf16(models: dict[str, WanTransformer], folder: Path) -> None:
    """Regime A: as the published models are run, everything cast."""
    x, text = draw()
    cast = load_transformer(folder, device=CPU, config=SMALL).bfloat16()
    assert torch.equal(velocity(cast, x, text, autocast=False), velocity(models["bf16"], x, text, autocast=False))


def test_a_model_without_memory_can_be_traced() -> None:
    """The meta device knows no autocast."""
    with torch.device("meta"):
        model = WanTransformer(SMALL)
        x, text = torch.empty(1, 4, 2, 4, 4), torch.empty(1, 6, 16)
        assert model(x, torch.empty(1, 2), model.project_text(text), torch.arange(2)).shape == x.shape
