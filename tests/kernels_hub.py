"""csrc_triton as a source project of Hugging Face's kernel-builder: `python tests/kernels_hub.py FOLDER`.

The hub loads a kernel from any folder, under any name, and several versions of it in one process. So the copy that this
makes imports itself relatively and registers its ops in a namespace of its own, csrc_triton_ and a hash of the sources.
The integrations stay behind: a kernel of the hub imports torch, Triton and itself. `kernel-builder build-and-upload` in
the folder does the rest; which version of the hub it becomes (`version` in build.toml) is the publisher's to say.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = REPOSITORY / "csrc_triton"
OWN_IMPORT = re.compile(r"^(\s*from )csrc_triton(?:\.([\w.]+))? import ", re.MULTILINE)
BUILD = """[general]
name = "csrc-triton"
version = 0
edition = 5
license = "Apache-2.0"
backends = ["cuda"]

[torch-noarch]
"""
FLAKE = """{
  description = "Kernels for autoregressive video diffusion";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""


def modules() -> dict[Path, str]:
    """The text of every module that goes to the hub, by its path in the package."""
    paths = [path.relative_to(SOURCE) for path in SOURCE.rglob("*.py")]
    return {
        path: (SOURCE / path).read_text(encoding="utf-8")
        for path in sorted(paths)
        if path.parts[0] not in ("integrations", "build")
    }


def relative(text: str, path: Path) -> str:
    """A module's text with the package's own imports made relative; path: the module's, in the package."""
    dots = "." * len(path.parts)
    return OWN_IMPORT.sub(lambda found: f"{found[1]}{dots}{found[2] or ''} import ", text)


def assemble(folder: Path) -> str:
    """Writes the project into a new folder and returns the namespace of its ops.

    Raises:
        FileExistsError: if the folder exists.
    """
    texts = modules()
    digest = hashlib.sha256("\0".join(f"{path}\0{text}" for path, text in texts.items()).encode()).hexdigest()
    namespace = f"csrc_triton_{digest[:8]}"
    folder.mkdir(parents=True)
    for path, text in texts.items():
        target = folder / "torch-ext" / "csrc_triton" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(relative(text, path).replace("csrc_triton::", f"{namespace}::"), encoding="utf-8")
    for name in ("README.md", "LICENSE"):
        shutil.copy(SOURCE / name, folder)
    (folder / "build.toml").write_text(BUILD, encoding="utf-8")
    (folder / "flake.nix").write_text(FLAKE, encoding="utf-8")
    return namespace


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/kernels_hub.py FOLDER (a new one)")
    sys.stdout.write(f"{assemble(Path(sys.argv[1]))}\n")
