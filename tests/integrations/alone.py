"""Runs a Python file where only the standard library, csrc_triton, torch, Triton and their needs can be imported.

python alone.py FOLDER FILE: FOLDER is where csrc_triton is.
"""

from __future__ import annotations

import importlib.metadata
import re
import runpy
import sys
from importlib.abc import MetaPathFinder
from typing import Any


def needs(names: list[str]) -> set[str]:
    """The distributions of these names and what they require, themselves and through others."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        todo += [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in required if "extra ==" not in line]
    return found


def refused_modules() -> set[str]:
    """Top-level modules of every other distribution that is installed here, and of this repository."""
    distributions = needs(["torch", "triton"])
    owners = importlib.metadata.packages_distributions()
    normal = {module: {name.lower().replace("_", "-") for name in names} for module, names in owners.items()}
    return {module for module, names in normal.items() if not names & distributions} - {"csrc_triton"} | {"tempact"}


class Refuse(MetaPathFinder):
    """Finds nothing, and refuses some modules as if they were not installed."""

    def __init__(self, refused: set[str]):
        self.refused = refused

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        top = name.split(".")[0]
        if top in self.refused:
            raise ModuleNotFoundError(f"No module named {top!r}", name=top)


if __name__ == "__main__":
    folder, file = sys.argv[1:3]
    sys.path[0] = folder  # in place of this file's folder
    sys.meta_path.insert(0, Refuse(refused_modules()))
    runpy.run_path(file, run_name="__main__")
