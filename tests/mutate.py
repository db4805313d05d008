"""Puts small faults into a copy of the code, one at a time, and runs the tests that must see each.

    python -m tests.mutate                # all of tests/mutations.py; exit code 1 if a fault survives
    python -m tests.mutate checkpoint gs  # those whose file or fault holds one of these words

`pytest -m slow tests/test_mutations.py` does the same, a test for each fault.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
COPIED = ("tempact", "csrc_triton", "tests", "docs", "bench", "pyproject.toml", "README.md", "setup.py")
LONGEST_S = 600


@dataclass(frozen=True)
class Mutation:
    """A fault. line: a text that stands once in the file; fault: what is put in its place; tests: node ids that fail
    for it."""

    file: str
    line: str
    fault: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}: {' '.join(self.line.split())} -> {' '.join(self.fault.split())}"

    def mutated(self, folder: Path) -> str:
        """The source of the file in `folder` with the fault."""
        text = (folder / self.file).read_text(encoding="utf-8")
        assert text.count(self.line) == 1, f"{self.file}: found {text.count(self.line)} times: {self.line}"
        return text.replace(self.line, self.fault)


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of the repository, in which faults do no harm."""
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            source = REPOSITORY / name
            if source.is_dir():
                shutil.copytree(source, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__", ".venv"))
            else:
                shutil.copy(source, folder)
        yield Path(folder)


def survives(mutation: Mutation, folder: Path) -> str:
    """What pytest said of the tests that should have failed; "" where one of them did."""
    file = folder / mutation.file
    sound = file.read_text(encoding="utf-8")
    file.write_text(mutation.mutated(folder), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    named = ("-m", "slow or not slow", *mutation.tests)  # a test that is named here runs however long it takes
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *named]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LONGEST_S, check=False
        )
    finally:
        file.write_text(sound, encoding="utf-8")
    # 1: a test has failed; anything else, such as a test that cannot be found, proves nothing
    return "" if done.returncode == 1 else f"exit code {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"


def main(words: list[str]) -> int:
    sys.path.insert(0, str(Path(__file__).parent))
    from mutations import MUTATIONS

    chosen = [each for each in MUTATIONS if not words or any(word in str(each) for word in words)]
    alive = 0
    with copied() as folder:
        for number, mutation in enumerate(chosen, 1):
            told = survives(mutation, folder)
            alive += bool(told)
            sys.stdout.write(f"{number}/{len(chosen)} {'SURVIVES' if told else 'seen'} {mutation} {told}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(chosen)} faults, {alive} survive\n")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
