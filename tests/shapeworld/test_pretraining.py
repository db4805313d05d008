"""The pretraining loop and what it ships."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch
from models.test_checkpoints import Unsafe
from safetensors.torch import load_file

from tempact.shapeworld import pretrain
from tempact.shapeworld import pretraining as training
from tempact.shapeworld.pretrain import DEFAULT_OUT, MANIFEST, SIZE_LIMIT_MIB, STEPS
from tempact.shapeworld.pretraining import Course, draw_parts, train
from tempact.shapeworld.pretraining.executor import ExecutorCourse, teacher_forcing_mask


class Line(Course):
    """Fits y = 2x."""

    name, batch, learning_rate, ema, device, seed = "line", 8, 0.05, 0.9, "cpu", 0

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.modules = torch.nn.Linear(1, 1)
        self.stop_after: int | None = None
        self.calls = 0

    def loss(self, generator: torch.Generator) -> torch.Tensor:
        self.calls += 1
        if self.stop_after is not None and self.calls > self.stop_after:
            raise KeyboardInterrupt
        x = torch.randn(self.batch, 1, generator=generator)
        return (self.modules(x) - 2 * x).square().mean()

    def save(self, folder: Path) -> None:
        torch.save(self.modules.state_dict(), folder / "line.pt")


def test_an_interrupted_course_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 10)
    whole = train(Line(), tmp_path / "whole", 60)
    cut = Line()
    cut.stop_after = 37
    with pytest.raises(KeyboardInterrupt):
        train(cut, tmp_path / "cut", 60)
    resumed = train(Line(), tmp_path / "cut", 60)
    one, two = (torch.load(tmp_path / name / "line.pt") for name in ("whole", "cut"))
    assert torch.equal(one["weight"], two["weight"]) and torch.equal(one["bias"], two["bias"])
    assert whole["loss"] == resumed["loss"] < 0.05
    assert not (tmp_path / "cut" / "training.pt").exists()


def test_the_state_of_an_interrupted_course_runs_no_code(tmp_path: Path) -> None:
    made = tmp_path / "made"
    torch.save({"course": Unsafe(made)}, tmp_path / "training.pt")
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        train(Line(), tmp_path, 60)
    assert not made.exists()


def numbered(seed: int, count: int) -> list[tuple[int, int]]:
    return [(seed, i) for i in range(count)]


def test_samples_do_not_depend_on_the_workers() -> None:
    alone = draw_parts(numbered, 2, 10, 4, workers=1)
    assert alone == draw_parts(numbered, 2, 10, 4, workers=2) != draw_parts(numbered, 3, 10, 4, workers=1)
    assert alone[:4] == [(2_000_006, 0), (2_000_006, 1), (2_000_006, 2), (2_000_007, 0)] and len(alone) == 10


def test_a_seed_makes_the_same_executor_and_text_encoder() -> None:
    first, second = (ExecutorCourse(seed, "cpu", clips=64).modules.state_dict() for seed in (5, 5))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_teacher_forcing_sees_what_a_rollout_sees() -> None:
    mask = teacher_forcing_mask(3, 2, "cpu")
    blocks = mask.view(6, 2, 6, 2)[:, 0, :, 0].int().tolist()
    assert blocks == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],  # a noisy chunk: the clean ones before it, and itself
        [1, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


def test_shipped_weights_are_those_of_the_manifest() -> None:
    manifest = json.loads((DEFAULT_OUT / MANIFEST).read_text())
    files = {path.relative_to(DEFAULT_OUT).as_posix() for path in DEFAULT_OUT.rglob("*") if path.is_file()}
    assert files - {MANIFEST} == set(manifest["sha256"])
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((DEFAULT_OUT / name).read_bytes()).hexdigest() == digest, name
    assert sum((DEFAULT_OUT / name).stat().st_size for name in files) < SIZE_LIMIT_MIB * 2**20
    for stage, steps in STEPS.items():
        course = manifest["courses"][stage]
        assert course["steps"] == steps and course["seed"] == 0 and course["hardware"]
    weights = load_file(DEFAULT_OUT / "executor" / "transformer.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--scale", "nan"], "--scale: found nan; accepted: a finite number above 0"),
        (["--scale", "0"], "--scale: found 0.0; accepted"),
        (["--seed", "-1"], "--seed: found -1; accepted: 0 to"),
        (["--scal"], "argument --scale: expected one argument"),
        (["--device", "cuda"], "--device: found cuda, but torch sees no GPU; accepted: cpu here"),
        (["--out", "file/weights", "--device", "cpu"], "--out: cannot make file/weights (Not a directory); accepted"),
    ],
)
def test_bad_options_are_one_line_before_a_course_begins(
    given: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(pretrain, "run_stages", lambda *_: pytest.fail("a course began"))
    (tmp_path / "file").touch()
    assert pretrain.main([*(["--out", "w"] if "--out" not in given else []), *given]) == 2
    shown = capsys.readouterr().err
    assert words in shown and shown.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["file"]
