"""Checks of a machine beside its packages: GPU, kernels, video writer, disk, judges' addresses."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import Tensor

from csrc_triton import adaln, fork_attention, runtime
from csrc_triton.adaln import naive as adaln_naive
from csrc_triton.fork_attention import naive as attention_naive
from tempact.diagnostics import FAULT, NOTE, OK, Finding

GIB = 2**30
LEAST_DISK = 2 * GIB  # of a ShapeWorld run with its videos
WAN_DISK = 40 * GIB  # of a run at full size: three checkpoints with their states, and videos


def device_of(name: str) -> torch.device:
    """The device that a run with `--device name` would ask for: auto, cpu or cuda."""
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def gpu(device: torch.device) -> Finding:
    """The GPU of a run, or why there is none."""
    accepted = f"an NVIDIA GPU of sm_{''.join(map(str, runtime.OLDEST_CAPABILITY))} or newer; none for ShapeWorld"
    if device.type != "cuda" or not torch.cuda.is_available():
        todo = "backbones need one: check nvidia-smi, and that this torch is built for CUDA"
        return Finding("gpu", FAULT if device.type == "cuda" else NOTE, "none that torch sees", accepted, todo)
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    found = f"{properties.name}, {properties.total_memory / GIB:.1f} GiB, capability {capability}"
    found += f", CUDA {torch.version.cuda}"
    if (properties.major, properties.minor) < runtime.OLDEST_CAPABILITY:
        return Finding("gpu", NOTE, found, accepted, "the torch path serves, slower")
    return Finding("gpu", OK, found, accepted)


def kernels(device: torch.device) -> Iterator[Finding]:
    """The backend of csrc_triton's ops and the reason for it, then its self-test."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    accepted = "hopper (capability 9.0), triton (sm_80 and newer), torch (everywhere)"
    name, reason = serving(device, dtype)
    forced = runtime.get_backend()
    why = f"forced by {runtime.ENVIRONMENT_VARIABLE}" if forced != "auto" else reason
    yield Finding("kernels", OK, f"{name}: {why}" if why else name, accepted)
    yield self_test(device, dtype)


def serving(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend of fork attention with heads of 128 channels, and the reason why no faster one serves."""
    if runtime.get_backend() == "torch":
        return "torch", ""
    reason = runtime.why_not_triton(device, dtype)
    if reason is not None or (device.type != "cuda" and runtime.get_backend() == "auto"):
        return "torch", reason or "the interpreter is for tests"
    from csrc_triton.fork_attention import selection

    reason = selection.why_not_hopper(device, dtype, SELF_TEST_HEAD)
    hopper = reason is None and runtime.get_backend() != "triton"
    return ("hopper", "") if hopper else ("triton", reason or "")


SELF_TEST_HEAD = 128
SELF_TEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the largest number of the result


def self_test(device: torch.device, dtype: torch.dtype) -> Finding:
    """Compares fork attention, its gradients and the modulated norm with the fp32 formulas, on a few tokens."""
    name, accepted = "kernels, self-test", f"results within {SELF_TEST_ERROR[dtype]:g} of the formulas"
    try:
        worst = max(relative_errors(device, dtype).items(), key=lambda item: item[1])
    except Exception as error:  # noqa: BLE001  whatever a broken installation raises is the finding
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        todo = f"install the tested torch and triton, or set {runtime.ENVIRONMENT_VARIABLE}=torch"
        return Finding(name, FAULT, found, accepted, todo)
    found = f"an error of {worst[1]:.1e} in {worst[0]}"
    if worst[1] <= SELF_TEST_ERROR[dtype]:
        return Finding(name, OK, found, accepted)
    return Finding(name, FAULT, found, accepted, f"set {runtime.ENVIRONMENT_VARIABLE}=torch and report this line")


def relative_errors(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """For each output, its largest difference from the fp32 formula over the formula's largest number."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    own = [draw(2, 96, 2, SELF_TEST_HEAD).requires_grad_() for _ in range(3)]
    past = draw(1, 64, 2, SELF_TEST_HEAD), draw(1, 64, 2, SELF_TEST_HEAD)
    x, shift, scale = draw(2, 96, 256), draw(2, 3, 256), draw(2, 3, 256)
    exact = [tensor.detach().float().requires_grad_() for tensor in own]
    k, v = (tensor.float() for tensor in past)
    weight = draw(*own[0].shape)
    out = fork_attention(own[0], own[1], own[2], past)
    wanted = attention_naive.fork_attention(exact[0], exact[1], exact[2], (k, v), SELF_TEST_HEAD**-0.5)[0]
    pairs = {"attention": (out, wanted)}
    gradients = (
        torch.autograd.grad((y * weight.to(y.dtype)).sum(), of) for y, of in ((out, own), (wanted, exact))
    )  # fmt: skip
    names = ("gradient of q", "gradient of k", "gradient of v")
    pairs |= dict(zip(names, zip(*gradients, strict=True), strict=True))
    normed = adaln_naive.adaln(x.float(), shift.float(), scale.float(), 1e-6)
    pairs["norm"] = (adaln(x, shift, scale, eps=1e-6), normed)
    return {
        name: float((found.detach().float() - right.detach()).abs().max() / right.detach().abs().max())
        for name, (found, right) in pairs.items()
    }


def video_writer() -> Finding:
    """Writes a short mp4 with imageio's ffmpeg."""
    accepted = "an ffmpeg with H.264 that imageio-ffmpeg finds"
    todo = "pip install imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE to an ffmpeg with libx264"
    try:
        import imageio_ffmpeg

        from tempact.video import save_mp4

        program = imageio_ffmpeg.get_ffmpeg_exe()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "test.mp4"
            save_mp4(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), path)
            size = path.stat().st_size
    except (ImportError, OSError, RuntimeError) as error:
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Finding("ffmpeg", FAULT, found, accepted, todo)
    found = f"{imageio_ffmpeg.get_ffmpeg_version()} at {program}, a test video of {size} bytes"
    return Finding("ffmpeg", OK if size else FAULT, found, accepted, "" if size else todo)


def output_folder(folder: Path) -> Iterator[Finding]:
    """Write access to a folder, and free space on its disk. Leaves nothing there."""
    reason = why_not_writable(folder)
    found = f"{folder}, {'writable' if reason is None else f'not writable ({reason})'}"
    todo = "" if reason is None else "name another with --output, here and in runs"
    yield Finding("output folder", OK if reason is None else FAULT, found, "a writable folder", todo)
    free = shutil.disk_usage(existing(folder)).free
    accepted = f"{LEAST_DISK / GIB:g} GiB, {WAN_DISK / GIB:g} GiB for runs of backbones"
    status = FAULT if free < LEAST_DISK else NOTE if free < WAN_DISK else OK
    yield Finding("disk", status, f"{free / GIB:.1f} GiB free", accepted, "" if status == OK else "free some space")


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return there


def why_not_writable(folder: Path) -> str | None:
    """The reason why a folder, which need not exist yet, cannot be written to; None if it can. Leaves nothing there."""
    try:
        with tempfile.TemporaryFile(dir=existing(folder)):
            return None
    except OSError as error:
        return error.strerror or str(error)


JUDGE_PREFIXES = ("TEMPACT_JUDGE_", "VLLM_", "LLM_")  # the authors' names are fallbacks
ADDRESS = "BASE_URL"


def judges(environment: Mapping[str, str] = os.environ) -> Finding:
    """Addresses of judges in the environment, of all roles. Servers are not asked, keys are not shown."""
    accepted = f"{JUDGE_PREFIXES[0]}{ADDRESS}, http(s), also per role; ShapeWorld needs none"
    names = sorted(
        name for name, value in environment.items()
        if name.startswith(JUDGE_PREFIXES) and name.endswith(ADDRESS) and value.strip()
    )  # fmt: skip
    if not names:
        todo = "training on real video needs them (docs/judges.md)"
        return Finding("judges", NOTE, "no address in the environment", accepted, todo)
    found, wrong = [], []
    for name in names:
        for address in environment[name].split(","):
            shown = _endpoint(address.strip())
            found.append(f"{name} {shown or 'which is no address'}")
            wrong += [] if shown else [name]
    if wrong:
        return Finding("judges", FAULT, ", ".join(found), accepted, f"correct {', '.join(dict.fromkeys(wrong))}")
    return Finding("judges", OK, ", ".join(found), accepted, "python -m tempact.doctor judges asks them")


def _endpoint(address: str) -> str:
    """Scheme, host and port of an address, without user, path and query, which may hold a key; "" for no address."""
    try:
        parts = urlsplit(address)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return ""
    return f"{parts.scheme}://{parts.hostname}{port}" if parts.scheme in ("http", "https") and parts.hostname else ""


def machine_findings(device: torch.device, output: Path) -> list[Finding]:
    """All checks of this module. Kernels are tried on the CPU where there is no GPU."""
    there = device if torch.cuda.is_available() else torch.device("cpu")
    return [gpu(device), *kernels(there), video_writer(), *output_folder(output), judges()]
