"""A run from its command to its report: what it leaves, what it survives, what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import imageio_ffmpeg
import pytest
import torch
from peft import PeftConfig
from PIL import Image
from runs.same_run import FAST
from safetensors.torch import load_file, save_file
from test_references import undocumented

from tempact import evaluate, generate, report, train
from tempact.cli import EXIT_ABORTED, from_yaml
from tempact.errors import EXIT_USER_ERROR
from tempact.evaluation import METHODS
from tempact.evaluation.statistics import Row, read_evaluation
from tempact.reporting import read_metrics
from tempact.reporting.report import write_report
from tempact.rewards import Scores, Scoring
from tempact.rewards.judges import JudgeOutage
from tempact.runs import run as run_module
from tempact.runs.checkpoint import defect, verify
from tempact.runs.evaluation import SHOWN
from tempact.trainer import Trainer
from tempact.types import PlanBatch
from tempact.worlds import WEIGHTS, ShapeWorld

SMOKE = ("shapeworld-smoke", "--device", "cpu", "--trainer.iterations", "2", *FAST)
PROMPT = "A red circle is at the top left. First, the circle slowly moves to the right. Then the circle turns blue."


pytestmark = pytest.mark.usefixtures("log_handlers")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert train.main([*SMOKE, "--output", str(folder), "--seed", "3"]) == 0
    return folder


@pytest.fixture
def unevaluated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Runs end before their evaluation, which takes most of their time; counts how often it was due."""
    due: list[int] = []
    monkeypatch.setattr(run_module, "evaluate", lambda *given, **more: due.append(1))
    return due


def refusal(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """The one line of a command that was refused."""
    shown = capsys.readouterr()
    assert code == EXIT_USER_ERROR and shown.out == ""
    *before, error = shown.err.splitlines()
    assert error.startswith("error: ") and all(" INFO loading the " in line for line in before), shown.err
    return error


def test_the_configuration_is_kept_as_it_was_used(finished: Path) -> None:
    config = from_yaml(finished / "config.yaml")
    assert (config.preset, config.seed, config.output) == ("shapeworld-smoke", 3, str(finished))
    assert config.trainer.iterations == 2 and config.device == "cpu"


def test_metrics_have_a_row_for_every_iteration(finished: Path) -> None:
    rows = read_metrics(finished)
    assert [row["step"] for row in rows] == [1, 2] and 0 < rows[0]["time_s"] < rows[1]["time_s"]
    for row in rows:
        for who in ("planner", "executor"):
            names = ("reward", "reward_std", "frac_reward_zero_std", "kl", "clip_ratio/low", "clip_ratio/high")
            assert all(isinstance(row[f"{who}/{name}"], float) for name in names)
            assert row[f"{who}/ratio_deviation"] == 0.0 and (row[f"{who}/kl"] == 0.0) == (row["step"] == 1)
        timed = sum(value for name, value in row.items() if name.startswith("timing_s/"))
        assert 0 < timed <= row["time_s"] + 0.01


def test_every_metric_of_a_run_is_in_the_reference(finished: Path) -> None:
    assert [undocumented(row) for row in read_metrics(finished)] == [[], []]


def test_samples_hold_every_continuation_and_agree_with_the_metrics(finished: Path) -> None:
    for step, row in enumerate(read_metrics(finished), 1):
        stem = finished / "samples" / f"step-{step:06d}"
        samples = [json.loads(line) for line in stem.with_suffix(".jsonl").read_text().splitlines()]
        assert [(s["plan_index"], s["continuation"]) for s in samples] == [(p, n) for p in (0, 1) for n in (0, 1)]
        for name in ("temporal_following", "aesthetics"):
            mean = sum(s[name] for s in samples) / len(samples)
            assert mean == pytest.approx(row[f"rewards/{name}/mean"], abs=1e-5)
        for sample in samples:
            bounds = [(s["start"], s["end"]) for s in sample["plan"]]
            assert bounds[0][0] == 0 and bounds[-1][1] == 24
            assert all(a[1] == b[0] for a, b in pairwise(bounds))
        for kind in ("worst", "best"):
            with Image.open(f"{stem}-{kind}.png") as strip:
                assert strip.width > 300 and len(strip.convert("RGB").getcolors(1 << 24) or []) > 20


def test_checkpoints_are_whole_and_hold_both_adapters(finished: Path) -> None:
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    for step in (1, 2):
        path = finished / "checkpoints" / f"step-{step:06d}"
        manifest = json.loads((path / "COMPLETE").read_text())
        assert defect(path) is None and manifest["step"] == step
        on_disk = {f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file()} - {"COMPLETE"}
        assert on_disk == set(manifest["files"])
        for who, rank in (("planner", 16), ("executor", 16)):
            assert PeftConfig.from_pretrained(str(path / who)).r == rank
            card = (path / who / "README.md").read_text()
            assert f"{who.capitalize()} of shapeworld-smoke, iteration {step}" in card and "load_adapter" in card
            tensors = load_file(path / who / "adapter_model.safetensors")
            assert tensors and all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_the_executor_adapter_holds_averages_and_the_state_raw_weights(finished: Path) -> None:
    checkpoint = verify(finished / "checkpoints" / "step-000002")
    stored = load_file(checkpoint.executor_dir / "adapter_model.safetensors")
    average, raw = checkpoint.state["ema"]["average"], checkpoint.state["executor"]
    assert checkpoint.state["ema"]["updates"] == 2 and average.keys() == raw.keys()
    for name, value in average.items():
        assert torch.equal(stored[name.replace(".default.", ".")], value)
    assert any(not torch.equal(raw[name], value) for name, value in average.items())


def test_videos_play_and_strips_compare_the_methods(finished: Path) -> None:
    videos = finished / "videos"
    index = json.loads((videos / "index.json").read_text())
    assert [entry["category"] for entry in index] == ["simple", "hard"]
    for entry in index:
        assert [video["title"] for video in entry["videos"]] == list(SHOWN.values())
        for video in entry["videos"]:
            reader = imageio_ffmpeg.read_frames(str(videos / video["mp4"]))
            assert next(reader)["codec"] == "h264" and sum(1 for _ in reader) == 24
            with Image.open(videos / video["gif"]) as gif:
                assert gif.format == "GIF" and getattr(gif, "n_frames", 1) > 1
            assert video["plan"][0]["start"] == 0 and video["plan"][-1]["end"] == 24
        with Image.open(videos / entry["strip"]) as strip:
            assert strip.format == "PNG" and strip.height > 100


def test_evaluation_has_a_row_for_every_method_set_and_judge(finished: Path) -> None:
    rows = json.loads((finished / "evaluation.json").read_text())
    told = {"split", "seed", "videos", "checkpoint", "weights", "suite", "tests"}
    assert all(row.keys() == {"method", "set", "judge", "score", "ci95", "n"} | told for row in rows)
    cells = {(row["method"], row["set"], row["judge"]): row for row in rows}
    assert len(cells) == len(rows)
    for method in METHODS:
        for category in ("simple", "hard"):
            for judge in ("verifier", "matcher", "picture quality", "clearness", "duplicates"):
                row = cells[method.name, category, judge]
                low, high = row["ci95"]
                assert row["n"] == 2 and 0 <= low <= row["score"] + 1e-6 and row["score"] <= high + 1e-6 <= 1.001
    scores = [json.loads(line) for line in (finished / "evaluation_scores.jsonl").read_text().splitlines()]
    for one in scores:
        mean = sum(one["scores"]) / len(one["scores"])
        assert cells[one["method"], one["set"], one["judge"]]["score"] == pytest.approx(mean, abs=1e-5)


def test_the_report_is_one_file_that_needs_no_other(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", text) + re.findall(r"url\(([^)]*)\)", text)
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert not re.search(r"<script[^>]+src|<link|@import", text)
    assert all(method.name in text for method in METHODS) and "shapeworld-smoke" in text
    for entry in json.loads((finished / "videos" / "index.json").read_text()):
        assert entry["prompt"] in text


def test_evaluating_a_run_again_gives_the_same_table(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    (folder / "evaluation.json").unlink()
    shutil.rmtree(folder / "evaluation")  # videos and scores, which would not be made again
    assert evaluate.main([str(folder)]) == 0
    assert read_evaluation(folder, Row) == read_evaluation(finished, Row)


def test_the_report_can_be_written_again(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    (folder / "report.html").unlink()
    assert report.main([str(folder)]) == 0
    assert (folder / "report.html").stat().st_size > 10_000
    assert "report.html" in capsys.readouterr().out and write_report(folder).is_file()


@pytest.mark.parametrize("trained", [True, False])
def test_generate_writes_a_video_and_its_plan(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], trained: bool
) -> None:
    run = [str(finished)] if trained else []
    for folder in ("one", "two"):
        arguments = [*run, "--prompt", PROMPT, "--output", str(tmp_path / folder), "--device", "cpu", "--seed", "4"]
        assert generate.main(arguments) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.suffix for path in paths] == [".mp4", ".png", ".json"] * 2
    for one, two in zip(paths[:3], paths[3:], strict=True):
        assert one.read_bytes() == two.read_bytes()  # one seed, one video
    reader = imageio_ffmpeg.read_frames(str(paths[0]))
    next(reader)
    assert sum(1 for _ in reader) == 24
    with Image.open(paths[1]) as picture:
        picture.load()
    told = json.loads(paths[2].read_text())
    assert told["instruction"] == PROMPT and told["steps"][0]["start"] == 0 and told["steps"][-1]["end"] == 24


def test_a_run_whose_updates_keep_failing_is_saved_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unevaluated: list[int]
) -> None:
    folder, build = tmp_path / "run", run_module.build_trainer
    arguments = [*SMOKE, "--output", str(folder), "--trainer.iterations", "4"]
    arguments += ["--trainer.max_skipped_updates", "1", "--trainer.checkpoint_every", "50"]

    def broken(*given) -> Trainer:
        trainer = build(*given)
        for parameter in trainer.executor_policy.parameters.values():
            parameter.register_hook(lambda gradient: gradient * float("inf"))
        return trainer

    monkeypatch.setattr(run_module, "build_trainer", broken)
    assert train.main(arguments) == EXIT_ABORTED and unevaluated == []
    rows = read_metrics(folder)
    assert [row["executor/skipped_updates"] for row in rows] == [1.0, 2.0]
    assert all(row["executor/grad_norm"] is None for row in rows)
    state = verify(folder / "checkpoints" / "step-000002").state
    assert state["skipped"] == [0, 2] and state["done"] == 2 and state["ema"]["updates"] == 0
    monkeypatch.setattr(run_module, "build_trainer", build)
    assert train.main(arguments) == 0 and unevaluated == [1]
    assert [row["executor/skipped_updates"] for row in read_metrics(folder)] == [1.0, 2.0, 0.0, 0.0]


def test_a_run_whose_judges_are_gone_saves_and_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unevaluated: list[int]
) -> None:
    folder, build = tmp_path / "run", ShapeWorld.rewards
    arguments = [*SMOKE, "--output", str(folder), "--trainer.iterations", "3"]
    arguments += ["--trainer.checkpoint_every", "50"]
    begun: list[PlanBatch] = []
    closed: list[int] = []

    def judged(world: ShapeWorld, *given: object) -> SimpleNamespace:
        whole = build(world, *given)

        def begin(plans: PlanBatch, *own: range) -> Scoring:
            begun.append(plans)
            scoring = whole.begin(plans, *own)
            if len(begun) == 2:
                scoring.scores = gone
            return scoring

        def gone() -> Scores:
            raise JudgeOutage("judge plan_quality: no answer from host for 300 s")

        found = SimpleNamespace(
            begin=begin, whole=whole.whole, metrics=whole.metrics, check=whole.check, close=lambda: closed.append(1)
        )
        found.extended = lambda rewards: found
        return found

    monkeypatch.setattr(ShapeWorld, "rewards", judged)
    assert train.main(arguments) == EXIT_ABORTED and unevaluated == [] and closed == [1]
    assert verify(folder / "checkpoints" / "step-000001").state["done"] == 1
    monkeypatch.setattr(ShapeWorld, "rewards", build)
    assert train.main(arguments) == 0 and unevaluated == [1]
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3]  # no iteration is lost or done twice


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--planner.weights", ""],
            "planner.weights: found nothing at ''; accepted: shapeworld, a folder with weights",
        ),
        (["--planner.weights", "/nowhere/planner"], "planner.weights: found nothing at /nowhere/planner; accepted: "),
        (["--executor.weights", "/nowhere/executor"], "executor.weights: found nothing at /nowhere/executor"),
        (["--planner.weights", "EMPTY"], "no config.json there"),
        (["--executor.weights", "EMPTY"], "executor.weights: found nothing at "),
        (["--executor.weights", "DAMAGED"], "not readable"),
        (["--executor.weights", "OTHER"], "not readable"),
        (["--executor.window", "wide"], "executor.window: found 'wide'; accepted: full, self-forcing, longlive"),
        (["--executor.text_switch", "none"], "executor.text_switch: found 'none'; accepted: cross_attention, recache"),
        (["--executor.frames", "27"], "executor.frames"),
        (["--executor.lora.targets", "nothing"], "executor.lora.targets: found ['nothing']; accepted: "),
        (["--planner.lora.targets", "nothing"], "planner.lora.targets: found ['nothing']; accepted: "),
        (["--planner.temperature", "0.7"], "planner.temperature: found 0.7; accepted: 1.0"),
        (["--data.prompts", "prompts.csv"], "data.prompts: found 'prompts.csv'; accepted: shapeworld"),
        (["--device", "tpu"], "device: found 'tpu'; accepted: auto, cpu, cuda"),
        (["--kernels", "cuda"], "kernels: found 'cuda'; accepted: torch, triton, auto"),
        (["--resume", "nowhere"], "resume: nowhere is no checkpoint"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    (tmp_path / "EMPTY").mkdir()
    if "DAMAGED" in arguments or "OTHER" in arguments:
        for name in ("DAMAGED", "OTHER"):
            shutil.copytree(WEIGHTS / "executor", tmp_path / name)
        (tmp_path / "DAMAGED" / "transformer.safetensors").write_bytes(b"not tensors")
        save_file({"x": torch.zeros(2)}, tmp_path / "OTHER" / "transformer.safetensors")
    given = [str(tmp_path / word) if word.isupper() else word for word in arguments]
    folder = tmp_path / "run"
    code = train.main([*SMOKE, "--output", str(folder), *given])
    assert words in refusal(capsys, code)
    assert not (folder / "config.yaml").exists() and not (folder / "metrics.jsonl").exists()


def test_a_finished_run_is_not_begun_anew(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = train.main([*SMOKE, "--output", str(finished), "--seed", "3", "--resume", "none"])
    assert "already holds step-000002" in refusal(capsys, code)


def test_commands_that_need_a_trained_run_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--prompt", PROMPT, "--output", str(tmp_path / "videos")]
    assert "holds no config.yaml" in refusal(capsys, generate.main([str(tmp_path), *asked]))
    assert "holds no config.yaml" in refusal(capsys, evaluate.main([str(tmp_path)]))
    (tmp_path / "config.yaml").write_text("preset: shapeworld-smoke\n")
    assert "holds no intact checkpoint" in refusal(capsys, generate.main([str(tmp_path), *asked]))
    assert "holds no intact checkpoint" in refusal(capsys, evaluate.main([str(tmp_path)]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "A cat sings."], "accepted"),
        (["--prompt", "  "], "--prompt: found an empty text"),
        (
            ["--prompt", PROMPT, "--preset", "shapeworld"],
            "accepted: python -m tempact.generate shapeworld ...",
        ),
        (["--prompt", PROMPT, "--output", "/proc/videos"], "accepted: a writable folder"),
        (["--prompt", PROMPT, "--seed", "x"], "invalid int value"),
    ],
)
def test_generate_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    code = generate.main(["--output", str(tmp_path / "videos"), *arguments])
    assert words in refusal(capsys, code) and not (tmp_path / "videos").exists()
