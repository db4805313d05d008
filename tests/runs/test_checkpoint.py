"""Checkpoints: exact, whole or not there, never silently wrong."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tempact.config import ExecutorConfig, LoraConfig, OptimConfig, PlannerConfig, RunConfig
from tempact.errors import UserError
from tempact.runs import checkpoint as module
from tempact.runs.checkpoint import (
    CorruptCheckpoint,
    capture_rng,
    check_config,
    defect,
    latest,
    recover,
    resolve_resume,
    restore_rng,
    save,
    verify,
)

LORA, OPTIM = LoraConfig(2, 4, ("q",)), OptimConfig(1e-3)
CONFIG = RunConfig("tiny", PlannerConfig("shapeworld", LORA, OPTIM), ExecutorConfig("shapeworld", LORA, OPTIM))


def adapter(value: float):
    def write(folder: Path) -> None:
        (folder / "adapter_config.json").write_text('{"r": 2}')
        save_file({"lora_A": torch.full((4, 4), value)}, folder / "adapter_model.safetensors")

    return write


def store(run: Path, step: int, keep: int = 5, **writers) -> Path:
    state = {"done": step, "moment": torch.full((3,), step / 7)}
    return save(run, step, {"planner": adapter(step), "executor": adapter(-step)} | writers, state, CONFIG, keep)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = store(tmp_path, 40)
    assert path == tmp_path / "checkpoints" / "step-000040" and latest(tmp_path).path == path
    loaded = verify(path)
    assert loaded.step == 40 and loaded.state["done"] == 40
    assert torch.equal(loaded.state["moment"], torch.full((3,), 40 / 7))
    assert load_file(loaded.planner_dir / "adapter_model.safetensors")["lora_A"][0, 0] == 40
    assert load_file(loaded.executor_dir / "adapter_model.safetensors")["lora_A"][0, 0] == -40
    files = json.loads((path / "COMPLETE").read_text())["files"]
    present = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} - {"COMPLETE"}
    assert files.keys() == present and len(present) == 7


def test_an_optimiser_goes_on_exactly(tmp_path: Path) -> None:
    def steps(weight: torch.Tensor, optimiser: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            weight.grad = torch.randn(5) + random.random() + torch.from_numpy(np.random.rand(5)).float()
            optimiser.step()

    torch.manual_seed(0)
    weight = torch.zeros(5, requires_grad=True)
    optimiser = torch.optim.AdamW([weight], lr=0.1)
    steps(weight, optimiser, 3)
    state = {"optimiser": optimiser.state_dict(), "weight": weight.detach().clone()}
    path = save(tmp_path, 3, {"planner": adapter(0), "executor": adapter(0)}, state, CONFIG, 1)
    steps(weight, optimiser, 3)
    random.seed(9), np.random.seed(9), torch.manual_seed(9)

    loaded = verify(path)
    resumed = loaded.state["weight"].requires_grad_()
    optimiser = torch.optim.AdamW([resumed], lr=0.5)
    optimiser.load_state_dict(loaded.state["optimiser"])
    restore_rng(loaded.rng)
    steps(resumed, optimiser, 3)
    assert torch.equal(resumed, weight)


def test_generators_come_back_mid_stream() -> None:
    random.gauss(0, 1), np.random.standard_normal()  # both keep half of a pair
    state = capture_rng()
    first = (random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.rand(), torch.rand(3).tolist())
    restore_rng(state)
    second = (
        random.gauss(0, 1),
        random.random(),
        np.random.standard_normal(),
        np.random.rand(),
        torch.rand(3).tolist(),
    )
    assert first == second


@pytest.mark.parametrize("file", ["planner/adapter_model.safetensors", "executor/adapter_config.json", "state/state.pt",
                                  "state/rng.pt", "state/config.json", "COMPLETE"])  # fmt: skip
@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "gone"])
def test_damage_is_found_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, harm: str
) -> None:
    good, bad = store(tmp_path, 20), store(tmp_path, 40)
    victim = bad / file
    content = bytearray(victim.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 4
    victim.write_bytes({"flip": content, "cut": content[:-3], "empty": b"", "gone": b""}[harm])
    if harm == "gone":
        victim.unlink()
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path).path == good
    assert "passed over: " in caplog.text and "step-000040: " in caplog.text
    with pytest.raises(CorruptCheckpoint, match="step-000040"):
        verify(bad)


def test_names_that_lead_out_of_the_checkpoint_are_refused(tmp_path: Path) -> None:
    path = store(tmp_path, 20)
    manifest = json.loads((path / "COMPLETE").read_text())
    for name in ("../outside", str(tmp_path / "outside")):
        (path / "COMPLETE").write_text(
            json.dumps(manifest | {"files": manifest["files"] | {name: {"bytes": 0, "sha256": ""}}})
        )
        assert "not a file of the checkpoint" in defect(path)
    (path / "COMPLETE").write_text(json.dumps(manifest))
    (path / "planner/adapter_config.json").rename(tmp_path / "moved")
    (path / "planner/adapter_config.json").symlink_to(tmp_path / "moved")
    assert "not a file of the checkpoint" in defect(path)


@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step"])
def test_a_save_killed_anywhere_leaves_a_valid_checkpoint(tmp_path: Path, again: bool) -> None:
    store(tmp_path, 20)
    step = 20 if again else 40
    killed_at = 0
    while True:
        killed_at += 1
        child = os.fork()
        if child == 0:
            _die_at(killed_at)
            store(tmp_path, step)
            os._exit(0)
        survived = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        found = latest(tmp_path)
        assert found is not None and found.state["done"] in (20, step), killed_at
        if survived:
            break
    assert found.path.name == f"step-{step:06d}" and killed_at > 10
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == sorted({"step-000020", f"step-{step:06d}"})


def _die_at(call: int) -> None:
    """This process exits, as kill -9 does, at the `call`-th write to disk of a save."""
    left = [call]

    def counted(function):
        def inner(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            return function(*args, **kwargs)

        return inner

    module.sync = counted(module.sync)
    torch.save = counted(torch.save)
    Path.rename = counted(Path.rename)


def test_reading_a_run_that_is_saving_changes_nothing_on_disk(tmp_path: Path) -> None:
    store(tmp_path, 20)
    parent = tmp_path / "checkpoints"
    seen: list[tuple[str, list[str]]] = []

    def look(folder: Path) -> None:
        before = sorted(path.name for path in parent.iterdir())
        found = latest(tmp_path)
        assert sorted(path.name for path in parent.iterdir()) == before
        seen.append((found.path.name, before))
        adapter(1.0)(folder)

    store(tmp_path, 40, executor=look)  # another process may read in the middle of a save
    assert seen == [("step-000020", ["step-000020", "step-000040.saving"])]
    (parent / "step-000040").rename(parent / "step-000040.replaced")  # killed between the two renames of a second save
    assert latest(tmp_path).name.startswith("step-000040 (") and (parent / "step-000040.replaced").is_dir()
    (parent / "step-000060.saving").mkdir()
    recover(tmp_path)
    assert sorted(path.name for path in parent.iterdir()) == ["step-000020", "step-000040"]


def test_a_checkpoint_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path, 20)
    hashed: list[str] = []
    plain = module.file_hash
    monkeypatch.setattr(module, "file_hash", lambda path: hashed.append(path.name) or plain(path))
    found = resolve_resume("auto", tmp_path)
    assert found.state["done"] == 20 and found.rng and found.config
    assert len(hashed) == len(set(hashed)) + 2  # two policies' files have the same two names


def test_a_failing_writer_leaves_nothing_behind(tmp_path: Path) -> None:
    store(tmp_path, 20)

    def fail(folder: Path) -> None:
        raise RuntimeError("adapter is gone")

    with pytest.raises(RuntimeError, match="adapter is gone"):
        store(tmp_path, 40, executor=fail)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000020"]


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    good = store(tmp_path, 20)
    with pytest.raises(UserError, match=r"no space left.*--resume auto from step-000020") as caught:
        store(tmp_path, 40, executor=lambda folder: Path("/dev/full").write_text("x"))
    assert "\n" not in str(caught.value)
    assert latest(tmp_path).path == good and defect(good) is None
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000020"]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (9, 10, 11, 100):
        store(tmp_path, step, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000011", "step-000100"]


def test_a_changed_configuration_is_refused_with_its_keys(tmp_path: Path) -> None:
    loaded = verify(store(tmp_path, 20))
    check_config(loaded, CONFIG)
    longer = dataclasses.replace(
        CONFIG, trainer=dataclasses.replace(CONFIG.trainer, iterations=999), output="elsewhere"
    )
    check_config(loaded, longer)
    patient = dataclasses.replace(CONFIG, judges=dataclasses.replace(CONFIG.judges, outage_s=3600.0, deadline_s=99.0))
    check_config(loaded, patient)
    with pytest.raises(UserError, match=r"judges.video_frames \(6 -> 8\)"):
        check_config(loaded, dataclasses.replace(CONFIG, judges=dataclasses.replace(CONFIG.judges, video_frames=8)))
    changed = dataclasses.replace(CONFIG, seed=4, executor=dataclasses.replace(CONFIG.executor, continuations=6))
    with pytest.raises(UserError) as caught:
        check_config(loaded, changed)
    assert "executor.continuations (8 -> 6), seed (0 -> 4);" in str(caught.value) and "\n" not in str(caught.value)
    older = {k: v for k, v in loaded.config.items() if k != "executor.eta"} | {"x": None}
    (loaded.path / "state" / "config.json").write_text(json.dumps(older))
    with pytest.raises(UserError, match=r"executor.eta \(null -> 1.0\), x \(null -> null\)"):
        check_config(loaded, CONFIG)


def test_what_resume_means(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    assert resolve_resume("auto", run) is None and resolve_resume("none", run) is None
    path = store(other, 20)
    assert resolve_resume("auto", other).path == path
    assert {resolve_resume(str(each), run).path for each in (other, path)} == {path}
    with pytest.raises(UserError, match="already holds step-000020 of another run"):
        resolve_resume("none", other)
    with pytest.raises(UserError, match="is no checkpoint; accepted: auto, none"):
        resolve_resume("sometimes", run)
    (path / "COMPLETE").unlink()
    for value in ("auto", str(other)):
        with pytest.raises(UserError, match="intact"):
            resolve_resume(value, other)
