"""Checkpoints: exact, whole or not there, never silently wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import os
import pickle
import random
import traceback
import zipfile
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
    defect,
    latest,
    recover,
    restore_rng,
    save,
    verify,
)
from tempact.runs.resume import check_config, resolve_resume

LORA, OPTIM = LoraConfig(2, 4, ("q",)), OptimConfig(1e-3)
CONFIG = RunConfig("tiny", PlannerConfig("shapeworld", LORA, OPTIM), ExecutorConfig("shapeworld", LORA, OPTIM))


def adapter(value: float):
    def write(folder: Path) -> None:
        (folder / "adapter_config.json").write_text('{"r": 2}')
        save_file({"lora_A": torch.full((4, 4), value)}, folder / "adapter_model.safetensors")

    return write


WRITERS = {"planner": adapter(0), "executor": adapter(0)}


def store(run: Path, step: int, keep: int = 5, course: str = "", **writers) -> Path:
    state = {"done": step, "moment": torch.full((3,), step / 7)}
    given = {"planner": adapter(step), "executor": adapter(-step)} | writers
    return save(run, step, given, state, CONFIG, keep, course)


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


def test_keys_of_other_versions_are_named_and_take_their_defaults(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = verify(store(tmp_path, 20))
    older = {k: v for k, v in loaded.config.items() if k != "executor.eta"} | {"planner.gone": None, "x": 3}
    (loaded.path / "state" / "config.json").write_text(json.dumps(older))
    check_config(loaded, CONFIG)
    assert "passed over, as this version has no such keys: planner.gone, x" in caplog.text
    with pytest.raises(UserError, match=r"executor.eta \(1.0 -> 0.5\);"):
        check_config(loaded, dataclasses.replace(CONFIG, executor=dataclasses.replace(CONFIG.executor, eta=0.5)))
    for removed in ("executor.lora.rank", "planner.weights"):  # keys without a default
        without = {name: value for name, value in older.items() if name != removed}
        (loaded.path / "state" / "config.json").write_text(json.dumps(without))
        with pytest.raises(UserError, match=rf"{removed} \(null -> "):
            check_config(loaded, CONFIG)


@pytest.mark.parametrize("key", ["planner", "executor"])
def test_a_learning_rate_is_not_changed_by_a_resume(tmp_path: Path, key: str) -> None:
    loaded = verify(store(tmp_path, 20))
    for name, value in {"lr": 2e-3, "lr_end": 0.5}.items():
        own = getattr(CONFIG, key)
        changed = dataclasses.replace(
            CONFIG, **{key: dataclasses.replace(own, optim=dataclasses.replace(own.optim, **{name: value}))}
        )
        with pytest.raises(UserError, match=rf"{key}.optim.{name} \("):
            check_config(loaded, changed)


def test_a_changed_length_that_moves_the_learning_rates_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    falling = dataclasses.replace(CONFIG.planner, optim=dataclasses.replace(OPTIM, lr_end=0.1))
    longer = dataclasses.replace(CONFIG.trainer, iterations=999)
    for planner, said in ((CONFIG.planner, False), (falling, True)):
        config = dataclasses.replace(CONFIG, planner=planner)
        loaded = verify(save(tmp_path / str(said), 3, WRITERS, {"done": 3}, config, 1))
        caplog.clear()
        with caplog.at_level(logging.INFO):
            check_config(loaded, dataclasses.replace(config, trainer=longer))
        assert "trainer.iterations (100 -> 999)" in caplog.text
        assert ("learning rates fall over all iterations" in caplog.text) == said


def names(run: Path, inner: str = "") -> list[str]:
    return sorted(path.name for path in (run / "checkpoints" / inner).iterdir() if path.name.startswith("step-"))


def test_what_belongs_to_another_course_is_set_aside_and_the_newest_save_stays(tmp_path: Path) -> None:
    for step in (20, 40):
        store(tmp_path, step, course="first")
    old = (tmp_path / "checkpoints/step-000040/COMPLETE").read_bytes()
    path = store(tmp_path, 30, keep=1, course="first")  # went on from 20
    assert names(tmp_path) == ["step-000030"] and latest(tmp_path).path == path
    (aside,) = (tmp_path / "checkpoints" / "aside").iterdir()
    assert aside.name.startswith("step-000040-") and (aside / "COMPLETE").read_bytes() == old
    assert resolve_resume(str(aside), tmp_path / "new").step == 40  # what was set aside can be gone on with elsewhere
    other = store(tmp_path, 2, keep=1, course="second")
    assert names(tmp_path) == ["step-000002"] and latest(tmp_path).path == other and latest(tmp_path).course == "second"
    assert len(names(tmp_path, "aside")) == 2
    store(tmp_path, 30, keep=1, course="first"), store(tmp_path, 2, keep=1, course="first")
    assert len(names(tmp_path, "aside")) == 3  # the second step 30 is the first one to the bit


def test_a_resume_from_elsewhere_does_not_mix_two_runs(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    elsewhere = store(other, 2, course="other")
    assert resolve_resume(str(elsewhere), run).path == elsewhere
    store(run, 4, course="own"), store(run, 5, course="own")
    for value in (elsewhere, other):
        with pytest.raises(UserError, match=r"found .*other.*step-000002, but .*run holds step-000005 of its own; acc"):
            resolve_resume(str(value), run)
    assert resolve_resume("auto", run).step == 5 and resolve_resume(str(run / "checkpoints/step-000004"), run).step == 4
    (tmp_path / "link").symlink_to(run)
    assert resolve_resume(str(tmp_path / "link"), run).step == 5


@pytest.mark.parametrize("where", ["executor", "executor/adapter_model.safetensors", "state/state.pt", ""])
def test_a_link_is_no_part_of_a_checkpoint(tmp_path: Path, where: str) -> None:
    good, bad = store(tmp_path, 20), store(tmp_path, 40)
    part = bad / where
    part.rename(tmp_path / "elsewhere")
    part.symlink_to(tmp_path / "elsewhere")
    assert "is not a file of the checkpoint" in defect(bad) and latest(tmp_path).path == good


def test_a_run_folder_behind_a_link_is_as_good_as_any(tmp_path: Path) -> None:
    store(tmp_path / "scratch", 20)
    (tmp_path / "run").symlink_to(tmp_path / "scratch")
    assert latest(tmp_path / "run").step == 20


def test_the_manifest_lists_exactly_the_files_that_are_there(tmp_path: Path) -> None:
    path = store(tmp_path, 20)
    manifest = json.loads((path / "COMPLETE").read_text())
    for gone in manifest["files"]:
        files = {name: entry for name, entry in manifest["files"].items() if name != gone}
        (path / "COMPLETE").write_text(json.dumps(manifest | {"files": files}))
        assert f"does not list {gone}" in defect(path)
        (path / gone).rename(tmp_path / "kept")
        assert f"does not list {gone}" in defect(path)
        (tmp_path / "kept").rename(path / gone)
    (path / "COMPLETE").write_text(json.dumps(manifest | {"files": {}}))
    assert "does not list" in defect(path)
    (path / "COMPLETE").write_text(json.dumps(manifest))
    for extra in ("planner/adapter_model.bin", "executor/more/x.safetensors", "notes.txt"):
        (path / extra).parent.mkdir(exist_ok=True)
        (path / extra).write_bytes(b"x")
        assert defect(path) == f"{extra} is not a file of the checkpoint"
        (path / extra).unlink()
    assert defect(path) is None
    (path / "COMPLETE").write_text(json.dumps(manifest | {"format": 99}))
    assert "format 99, which is later than this version's" in defect(path)


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path: Path) -> None:
    store(tmp_path, 20).rename(tmp_path / "checkpoints" / "step-000090")
    assert latest(tmp_path) is None
    with pytest.raises(CorruptCheckpoint, match="COMPLETE is for step 20"):
        verify(tmp_path / "checkpoints" / "step-000090")


class Attack:
    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["ATTACKED"],)


@pytest.mark.parametrize("file", ["state.pt", "rng.pt"])
def test_a_pickle_with_the_right_hashes_is_passed_over_and_never_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, file: str
) -> None:
    monkeypatch.setenv("ATTACKED", str(tmp_path / "attacked"))
    good, bad = store(tmp_path, 20), store(tmp_path, 40)
    torch.save({"done": 40, "attack": Attack()}, bad / "state" / file)
    manifest = json.loads((bad / "COMPLETE").read_text())
    raw = (bad / "state" / file).read_bytes()
    manifest["files"][f"state/{file}"] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (bad / "COMPLETE").write_text(json.dumps(manifest))
    assert resolve_resume("auto", tmp_path).path == good and not (tmp_path / "attacked").exists()
    assert f"step-000040: state/{file} holds more than tensors" in caplog.text
    loaded = dataclasses.replace(verify(good), path=bad)  # a reader that did not verify
    with pytest.raises(pickle.UnpicklingError):
        loaded.state if file == "state.pt" else loaded.rng  # noqa: B018
    assert not (tmp_path / "attacked").exists()


def resealed(path: Path, file: str, content: bytes) -> None:
    """A file of other content, with its right size and hash in COMPLETE."""
    (path / file).write_bytes(content)
    manifest = json.loads((path / "COMPLETE").read_text())
    manifest["files"][file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "COMPLETE").write_text(json.dumps(manifest))


def torch_file(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def odd_pickle(code: bytes) -> bytes:
    """torch's archive with another pickle in it."""
    source, target = zipfile.ZipFile(io.BytesIO(torch_file({"done": 1}))), io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            archive.writestr(name, code if name.endswith("data.pkl") else source.read(name))
    return target.getvalue()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state/state.pt", torch_file([1, 2])),
        ("state/state.pt", odd_pickle(b"R.")),
        ("state/state.pt", odd_pickle(b".")),
        ("state/state.pt", odd_pickle(b"ccollections\nOrderedDict\n(K\x01tR.")),
        ("state/rng.pt", b""),
        ("state/config.json", b"{"),
        ("state/config.json", b"[]"),
        ("planner/adapter_config.json", b"[" * 100_000),
        ("executor/adapter_model.safetensors", b"cut"),
    ],
)
def test_an_odd_file_with_the_right_hash_is_passed_over(tmp_path: Path, file: str, content: bytes) -> None:
    good, bad = store(tmp_path, 20), store(tmp_path, 40)
    resealed(bad, file, content)
    assert latest(tmp_path).path == good and defect(bad)


@pytest.mark.parametrize(
    "manifest",
    [
        b"[" * 100_000,
        b'{"step": 40, "files": {"x": {"bytes": Infinity, "sha256": ""}}}',
        b'{"step": 40, "files": {"' + b"x" * 5000 + b'": {"bytes": 1, "sha256": ""}}}',
        b"[]",
        b'{"step": 40, "files": 3}',
    ],
)
def test_an_odd_manifest_is_passed_over(tmp_path: Path, manifest: bytes) -> None:
    good, bad = store(tmp_path, 20), store(tmp_path, 40)
    (bad / "COMPLETE").write_bytes(manifest)
    assert latest(tmp_path).path == good and defect(bad)
    if b"x" * 5000 in manifest:
        whole = json.loads((good / "COMPLETE").read_text())
        whole["files"]["x" * 5000] = {"bytes": 1, "sha256": ""}
        (good / "COMPLETE").write_text(json.dumps(whole))
        assert defect(good)


def test_a_reader_beside_a_trainer_harms_no_save(tmp_path: Path) -> None:
    """200 saves of one process while another reads the newest checkpoint over and over, as generate and evaluate do."""
    store(tmp_path, 1)
    stop = tmp_path / "stop"
    reader = os.fork()
    if reader == 0:
        code, seen, count = 0, 0, 0
        try:
            while not stop.exists():
                found = latest(tmp_path)
                assert found is not None and found.step >= seen, (found, seen)
                seen, count = found.step, count + 1
            assert count > 10
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            code = 1
        os._exit(code)  # never into the rest of pytest
    for step in range(2, 202):
        store(tmp_path, step if step % 3 else step - 1, keep=1 + step % 2)
    stop.touch()
    assert os.waitpid(reader, 0)[1] == 0
    assert verify(tmp_path / "checkpoints" / "step-000200").state["done"] == 200


def test_a_save_recovers_first_and_syncs_all_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path, 20)
    parent = tmp_path / "checkpoints"
    (parent / "step-000020").rename(parent / "step-000020.replaced")
    (parent / "step-000030.saving").mkdir()
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(os.readlink(f"/proc/self/fd/{file}")).name))
    path = store(tmp_path, 40)
    assert names(tmp_path) == ["step-000020", "step-000040"] and latest(tmp_path).path == path
    files = {file.name for file in path.rglob("*") if file.is_file()}
    assert files <= set(synced) and {"planner", "executor", "state", "step-000040.saving", "checkpoints"} <= set(synced)
    assert synced.index("COMPLETE") > synced.index("state.pt") and synced[-1] == "checkpoints"


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
