"""The specialisations of the fork attention kernels that are compiled ahead of time: see kernel_checks.

`python tests/ops/ahead_fork_attention.py` compiles those for Hopper and prints one JSON line a kernel, with the matrix
instructions, the waits for them and the loads by the tensor memory accelerator that its machine code has. With
`everything` it compiles all kernels in every precision and head size, each for the capability that its tiling is for.
With `portable` it compiles some of the kernels without descriptors for sm_80, sm_90 and sm_120, with `portable all`
all of them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from kernel_checks import Compiled, compile_ahead

from csrc_triton.fork_attention import tiles
from csrc_triton.fork_attention.portable import backward, dkv, forward

SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
HEAD_DIMS = (32, 64, 80, 128, 256)
TABLES = {"forward": tiles.FORWARD, "query gradient": tiles.QUERY_GRADIENT, "key gradient": tiles.KEY_GRADIENT}
KERNELS = {
    "forward": forward.forward_kernel,
    "query gradient": backward.query_gradient_kernel,
    "key gradient": dkv.key_gradient_kernel,
}
TILED = {"q": "queries", "grad": "queries", "k": "keys", "v": "keys", "past_k": "keys", "past_v": "keys"}
RESULTS = ("out", "grad_q", "grad_k", "grad_v")
FIXED = {
    "table": "*i32",
    "indices": "*i32",
    "lse": "*fp32",
    "delta": "*fp32",
    "grad_lse": "*fp32",
    "scale": "fp32",
    "softmax_scale": "fp32",
}
UNALIGNED = ("heads", "length", "own", "branches", "share", "past_size", "block", "table_by_slot")
SWITCHES = {"GROUP": 1, "INDEXED": False, "CAUSAL": False, "BLIND": False}


def case(kernel: str, major: int, dtype: str, head_dim: int, past: int = 2, **switches: Any) -> Compiled:
    """One kernel as it runs on aligned tensors; past: 0 no context, 1 a pair of tensors, 2 segments in a cache."""
    tiling = tiles.tiling_of(TABLES[kernel], major, head_dim, SIZES[dtype])
    values: dict[str, Any] = {
        "PAST": past, "SLOTS": 16 if past == 2 else 1, "QUERIES": tiling.queries, "KEYS": tiling.keys,
        "WIDTH": tiles.width_of(head_dim), "HEAD": head_dim, "DESCRIPTORS": tiling.descriptors, **SWITCHES, **switches,
    }  # fmt: skip
    names = KERNELS[kernel].arg_names
    signature = {}
    for name in names:
        if name in TILED and tiling.descriptors:
            signature[name] = f"tensordesc<{dtype}[1,1,{getattr(tiling, TILED[name])},{head_dim}]>"
        elif name in TILED or name in RESULTS:
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "constexpr" if name in values else FIXED.get(name, "i32")
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    constants = {name: value for name, value in values.items() if name in names}
    name = ", ".join([kernel, f"sm_{major}0", dtype, str(head_dim), f"past {past}", *map(str.lower, switches)])
    return Compiled(name, KERNELS[kernel], signature, constants, options, _aligned(signature))


def delta(dtype: str, head_dim: int) -> Compiled:
    width = tiles.width_of(head_dim)
    constants = {"ROWS": backward.DELTA_ROWS, "WIDTH": width, "HEAD": head_dim, "GRAD_LSE": True}
    kernel = backward.delta_kernel
    signature = {name: "constexpr" if name in constants else FIXED.get(name, "i32") for name in kernel.arg_names}
    signature |= {"out": f"*{dtype}", "grad": f"*{dtype}"}
    return Compiled(f"delta, sm_80, {dtype}, {head_dim}", kernel, signature, constants, {}, _aligned(signature))


def _aligned(signature: dict[str, str]) -> tuple[str, ...]:
    return tuple(n for n, type_ in signature.items() if type_[0] == "*" or (type_ == "i32" and n not in UNALIGNED))


VARIANTS: tuple[dict[str, Any], ...] = (
    {"GROUP": 4},
    {"INDEXED": True, "past": 1},
    {"CAUSAL": True},
    {"GROUP": 4, "CAUSAL": True, "BLIND": True},
)
AHEAD_OF_TIME = [
    *(case(kernel, 8, dtype, size) for kernel in KERNELS for dtype, size in (("bf16", 128), ("fp32", 32))),
    delta("bf16", 128),
]
HOPPER = [
    *(case(kernel, 9, "bf16", 128, past) for kernel in ("forward", "query gradient") for past in (0, 1, 2)),
    case("key gradient", 9, "bf16", 128),
    case("forward", 9, "fp16", 64),
]
EVERYTHING = [
    *(case(k, m, dtype, size) for k in KERNELS for m in (8, 9) for dtype in SIZES for size in HEAD_DIMS),
    *(case(k, 8, "bf16", 96, **each) for k in KERNELS for each in VARIANTS),
    *(delta(dtype, size) for dtype in SIZES for size in HEAD_DIMS),
]


def portable(kernel: str, target: int, dtype: str, head_dim: int, **switches: Any) -> tuple[Compiled, int]:
    """A kernel with the tiles that a GPU without descriptors has, or Hopper where a tensor cannot have one."""
    return case(kernel, tiles.SM_120 if target == 120 else tiles.PLAIN, dtype, head_dim, **switches), target


PORTABLE = [
    portable("query gradient", 80, "fp32", 128),
    portable("key gradient", 120, "fp32", 128),
    portable("query gradient", 120, "bf16", 128),
    portable("key gradient", 80, "bf16", 160, GROUP=4, CAUSAL=True),
    portable("forward", 80, "bf16", 80, GROUP=4, CAUSAL=True, BLIND=True, INDEXED=True, past=1),
]
ALL_PORTABLE = [
    *(portable(k, t, d, n) for k in KERNELS for t in (80, 90, 120) for d in ("bf16", "fp32") for n in tiles.WIDTHS),
    *(portable(k, t, "bf16", 80, **each) for k in KERNELS for t in (80, 120) for each in VARIANTS),
]


def machine_code(of: Compiled, target: int) -> str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(of.signature)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in of.aligned}
    source = ASTSource(of.kernel, of.signature, of.constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=of.options)
    nvdisasm = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        return subprocess.run([nvdisasm, "-c", cubin.name], capture_output=True, text=True, check=True).stdout


def main(options: list[str]) -> None:
    if "portable" in options:
        for of, target in ALL_PORTABLE if "all" in options else PORTABLE:
            sys.stdout.write(json.dumps(next(iter(compile_ahead([of], [target])))) + "\n")
        return
    for of in EVERYTHING if "everything" in options else HOPPER:
        target = 90 if "sm_90" in of.name else 80
        row = next(iter(compile_ahead([of], [target])))
        if "everything" not in options:
            code = machine_code(of, target)
            found = {"products": r"\bHGMMA\b", "waits": r"\bWARPGROUP\.DEPBAR", "loads": r"\bUTMALDG\b"}
            row |= {name: len(re.findall(pattern, code)) for name, pattern in found.items()}
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
