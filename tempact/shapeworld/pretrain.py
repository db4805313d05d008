"""`python -m tempact.shapeworld.pretrain`: ShapeWorld's weights from nothing.

The three courses (executor with text encoder, planner, judge) are independent and train side by side, each in its own
process. An interrupted run goes on where it stopped. MANIFEST.json records how the weights were made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tempact.config import LARGEST_SEED
from tempact.errors import LineParser, UserError, guarded
from tempact.files import usual_mode

log = logging.getLogger(__name__)

STEPS = {"executor": 6000, "planner": 4500, "judge": 4000}
DEFAULT_OUT = Path(__file__).parent / "weights"
METRICS = "metrics.json"
MANIFEST = "MANIFEST.json"
SIZE_LIMIT_MIB = 16


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a course failed, 2 bad input."""
    return guarded(lambda: _pretrain(argv))


def _pretrain(argv: list[str] | None) -> int:
    arguments = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if arguments.stage:
        train_stage(arguments)
        return 0
    codes = run_stages(arguments, argv if argv is not None else sys.argv[1:])
    failed = [stage for stage, code in codes.items() if code]
    if failed:
        log.error("failed: %s; the same command goes on from the last checkpoints", ", ".join(failed))
        return 1
    write_manifest(arguments)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parsed options. Raises UserError for a bad value before a course begins."""
    parser = LineParser(prog="python -m tempact.shapeworld.pretrain", description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the weights (default: the shipped)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the steps of every course, for trials")
    parser.add_argument("--stage", choices=tuple(STEPS), help="train only this one, in this process")
    parser.add_argument("--fresh", action="store_true", help="start over instead of going on from checkpoints")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.scale < math.inf:
        raise UserError(f"--scale: found {arguments.scale}; accepted: a finite number above 0")
    if not 0 <= arguments.seed <= LARGEST_SEED:
        raise UserError(f"--seed: found {arguments.seed}; accepted: 0 to {LARGEST_SEED}")
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("--device: found cuda, but torch sees no GPU; accepted: cpu here, which takes far longer")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make {arguments.out} ({error.strerror}); accepted: a folder") from error
    return arguments


def run_stages(arguments: argparse.Namespace, argv: list[str]) -> dict[str, int]:
    """Runs the courses and returns their exit codes; skips a course finished with this seed and length."""
    command = [sys.executable, "-m", "tempact.shapeworld.pretrain", *argv]
    left = [stage for stage in STEPS if arguments.fresh or not finished(arguments, stage)]
    children = {stage: subprocess.Popen([*command, "--stage", stage]) for stage in left}
    try:
        return {stage: child.wait() for stage, child in children.items()}
    finally:
        for child in children.values():
            child.terminate()


def finished(arguments: argparse.Namespace, stage: str) -> bool:
    """True where the folder holds weights of this course, seed and length."""
    file = arguments.out / stage / METRICS
    if not file.is_file():
        return False
    metrics = json.loads(file.read_text(encoding="utf-8"))
    return (metrics["seed"], metrics["steps"]) == (arguments.seed, steps_of(arguments, stage))


def steps_of(arguments: argparse.Namespace, stage: str) -> int:
    return max(1, round(STEPS[stage] * arguments.scale))


def train_stage(arguments: argparse.Namespace) -> None:
    """Trains one course; writes its figures, versions and hardware beside its weights."""
    import peft
    import tokenizers
    import torch
    import transformers
    from transformers.utils import logging as transformers_logging

    from csrc_triton import runtime
    from tempact.shapeworld.pretraining import Course, train
    from tempact.shapeworld.pretraining.executor import ExecutorCourse
    from tempact.shapeworld.pretraining.matcher import JudgeCourse
    from tempact.shapeworld.pretraining.planner import PlannerCourse

    transformers_logging.disable_progress_bar()
    torch.set_float32_matmul_precision("high")
    runtime.set_backend("torch")  # the courses compile their blocks, which fuses the same
    courses: dict[str, Callable[[int, str, int], Course]] = {
        "executor": ExecutorCourse, "planner": PlannerCourse, "judge": JudgeCourse,
    }  # fmt: skip
    folder, steps = arguments.out / arguments.stage, steps_of(arguments, arguments.stage)
    workers = max(1, (os.cpu_count() or 1) // len(STEPS))
    course = courses[arguments.stage](arguments.seed, arguments.device, workers)
    figures = train(course, folder, steps, resume=not arguments.fresh)
    gpu = arguments.device == "cuda"
    metrics = figures | {
        "seed": arguments.seed,
        "hardware": torch.cuda.get_device_name() if gpu else platform.processor() or "CPU",
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, transformers, tokenizers, peft)},
    }
    usual_mode(folder)
    (folder / METRICS).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


def write_manifest(arguments: argparse.Namespace) -> None:
    """Writes the record of the weights: command, figures, versions and hardware of each course, sizes and hashes."""
    files = sorted(path for path in arguments.out.rglob("*") if path.is_file() and path.name != MANIFEST)
    total = sum(path.stat().st_size for path in files)
    scale = f" --scale {arguments.scale}" if arguments.scale != 1.0 else ""
    manifest = {
        "command": f"python -m tempact.shapeworld.pretrain --seed {arguments.seed}{scale}",
        "courses": {
            stage: json.loads((arguments.out / stage / METRICS).read_text(encoding="utf-8")) for stage in STEPS
        },
        "bytes": total,
        "sha256": {
            path.relative_to(arguments.out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
        },
    }
    (arguments.out / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    log.info("%d files, %.1f MiB in %s", len(files), total / 2**20, arguments.out)
    if total > SIZE_LIMIT_MIB * 2**20:
        log.warning("the weights are larger than the %d MiB that are shipped at most", SIZE_LIMIT_MIB)


if __name__ == "__main__":
    sys.exit(main())
