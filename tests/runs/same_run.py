"""Short runs, and what two runs of one seed have in common."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tempact import train

# three noise levels in place of four, of which two are trained, and plans that are cut off sooner
FAST = ("--executor.timesteps", "1000", "750", "500", "--planner.max-new-tokens", "64")
ARGUMENTS = [
    "shapeworld-smoke", "--device", "cpu", "--trainer.iterations", "3", "--trainer.checkpoint-every", "3", *FAST
]  # fmt: skip
SHORT_EVALUATION = ["--evaluation.simple", "1", "--evaluation.hard", "1"]


def start(folder: Path, *more: str) -> int:
    return train.main([*ARGUMENTS, *SHORT_EVALUATION, "--output", str(folder), *more])


def metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    of_machine = ("time_s", "timing_s/", "memory/", "ranks/")
    return [{key: value for key, value in row.items() if not key.startswith(of_machine)} for row in rows]


def equal(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return a == b


def assert_same_training(one: Path, two: Path) -> None:
    last = Path("checkpoints") / "step-000003"
    for policy in ("planner", "executor"):
        file = last / policy / "adapter_model.safetensors"
        assert equal(load_file(one / file), load_file(two / file)), policy
    states = [torch.load(folder / last / "state" / "state.pt", weights_only=True) for folder in (one, two)]
    assert equal(*states)
    assert metrics(one) == metrics(two)


def assert_same_run(one: Path, two: Path) -> None:
    assert_same_training(one, two)
    assert json.loads((one / "evaluation.json").read_text()) == json.loads((two / "evaluation.json").read_text())
