"""The doctor's lines, its exit codes, and that it breaks on what is broken."""

from __future__ import annotations

import ast
import json
import re
import sys
import types
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from tempact import diagnostics, doctor
from tempact.diagnostics import FAULT, NOTE, OK, PACKAGES, Finding, Package, package_version
from tempact.diagnostics import machine as checks

REPOSITORY = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TEMPACT_JUDGE_BASE_URL", "VLLM_BASE_URL", "LLM_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def test_a_healthy_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "runs" / "new"
    assert doctor.main(["--output", str(output), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(re.match(r"(ok   |note ) [a-z][\w, -]+: found .+; accepted: .+", line) for line in lines), lines
    names = [line[6:].split(":")[0] for line in lines]
    assert names[0] == "python" and set(PACKAGES) <= set(names)
    assert names[-7:] == ["gpu", "kernels", "kernels, self-test", "ffmpeg", "output folder", "disk", "judges"]
    assert not output.parent.exists() and list(tmp_path.iterdir()) == []


def test_what_is_missing_makes_exit_code_2_also_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--output", "/proc/runs", "--device", "cpu", "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    faults = {finding["name"]: finding for finding in report["findings"] if finding["status"] == FAULT}
    assert report["healthy"] is False and "not writable" in faults["output folder"]["found"]
    assert faults["output folder"]["todo"] and set(faults["output folder"]) == set(Finding.__dataclass_fields__)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_asked_for_must_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--output", str(tmp_path), "--device", "cuda"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith(FAULT)] == ["fault gpu"]


def test_wrong_options_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--jsn"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unrecognized arguments: --jsn; accepted:") and error.count("\n") == 1


# versions


def test_the_matched_table_is_that_of_the_installation() -> None:
    pinned = dict(re.findall(r"^([\w.-]+)==([^ ;\n]+)", (REPOSITORY / "constraints.txt").read_text(), re.M))
    texts = [
        node.value for node in ast.walk(ast.parse((REPOSITORY / "setup.py").read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]  # fmt: skip
    oldest = dict(match.groups() for text in texts if (match := re.match(r"([\w.-]+)>=([\d.]+)", text)))
    for name, package in PACKAGES.items():
        assert package.oldest == oldest[name], name
        assert package.tested == pinned.get(name, package.tested), name


@pytest.mark.parametrize(
    ("found", "extra", "status"),
    [
        ("2.11", "", OK), ("2.11.0+cu130", "", OK), ("2.9.1", "", FAULT), ("3.0.0a1", "", OK), (None, "", FAULT),
        (None, "wan", NOTE), ("2.10.9", "wan", FAULT),
    ],
)  # fmt: skip
def test_versions_are_compared_as_numbers(
    monkeypatch: pytest.MonkeyPatch, found: str | None, extra: str, status: str
) -> None:
    def version(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(diagnostics, "version", version)
    finding = package_version("torch", Package("2.11", "2.13.0", extra))
    assert finding.status == status and bool(finding.todo) == (status != OK)
    assert "2.11 or later (tested with 2.13.0)" in finding.line()


def test_without_torch_the_doctor_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = diagnostics.version

    def version(name: str) -> str:
        if name == "torch":
            raise PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(diagnostics, "version", version)
    monkeypatch.setitem(sys.modules, "tempact.diagnostics.machine", None)  # importing it would fail
    assert doctor.main([]) == 2
    assert "fault torch: found nothing; accepted: 2.11 or later" in capsys.readouterr().out


# kernels


def test_the_self_test_passes_and_breaks_with_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = checks.relative_errors(CPU, torch.float32)
    assert set(errors) == {"attention", "gradient of q", "gradient of k", "gradient of v", "norm"}
    assert max(errors.values()) < 1e-5
    good = checks.fork_attention

    def scaled(*args: object) -> torch.Tensor:
        return good(*args) * 1.01  # type: ignore[call-overload]

    def raising(*args: object) -> torch.Tensor:
        raise RuntimeError("no\nkernel image")

    cases: list[tuple[Callable[..., torch.Tensor], str]] = [(scaled, "an error of"), (raising, "no kernel image")]
    for broken, words in cases:
        monkeypatch.setattr(checks, "fork_attention", broken)
        finding = checks.self_test(CPU, torch.float32)
        assert finding.status == FAULT and words in finding.found and "CSRC_TRITON_BACKEND=torch" in finding.todo


def test_which_kernels_serve_and_why() -> None:
    from csrc_triton import runtime

    with runtime.backend("torch"):
        assert checks.serving(CPU, torch.float32) == ("torch", "")
        assert "forced by CSRC_TRITON_BACKEND" in next(checks.kernels(CPU)).found
    if not torch.cuda.is_available():
        with runtime.backend("triton"):  # interpreted here
            name, reason = checks.serving(CPU, torch.float32)
        assert name == "triton" and "accepted: an NVIDIA GPU of capability 9.0" in reason
        assert checks.serving(CPU, torch.float32)[0] == "torch"


@pytest.mark.gpu
def test_the_kernels_of_this_gpu_compute_what_the_formulas_do() -> None:
    device = torch.device("cuda")
    name, _ = checks.serving(device, torch.bfloat16)
    assert name in ("hopper", "triton") and checks.self_test(device, torch.bfloat16).status == OK
    assert checks.gpu(device).status == OK


# the rest of the machine


@pytest.mark.parametrize(
    ("environment", "status", "found"),
    [
        ({}, NOTE, "no address in the environment"),
        ({"TEMPACT_JUDGE_BASE_URL": " "}, NOTE, "no address"),
        ({"TEMPACT_JUDGE_BASE_URL": "http://user:secret@h:8000/secret?key=secret"}, OK, "BASE_URL http://h:8000"),
        ({"TEMPACT_JUDGE_VIDEO_BASE_URL": "https://a/v1,https://b/v1"}, OK, "https://a, TEMPACT_JUDGE_VIDEO_BASE_URL"),
        ({"VLLM_BASE_URL": "http://h:x"}, FAULT, "VLLM_BASE_URL which is no address"),
        ({"LLM_BASE_URL": "secret", "TEMPACT_JUDGE_API_KEY": "secret"}, FAULT, "LLM_BASE_URL which is no address"),
    ],
)
def test_addresses_of_judges_are_shown_without_secrets(environment: dict[str, str], status: str, found: str) -> None:
    finding = checks.judges(environment)
    assert finding.status == status and found in finding.found and "secret" not in finding.line()


def test_a_video_writer_that_is_missing_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.video_writer().status == OK
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    finding = checks.video_writer()
    assert finding.status == FAULT and "IMAGEIO_FFMPEG_EXE" in finding.todo


@pytest.mark.parametrize(("free_gib", "status"), [(1, FAULT), (10, NOTE), (100, OK)])
def test_room_on_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free_gib: int, status: str) -> None:
    usage = types.SimpleNamespace(free=free_gib * checks.GIB)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage)
    assert [finding.status for finding in checks.output_folder(tmp_path / "a" / "b")] == [OK, status]
