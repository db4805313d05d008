"""Every GPU and every version of Triton that is accepted: each kernel is compiled for it, within the GPU's limits.

The tests of each op compile its specialisations for sm_80, whose tiles sm_86 and sm_89 share, and for sm_90, with the
version that is installed. `.ci/run` names folders with the others in TRITON_FOLDERS.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from kernel_checks import SHARED, TARGETS, assert_well_compiled, beyond, compiled_by, compiled_kernels

from csrc_triton import runtime
from csrc_triton.fork_attention.selection import TESTED_TRITON, minor

OTHERS = (89, 100, 120)
MODULES = sorted(
    path.stem for path in Path(__file__).parent.glob("ahead_*.py") if "\nAHEAD_OF_TIME = " in path.read_text()
)
FOLDERS = [Path(folder) for folder in os.environ.get("TRITON_FOLDERS", "").split(os.pathsep) if folder]
given = pytest.mark.skipif(not FOLDERS, reason="needs other versions of Triton: TRITON_FOLDERS, as .ci/run sets it")
CI = Path(__file__).parents[2] / ".ci/run"


@pytest.mark.parametrize("module", MODULES)
def test_each_kernel_fits_chips_that_its_own_tests_leave_out(module: str) -> None:
    rows = compiled_kernels(module, OTHERS, "one")
    assert {row["target"] for row in rows} == set(OTHERS)


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_all_specialisations_fit_all_chips(module: str) -> None:
    """All from a module's OLDEST on, where it has one."""
    rows = compiled_kernels(module, SHARED)
    oldest = re.search(r"^OLDEST = (\d+)", (Path(__file__).parent / f"{module}.py").read_text(), re.MULTILINE)
    assert {row["target"] for row in rows} == {chip for chip in SHARED if oldest is None or chip >= int(oldest[1])}


@given
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_each_kernel_compiles_for_hopper_with_other_versions(folder: Path) -> None:
    assert_well_compiled(compiled_by("ops/ahead_hopper.py", "one", triton=folder))
    assert compiled_kernels(",".join(MODULES), [90], "one", folder)


def test_the_versions_that_serve_on_hopper_are_compiled() -> None:
    found = re.search(r'^tritons="(.*)"$', CI.read_text(), re.MULTILINE)
    assert found is not None and set(map(minor, found[1].split())) == {*TESTED_TRITON, (3, 9)}
    assert minor(triton.__version__) in TESTED_TRITON


ROW: dict[str, Any] = {
    "name": "it", "registers": 255, "threads": 256, "shared": 101376, "tensor_columns": 512,
}  # fmt: skip


@pytest.mark.parametrize(
    ("what", "found", "reason"),
    [
        ("shared", 101377, "101377 bytes of shared memory; the chip has 101376"),
        ("threads", 288, "73440 registers; the chip has 65536"),
        ("tensor_columns", 513, "513 columns of tensor memory; the chip has 512"),
    ],
)
def test_a_kernel_beyond_a_chip_is_named(what: str, found: int, reason: str) -> None:
    assert beyond(ROW, 89) == []
    assert beyond(ROW | {what: found}, 89) == [f"it on sm_89: {reason}"]


def test_what_is_compiled_is_what_is_accepted() -> None:
    oldest = 10 * runtime.OLDEST_CAPABILITY[0] + runtime.OLDEST_CAPABILITY[1]
    assert min(SHARED) == min(TARGETS) == oldest


def test_rocm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    reason = runtime.why_not_triton(torch.device("cuda", 0), torch.bfloat16)
    assert reason is not None and reason.startswith("a GPU under ROCm") and "accepted: NVIDIA" in reason
