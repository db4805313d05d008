"""What a run went on: versions, hardware and command, noted each time it starts or resumes."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from tempact.infra.files import reading, write_atomic

ENVIRONMENT = "environment.json"
PACKAGES = ("torch", "triton", "transformers", "peft", "safetensors", "numpy")


@dataclass(frozen=True)
class Session:
    """One start of a run. `started` is UTC, `versions` maps packages to versions, memory is in GiB."""

    started: str
    from_step: int
    command: str
    versions: dict[str, str]
    cpu: str
    cores: int
    memory_gib: float
    gpus: list[str]


def record_environment(run_folder: Path, from_step: int) -> None:
    """Adds this process to `run_folder`/environment.json."""
    sessions = [*read_environment(run_folder), _this_session(from_step)] if from_step else [_this_session(0)]
    path = Path(run_folder) / ENVIRONMENT
    write_atomic(path, json.dumps([asdict(session) for session in sessions], indent=1) + "\n")


def read_environment(run_folder: Path) -> list[Session]:
    """Sessions of a run in order, none if nothing was noted."""
    path = Path(run_folder) / ENVIRONMENT
    with reading(path):
        return [Session(**session) for session in json.loads(path.read_text())] if path.is_file() else []


def _this_session(from_step: int) -> Session:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Session(
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        from_step=from_step,
        command=shlex.join(["python", *sys.orig_argv[1:]]),
        versions=versions,
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(memory, 1),
        gpus=gpus,
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
