"""Python and the packages beside the matched table. Imports nothing that may be missing."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

OK, NOTE, FAULT = "ok", "note", "fault"  # there; not there and not needed by all; needed and not there
PYTHON = (3, 11)
NOTHING = "nothing"


@dataclass(frozen=True)
class Finding:
    """One line. status: OK, NOTE or FAULT; todo: "" where nothing is to be done."""

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
    """The oldest version that serves, the one that the tests and published numbers were made with ("": see what
    installs it), and for what it is needed beside the core ("": for everything)."""

    oldest: str
    tested: str
    extra: str = ""


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
    "wandb": Package("0.20", "", "wandb"),
}


def versions() -> Iterator[Finding]:
    """Python and the packages, beside the matched table."""
    found = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info[:2] >= PYTHON
    accepted = f"{'.'.join(map(str, PYTHON))} or later"
    yield Finding("python", OK if good else FAULT, found, accepted, "" if good else "make the environment anew with it")
    for name, package in PACKAGES.items():
        if name == "triton" and not sys.platform.startswith("linux"):
            continue
        yield package_version(name, package)


def package_version(name: str, package: Package) -> Finding:
    accepted = f"{package.oldest} or later" + (f" (tested with {package.tested})" if package.tested else "")
    install = f"pip install -e '.[{package.extra}]' -c constraints.txt" if package.extra else (
        "pip install -e . -c constraints.txt"
    )  # fmt: skip
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
