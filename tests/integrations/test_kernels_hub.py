"""The project for Hugging Face's kernel-builder: loaded as the hub loads it, from anywhere and under another name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
LOAD = """
import importlib.util, pkgutil, sys
from pathlib import Path
import torch

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("csrc_triton", "tempact"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
kernels = []
for name, folder in (("first_1a2b", sys.argv[1]), ("second_3c4d", sys.argv[2])):
    file = Path(folder) / "torch-ext/csrc_triton/__init__.py"
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(file.parent)])
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for found in pkgutil.walk_packages(module.__path__, name + "."):
        importlib.import_module(found.name)
    kernels.append(module)
q = torch.randn(1, 4, 2, 32)
outs = [kernel.fork_attention(q, q, q) for kernel in kernels]
exact = torch.nn.functional.scaled_dot_product_attention(*(q.transpose(1, 2),) * 3).transpose(1, 2)
assert all(torch.allclose(out, exact, atol=1e-5) for out in outs)
"""


def assembled(source: Path, folder: Path) -> str:
    command = [sys.executable, source / "tests/kernels_hub.py", folder]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_two_versions_load_in_one_process_without_the_package(tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    (changed / "tests").mkdir(parents=True)
    shutil.copy(REPOSITORY / "tests/kernels_hub.py", changed / "tests")
    shutil.copytree(REPOSITORY / "csrc_triton", changed / "csrc_triton", ignore=shutil.ignore_patterns("__pycache__"))
    with open(changed / "csrc_triton/runtime.py", "a", encoding="utf-8") as file:
        file.write("\n# changed\n")
    folders = [tmp_path / "first", tmp_path / "second"]
    names = [assembled(REPOSITORY, folders[0]), assembled(changed, folders[1])]
    assert names[0] != names[1]
    script = tmp_path / "load.py"
    script.write_text(LOAD, encoding="utf-8")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, script, *folders], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_project_holds_what_kernel_builder_asks_for(tmp_path: Path) -> None:
    namespace = assembled(REPOSITORY, tmp_path / "project")
    general = tomllib.loads((tmp_path / "project/build.toml").read_text())["general"]
    assert general["name"].replace("-", "_") == "csrc_triton" and general["backends"] == ["cuda"]
    assert {path.name for path in (tmp_path / "project").iterdir()} == {
        "LICENSE", "README.md", "build.toml", "flake.nix", "torch-ext",
    }  # fmt: skip
    for path in (tmp_path / "project/torch-ext").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) csrc_triton\b", text, re.MULTILINE), path
        assert set(re.findall(r"(\w+)::\w", text)) <= {namespace}, path
