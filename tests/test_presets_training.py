"""Two iterations of every preset of a real backbone by its command, with small widths and rewards made up: from
published layouts to checkpoints, and from random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from models import synthesise
from peft import PeftConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from tempact import train
from tempact.cli import from_yaml
from tempact.errors import EXIT_USER_ERROR
from tempact.models.wan.checkpoints.convert import convert
from tempact.models.wan.transformer import WanConfig
from tempact.presets import get_preset
from tempact.reporting import read_metrics
from tempact.rewards import RewardSet, Span
from tempact.runs import run as run_module
from tempact.shapeworld.pretraining.planner import fit_tokenizer
from tempact.types import Plan, Step
from tempact.worlds import World

SMALL = WanConfig(dim=48, ffn_dim=64, freq_dim=16, text_dim=16, text_len=512, heads=2, layers=2)
FRAMES = 15  # beyond the windows of 12
INSTRUCTIONS = ("A circle becomes a square.", "A square, then a circle.", "A circle.")
SHAPE = [
    "--device", "cpu", "--executor.video_size", "16", "32", "--executor.frames", str(FRAMES),
    "--executor.lora.rank", "4", "--executor.continuations", "2", "--executor.optim.lr", "1e-2",
    "--planner.plans_per_prompt", "2", "--planner.max_new_tokens", "6", "--data.prompts_per_iteration", "1",
    "--trainer.iterations", "2",
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("log_handlers")


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little Qwen3 with a chat template."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("planner")
    tokenizer = fit_tokenizer(["user\n", "assistant\n", *INSTRUCTIONS] * 2)
    sizes = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    Qwen3ForCausalLM(sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wan's, with text encoder and VAE."""
    pytest.importorskip("diffusers", reason="needs diffusers: pip install -e '.[test]'")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("release") / "wan"
    return synthesise.pipeline_folder(folder, synthesise.random_state(SMALL), SMALL)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,category\n" + "".join(f'"{text}",shapes\n' for text in INSTRUCTIONS), encoding="utf-8-sig")
    return path


def length(prompts: list[str], plans: list[Plan], frames: Tensor, spans: list[Span | None]) -> Tensor:
    """Of the planner's answer."""
    return torch.tensor([len(plan.response) % 10 / 10 for plan in plans])


@dataclass
class Brightness:
    """Of the frames from `first` on."""

    first: int

    def __call__(self, prompts: list[str], plans: list[Plan], frames: Tensor, spans: list[Span | None]) -> Tensor:
        return frames[:, :, self.first :].float().mean(dim=(2, 3, 4, 5)) / 255


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards without judges, and plans of three steps whatever the untaught planner has said."""

    def planned(text: str, instruction: str, frames: int, chunk: int) -> Plan:
        bounds = [0, frames // chunk // 3 * chunk, (frames // chunk - 1) * chunk, frames]
        words = ("a circle", "a square", "a circle")
        return Plan(instruction, tuple(Step(a, b, w) for (a, b), w in zip(pairwise(bounds), words, strict=True)))

    rewards = RewardSet(length, Brightness(0), Brightness(9), Brightness(1))
    monkeypatch.setattr("tempact.planner.planner.parse_plan", planned)
    monkeypatch.setattr(World, "rewards", lambda world, *given: rewards)
    monkeypatch.setattr(run_module, "write_extremes", lambda *given: None)  # a third of the time, and tested elsewhere


def weights_of(preset: str, folder: Path) -> list[str]:
    """A published file of that backbone, converted because such files tell no sizes, and what goes with it."""
    state = synthesise.random_state(SMALL)
    averaged = preset in ("self-forcing", "causal-forcing-framewise")  # these releases hold generator_ema
    layout = synthesise.self_forcing if averaged else synthesise.causal_forcing
    convert(layout(folder / "published.pt", state), folder / "weights", config=SMALL)
    given = ["--executor.weights", str(folder / "weights"), "--executor.text_cache", str(folder / "text")]
    if preset == "longlive":
        given += ["--executor.adapters", str(synthesise.longlive_lora(folder / "lora.pt", SMALL, 3))]
    return given


def check(folder: Path, preset: str) -> None:
    """Two whole iterations that have learned something, from where they said."""
    config = from_yaml(folder / "config.yaml")
    assert config.preset == preset and config.executor.precision == "bf16-fp32-gates"
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["executor/ratio_deviation"] == row["planner/ratio_deviation"] == 0.0
        measured = [value for name, value in row.items() if name.startswith("executor/rollout_gap/")]
        assert len(measured) == 3 and max(measured) < 0.5
        assert (row["executor/kl"] == 0.0) == (row["step"] == 1) and row["executor/grad_norm"] > 0
        assert row["rewards/aesthetics/missing"] == 0.0
    checkpoint = folder / "checkpoints" / "step-000002"
    assert set(PeftConfig.from_pretrained(str(checkpoint / "executor")).target_modules) == set(
        get_preset(preset).executor.lora.targets
    )
    for who in ("executor", "planner"):
        tensors = load_file(checkpoint / who / "adapter_model.safetensors")
        assert any(name.endswith("lora_B.weight") and bool(tensor.any()) for name, tensor in tensors.items())
    samples = [json.loads(line) for line in (folder / "samples" / "step-000002.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * 2 and {sample["prompt"] for sample in samples} <= set(INSTRUCTIONS)
    assert all(sample["category"] == "shapes" and sample["plan"][-1]["end"] == FRAMES for sample in samples)


@pytest.mark.parametrize(
    "preset",
    [
        pytest.param("self-forcing", marks=pytest.mark.slow),
        "longlive",
        pytest.param("causal-forcing", marks=pytest.mark.slow),
        pytest.param("causal-forcing-framewise", marks=pytest.mark.slow),
    ],
)
def test_two_iterations_from_published_layouts(
    preset: str, tmp_path: Path, planner: Path, release: Path, prompts: Path, judged: None
) -> None:
    given = ["--planner.weights", str(planner), "--executor.wan_folder", str(release), "--data.prompts", str(prompts)]
    folder = tmp_path / "run"
    assert train.main([preset, *SHAPE, *given, *weights_of(preset, tmp_path), "--output", str(folder)]) == 0
    check(folder, preset)
    assert "Random weights" not in (folder / "report.html").read_text()


@pytest.mark.slow
def test_two_iterations_from_random_weights(
    tmp_path: Path, prompts: Path, judged: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    given = ["--planner.weights", "random", "--executor.weights", "random-tiny", "--data.prompts", str(prompts)]
    assert train.main(["longlive", *SHAPE, *given, "--output", str(folder)]) == 0
    check(folder, "longlive")
    told = capsys.readouterr().err
    assert "executor.weights: random-tiny: videos are noise" in told and "planner.weights: random: its plans" in told
    assert "Random weights</strong> (planner.weights: random, executor.weights: random-tiny)" in " ".join(
        (folder / "report.html").read_text().split()
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--executor.weights", ""], "executor.weights: found nothing, and the preset longlive has none of its own"),
        (["--executor.weights", "/nowhere/x.pt"], "executor.weights: found nothing at /nowhere/x.pt; accepted: "),
        (["--data.prompts", ""], "data.prompts: found nothing, which does not serve executor.weights random-tiny"),
        (["--data.prompts", "shapeworld"], "accepted: a CSV, JSONL, parquet or text file of prompts"),
        (["--data.prompts", "gone.csv"], "gone.csv: cannot be read"),
        (["--data.prompts_per_iteration", "4"], "found 3 prompts; accepted: at least data.prompts_per_iteration (4)"),
        (
            ["--executor.frames", "1026"],
            "executor.frames: found 1026; accepted: whole chunks of 3, at most 1023 latent",
        ),
        (
            ["--executor.chunk_frames", "15"],
            "executor.chunk_frames: found 15; accepted: 1, 3, 5 with this window",
        ),
        ([], "environment: found no address of the judge plan_quality"),
    ],
)
def test_what_is_missing_is_said_before_weights_are_loaded(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    change: list[str], words: str,
) -> None:  # fmt: skip
    def loads(config: object) -> Callable:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(run_module, "build_policies", loads)
    given = ["--planner.weights", "random", "--executor.weights", "random-tiny", "--data.prompts", str(prompts)]
    folder = tmp_path / "run"
    assert train.main(["longlive", *SHAPE, *given, *change, "--output", str(folder)]) == EXIT_USER_ERROR
    shown = capsys.readouterr().err
    assert words in shown and shown.startswith("error: ") and shown.count("\n") == 1
    assert not folder.exists()
