"""The executor's parts from published checkpoints: transformer with adapters, text encoder, VAE."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import synthesise

from tempact.config import RunConfig
from tempact.errors import UserError
from tempact.executor.sampler import gaussian_noise
from tempact.models.wan.checkpoints.load import load_transformer
from tempact.models.wan.transformer import WanConfig
from tempact.presets import get_preset
from tempact.types import Batch, Plan, Step
from tempact.worlds import build_policies, build_prompts, build_rewards, is_wan

CPU = torch.device("cpu")
SMALL = WanConfig(dim=48, ffn_dim=64, freq_dim=16, text_dim=16, text_len=512, heads=2, layers=2)
PLAN = Plan("i", (Step(0, 3, "a circle"), Step(3, 6, "a square")))


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder of diffusers, of small widths."""
    pytest.importorskip("diffusers", reason="needs diffusers: pip install -e '.[test]'")
    torch.manual_seed(0)
    return synthesise.pipeline_folder(tmp_path_factory.mktemp("release") / "wan", synthesise.random_state(SMALL), SMALL)


def configured(folder: Path, cache: Path, **changes: object) -> RunConfig:
    base = get_preset("shapeworld-smoke")
    settings = {
        "weights": str(folder),
        "frames": 6,
        "video_size": (16, 32),
        "text_cache": str(cache / "text"),
    } | changes
    return replace(base, device="cpu", executor=replace(base.executor, **settings))


def file_of(release: Path, folder: Path) -> Path:
    """LongLive's base with the config of a small model: a conversion, as such files tell no sizes."""
    from tempact.models.wan.checkpoints.convert import convert

    file = synthesise.causal_forcing(folder / "longlive_base.pt", synthesise.random_state(SMALL))
    convert(file, folder / "base", config=SMALL)
    return folder / "base"


@pytest.mark.parametrize("precision", ["fp32", "bf16-fp32-gates"])
def test_a_published_checkpoint_is_rolled_out_and_updated(release: Path, tmp_path: Path, precision: str) -> None:
    """From LongLive's files beside Wan's release: the weights are those that loading alone gives."""
    base = file_of(release, tmp_path)
    lora = synthesise.longlive_lora(tmp_path / "lora.pt", SMALL, 3)
    config = configured(base, tmp_path, wan_folder=str(release), adapters=(str(lora),), precision=precision)
    executor = build_policies(config).executor
    wanted = load_transformer(base, device=CPU, adapters=[lora], precision=precision).state_dict()
    found = {name.replace(".base_layer", ""): tensor for name, tensor in executor.model.state_dict().items()}
    assert [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)] == []
    rollout = executor.rollout([PLAN], [3], gaussian_noise(0, executor.noise_shape(1, 2), CPU))
    assert rollout.frames.shape == (1, 2, 21, 3, 16, 32)
    assert torch.equal(rollout.frames[0, 0, :9], rollout.frames[0, 1, :9])
    assert not torch.equal(rollout.frames[0, 0, 9:], rollout.frames[0, 1, 9:])
    ones = torch.ones(1, dtype=torch.bool)
    batch = Batch(torch.zeros(1), ones, torch.tensor([[1.0, -1.0]]), ones.expand(1, 2), None, rollout.transition)
    metrics = executor.update(batch, [0])
    assert metrics["ratio_deviation"] == 0.0
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in executor.parameters().values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp8"}, "precision: found 'fp8'; accepted: fp32, bf16, bf16-fp32-gates"),
        ({"adapters": ("gone.pt",)}, "gone.pt: found no file; accepted: an adapter's file or folder"),
        ({"wan_folder": "gone"}, "executor.wan_folder: gone is not a folder; accepted: Wan2.1-T2V-1.3B"),
        ({"video_size": (16, 24)}, "executor.video_size: found 16x24; accepted: multiples of 16x16"),
        ({"weights": "shapeworld", "frames": 24, "precision": "bf16"}, "accepted: none and fp32 in ShapeWorld"),
        ({"weights": "shapeworld", "frames": 24, "adapters": ("x",)}, "accepted: none and fp32 in ShapeWorld"),
        ({"weights": "gone.pt"}, "found nothing at gone.pt; accepted: shapeworld, a folder with weights, a Wan check"),
    ],
)
def test_parts_that_do_not_fit_are_refused(release: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_policies(configured(release, tmp_path, **changes))
    assert not (tmp_path / "text").exists()


def test_another_models_latents_are_refused(release: Path, tmp_path: Path) -> None:
    sizes = replace(SMALL, in_dim=48, out_dim=48)  # Wan2.2's 5B model has that many
    folder = synthesise.wan_folder(tmp_path / "wan", synthesise.random_state(sizes), sizes)
    with pytest.raises(UserError, match="found 48 latent channels; accepted: 16, as the VAE"):
        build_policies(configured(folder, tmp_path, wan_folder=str(release)))


def test_training_on_real_video_is_refused_without_prompts_and_judges(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TEMPACT_JUDGE_BASE_URL", "TEMPACT_JUDGE_PLAN_QUALITY_BASE_URL", "LLM_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    config = configured(release, tmp_path)
    with pytest.raises(UserError, match="data.prompts: found 'shapeworld', which does not serve executor.weights"):
        build_prompts(config)
    with pytest.raises(UserError, match="found no address of the judge plan_quality; accepted: TEMPACT_JUDGE_PLAN"):
        build_rewards(config)


def test_what_is_wan_and_what_is_shapeworlds(release: Path, tmp_path: Path) -> None:
    file = synthesise.causal_forcing(tmp_path / "x.pt", {})
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "transformer.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    assert is_wan(str(release)) and is_wan(str(file))
    assert not any(is_wan(name) for name in ("shapeworld", str(tmp_path / "own"), str(tmp_path / "empty"), "gone"))
