"""Names, atomic writes, full disks and the claim on a run folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tempact.errors import UserError
from tempact.files import claim_run_folder, disk_full, safe_name, write_atomic


@pytest.mark.parametrize(
    "text", ["../../etc/passwd", "/abs", "a\\b:c*?", "", ".", "..", "\x00", "ü" * 300, "x" * 4000, "CON"]
)
def test_safe_names_stay_in_their_folder(tmp_path: Path, text: str) -> None:
    name = safe_name(text)
    path = tmp_path / name
    path.write_text("x")
    assert path.parent.resolve() == tmp_path.resolve() and [p.name for p in tmp_path.iterdir()] == [name]
    assert 0 < len(name) <= 60 and not name.startswith("-")


def test_safe_names_are_readable_and_differ() -> None:
    assert safe_name("simple") == "simple"
    assert safe_name("A red circle!").startswith("a-red-circle-")
    assert safe_name("A red circle!") != safe_name("a red circle?") == safe_name("a red circle?")


def test_an_atomic_write_replaces_or_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"a\.json.*no space left.*3 free bytes"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_is_known_by_number_word_and_cause() -> None:
    wrapped = RuntimeError("writer failed")
    wrapped.__cause__ = OSError(errno.EDQUOT, "quota")
    assert disk_full(OSError(errno.ENOSPC, "")) and disk_full(wrapped)
    assert disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not disk_full(OSError(errno.EACCES, "denied")) and not disk_full(RuntimeError("broken"))


def test_one_run_at_a_time_has_a_folder(tmp_path: Path) -> None:
    with claim_run_folder(tmp_path / "run") as folder:
        assert folder.is_dir()
        with pytest.raises(UserError, match="another run is using"), claim_run_folder(tmp_path / "run"):
            pytest.fail("claimed twice")
    with claim_run_folder(tmp_path / "run"):
        pass


@pytest.mark.parametrize("place", ["/proc/tempact", "file/run", "file"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"^output: cannot write to .*accepted: a writable folder$"),
        claim_run_folder(tmp_path / place),
    ):
        pytest.fail("claimed")
