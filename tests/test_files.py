"""Names, atomic writes, full disks and the claim on a run folder."""

from __future__ import annotations

import ast
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tempact.errors import UserError
from tempact.files import claim_run_folder, disk_full, safe_name, write_atomic

PACKAGES = [Path(__file__).parents[1] / name for name in ("tempact", "csrc_triton")]


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


def test_every_text_file_names_its_encoding() -> None:
    """The locale's encoding is another one on some machines."""
    unnamed = []
    for path in [*PACKAGES[0].rglob("*.py"), *PACKAGES[1].rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
            if name not in ("open", "fdopen", "read_text", "write_text", "NamedTemporaryFile", "TemporaryFile"):
                continue
            given = [*node.args, *(own.value for own in node.keywords)]
            binary = any(isinstance(own, ast.Constant) and own.value in ("rb", "wb", "ab", "r+b") for own in given)
            other = ast.unparse(node.func) in ("Image.open", "os.open", "stop.open")
            if not (binary or other or any(own.arg in ("encoding", "dir") for own in node.keywords)):
                unnamed.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert unnamed == []


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_are_as_readable_as_others(tmp_path: Path, umask: int) -> None:
    """Also those of safetensors, which makes them for their owner alone."""
    code = (
        "import sys, torch; from pathlib import Path; from safetensors.torch import save_file\n"
        "from tempact.files import usual_mode, write_atomic, writing\n"
        "folder = Path(sys.argv[1]); write_atomic(folder / 'a.json', 'x'); (folder / 'in').mkdir()\n"
        "with writing(folder / 'b.safetensors') as partial: save_file({'x': torch.zeros(2)}, partial)\n"
        "save_file({'x': torch.zeros(2)}, folder / 'in' / 'c.safetensors'); usual_mode(folder)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=PACKAGES[0].parent, check=True, umask=umask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.*")}
    assert modes == dict.fromkeys(("a.json", "b.safetensors", "c.safetensors"), 0o666 & ~umask)
