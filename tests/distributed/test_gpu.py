"""Runs on GPUs: through NCCL and in several processes they have the bits of one process, with --deterministic."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs.same_run import assert_same_training

ROOT = Path(__file__).parents[2]
ARGUMENTS = [
    "shapeworld", "--deterministic", "--trainer.iterations", "3", "--trainer.checkpoint-every", "3",
    "--trainer.updates-per-iteration", "2", "--evaluation.simple", "1", "--evaluation.hard", "1",
]  # fmt: skip


def run(folder: Path, *before: str, after: tuple[str, ...] = ()) -> Path:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    command = [sys.executable, *before, "-m", "tempact.train", *ARGUMENTS, "--output", str(folder), *after]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one process without torch.distributed."""
    return run(tmp_path_factory.mktemp("alone"))


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node")


@pytest.mark.gpu
def test_a_run_repeats(alone: Path, tmp_path: Path) -> None:
    assert_same_training(alone, run(tmp_path / "run"))


@pytest.mark.gpu
def test_one_process_of_nccl_has_the_bits_of_a_run_without(alone: Path, tmp_path: Path) -> None:
    assert_same_training(alone, run(tmp_path / "run", *TORCHRUN, "1"))


@pytest.mark.gpu
def test_two_processes_on_one_gpu_exchange_through_gloo(alone: Path, tmp_path: Path) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*next(iter(environment.items())))
        assert_same_training(alone, run(tmp_path / "run", after=("--gpus", "2")))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [2, 4])
def test_gpus_have_the_bits_of_one(alone: Path, tmp_path: Path, count: int) -> None:
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")
    assert_same_training(alone, run(tmp_path / "run", after=("--gpus", str(count))))
