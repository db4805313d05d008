"""Checks before a run: of the machine (doctor) and of a configuration (dry run).

Here: what a check has found, and Python and the packages beside the tested versions. This module imports nothing that
may be missing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

OK, NOTE, FAULT = "ok", "note", "fault"  # of a check: passed; something that only some runs need; a run would fail
PYTHON = (3, 11)
NOTHING = "nothing"


@dataclass(frozen=True)
class Finding:
    """The result of one check. status: OK, NOTE or FAULT; todo: "" where nothing is to be done."""

    name: str
    status: str
    found: str
    accepted: str
    todo: str = ""

    def line(self) -> str:
        todo = f"; {self.todo}" if self.todo else ""
        return f"{self.status:<5} {self.name}: found {self.found}; accepted: {self.accepted}{todo}"


@dataclass(frozen=True)
class Package:
    oldest: str  # version that serves
    tested: str  # version behind the tests and published numbers; "" for none
    extra: str = ""  # of the installation, that the package belongs to; "": the core


PACKAGES = {
    "torch": Package("2.11", "2.13.0"),
    "triton": Package("3.5", "3.7.1"),
    "transformers": Package("5.0", "5.23.0"),
    "peft": Package("0.18", "0.21.2"),
    "safetensors": Package("0.4", "0.8.0"),
    "tokenizers": Package("0.22", "0.23.3"),
    "numpy": Package("1.26", "2.4.6"),
    "pydantic": Package("2.7", "2.14.3"),
    "imageio-ffmpeg": Package("0.5", "0.8.1"),
    "diffusers": Package("0.36", "0.42.1", "wan"),
    "ftfy": Package("6.2", "6.3.1", "wan"),
    "openai": Package("2.0", "3.54.0", "judges"),
    "tensorboard": Package("2.20", "2.21.0", "tensorboard"),
    "wandb": Package("0.20", "", "wandb"),
    "trackio": Package("0.40", "", "trackio"),
}


def versions() -> Iterator[Finding]:
    """Python and every package of PACKAGES."""
    found = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info[:2] >= PYTHON
    accepted = f"{'.'.join(map(str, PYTHON))} or later"
    yield Finding("python", OK if good else FAULT, found, accepted, "" if good else "make the environment anew with it")
    for name, package in PACKAGES.items():
        if name == "triton" and not sys.platform.startswith("linux"):
            continue
        yield package_version(name, package)


def package_version(name: str, package: Package) -> Finding:
    """The installed version; a package of an extra may be missing."""
    accepted = f"{package.oldest} or later" + (f" (tested with {package.tested})" if package.tested else "")
    target = f"'.[{package.extra}]'" if package.extra else "."
    install = f"pip install -e {target} -c constraints.txt"
    try:
        found = version(name)
    except PackageNotFoundError:
        what = f"{NOTHING}, which only the extra {package.extra!r} needs" if package.extra else NOTHING
        return Finding(name, NOTE if package.extra else FAULT, what, accepted, install)
    if _numbers(found) < _numbers(package.oldest):
        return Finding(name, FAULT, found, accepted, install)
    return Finding(name, OK, found, accepted)


def _numbers(found: str) -> tuple[int, ...]:
    """2.13.0+cu130 -> (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", found)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
