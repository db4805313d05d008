"""The specialisations of the Hopper kernels of fork attention that are compiled ahead of time, without a GPU.

`python tests/ops/ahead_hopper.py` prints one JSON line a kernel: registers, spilled bytes (stack), shared memory, and
what its machine code has of matrix instructions, waits for them and loads by the tensor memory accelerator. With
`everything` it compiles all contexts, precisions and head sizes; with `one`, the listed ones that are split into parts.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from csrc_triton.fork_attention.hopper import backward, dkv, forward
from csrc_triton.fork_attention.hopper._gluon import LAUNCH

KERNELS = {
    "forward": (forward.forward_kernel, forward.KEYS.value),
    "query gradient": (backward.query_gradient_kernel, backward.KEYS.value),
    "key gradient": (dkv.key_gradient_kernel, dkv.KEYS.value),
}
OF_KEYS = ("k", "v", "past_k", "past_v")
OF_QUERIES = ("q", "grad", "out", "grad_q")
OF_GRADIENTS = ("grad_k", "grad_v")
POINTERS = {"table": "*i32"} | dict.fromkeys(("lse", "sums", "tops", "k_sums", "v_sums"), "*fp32")
FLOATS = ("scale", "softmax_scale")
FOUND = {"products": r"\bHGMMA\b", "waits": r"\bWARPGROUP\.DEPBAR", "loads": r"\bUTMALDG\b"}


def layout(bits: int, rank: int) -> str:
    return repr(gl.NVMMASharedLayout(swizzle_byte_width=128 if rank > 1 else 0, element_bitwidth=bits, rank=rank))


def compiled(name: str, dtype: str, head_dim: int, past: int, split: bool, group: int) -> Any:
    kernel, keys = KERNELS[name]
    chosen = {"PAST": past, "SPLIT": split, "GROUP": group, "TURNS": forward.TURNS}
    chosen |= {"STAGES": forward.STAGES[head_dim], "ASSEMBLY": forward.ASSEMBLY[head_dim]}
    constants = {n: v for n, v in chosen.items() if n in kernel.arg_names}
    signature = {}
    for argument in kernel.arg_names:
        if argument in (*OF_KEYS, *OF_QUERIES, *OF_GRADIENTS):
            rows = forward.QUERIES.value if argument in OF_QUERIES else keys
            signature[argument] = f"tensordesc<{dtype}[1,1,{rows},{head_dim}],{layout(16, 4)}>"
        elif argument == "vectors" and name == "key gradient":
            signature[argument] = f"tensordesc<fp32[{dkv.QUERIES.value}],{layout(32, 1)}>"
        elif argument in constants:
            signature[argument] = "constexpr"
        else:
            signature[argument] = POINTERS.get(argument, "fp32" if argument in FLOATS else "i32")
    if signature.get("vectors") == "i32":
        signature["vectors"] = "*fp32"
    aligned = {(i,): [["tt.divisibility", 16]] for i, type_ in enumerate(signature.values()) if type_[0] == "*"}
    source = GluonASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=LAUNCH)


def described(name: str, dtype: str, head_dim: int, past: int, split: bool, group: int = 1) -> dict[str, Any]:
    made = compiled(name, dtype, head_dim, past, split, group)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.asm["cubin"])
        cubin.flush()
        commands = [[tools / "cuobjdump", "--dump-resource-usage"], [tools / "nvdisasm", "-c"]]
        usage, code = (
            subprocess.run([*command, cubin.name], capture_output=True, text=True, check=True).stdout
            for command in commands
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return {
        "name": f"{name}, {dtype}, {head_dim}, past {past}, {'split' if split else 'whole'}, group {group}",
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": made.metadata.shared,
        **{what: len(re.findall(pattern, code)) for what, pattern in FOUND.items()},
    }


LISTED = [
    ("forward", "bf16", 128, 2, False, 1),
    ("forward", "bf16", 128, 2, True, 4),
    ("forward", "fp16", 64, 1, False, 1),
    ("query gradient", "bf16", 128, 2, False, 1),
    ("query gradient", "bf16", 128, 2, True, 4),
    ("query gradient", "fp16", 64, 1, False, 1),
    ("key gradient", "bf16", 128, 0, False, 1),
    ("key gradient", "bf16", 128, 0, True, 4),
]


def everything() -> Iterator[tuple[str, str, int, int, bool, int]]:
    for name in KERNELS:
        for dtype in ("bf16", "fp16"):
            for head_dim in (64, 128):
                for past in (0,) if name == "key gradient" else (0, 1, 2):
                    for split in (False, True):
                        for group in (1, 4):
                            yield name, dtype, head_dim, past, split, group


if __name__ == "__main__":
    which = {"everything": everything(), "one": [case for case in LISTED if case[4]]}
    for case in which.get(sys.argv[-1], LISTED):
        sys.stdout.write(json.dumps(described(*case)) + "\n")
