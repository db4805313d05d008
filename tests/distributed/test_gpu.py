"""Runs on GPUs: through NCCL and in several processes they have the bits of one process, with --deterministic."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs.same_run import assert_same_training

from tempact.runs.checkpoint import verify

ROOT = Path(__file__).parents[2]
ARGUMENTS = [
    "shapeworld", "--deterministic", "--trainer.iterations", "3", "--trainer.checkpoint-every", "3",
    "--trainer.updates-per-iteration", "2", "--evaluation.simple", "1", "--evaluation.hard", "1",
]  # fmt: skip


def run(folder: Path, *before: str, after: tuple[str, ...] = (), **variables: str) -> Path:
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    environment = os.environ | {"PYTHONPATH": path} | variables
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
    # never set in this process: CUDA may be initialised while it is, and then knows one GPU for good
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    assert_same_training(alone, run(tmp_path / "run", after=("--gpus", "2"), CUDA_VISIBLE_DEVICES=first))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [2, 4])
def test_gpus_have_the_bits_of_one(alone: Path, tmp_path: Path, count: int) -> None:
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")
    assert_same_training(alone, run(tmp_path / "run", after=("--gpus", str(count))))


LAUNCHED = """
import sys
from tempact.distributed.launch import launch

*fault, count = sys.argv[1:7]
sys.exit(launch(sys.argv[7:], int(count), 0, tuple(fault)))
"""
CODES = {"kill": 137, "term": 130, "exception": 1}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "rank", "phase"),
    [
        ("kill", 1, "update"),
        ("kill", 0, "rollout"),
        ("term", 1, "rollout"),
        ("term", 0, "update"),
        ("exception", 1, "update"),
    ],
)
def test_a_fault_of_a_rank_of_nccl_ends_all_and_the_run_goes_on_on_one_gpu(
    kind: str, rank: int, phase: str, alone: Path, tmp_path: Path
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    folder, planted = tmp_path / "run", tmp_path / "planted"
    fault = [str(ROOT / "tests" / "distributed" / "faulty.py"), kind, str(rank), phase, "2"]
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")))
    environment = os.environ | {"PYTHONPATH": path, "PLANTED_AT": str(planted)}
    command = [sys.executable, "-c", LAUNCHED, *fault, "2", *ARGUMENTS, "--output", str(folder)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    took = time.time() - float(planted.read_text())
    said = done.stderr.splitlines()[-1]
    sys.stdout.write(f"{kind} {rank} {phase}: {took:.1f} s, code {done.returncode}: {said}\n")
    assert done.returncode == CODES[kind], done.stderr[-3000:]
    assert took < 25
    assert f"rank {rank} on " in said if kind != "term" else "SIGTERM: saved after iteration" in said, said
    for checkpoint in (folder / "checkpoints").glob("step-*[0-9]"):
        verify(checkpoint)
    assert_same_training(alone, run(folder))
