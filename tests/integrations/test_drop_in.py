"""Installations: csrc_triton alone, with torch and Triton and nothing else in reach, and together with tempact."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from csrc_triton.fork_attention.selection import TESTED_TRITON
from tempact import __version__

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "csrc_triton"
README = REPOSITORY / "README.md"
ALONE = Path(__file__).parent / "alone.py"

USE = """
import importlib, pkgutil, sys
import torch
loaded = set(sys.modules)
import csrc_triton
assert not [m for m in set(sys.modules) - loaded if m.split(".")[0] == "triton"], "Triton is imported before it is used"
for module in pkgutil.walk_packages(csrc_triton.__path__, "csrc_triton."):
    if not module.name.startswith("csrc_triton.integrations"):
        importlib.import_module(module.name)

cache = csrc_triton.ForkableKVCache(1, 2, 32, rows=8, dtype=torch.float32, device=torch.device("cpu"))
branch = cache.new_branch()
rows = cache.reserve([branch], 5)
past = torch.randn(1, 5, 2, 32)
cache.write(rows, 0, past, past)
cache.commit(rows)
q = torch.randn(3, 4, 2, 32, requires_grad=True)
out = csrc_triton.fork_attention(q, q, q, cache.views(cache.fork(branch, 3), [(0, 5)])[0])
keys = torch.cat([past.expand(3, -1, -1, -1), q], dim=1)
scores = torch.einsum("blhd,bmhd->bhlm", q, keys) * 32 ** -0.5
assert torch.allclose(out, torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), keys), atol=1e-5)
out.sum().backward()
assert q.grad.isfinite().all() and q.grad.abs().sum() > 0
assert not {"tempact", "numpy", "diffusers"} & set(sys.modules)
print("used", csrc_triton.__file__)
"""


INSTALL = (
    sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation",
    "--disable-pip-version-check", "--target",
)  # fmt: skip
BUILT = shutil.ignore_patterns("__pycache__", "build", "*.egg-info", "weights")


def installed_from(source: Path, site: Path) -> Path:
    done = subprocess.run([*INSTALL, site, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return site


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with csrc_triton installed alone, from a copy that has nothing around it."""
    folder = tmp_path_factory.mktemp("alone")
    source = folder / "source" / "csrc_triton"
    shutil.copytree(PACKAGE, source, ignore=BUILT)
    return installed_from(source, folder / "site")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the files that an installation of tempact is made from, but for ShapeWorld's weights."""
    folder = tmp_path / "a checkout"
    for package in ("csrc_triton", "tempact"):
        shutil.copytree(REPOSITORY / package, folder / package, ignore=BUILT)
    for file in ("setup.py", "pyproject.toml", "build_backend.py", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(REPOSITORY / file, folder)
    return folder


def run_alone(folder: Path, code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "code.py"
    file.write_text(code, encoding="utf-8")
    command = [sys.executable, str(ALONE), str(folder), str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}  # the interpreter, which is for tests, needs numpy
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)


def test_it_installs_and_works_alone(installed: Path, tmp_path: Path) -> None:
    assert not (installed / "tempact").exists()
    done = run_alone(installed, USE, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == f"used {installed / 'csrc_triton' / '__init__.py'}"


@pytest.mark.parametrize("module", ["tempact", "numpy", "diffusers", "peft"])
def test_the_subprocess_reaches_nothing_else(module: str, tmp_path: Path) -> None:
    done = run_alone(REPOSITORY, f"import {module}", tmp_path)
    assert done.returncode != 0 and f"No module named '{module}'" in done.stderr


def oldest(requirement: str) -> tuple[str, tuple[int, ...]]:
    """The name and the lower bound in "torch>=2.9"."""
    name, version = re.split(r">=|;", requirement)[:2]
    return name, tuple(map(int, version.split(".")))


def test_its_own_distribution_has_every_package_and_needs_no_more(installed: Path) -> None:
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))
    folders = sorted(init.parent.relative_to(REPOSITORY) for init in PACKAGE.rglob("__init__.py"))
    assert project["tool"]["setuptools"]["packages"] == [".".join(folder.parts) for folder in folders]
    whole = (REPOSITORY / "setup.py").read_text(encoding="utf-8")
    for name, least in map(oldest, project["project"]["dependencies"]):
        asked = re.search(rf'"({name}>=[\d.]+)', whole)
        assert asked is not None and oldest(asked[1])[1] >= least, f"setup.py accepts {name} older than {least}"
    assert (PACKAGE / "LICENSE").read_text() == (REPOSITORY / "LICENSE").read_text()
    assert project["project"]["version"] == __version__
    assert (installed / "csrc_triton" / "py.typed").is_file()


def test_its_readme_names_the_versions_that_it_asks_for_and_is_tested_with() -> None:
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = dict(re.findall(r"^([\w.-]+)==(\d+\.\d+)", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))
    text = (PACKAGE / "README.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \|", text, re.MULTILINE))
    tested = dict(re.findall(r"^\| (\w+) \| [\d.]+ \| ([\d.]+) \|", text, re.MULTILINE))
    for need in ["Python" + project["requires-python"], *project["dependencies"]]:
        name, least = oldest(need)
        (row,) = (row for row in table if row.lower() == name.lower())
        assert tuple(map(int, table[row].split("."))) == least, row
        assert tested[row] == pinned.get(name, tested[row]), row
    hoppers = [".".join(map(str, version)) for version in (TESTED_TRITON[0], TESTED_TRITON[-1])]
    assert f"{hoppers[0]} to {hoppers[1]} |" in text


def test_no_file_has_two_owners_where_both_are_installed(installed: Path, checkout: Path, tmp_path: Path) -> None:
    both = [installed, installed_from(checkout, tmp_path / "site")]
    whole, kernels = (
        {str(file) for of in importlib.metadata.distributions(path=[str(site)]) for file in of.files or ()}
        for site in reversed(both)
    )
    assert "tempact/__init__.py" in whole and "csrc_triton/__init__.py" in kernels
    assert not whole & kernels
    (tempact,) = importlib.metadata.distributions(path=[str(both[1])])
    assert f"csrc-triton @ {(checkout / 'csrc_triton').as_uri()}" in (tempact.requires or ())


def built(source: Path, folder: Path) -> tuple[set[str], set[str], str]:
    """What `python -m build` makes: the files of the archive, those of the wheel made from it, and its metadata."""
    folder.mkdir()
    backend = "build_backend" if (source / "build_backend.py").is_file() else "setuptools.build_meta"
    archive = made(source, f"import {backend} as b; print(b.build_sdist({str(folder)!r}))", folder)
    with tarfile.open(archive) as packed:
        files = {name.partition("/")[2] for name in packed.getnames()}
        packed.extractall(folder, filter="data")
    unpacked = folder / archive.name.removesuffix(".tar.gz")
    wheel = made(unpacked, f"import {backend} as b; print(b.build_wheel({str(folder)!r}))", folder)
    with zipfile.ZipFile(wheel) as packed:
        metadata = next(name for name in packed.namelist() if name.endswith("METADATA"))
        return files, set(packed.namelist()), packed.read(metadata).decode()


def made(source: Path, code: str, folder: Path) -> Path:
    """The file whose name a build backend prints at last."""
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / done.stdout.split()[-1]


def test_archives_and_wheels_hold_everything(checkout: Path, tmp_path: Path) -> None:
    for name in ("csrc_triton", "tempact"):
        source = checkout / name if name == "csrc_triton" else checkout
        files, installed, metadata = built(source, tmp_path / name)
        package = checkout / name
        owned = [path.relative_to(package) for path in package.rglob("*") if path.is_file()]
        ours = {f"{name}/{path}" for path in owned if path.suffix == ".py" or path.name == "py.typed"}
        assert ours == {file for file in installed if file.endswith((".py", "py.typed"))}
        assert f"{name}-{__version__}.dist-info/licenses/LICENSE" in installed
        assert {"LICENSE", "README.md", "pyproject.toml"} <= files
        assert f"Version: {__version__}" in metadata and "Description-Content-Type: text/markdown" in metadata
        assert " @ file:" not in metadata
    assert f"Requires-Dist: csrc-triton=={__version__}" in metadata
    assert not {file for file in installed if file.startswith("csrc_triton/")}


def test_an_editable_installation_serves_both_packages_from_the_checkout(checkout: Path, tmp_path: Path) -> None:
    code = f"import build_backend; print(build_backend.build_editable({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as wheel:
        assert not [name for name in wheel.namelist() if name.startswith(("csrc_triton/", "tempact/"))]
        finder = next(name for name in wheel.namelist() if name.endswith("_finder.py"))
        metadata = next(name for name in wheel.namelist() if name.endswith("METADATA"))
        served, needs = wheel.read(finder).decode(), wheel.read(metadata).decode()
    assert all(repr(str(checkout / package)) in served for package in ("csrc_triton", "tempact"))
    assert "csrc-triton" not in needs and "Requires-Dist: triton>=3.5" in needs


def test_the_example_in_the_readme_runs_alone(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    examples = [block for block in blocks if "from csrc_triton import" in block]
    assert len(examples) == 1, f"README.md has {len(examples)} examples of csrc_triton"
    assert sum(bool(line.strip()) for line in examples[0].splitlines()) <= 20
    check = (
        "\nassert cache.rows_used == 11 * tokens\n"  # three chunks shared, one of each continuation
        "assert all(block.weight.grad.abs().sum() > 0 for block in blocks)\n"
    )
    done = run_alone(REPOSITORY, examples[0] + check, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
