"""`python -m csrc_triton [--dtype DTYPE] [--head-dim N] [--device DEVICE]`: versions, the GPU, and which implementation
serves a call of each op, and why no faster one does."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from csrc_triton import (
    adaln,
    decode_attention,
    enlarge,
    flow_policy_loss,
    flow_policy_loss_and_grad,
    flow_sde_step,
    fork_attention,
    fp8_linear,
    fp8_rows,
    gated_residual,
    gated_residual_adaln,
    gated_residual_norm,
    norm_silu,
    qk_norm_rope,
    runtime,
)
from csrc_triton.fp8_linear import why_plain

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
B, FRAMES, TOKENS, HEADS = 1, 2, 32, 2  # of the calls that are asked about; L = FRAMES * TOKENS


class Served(NamedTuple):
    """Which implementation serves an op, and why no faster one does; empty where there is none."""

    op: str
    by: str
    reason: str


def calls(device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, Callable[[], object]]:
    """A call of each op, on tensors of the current mode."""
    dim, length = HEADS * head_dim, FRAMES * TOKENS

    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    x, chunk, vectors, weight = make(B, length, dim), make(B, length, HEADS, head_dim), make(B, FRAMES, dim), make(dim)
    angles = make(length, head_dim // 2, dtype=torch.float32)
    rope = None if head_dim % 2 else (angles, angles)
    advantage = make(B, dtype=torch.float32)
    token, keys = make(B, HEADS, head_dim), make(B, HEADS, TOKENS, head_dim)
    return {
        "fork_attention": lambda: fork_attention(chunk, chunk, chunk),
        "qk_norm_rope": lambda: qk_norm_rope(x, x, weight, weight, rope, heads=HEADS, eps=1e-6),
        "adaln": lambda: adaln(x, vectors, vectors, eps=1e-6),
        "gated_residual": lambda: gated_residual(x, x, vectors),
        "gated_residual_adaln": lambda: gated_residual_adaln(x, x, vectors, vectors, vectors, eps=1e-6),
        "gated_residual_norm": lambda: gated_residual_norm(x, x, vectors, weight, weight, eps=1e-6),
        "flow_sde_step": lambda: flow_sde_step(x, x, x, 0.9, 0.5),
        "flow_policy_loss": lambda: flow_policy_loss(x, x, None, x, advantage, clip=0.1),
        "flow_policy_loss_and_grad": lambda: flow_policy_loss_and_grad(x, make(*x.shape), None, x, advantage, clip=0.1),
        "norm_silu": lambda: norm_silu(x, weight, out=make(*x.shape)),
        "enlarge": lambda: enlarge(x[:, None].contiguous()),
        "decode_attention": lambda: decode_attention(token, keys, keys, make(B, dtype=torch.int64)),
        "fp8_rows": lambda: fp8_rows(x),
        "fp8_linear": lambda: fp8_linear(x, fp8_rows(make(dim, dim)), weight),
    }


def serving(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[Served]:
    """What serves each op under the backend in force. Nothing is computed: the calls get fake tensors."""
    found = []
    with FakeTensorMode(), torch.no_grad():
        for op, call in calls(device, dtype, head_dim).items():
            forced = runtime.get_backend()
            refused = _refusal(call) if forced != "auto" else None
            reason = _why_no_kernel(call)
            if refused is not None:
                found.append(_none(op, forced, _cause(refused)))
            elif forced == "torch":
                found.append(Served(op, "torch", "the backend torch is forced"))
            elif reason is not None or (forced == "auto" and device.type != "cuda"):
                found.append(Served(op, "torch", reason or "the interpreter serves where it is forced"))
            elif op == "fork_attention":
                found.append(_attention(op, device, dtype, head_dim))
            elif op == "fp8_linear":
                plain = why_plain(device, dtype, HEADS * head_dim, HEADS * head_dim)
                found.append(Served(op, "torch", "cuBLAS's product of float8 rows" if plain is None else plain))
            else:
                found.append(Served(op, "triton", ""))
    return found


def _attention(op: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Served:
    from csrc_triton.fork_attention import selection

    forced = runtime.get_backend()
    reason = selection.why_not_hopper(device, dtype, head_dim)
    if reason is None and forced != "triton":
        return Served(op, "hopper", "")
    if forced == "hopper":
        return _none(op, forced, str(reason))
    return Served(op, "triton", reason or "the backend triton is forced")


def _why_no_kernel(call: Callable[[], object]) -> str | None:
    """The op's own reason why no kernel can serve; None where one can."""
    with runtime.backend("triton"):
        refusal = _refusal(call)
    return None if refusal is None else _cause(refusal)


def _cause(refusal: str) -> str:
    return refusal.rpartition("cannot serve: ")[2]


def _none(op: str, forced: str, reason: str) -> Served:
    return Served(op, "none: an error", f"{forced} is forced, and does not serve {reason}")


def _refusal(call: Callable[[], object]) -> str | None:
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def machine() -> list[tuple[str, str]]:
    """Versions, the GPUs and the backend."""
    rows = [
        ("csrc_triton", f"{_version('csrc-triton')}: {os.path.dirname(os.path.abspath(__file__))}"),
        ("Python", platform.python_version()),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or torch.version.hip or 'none'}"),
        ("Triton", _version("triton")),
    ]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        size = f"{gpu.multi_processor_count} multiprocessors, {gpu.total_memory / 2**30:.1f} GiB"
        rows.append((f"GPU {index}", f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {size}"))
    if not torch.cuda.is_available():
        rows.append(("GPU", "none that torch sees"))
    named = os.environ.get(runtime.ENVIRONMENT_VARIABLE)
    rows.append(("backend", f"{runtime.get_backend()} ({runtime.ENVIRONMENT_VARIABLE} is {named or 'not set'})"))
    return rows


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of equal width, a line a row."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "".join(f"{line.rstrip()}\n" for line in padded)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m csrc_triton", description=__doc__)
    made.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of the tensors (bfloat16)")
    made.add_argument("--head-dim", type=int, default=128, metavar="N", help="channels of an attention head (128)")
    devices = ("cpu", "cuda")
    made.add_argument("--device", choices=devices, help="where the tensors are (cuda, where there is a GPU)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.head_dim < 1:
        parser().error(f"argument --head-dim: found {arguments.head_dim}; accepted: at least 1")
    if device == "cuda" and not torch.cuda.is_available():
        parser().error("argument --device: found cuda, and no GPU that torch sees; accepted: cpu")
    rows = serving(torch.device(device), DTYPES[arguments.dtype], arguments.head_dim)
    sys.stdout.write(table(("", ""), machine()).lstrip("\n"))
    sys.stdout.write(f"\n{arguments.dtype} tensors on {device}, heads of {arguments.head_dim}:\n\n")
    sys.stdout.write(table(("op", "served by", "why not by a faster one"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
