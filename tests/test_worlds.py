"""Worlds: which weights are whose, what goes with them, and the parts of published checkpoints."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import synthesise

from tempact import evaluate, generate
from tempact.config import RunConfig
from tempact.diagnostics.dry_run import missing
from tempact.errors import UserError
from tempact.executor.sampler import gaussian_noise
from tempact.models.wan.checkpoints.load import load_transformer
from tempact.models.wan.transformer import WanConfig
from tempact.policies import build_policies
from tempact.presets import get_preset
from tempact.rewards import RewardSet
from tempact.types import Batch, Plan, Step
from tempact.worlds import RandomWan, ShapeWorld, Wan, World, shipped, world_of

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
        ({"adapters": ("gone.pt",)}, "executor.adapters: gone.pt: found no file; accepted: "),
        ({"wan_folder": "gone"}, "executor.wan_folder: gone is not a folder; accepted: Wan2.1-T2V-1.3B"),
        ({"video_size": (16, 24)}, "executor.video_size: found 16x24; accepted: positive multiples of 16"),
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
        world_of(config).prompts()
    with pytest.raises(UserError, match="found no address of the judge plan_quality; accepted: TEMPACT_JUDGE_PLAN"):
        world_of(config).rewards(CPU)


def kind(weights: str | Path) -> type[World]:
    base = get_preset("shapeworld-smoke")
    return type(world_of(replace(base, executor=replace(base.executor, weights=str(weights)))))


def test_which_weights_are_whose(release: Path, tmp_path: Path) -> None:
    file = synthesise.causal_forcing(tmp_path / "x.pt", {})
    (tmp_path / "empty").mkdir()
    assert [kind(name) for name in ("shapeworld", "random", "random-tiny")] == [ShapeWorld, RandomWan, RandomWan]
    assert {kind(name) for name in (release, file, tmp_path / "empty", "gone", "")} == {Wan}  # what is missing, too
    assert kind(shipped("executor", "shapeworld")) is ShapeWorld


@pytest.fixture(params=["shapeworld", "wan", "random"])
def copied(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[RunConfig, RunConfig]:
    """A world under its usual name, and the same from weights in a copied folder (random ones have but their names)."""
    folder, base = tmp_path / "copy", get_preset("shapeworld-smoke")
    if request.param == "shapeworld":
        shutil.copytree(shipped("executor", "shapeworld"), folder)
        usual = replace(base, device="cpu")
    elif request.param == "wan":
        usual = configured(request.getfixturevalue("release"), tmp_path)
        shutil.copytree(usual.executor.weights, folder)
    else:
        usual, folder = configured(Path("random-tiny"), tmp_path), Path("random-tiny")
    return usual, replace(usual, executor=replace(usual.executor, weights=str(folder)))


def test_a_copied_folder_is_the_same_world(
    copied: tuple[RunConfig, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("TEMPACT_JUDGE_", "VLLM_", "LLM_"))]:
        monkeypatch.delenv(name)
    usual, copy = (world_of(config) for config in copied)
    assert type(usual) is type(copy) and usual.sizes()[:2] == copy.sizes()[:2]
    own = isinstance(copy, ShapeWorld)
    assert copy.chosen_suite(None) == ("shapeworld" if own else "temporal-order")
    assert copy.note == ("random weights" if isinstance(copy, RandomWan) else "")
    if own:
        assert copy.prompts().draw(1, 0) == usual.prompts().draw(1, 0)
        assert type(copy.rewards(CPU)) is type(usual.rewards(CPU)) is RewardSet
        assert copy.chosen_suite("shapeworld") == "shapeworld"
    else:
        for asked, message in (
            (copy.prompts, "data.prompts: found 'shapeworld', which does not serve executor.weights"),
            (lambda: copy.rewards(CPU), "found no address of the judge plan_quality"),
            (lambda: copy.chosen_suite("shapeworld"), "whose videos ShapeWorld's evaluation cannot score"),
        ):
            with pytest.raises(UserError, match=message):
                asked()
    parts = [world.executor_parts(CPU) for world in (usual, copy)]
    states = [part.transformer.state_dict() for part in parts]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert parts[1].codec.fps == (8.0 if own else 16.0)


def test_commands_take_a_copied_folder_for_the_same_world(
    copied: tuple[RunConfig, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The suite of `evaluate`, the instructions of `generate`, what a dry run misses."""
    own, settings = isinstance(world_of(copied[1]), ShapeWorld), copied[1].executor
    options = ["--device", "cpu", "--executor.weights", settings.weights, "--executor.frames", str(settings.frames)]
    options += ["--executor.video_size", *map(str, settings.video_size), "--executor.text_cache", settings.text_cache]
    assert evaluate.main(["shapeworld-smoke", *options, "--judge", "in-domain", "--simple", "999"]) == 2
    assert ("--judge: is not for --suite shapeworld" if own else "--simple: found 999") in capsys.readouterr().err

    def loads(*given: object, **more: object) -> None:
        raise UserError("weights are loaded")

    monkeypatch.setattr("tempact.runs.generation.build_executor", loads)
    assert generate.main([*options, "--prompt", "A cat sings.", "--output", str(tmp_path / "videos")]) == 2
    assert ("instruction: not understood" if own else "weights are loaded") in capsys.readouterr().err
    missed = {line.split(":")[0] for line in missing(replace(copied[1], output=str(tmp_path / "run")))}
    assert missed == set() if own else {"data.prompts", "judges"} <= missed
