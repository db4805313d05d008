"""Small file helpers of a run folder: names, atomic writes, a full disk, one run at a time."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from tempact.errors import UserError

NAME_LIMIT = 48  # characters of a file name made from a prompt, before its hash
UMASK = os.umask(0o077)  # asked for once, while no other thread makes files: asking sets it
os.umask(UMASK)


def safe_name(text: str) -> str:
    """A file name for any text: lower-case letters, digits and dashes, cut, with a hash where something was lost."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if name == text and 0 < len(name) <= NAME_LIMIT:
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{name[:NAME_LIMIT].strip('-')}-{digest}".strip("-")


def write_atomic(path: Path, data: str | bytes) -> None:
    """Writes `path` whole or not at all; UserError when the disk is full."""
    raw = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data
    with writing(path, f"{len(raw)} free bytes") as partial, partial.open("wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def writing(path: Path, accepted: str = "a disk with space left") -> Iterator[Path]:
    """The name under which to write `path`, for writers that want a file: it takes its place whole or not at all.

    UserError when the disk is full, which says what is accepted.
    """
    partial = partial_of(path)
    try:
        yield partial
        usual_mode(partial)
        partial.replace(path)
    except Exception as error:  # not every writer has an OSError for a full disk
        if not disk_full(error):
            raise
        raise UserError(f"{path}: found no space left on the disk; accepted: {accepted}") from error
    finally:
        partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """The name beside `path` under which this process alone, of all hosts that see the folder, writes it."""
    writer = f"{socket.gethostname()}.{os.getpid()}"
    return path.with_name(f".{path.stem}.{writer}.partial{path.suffix}")  # by the ending some know the format


def usual_mode(path: Path) -> None:
    """Gives a file, or the files of a folder, the mode that `open` gives: safetensors' are for their owner alone."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            file.chmod(0o666 & ~UMASK)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Around the parsing of a file that a run wrote: UserError with its name if it is not as it was written."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: cannot be read ({reason}); accepted: the file as the run wrote it") from error


def disk_full(error: BaseException | None) -> bool:
    """Is `error`, or what caused it, a full disk or quota? Writers in C++ and Rust only say so in words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(error) for words in ("No space left on device", "Disk quota exceeded")):
            return True
        error = error.__cause__ or error.__context__
    return False


LEDGER = "judges.json"  # in a run's folder: what its judges have been asked


@contextmanager
def claim_run_folder(path: str | Path) -> Iterator[Path]:
    """Makes the folder and holds it for this process; UserError if it cannot be written or another run has it.

    The lock is the kernel's, so a killed run leaves nothing behind that would block the next one. Of a run that a
    UserError ends before it has written anything, its own folder does not stay.
    """
    folder = Path(path)
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        lock = (folder / ".lock").open("wb")
    except OSError as error:
        raise UserError(f"output: cannot write to {folder} ({error.strerror}); accepted: a writable folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"output: another run is using {folder}; accepted: a folder of its own for each run"
            ) from error
        try:
            yield folder
        except UserError:
            left = {path.name: path.stat().st_size for path in folder.iterdir()}
            if new and not any(left.values()) and left.keys() <= {".lock", LEDGER}:
                for name in left:
                    (folder / name).unlink()
                folder.rmdir()
            raise
