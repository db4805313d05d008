"""Checkpoints of planner and executor together.

    checkpoints/step-000040/planner/   adapter_config.json, adapter_model.safetensors
                            executor/  the same
                            state/     state.pt (optimisers, averages, iteration), rng.pt, config.json
                            COMPLETE   sizes and SHA-256 hashes of all files, written last
                aside/      checkpoints of another course, and the metrics that were theirs

A course is one way through the iterations: a run that goes on from one of its earlier checkpoints takes another way,
and the later checkpoints are set aside.

A save fills a folder under another name in the same place, syncs it and renames it: a save that is killed leaves the
earlier checkpoints valid. A file that COMPLETE does not confirm is never loaded. Reading changes nothing on disk, so a
run that trains can be read; the remains of a killed save are cleared by the process that holds the run's lock.
"""

from __future__ import annotations

import io
import json
import logging
import random
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from tempact.config import RunConfig, flatten
from tempact.errors import UserError
from tempact.files import disk_full, file_hash, sync

log = logging.getLogger(__name__)

FOLDER, COMPLETE, ASIDE = "checkpoints", "COMPLETE", "aside"
FORMAT = 2  # of the folder: 1 had no course
PLANNER, EXECUTOR = "planner", "executor"
TENSOR_FILES = ("state/state.pt", "state/rng.pt")
NEEDED = {*TENSOR_FILES, "state/config.json"} | {
    f"{policy}/{file}"
    for policy in (PLANNER, EXECUTOR)
    for file in ("adapter_config.json", "adapter_model.safetensors")
}
SAVING, REPLACED, REMOVED = ".saving", ".replaced", ".removed"  # suffixes of folders that a killed save may leave
READINGS = 10  # of a folder whose checkpoints change while they are read


class CorruptCheckpoint(UserError):
    """A checkpoint whose files are not those that were saved."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose files were verified when this object was made (`verify`, `latest`).

    digest: the first 12 hex digits of the SHA-256 of COMPLETE, which lists the hashes of all files. course: its name,
    "" in format 1. state, rng and config are read from disk at each access: `state` as given to `save`, `rng` for
    `restore_rng`, `config` flattened.
    """

    path: Path
    step: int
    digest: str
    course: str

    @property
    def planner_dir(self) -> Path:
        return self.path / PLANNER

    @property
    def executor_dir(self) -> Path:
        return self.path / EXECUTOR

    @property
    def name(self) -> str:
        """Step and content, for results: "step-000040 (0123456789ab)"."""
        return f"{_name(self.step)} ({self.digest})"

    def within(self, run_folder: Path) -> bool:
        """Is this one of the run's own checkpoints?"""
        parent = Path(run_folder) / FOLDER
        return parent.is_dir() and self.path.parent.samefile(parent)

    @property
    def current(self) -> bool:
        """Does the folder still hold what was verified?"""
        try:
            return file_hash(self.path / COMPLETE).startswith(self.digest)
        except OSError:
            return False

    @property
    def state(self) -> dict:
        return self._tensors("state.pt")

    @property
    def rng(self) -> dict:
        return self._tensors("rng.pt")

    @property
    def config(self) -> dict[str, object]:
        return json.loads((self.path / "state" / "config.json").read_text(encoding="utf-8"))

    def _tensors(self, file: str) -> dict:
        return torch.load(self.path / "state" / file, map_location="cpu", weights_only=True)


def new_course() -> str:
    return secrets.token_hex(6)


def save(
    run_folder: Path,
    step: int,
    writers: Mapping[str, Callable[[Path], None]],
    state: dict,
    config: RunConfig,
    keep: int,
    course: str = "",
) -> Path:
    """Writes checkpoint `step` of a course, keeps its newest `keep` checkpoints and returns the new folder.

    Later checkpoints and those of other courses are set aside. The caller holds the run's lock (`claim_run_folder`).
    `writers` map a sub-folder ("planner", "executor") to the
    function that fills it; `state` holds tensors and plain data only. Raises UserError when the disk is full; earlier
    checkpoints are then untouched.
    """
    assert keep >= 1
    parent = Path(run_folder) / FOLDER
    final = parent / _name(step)
    saving = parent / (final.name + SAVING)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        recover(run_folder)
        _fill(saving, step, writers, state, config, course)
        set_aside(run_folder, step, course)
        _swap_in(saving, final)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not disk_full(error):
            raise
        kept = latest(run_folder)
        raise UserError(
            f"{final}: no space left on the disk ({shutil.disk_usage(parent).free >> 20} MiB free); free some and go "
            f"on with --resume auto from {kept.path.name if kept else 'the start'}"
        ) from error
    finally:
        shutil.rmtree(saving, ignore_errors=True)
    for _, old in listed(parent)[keep:]:
        shutil.rmtree(old.rename(old.with_name(old.name + REMOVED)))
    return final


def set_aside(run_folder: Path, step: int, course: str) -> list[str]:
    """Moves checkpoints after `step` and those of other courses to `checkpoints/aside`; returns their names.

    Only for the process that holds the run's lock.
    """
    parent, moved = Path(run_folder) / FOLDER, []
    for later, path in reversed(listed(parent)):
        manifest = path / COMPLETE
        if later <= step and course_of(path) == course:
            continue
        target = parent / ASIDE / f"{stem_of(path)}-{file_hash(manifest)[:12] if manifest.is_file() else new_course()}"
        if target.exists():  # the very same files
            shutil.rmtree(path)
        else:
            target.parent.mkdir(exist_ok=True)
            path.rename(target)
        moved.append(path.name)
    if moved:
        log.warning("%s: set aside in %s: %s", run_folder, parent / ASIDE, ", ".join(moved))
    return moved


def course_of(path: Path) -> str:
    """The course of a checkpoint folder; "" where it has none or cannot be read."""
    try:
        return str(json.loads((path / COMPLETE).read_bytes()).get("course", ""))
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""


def verify(path: Path) -> Checkpoint:
    """The checkpoint in a folder; CorruptCheckpoint if a file differs from its size or hash in COMPLETE."""
    path = Path(path)
    reason = defect(path)
    if reason:
        raise CorruptCheckpoint(f"{path}: {reason}; accepted: a checkpoint as it was saved")
    digest = file_hash(path / COMPLETE)[:12]
    return Checkpoint(path, int(stem_of(path).removeprefix("step-")), digest, course_of(path))


def latest(run_folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; others are passed over with a warning that says why. Read-only."""
    parent = Path(run_folder) / FOLDER
    for _ in range(READINGS):
        found = listed(parent)
        before = _identities(found)
        for _, path in found:
            try:
                return verify(path)
            except (CorruptCheckpoint, FileNotFoundError) as error:
                if _identities(listed(parent)) != before:
                    break  # the run that trains has saved meanwhile
                log.warning("passed over: %s", error)
        else:
            return None
    return None


def _identities(found: list[tuple[int, Path]]) -> list[tuple[str, int]]:
    """Names and inodes of checkpoints; a folder that is gone has none."""
    known = []
    for _, path in found:
        with suppress(FileNotFoundError):
            known.append((path.name, path.stat().st_ino))
    return known


def defect(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, None if it holds the files of its saving and nothing else, each with the
    size and hash it had."""
    try:
        return _manifest_defect(path) or _content_defect(path)
    except OSError as error:  # a name that no file can have
        return f"{COMPLETE} is damaged ({error.strerror})"


def _manifest_defect(path: Path) -> str | None:
    try:
        manifest = json.loads((path / COMPLETE).read_bytes())
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        step, version = manifest["step"], manifest.get("format", 1)
    except FileNotFoundError:
        return f"{COMPLETE} is missing (the save did not finish)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return f"{COMPLETE} is damaged"
    if version not in range(1, FORMAT + 1):
        return f"{COMPLETE} is of format {version}, which is later than this version's {FORMAT}"
    if step != step_of(stem_of(path)):
        return f"{COMPLETE} is for step {step}"
    if NEEDED - files.keys():
        return f"{COMPLETE} does not list {', '.join(sorted(NEEDED - files.keys()))}"
    for file in (path, *sorted(path.rglob("*"))):
        name = file.relative_to(path).as_posix()
        if file.is_symlink() or not (file.is_dir() or name in files or name == COMPLETE):
            return f"{'the folder' if file == path else name} is not a file of the checkpoint"
    for name, (size, digest) in files.items():
        file = path / name
        if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
            return f"{name} is not a file of the checkpoint"
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if file_hash(file) != digest:
            return f"{name} does not have the hash it was saved with"
    return None


def _content_defect(path: Path) -> str | None:
    """What is wrong with files that are as they were written: each is read as far as tells its kind."""
    for name in TENSOR_FILES:
        try:  # without running code of the file; tensors themselves are not read
            value = torch.load(path / name, map_location="cpu", weights_only=True, mmap=True)
        except FileNotFoundError:
            raise
        except Exception:  # noqa: BLE001 - an odd pickle raises whatever it comes to
            return f"{name} holds more than tensors, or is cut"
        if not isinstance(value, dict):
            return f"{name} holds no state"
    try:
        config = json.loads((path / "state" / "config.json").read_bytes())
        for policy in (PLANNER, EXECUTOR):
            json.loads((path / policy / "adapter_config.json").read_bytes())
            with safe_open(path / policy / "adapter_model.safetensors", "pt") as tensors:
                tensors.keys()
    except (ValueError, RuntimeError, SafetensorError) as error:  # a RecursionError is a RuntimeError
        return f"a file cannot be read ({' '.join(str(error).split())[:80]})"
    return None if isinstance(config, dict) else "state/config.json holds no configuration"


def _fill(
    folder: Path, step: int, writers: Mapping[str, Callable[[Path], None]], state: dict, config: RunConfig, course: str
) -> None:
    for name, write in writers.items():
        (folder / name).mkdir(parents=True)
        write(folder / name)
    (folder / "state").mkdir(parents=True)
    _save_tensors(state, folder / "state" / "state.pt")
    _save_tensors(capture_rng(), folder / "state" / "rng.pt")
    (folder / "state" / "config.json").write_text(
        json.dumps(flatten(config), indent=1, sort_keys=True), encoding="utf-8"
    )
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for file in files:
        sync(file)
    listed = {f.relative_to(folder).as_posix(): {"bytes": f.stat().st_size, "sha256": file_hash(f)} for f in files}
    manifest = {"format": FORMAT, "step": step, "course": course, "files": listed}
    (folder / COMPLETE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in (folder / COMPLETE, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        sync(path)


def _save_tensors(value: dict, path: Path) -> None:
    # by way of memory: torch's own file writer does not say that a disk is full
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(buffer.getbuffer())


def _swap_in(saving: Path, final: Path) -> None:
    """Renames; a checkpoint of the same step gives way only once the new one is whole."""
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        final.rename(replaced)
    saving.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def recover(run_folder: Path) -> None:
    """Clears the remains of a killed save: half-filled folders go, a replaced checkpoint without successor comes back.

    Only for the process that holds the run's lock.
    """
    parent = Path(run_folder) / FOLDER
    for folder in (*parent.glob(f"step-*{SAVING}"), *parent.glob(f"step-*{REMOVED}")):
        shutil.rmtree(folder)
    for folder in parent.glob(f"step-*{REPLACED}"):
        final = folder.with_name(folder.name.removesuffix(REPLACED))
        if final.exists():
            shutil.rmtree(folder)
        else:
            folder.rename(final)


def listed(parent: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, the newest first; one that is being replaced stands in for its successor."""
    if not parent.is_dir():
        return []
    found = {path.name: path for path in parent.iterdir() if step_of(path.name) is not None}
    for path in parent.glob(f"step-*{REPLACED}"):
        found.setdefault(stem_of(path), path)
    return sorted(((step, path) for name, path in found.items() if (step := step_of(name)) is not None), reverse=True)


def stem_of(path: Path) -> str:
    """The name "step-000040" of a checkpoint folder, also of one that is being replaced or was set aside."""
    return re.sub(r"(?<=\d)-[0-9a-f]{12}$", "", path.name.removesuffix(REPLACED))


def _name(step: int) -> str:
    return f"step-{step:06d}"


def step_of(name: str) -> int | None:
    return int(name.removeprefix("step-")) if re.fullmatch(r"step-\d{6,}", name) else None


def capture_rng() -> dict:
    """State of every global generator; of CUDA ones only where CUDA is in use."""
    version, words, gauss = random.getstate()
    legacy = np.random.get_state()
    assert isinstance(legacy, tuple)
    name, keys, position, has_gauss, cached = legacy
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore_rng(state: dict) -> None:
    """Sets every global generator to a state of `capture_rng`. CUDA states of another GPU count are left out."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    gpus = torch.cuda.device_count()
    if len(state["cuda"]) == gpus:
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
    elif state["cuda"]:
        log.warning(
            "the checkpoint has CUDA generators of %d GPUs, here are %d: not restored", len(state["cuda"]), gpus
        )
