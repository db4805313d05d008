"""`python -m csrc_triton`: which implementation serves a call, and why."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from op_samples import CALLS, registered

import csrc_triton
from csrc_triton import __main__ as command
from csrc_triton import runtime

CPU = torch.device("cpu")


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """A GPU of the given capability, as far as the choice between the kernels of attention asks for one."""
    from csrc_triton.fork_attention import selection

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: request.param)
    selection.why_not_hopper.cache_clear()
    yield
    selection.why_not_hopper.cache_clear()


def served(dtype: torch.dtype, head_dim: int) -> dict[str, tuple[str, str]]:
    return {row.op: (row.by, row.reason) for row in command.serving(CPU, dtype, head_dim)}


def attention(dtype: torch.dtype = torch.bfloat16) -> tuple[str, str]:
    return command._attention("fork_attention", torch.device("cuda", 0), dtype, 128)[1:]


@pytest.mark.parametrize("capability", [(9, 0)], indirect=True)
def test_on_hopper_its_own_kernels_serve_attention(capability: None) -> None:
    assert attention() == ("hopper", "")
    assert attention(torch.float32) == ("triton", "torch.float32 tensors; accepted: bfloat16, float16")
    with runtime.backend("triton"):
        assert attention() == ("triton", "the backend triton is forced")


@pytest.mark.parametrize("capability", [(8, 0)], indirect=True)
def test_on_other_gpus_the_portable_kernels_serve_attention(capability: None) -> None:
    assert attention() == ("triton", "a GPU of capability 8.0; accepted: 9.0")
    with runtime.backend("hopper"):
        assert attention() == (
            "none: an error", "hopper is forced, and does not serve a GPU of capability 8.0; accepted: 9.0"
        )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter stands in where there is no GPU")
def test_a_reason_is_the_ops_own() -> None:
    found = served(torch.bfloat16, 36)
    assert found["fork_attention"][0] == "torch" and "head_dim 36; accepted:" in found["fork_attention"][1]
    assert found["qk_norm_rope"] == ("torch", "heads of 36 channels; accepted: a power of two in [2, 256]")
    assert found["decode_attention"][1].startswith("heads of 36; accepted: 16,")
    assert found["adaln"] == ("torch", "the interpreter serves where it is forced")
    with runtime.backend("triton"):
        found = served(torch.bfloat16, 36)
        assert found["decode_attention"][0] == "none: an error" and found["adaln"] == ("triton", "")
        assert found["decode_attention"][1].startswith("triton is forced, and does not serve heads of 36; accepted: 16")
        found = served(torch.bfloat16, 64)
        assert found.pop("fp8_linear") == ("torch", "tensors on cpu; accepted: NVIDIA GPUs from sm_90")
        assert set(found.values()) == {("triton", ""), attention_here()}
    with runtime.backend("torch"):
        assert set(served(torch.bfloat16, 64).values()) == {("torch", "the backend torch is forced")}
    reason = "torch.float64 tensors; accepted: float32, bfloat16, float16"
    assert served(torch.float64, 64)["enlarge"] == ("torch", reason)


def attention_here() -> tuple[str, str]:
    return "triton", "tensors on cpu; accepted: an NVIDIA GPU of capability 9.0"


def test_every_op_has_its_line() -> None:
    public = {name.partition(" ")[0] for name in CALLS}
    assert {row.op for row in command.serving(CPU, torch.float32, 7)} == public
    assert public <= set(csrc_triton.__all__)
    own = {name.removesuffix("_backward").removesuffix("_write") for name in registered()}
    assert own <= public


def test_columns_are_as_wide_as_their_cells() -> None:
    assert command.table(("a", "b"), [("long", "1"), ("x", "")]) == "a     b\nlong  1\nx\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_the_command_says_versions_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--dtype", "float32", "--head-dim", "64"]) == 0
    out = capsys.readouterr().out
    for line in (f"torch        {torch.__version__}, CUDA none\n", "GPU          none that torch sees\n"):
        assert line in out
    assert "\nfloat32 tensors on cpu, heads of 64:\n" in out
    assert "\nfork_attention             torch      the interpreter serves where it is forced\n" in out
    for arguments, accepted in ((["--head-dim", "0"], "accepted: at least 1"), (["--device", "cuda"], "accepted: cpu")):
        with pytest.raises(SystemExit) as stopped:
            command.main(arguments)
        assert stopped.value.code == 2 and accepted in capsys.readouterr().err


def test_the_command_runs_as_a_module() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CSRC_TRITON_BACKEND": "triton"}
    command = [sys.executable, "-m", "csrc_triton", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "backend      triton (CSRC_TRITON_BACKEND is triton)\n" in done.stdout
    assert "\nadaln                      triton\n" in done.stdout
