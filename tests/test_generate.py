"""Generating videos from the command line: ShapeWorld's, and those of real backbones with small random weights."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from models import synthesise
from test_worlds import SMALL, file_of
from test_worlds import release as release  # a fixture: a pipeline's folder with small random weights

from tempact import generate
from tempact.cli import to_yaml
from tempact.config import LoraConfig, RunConfig
from tempact.errors import UserError
from tempact.executor.best_of import Continuations
from tempact.executor.sampler import gaussian_noise
from tempact.executor.stream import stream_frames
from tempact.models.wan.codec import PixelCodec
from tempact.planner.planner import Planner
from tempact.policies import PolicyPair, build_policies
from tempact.presets import get_preset
from tempact.rewards import Span
from tempact.runs import generation
from tempact.runs.best_of import span_of
from tempact.runs.checkpoint import save
from tempact.types import Plan, PlanBatch, Prompt, Step
from tempact.video import enlarge

STEPS = [{"start": 0, "end": 3, "prompt": "a cat"}, {"start": 3, "end": 9, "prompt": "a dog"}]
TINY = [
    "--executor.weights", "random-tiny", "--executor.lora.rank", "4", "--executor.lora.alpha", "4",
    "--executor.precision", "fp32",  # a CPU's convolutions in bf16 take six times as long
]  # fmt: skip
SHAPE = ["--executor.video_size", "32", "48", "--frames", "9", "--device", "cpu"]
LONGLIVE = ["longlive", *TINY, *SHAPE, "--planner.weights", "random", "--planner.max_new_tokens", "4"]
# of whom nothing is known: fails if it is loaded
NO_PLANNER = ["longlive", *TINY, *SHAPE, "--planner.weights", "/nowhere"]
INSTRUCTION = "A red circle is at the top left and a blue square is at the bottom right. Then the square vanishes."


def small(**changes: object) -> RunConfig:
    """What LONGLIVE says."""
    base = get_preset("longlive")
    lora = replace(base.executor.lora, rank=4, alpha=4)
    settings = {"weights": "random-tiny", "video_size": (32, 48), "frames": 9, "lora": lora, "precision": "fp32"}
    planner = replace(base.planner, weights="random", max_new_tokens=4)
    return replace(base, device="cpu", planner=planner, executor=replace(base.executor, **settings | changes))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[Path]:
    """The files that a command has written, in order."""
    code = generate.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    paths = [Path(line) for line in captured.out.splitlines()]
    assert all(path.is_file() for path in paths)
    return paths


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command says on standard error when it is refused."""
    code = generate.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def played(path: Path) -> tuple[dict, np.ndarray]:
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    return meta, np.stack([np.frombuffer(raw, np.uint8).reshape(height, width, 3) for raw in reader])


def plan_file(folder: Path, steps: Sequence[dict] = STEPS) -> Path:
    path = folder / "plan.json"
    path.write_text(json.dumps(list(steps)))
    return path


def steps_of(path: Path) -> tuple[Step, ...]:
    return tuple(Step(**step) for step in json.loads(path.read_text())["steps"])


def rolled_out(policies: PolicyPair, steps: tuple[Step, ...], seed: int) -> torch.Tensor:
    """uint8 [T, 3, height, width] of one video."""
    executor = policies.executor
    noise = gaussian_noise(seed, executor.noise_shape(1, 1), executor.device)
    return executor.rollout([Plan("i", steps)], [0], noise).frames[0, 0]


def test_a_shapeworld_video_is_the_rollout_of_its_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("--prompt", INSTRUCTION, "--seed", 3, "--output", tmp_path / "out", "--device", "cpu")
    mp4, _, told = run(capsys, *command)
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir() if path.suffix) == [".json", ".mp4", ".png"]
    policies = build_policies(replace(get_preset("shapeworld"), device="cpu"))
    facts, steps = json.loads(told.read_text()), steps_of(told)
    assert facts["instruction"] == INSTRUCTION and facts["seed"] == 3 and "note" not in facts
    assert (steps[0].start, steps[-1].end) == (0, 24) and facts["frames"] == 24
    wanted = enlarge(rolled_out(policies, steps, 3))
    meta, frames = played(mp4)
    assert meta["fps"] == 8 and frames.shape == wanted.shape
    assert np.abs(frames.astype(int) - wanted).mean() < 6  # of H.264
    again = run(capsys, *command, "--plan", told, "--output", tmp_path / "again")
    assert again[0].read_bytes() == mp4.read_bytes()  # what is told is enough to make it again


def test_the_planner_may_sample_as_it_is_not_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In training, other settings than those of the full distribution are refused."""
    options = ["--prompt", INSTRUCTION, "--output", tmp_path / "out", "--device", "cpu"]
    assert len(run(capsys, *options, "--planner.temperature", 0.1, "--planner.top_p", 0.9)) == 3
    assert "planner.temperature: found 0.0; accepted: 1, or above 0" in refused(
        capsys, *options, "--planner.temperature", 0
    )


def test_no_video_takes_the_place_of_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names differ by seed, plan and settings; the same command writes the same file."""
    common = ("shapeworld", "--prompt", INSTRUCTION, "--device", "cpu", "--output", tmp_path / "out", "--plans", 1)
    plan = ("--plan", plan_file(tmp_path, [{"start": 0, "end": 24, "prompt": "A red circle is at the top left."}]))
    made = [
        run(capsys, *common, *more)[0].name
        for more in ((), ("--seed", 1), plan, (*plan, "--executor.eta", 0.5), (*plan, "--executor.shift", 3), ())
    ]
    assert len(set(made)) == 5 and made[0] == made[-1] and len([*(tmp_path / "out").glob("*.mp4")]) == 5


def test_the_best_of_several_plans_makes_the_video(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By ShapeWorld's plan quality, then by the shortest step; eight are sampled unless told otherwise."""
    opening, asked = "A red circle is at the top left and a blue square is at the bottom right.", list[int]()

    def sample(self: Planner, prompts: list[Prompt], count: int, seed: int) -> PlanBatch:
        asked.append(count)
        gone = "The blue square vanishes."
        spans = [[(0, 24, opening)], [(0, 21, opening), (21, 24, gone)], [(0, 12, opening), (12, 24, gone)],
                 [(0, 9, opening), (9, 24, gone)]]  # fmt: skip
        plans = [Plan(INSTRUCTION, tuple(Step(*step) for step in own)) for own in (spans * 2)[:count]]
        return PlanBatch(prompts, plans, count)

    monkeypatch.setattr(Planner, "sample", sample)
    common = ("--prompt", INSTRUCTION, "--device", "cpu", "--output", tmp_path / "out")
    ends = [steps_of(run(capsys, *common, *more)[2])[0].end for more in ((), ("--plans", 2), ("--plans", 1))]
    assert asked == [8, 2, 1] and ends == [12, 21, 24]


@pytest.mark.slow
def test_random_weights_are_named_on_every_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = run(
        capsys, *NO_PLANNER, "--prompt", "A cat.", "--plan", plan_file(tmp_path), "--count", 2,
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert [path.suffix for path in paths] == [".mp4", ".png", ".json"] * 2
    names = [path.stem for path in paths]
    assert [bool(re.fullmatch(rf"random-weights-a-cat-\w{{8}}-seed{i // 3}-\w{{8}}", names[i])) for i in range(6)]
    assert len(set(names)) == 2
    first, second = (json.loads(paths[i].read_text()) for i in (2, 5))
    assert first["note"] == "random weights" and (first["seed"], second["seed"]) == (0, 1)
    assert first["executor"]["weights"] == "random-tiny" and first["planner"] == "a plan given"
    assert steps_of(paths[2]) == (Step(0, 3, "a cat"), Step(3, 9, "a dog"))
    assert paths[0].read_bytes() != paths[3].read_bytes()
    meta, frames = played(paths[0])
    assert meta["fps"] == 16 and frames.shape == (33, 160, 240, 3)
    policies = build_policies(small())
    wanted = enlarge(rolled_out(policies, steps_of(paths[2]), 0))
    caption = slice(-9, None)
    assert np.abs(frames.astype(int) - wanted)[:, :140].mean() < 12  # noise, which H.264 does badly at
    assert (frames[:, caption, :60].reshape(33, -1).min(1) < 60).all()
    assert (frames[:, caption, :60].reshape(33, -1).max(1) > 190).all()


def test_a_published_checkpoint_makes_videos_without_a_note(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LongLive's base and lora.pt, text encoder and VAE of Wan's release, none of them random by name."""
    base = file_of(release, tmp_path)
    lora = synthesise.longlive_lora(tmp_path / "lora.pt", SMALL, 3)
    mp4, strip, told = run(
        capsys, *NO_PLANNER, "--prompt", "A cat.", "--plan", plan_file(tmp_path), "--output", tmp_path / "out",
        "--executor.weights", base, "--executor.adapters", lora, "--executor.wan_folder", release,
        "--executor.text_cache", tmp_path / "text", "--executor.precision", "bf16-fp32-gates",
    )  # fmt: skip
    facts = json.loads(told.read_text())
    assert "note" not in facts and {path.stem[:6] for path in (mp4, strip, told)} == {"a-cat-"}
    assert facts["executor"] == {"weights": str(base), "adapters": [str(lora)], "precision": "bf16-fp32-gates"}
    assert played(mp4)[1].shape == (33, 160, 240, 3)


def test_what_is_said_of_a_random_planner() -> None:
    config = small(weights="longlive_base.pt")
    assert generation.note_of(config, planned=True) == "random planner"
    assert generation.note_of(config, planned=False) == ""
    assert generation.note_of(small(), planned=False) == "random weights"
    assert generation.note_of(small(weights="random"), planned=True) == "random weights"
    assert generation.note_of(get_preset("shapeworld"), planned=True) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["longlive", "self-forcing"])
def test_frames_from_a_streamed_decoder_are_the_rollouts(name: str) -> None:
    """Bit for bit, through the VAE's state; beyond the window, with a switch after it."""
    window = get_preset(name).executor
    executor = build_policies(small(window=window.window, text_switch=window.text_switch, frames=18)).executor
    plan = Plan("i", (Step(0, 6, "a cat"), Step(6, 15, "a dog"), Step(15, 18, "a cat")))
    noise = gaussian_noise(5, executor.noise_shape(1, 1), executor.device)
    pieces = list(stream_frames(executor, plan, noise))
    assert [len(piece) for piece in pieces] == [9, 12, 12, 12, 12, 12]
    assert torch.equal(torch.cat(pieces), executor.rollout([plan], [0], noise).frames[0, 0])


def test_latent_frames_of_pixel_frames() -> None:
    codec = build_policies(small()).executor.codec
    assert generation.latent_of_frames(codec, 3) == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert generation.latent_of_frames(PixelCodec(), 3) == [0, 1, 2]


def test_a_file_of_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": "A cat.", "prompt_id": "one", "plan": STEPS, "seed": 7},
        {"prompt": "A cat.", "category": "simple", "plan": STEPS[:1]},
        {"prompt": "A dog."},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    paths = run(capsys, *LONGLIVE, "--prompts", file, "--output", tmp_path / "out", "--seed", 4)
    assert [path.stem.removeprefix("random-weights-")[:5] for path in paths[::3]] == ["one-s", "001-a", "002-a"]
    told = [json.loads(path.read_text()) for path in paths[2::3]]
    assert [each["seed"] for each in told] == [7, 4, 4]
    assert [each.get("prompt_id") for each in told] == ["one", None, None] and told[1]["category"] == "simple"
    assert steps_of(paths[5]) == (Step(0, 9, "a cat"),)
    assert steps_of(paths[8])[-1].end == 9 and told[2]["planner"] == "random"
    alone = run(
        capsys, *NO_PLANNER, "--prompt", "A cat.", "--plan", plan_file(tmp_path), "--seed", 7,
        "--output", tmp_path / "alone",
    )  # fmt: skip
    assert alone[0].read_bytes() == paths[0].read_bytes()  # whatever else the file holds


def trained(policies: PolicyPair) -> None:
    with torch.no_grad():
        for parameter in (*policies.executor.parameters().values(), *policies.planner.peft.parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)


def a_run(folder: Path, config: RunConfig, policies: PolicyPair) -> Path:
    """The folder that a training run leaves after two iterations."""
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    writers = {"planner": policies.planner.save_adapter, "executor": policies.executor.save_adapter}
    save(folder, 2, writers, {}, config, 1)
    return folder


def test_adapters_of_a_run_and_of_a_peft_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A PEFT folder brings its rank, alpha and targets, here others than the preset's."""
    lora = LoraConfig(2, 6, ("self_attn.v", "ffn.0", "ffn.2"))
    config = small(lora=lora)
    policies = build_policies(config)
    steps = tuple(Step(**step) for step in STEPS)
    untrained = rolled_out(policies, steps, 1)
    trained(policies)
    wanted = rolled_out(policies, steps, 1)
    folder = a_run(tmp_path / "run", config, policies)
    common = ("--prompt", "A cat.", "--plan", plan_file(tmp_path), "--seed", 1)
    first = run(capsys, folder, *common, "--output", tmp_path / "a")
    adapter = folder / "checkpoints" / "step-000002" / "executor"
    sizes = ["--executor.weights", "random-tiny", "--planner.weights", "/nowhere", *SHAPE]
    sizes += ["--executor.precision", "fp32"]
    second = run(capsys, "longlive", *common, "--adapter", adapter, "--output", tmp_path / "b", *sizes)
    assert first[0].read_bytes() == second[0].read_bytes()
    assert {json.loads(paths[2].read_text())["adapter"] for paths in (first, second)} == {str(adapter)}
    frames = played(first[0])[1][:, :140].astype(int)  # above the caption
    near, far = (np.abs(frames - enlarge(video)[:, :140]).mean() for video in (wanted, untrained))
    assert near < 0.5 * far


def test_the_planner_of_a_run_plans(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small()
    folder = a_run(tmp_path / "run", config, build_policies(config))
    loaded: list[Path] = []
    monkeypatch.setattr(Planner, "load_adapter", lambda self, path: loaded.append(path))
    paths = run(capsys, folder, "--prompt", "A cat.", "--output", tmp_path / "out")
    assert loaded == [folder / "checkpoints" / "step-000002" / "planner"]
    assert json.loads(paths[2].read_text())["planner"] == "random"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "one of the arguments --prompt --prompts --again is required"),
        (["--prompt", "x", "--prompts", "p.csv"], "not allowed with argument"),
        (["--prompt", " "], "--prompt: found an empty text; accepted: an instruction"),
        (["--prompts", "p.csv", "--plan", "plan.json"], "--plan: found beside --prompts; accepted: a column `plan`"),
        (["--prompts", "gone.csv"], "gone.csv: cannot be read"),
        (["--prompt", "x", "--count", "0"], "--count: found 0; accepted: at least 1"),
        (["--prompt", "x", "--seed", "-1"], "--seed: found -1; accepted: 0 to"),
        (
            ["--prompt", "x", "--frames", "10"],
            "executor.frames: found 10; accepted: a positive multiple",
        ),
        (["--prompt", "x", "--plan", "gone.json"], "gone.json: cannot be read"),
        (
            ["--prompt", "x", "--adapter", "gone"],
            "--adapter: found no adapter_config.json in gone; accepted: a PEFT folder",
        ),
        (
            ["--prompt", "x", "--frames", "161"],
            "executor.frames: found 161; accepted: a positive multiple",
        ),
        (["--prompt", "x", "--plans", "0"], "--plans: found 0; accepted: at least 1"),
        (["--prompt", "x", "--best-of", "0"], "--best-of: found 0; accepted: at least 1"),
        (["--prompt", "x", "--best-of", "2"], "environment: found no address of the judge step_following; accepted"),
        (
            ["--prompt", "x", "--best-of", "2", "--best_of.rewards", "v"],
            "best_of.rewards: found 'v'; accepted: temporal",
        ),
        (
            ["--prompt", "x", "--best-of", "2", "--best_of.chunks", "-1"],
            "best_of.chunks: found -1; accepted: at least 0",
        ),
        (["--again", "gone.json"], "gone.json: cannot be read"),
        (["--again", "gone.json", "--best-of", "2"], "--best-of: found beside --again; accepted: --again alone"),
        (["--again", "gone.json", "--plan", "plan.json"], "--plan: found beside --again; accepted: --again alone"),
        (["--again", "gone.json", "--prompt", "x"], "not allowed with argument"),
        (["--prompt", "x", "--plans", "2"], "--plans: found 2; accepted: 1 here, as only ShapeWorld rates plans"),
        (
            ["--prompt", "x", "--preset", "longlive"],
            "accepted: python -m tempact.generate longlive ...",
        ),
        (["--prompt", "x", "--run=runs/a"], "--run: no such option; accepted: python -m tempact.generate runs/a ..."),
        (["--prompt", "x", "--executor.weights", "gone.pt"], "found nothing at gone.pt"),
        (["--prompt", "x", "--executor.weights", ""], "the preset longlive has none of its own; accepted"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    said = refused(capsys, *LONGLIVE, *arguments, "--output", tmp_path / "out")
    assert words in said and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", [None, "nothing here", "[]", '{"steps": [{"start": 0, "end": 9}]}'])
def test_a_plan_file_that_holds_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None) -> None:
    plan = tmp_path / "plan.json"
    if text is not None:
        plan.write_text(text)
    said = refused(capsys, *NO_PLANNER, "--prompt", "x", "--plan", plan, "--output", tmp_path / "out")
    words = "cannot be read" if text is None else "found no "
    assert words in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [40, 100])
def test_words_that_the_text_encoder_does_not_see_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: int
) -> None:
    """ShapeWorld's encoder reads 63 tokens; the plan itself is kept."""
    prompt = "The red circle moves. " + " ".join(["circle"] * (words - 4))
    steps = [{"start": 0, "end": 12, "prompt": "The red circle moves."}, {"start": 12, "end": 24, "prompt": prompt}]
    file = plan_file(tmp_path, steps)
    out = str(tmp_path / "out")
    assert generate.main(["--prompt", INSTRUCTION, "--plan", str(file), "--output", out, "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    told = [line for line in captured.err.splitlines() if "does not see" in line]
    (plan,) = (Path(line) for line in captured.out.splitlines() if line.endswith(".json"))
    assert json.loads(plan.read_text())["steps"][1]["prompt"] == prompt
    if words < 60:
        assert told == []
    else:
        (line,) = told
        unseen = line.rpartition("--prompt: step 2: the text encoder does not see its last words: ")[2]
        assert prompt.endswith(unseen) and 30 < len(unseen.split()) < 42


def test_an_instruction_of_a_file_that_shapeworld_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text(f'prompt\n"{INSTRUCTION}"\nA cat sings.\n')
    said = refused(capsys, "--prompts", file, "--output", tmp_path / "out", "--device", "cpu")
    assert f"{file}: row 2: instruction: not understood" in said and not (tmp_path / "out").exists()


def test_runs_and_adapters_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = (*NO_PLANNER, "--prompt", "x", "--plan", plan_file(tmp_path), "--output", tmp_path / "out")
    peft = tmp_path / "peft"
    peft.mkdir()
    told = peft / "adapter_config.json"
    for text, words in (
        ("{", f"{told}: not readable ("),
        ("[]", f"{told}: found no "),
        ('{"r": 2}', f"{told}: found no 'lora_alpha'; accepted: r, lora_alpha and target_modules of a LoRA"),
        ('{"r": "x", "lora_alpha": 2, "target_modules": []}', "--executor.lora.rank: found 'x'; accepted: a whole"),
        ('{"r": 2, "lora_alpha": 2, "target_modules": ["nothing"]}', "found ['nothing']; accepted: module names"),
        ('{"r": 2, "lora_alpha": 2.0, "target_modules": "all"}', "adapter_model.safetensors: not found"),
    ):
        told.write_text(text)
        options = [word for word in common if word not in ("--executor.lora.rank", "--executor.lora.alpha", "4")]
        assert words in refused(capsys, *options, "--adapter", peft)
    empty = tmp_path / "run"
    empty.mkdir()
    (empty / "config.yaml").write_text(to_yaml(small()))
    rest = common[-6:]
    assert "holds no intact checkpoint" in refused(capsys, empty, *rest)
    said = refused(capsys, empty, *rest, "--adapter", peft)
    assert f"--adapter: found beside the run {empty}, which has its own; accepted: one of the two" in said
    assert "gone: holds no config.yaml; accepted: the folder of a training run, or a preset" in refused(
        capsys, "gone", *rest
    )
    assert not (tmp_path / "out").exists()


def test_the_inference_of_a_backbones_authors_is_one_flag() -> None:
    def configured(preset: str, *more: str) -> RunConfig:
        line = ["--prompt", "x", "--executor.weights", "random-tiny", "--planner.weights", "random"]
        return generate._configured(*generate.parser().parse_known_args([*line, *more]), [preset], None)[0]

    ours, theirs = configured("self-forcing").executor, configured("self-forcing", "--inference", "backbone").executor
    assert (ours.smooth_prompts, ours.window, ours.frames) == (True, "tempact-self-forcing", 30)
    assert (theirs.smooth_prompts, theirs.window, theirs.frames, theirs.precision) == (
        False,
        "self-forcing",
        21,
        "bf16",
    )
    longlive = configured("longlive", "--inference", "backbone", "--frames", "120").executor
    assert (longlive.window, longlive.frames, longlive.entry, longlive.switch_rounding) == (
        "longlive",
        120,
        "generator",
        "up",
    )
    with pytest.raises(UserError, match="--inference"):
        configured("shapeworld", "--inference", "backbone")


@pytest.mark.slow
def test_a_locale_without_utf_8_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts, folders and what is printed keep their letters."""
    text, root = "Eine Füchsin läuft – schnell.", Path(__file__).parents[1]
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "", "PYTHONPATH": str(root)}
    (tmp_path / "läufe").mkdir()
    arguments = [*LONGLIVE, "--prompt", text, "--output", tmp_path / "läufe" / "v"]
    command = [sys.executable, "-m", "tempact.generate", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    *_, told = [Path(line) for line in done.stdout.decode("utf-8").splitlines()]
    assert told.parent == tmp_path / "läufe" / "v" and json.loads(told.read_text("utf-8"))["instruction"] == text
    assert run(capsys, *arguments)[2] == told
    assert generate._typed("\ud83d.") == "?."


def brightness(prompts, plans, frames, spans) -> torch.Tensor:
    """A reward of real video: how bright the switched step is."""
    (span,) = spans
    return frames[:, :, span.first : span.last + 1].float().mean(dim=(2, 3, 4, 5)) / 255


def test_the_best_of_several_continuations_is_made_again_from_its_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real video, by a reward of one's own: no judge and no PickScore is asked for."""
    short = (*NO_PLANNER, "--frames", 6, "--output", tmp_path / "out")
    steps = [{"start": 0, "end": 3, "prompt": "a cat"}, {"start": 3, "end": 6, "prompt": "a dog"}]
    by = ("--rewards.custom", "test_generate:brightness", "--best_of.rewards", "brightness", "--best_of.chunks", 0)
    made = run(
        capsys, *short, "--prompt", "A cat.", "--plan", plan_file(tmp_path, steps), *by, "--best-of", 3, "--seed", 2
    )
    own = json.loads(made[2].read_text())["best_of"]
    (choice,) = own["choices"]
    scores = choice["scores"]["brightness"]
    assert (choice["frame"], choice["frames"], own["continuations"]) == (3, 3, 3) and len(set(scores)) == 3
    assert scores == choice["scores"]["total"] and scores[choice["continuation"]] == max(scores)
    assert choice["continuation"] != 0  # or the test below would prove nothing
    again = run(capsys, *short, "--again", made[2])
    difference = np.abs(played(again[0])[1].astype(int) - played(made[0])[1])
    assert difference.max() <= 2 and difference.mean() < 0.1  # of another batch
    first = again[0].read_bytes()
    twice = run(capsys, *short, "--again", again[2])
    assert twice[0] == again[0] != made[0] and twice[0].read_bytes() == first


def test_a_video_of_rounded_linears_says_so_and_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is another video than that of the weights themselves, and near it."""
    command = ("--prompt", INSTRUCTION, "--device", "cpu", "--plans", 1, "--output", tmp_path / "out")
    rounded = ("--executor.fp8_linears", "true")
    plain = run(capsys, *command)
    made = run(capsys, *command, *rounded)
    facts = [json.loads(paths[2].read_text()) for paths in (plain, made)]
    assert facts[1]["executor"] == facts[0]["executor"] | {"fp8_linears": True} and made[0].name != plain[0].name
    assert facts[1]["steps"] == facts[0]["steps"]
    frames, wanted = (played(paths[0])[1].astype(int) for paths in (made, plain))
    assert 0 < np.abs(frames - wanted).mean() < 4
    first = made[0].read_bytes()
    again = run(capsys, "--again", made[2], *rounded, "--device", "cpu", "--output", tmp_path / "again")
    assert again[0].name == made[0].name and again[0].read_bytes() == first


def test_a_file_that_no_video_belongs_to_is_not_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = {"instruction": "A cat.", "steps": STEPS, "seed": 3, "latent_frames": 9}
    wrong = [
        (STEPS, "AttributeError"), ({**told, "seed": "x"}, "ValueError"),
        ({**told, "latent_frames": 12}, "12 latent frames"),
        ({**told, "seed": -1}, "seed -1"), ({**told, "best_of": {"choices": [{"frame": 3}]}}, "KeyError"),
        ({**told, "best_of": {"choices": [{"frame": 3, "frames": 3, "continuation": -2}]}}, "no negative number"),
    ]  # fmt: skip
    for number, (content, words) in enumerate(wrong):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(content))
        said = refused(capsys, *NO_PLANNER, "--again", file, "--output", tmp_path / "out")
        assert f"{number}.json: found" in said and words in said and "accepted: " in said
    assert not (tmp_path / "out").exists()


def test_best_of_n_from_python() -> None:
    """One continuation is today's video to the bit; the verifier chooses of more."""
    policies = build_policies(replace(get_preset("shapeworld"), device="cpu"))
    gone = Step(6, 24, "The blue square vanishes.")
    plan = Plan(INSTRUCTION, (Step(0, 6, INSTRUCTION.partition(" Then")[0]), gone))
    today = rolled_out(policies, plan.steps, 3)
    choices: list[dict] = []
    videos = [
        torch.cat([*generation.generate(policies, INSTRUCTION, plan=plan, seed=3, best_of=n, choices=choices)])
        for n in (1, 4)
    ]
    assert torch.equal(videos[0], today)
    (choice,) = choices
    assert (choice["frame"], choice["frames"]) == (6, 6) and choice["scores"].keys() == {
        "step_following", "aesthetics", "total"
    }  # fmt: skip
    total = choice["scores"]["total"]
    assert total[choice["continuation"]] == max(total) and torch.equal(videos[1][:6], today[:6])
    noise = gaussian_noise(3, policies.executor.noise_shape(1, 4), policies.executor.device)
    chosen = noise.following(dict.fromkeys((2, 3), choice["continuation"]))
    again = torch.cat([*stream_frames(policies.executor, plan, chosen)])
    assert (videos[1].int() - again.int()).abs().max() <= 1
    with pytest.raises(UserError, match="best_of: found 0; accepted: at least 1"):
        next(generation.generate(policies, INSTRUCTION, best_of=0))


def test_a_step_in_the_making_ends_where_its_frames_end() -> None:
    """Among the frames of the chunk before and its own, and among all."""
    plan, nothing = Plan("i", (Step(0, 6, "a"), Step(6, 15, "b"))), torch.zeros(2, dtype=torch.bool)
    for before, shared, frames in ((3, 3, 9), (6, 6, 12)):
        made = Continuations(6, 12, torch.zeros(2, frames, 3, 1, 1, dtype=torch.uint8), shared, nothing)
        assert span_of(plan, made, before) == Span(shared, frames - 1, Step(before, before + 6, "b"))
