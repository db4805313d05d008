"""How a kernel is accepted: error bounds and ahead-of-time compilation.

`python tests/kernel_checks.py MODULE,... all|one TARGET...` compiles the kernels that modules list, all or the first
specialisation of each, in a process where Triton's interpreter is off, and prints one JSON line a kernel. Targets
before a kernel's `oldest` are left out.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

TARGETS = (80, 90)
# what one program may have of a chip's shared memory, in bytes, by compute capability
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
REGISTERS = 65536  # that the threads of a program share, on all of these
TENSOR_COLUMNS = 512  # of tensor memory, where a chip has it
ALIKE = {80: (86, 89)}  # what is compiled for the first has the same tiles on the others


def error(got: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; infinite where `got` is not finite and `exact` is."""
    gap = (got.double().cpu() - exact.double().cpu()).abs()
    return gap.nan_to_num(nan=float("inf")).max().item() if gap.numel() else 0.0


def assert_as_good(
    name: str, got: Tensor, same_precision: Tensor, exact: Tensor, atol: float = 1e-6, times: float = 2
) -> None:
    """|got - exact| <= times |torch at the same precision - exact| + atol, by the largest difference.

    exact: the naive formula in fp64 on the upcast inputs.
    """
    assert got.shape == exact.shape, f"{name}: {tuple(got.shape)}, not {tuple(exact.shape)}"
    assert got.dtype == same_precision.dtype, f"{name}: {got.dtype}, not {same_precision.dtype}"
    found, allowed = error(got, exact), times * error(same_precision, exact) + atol
    assert found <= allowed, f"{name}: error {found:.3g}, allowed {allowed:.3g}"


@dataclass(frozen=True)
class Compiled:
    """A kernel to compile ahead of time, with the types and constants of one specialisation."""

    name: str
    kernel: Any
    signature: dict[str, str]  # argument -> Triton type ("*bf16", "i32", "fp32", "constexpr")
    constants: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)  # num_warps, num_stages
    aligned: tuple[str, ...] = ()  # arguments known to be divisible by 16
    oldest: int = TARGETS[0]  # target that it compiles for


def compile_ahead(cases: Iterable[Compiled], targets: Iterable[int]) -> Iterable[dict[str, Any]]:
    """Compiles without a GPU; yields name, target, registers, threads, spilled bytes (stack) and memory on the chip."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for case in cases:
        names = list(case.signature)
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
        for target in (target for target in targets if target >= case.oldest):
            source = ASTSource(case.kernel, case.signature, case.constants, attributes)
            compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=case.options)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
                cubin.write(compiled.asm["cubin"])
                cubin.flush()
                command = [cuobjdump, "--dump-resource-usage", cubin.name]
                usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            registers, stack = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
            yield {
                "name": case.name, "target": target, "registers": registers, "stack": stack,
                "threads": 32 * compiled.metadata.num_warps, "shared": compiled.metadata.shared,
                "tensor_columns": getattr(compiled.metadata, "tmem_size", None) or 0,
            }  # fmt: skip


def beyond(row: dict[str, Any], target: int) -> list[str]:
    """What of a kernel, as `compile_ahead` describes it, a GPU of this capability cannot launch; [] if it can."""
    counts = {
        "bytes of shared memory": (row["shared"], SHARED[target]),
        "registers": (row["registers"] * row["threads"], REGISTERS),
        "columns of tensor memory": (row["tensor_columns"], TENSOR_COLUMNS),
    }
    return [
        f"{row['name']} on sm_{target}: {found} {what}; the chip has {most}"
        for what, (found, most) in counts.items()
        if found > most
    ]


def compiled_by(*command: str | Path, triton: Path | None = None) -> list[dict[str, Any]]:
    """The JSON lines that a script of tests/ prints, compiled by the installed Triton or by that of a folder."""
    tests = Path(__file__).parent
    path = os.pathsep.join(map(str, [*([triton] if triton else []), tests, tests.parent]))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, tests / command[0], *command[1:]], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def compiled_kernels(
    module: str, targets: Iterable[int] = TARGETS, which: str = "all", triton: Path | None = None
) -> list[dict[str, Any]]:
    """`compile_ahead` of `module`.AHEAD_OF_TIME, in a process of its own; every chip could launch what it is for.

    module: one, or several joined by commas. which: "all", or "one" for the first specialisation of each kernel.
    triton: see `compiled_by`.
    """
    rows = compiled_by("kernel_checks.py", module, which, *map(str, targets), triton=triton)
    chips = [(row, chip) for row in rows for chip in (row["target"], *ALIKE.get(row["target"], ()))]
    assert not [reason for row, chip in chips for reason in beyond(row, chip)]
    return rows


def assert_well_compiled(rows: Iterable[dict[str, Any]]) -> None:
    """What is compiled for Hopper neither spills nor waits for each of its matrix products."""
    for row in rows:
        assert row["stack"] == 0 and row["loads"] > 0, row
        assert row["shared"] <= SHARED[90], row
        assert row["products"] >= 4 * row["waits"], row  # where ptxas serialises them there is a wait for each


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent / "ops"))
    listed = [case for name in sys.argv[1].split(",") for case in importlib.import_module(name).AHEAD_OF_TIME]
    first = {id(case.kernel): case for case in reversed(listed)}
    cases = listed if sys.argv[2] == "all" else first.values()
    for row in compile_ahead(cases, [int(target) for target in sys.argv[3:]]):
        sys.stdout.write(json.dumps(row) + "\n")
