"""A run's tables: of the weights and settings that they name, never in the place of another table."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluation.test_harness import FakeJudge
from safetensors.torch import load_file, save_file

from tempact import evaluate, generate, train
from tempact.cli import from_yaml, parse_run
from tempact.evaluation import METHODS, OVERFITTING
from tempact.evaluation.harness import Evaluation
from tempact.evaluation.judges import Suite
from tempact.evaluation.statistics import MethodScores, read_evaluation, read_origin
from tempact.presets import get_preset
from tempact.runs import evaluation, run
from tempact.runs.checkpoint import Checkpoint, save, verify
from tempact.shapeworld import STRICT_SETS

pytestmark = pytest.mark.usefixtures("log_handlers")
SMOKE = ("shapeworld-smoke", "--device", "cpu", "--evaluation.hard", "1", "--evaluation.strips", "0")
FAST = ("--executor.timesteps", "1000", "500", "--planner.max_new_tokens", "64")
STOPS_AFTER = 3  # batches of the evaluation


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose evaluation was stopped and gone on with."""
    folder, made = tmp_path_factory.mktemp("runs") / "finished", list[int]()
    line = [*SMOKE, *FAST, "--output", str(folder), "--trainer.iterations", "1"]
    real = Evaluation._make

    def counted(self: Evaluation, *given) -> None:
        if len(made) == STOPS_AFTER and not (folder / "stopped").exists():
            (folder / "stopped").touch()
            signal.raise_signal(signal.SIGINT)
        made.append(1)
        real(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluation, "_make", counted)
        assert train.main(line) == 130 and len(made) == STOPS_AFTER
        assert not (folder / "evaluation.json").exists()
        assert train.main(line) == 0 and len(made) == 2 * len(METHODS)  # each batch once
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def by_cell(folder: Path) -> dict[tuple[str, str, str], tuple[float, ...]]:
    return {(one.method, one.set, one.judge): tuple(one.scores) for one in read_evaluation(folder, MethodScores)}


def test_the_baselines_of_a_run_are_those_of_the_untrained_policies(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_again(copied, 2, verify(copied / "checkpoints" / "step-000001"), change=0.2)
    monkeypatch.chdir(tmp_path)
    assert evaluate.main([*SMOKE, *FAST]) == 0 and evaluate.main([str(copied)]) == 0
    trained, untrained = by_cell(copied), by_cell(tmp_path / "runs" / "shapeworld-smoke-untrained")
    assert {method for method, _, _ in untrained} == {"single-prompt", "step-prompt"}
    for cell, scores in untrained.items():
        assert trained[cell] == pytest.approx(scores, abs=1e-5), cell
    steps = {cell[1:]: scores for cell, scores in untrained.items() if cell[0] == "step-prompt"}
    for method in ("planner only", "executor only", "+ TempAct"):
        assert any(trained[method, *cell] != pytest.approx(scores, abs=1e-3) for cell, scores in steps.items()), method


def test_a_runs_table_names_its_checkpoint_and_evaluating_again_is_the_same_to_the_bit(copied: Path) -> None:
    found = read_origin(copied)
    assert found and (found.split, found.seed, found.videos) == ("test", 1234, {"simple": 2, "hard": 1})
    assert found.checkpoint == "step-000001" and found.weights and found.suite
    names = ("evaluation.json", "comparisons.json", "evaluation_scores.jsonl", "config.yaml")
    before = [(copied / name).read_bytes() for name in names]
    for name in names[:-1]:
        (copied / name).unlink()
    assert evaluate.main([str(copied), "--threads", "1"]) == 0
    assert [(copied / name).read_bytes() for name in names] == before and not (copied / "evaluations").exists()


@pytest.mark.parametrize(
    "other",
    [
        ["--seed", "9"], pytest.param(["--simple", "3"], marks=pytest.mark.slow), ["--split", "validation"],
        pytest.param(["--evaluation.bootstrap", "9"], marks=pytest.mark.slow),
        pytest.param(["--executor.eta", "0.5"], marks=pytest.mark.slow), ["--evaluation.suite", "shapeworld-strict"],
    ],
    ids=lambda given: given[0],
)  # fmt: skip
def test_other_settings_have_a_folder_of_their_own(
    finished: Path, other: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, _ = parse_run(["--config", str(finished / "config.yaml")], "x")
    assert evaluation.table_folder(own, finished) == finished
    free = ["--device", "auto", "--threads", "3", "--evaluation.strips", "2", "--evaluation.strict", "9"]
    free += ["--output", "x"]
    assert evaluation.table_folder(parse_run(["--config", str(finished / "config.yaml"), *free], "x")[0], finished) == (
        finished
    )
    names = {"--seed": "--evaluation.seed", "--simple": "--evaluation.simple", "--split": "--evaluation.split"}
    words = [names.get(word, word) for word in other]
    changed, _ = parse_run(["--config", str(finished / "config.yaml"), *words], "x")
    folder = evaluation.table_folder(changed, finished)
    assert folder.parent == finished / "evaluations" and folder == evaluation.table_folder(changed, finished)
    folder.rmdir()


@pytest.mark.slow
def test_rows_of_best_of_n_have_a_table_of_their_own(copied: Path) -> None:
    kept = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert evaluate.main([str(copied), "--best-of", "2", "--simple", "1"]) == 0
    assert all(path.read_bytes() == data for path, data in kept.items())
    (folder,) = (copied / "evaluations").iterdir()
    assert folder.name.endswith("-best-of-2") and from_yaml(folder / "config.yaml").best_of.chunks == 2
    scores = by_cell(folder)
    assert list(dict.fromkeys(method for method, _, _ in scores)) == [
        "single-prompt", "step-prompt", "+ TempAct", "step-prompt, best of 2", "+ TempAct, best of 2"
    ]  # fmt: skip
    videos = [json.loads(line) for line in next(folder.glob("evaluation/*/videos.jsonl")).read_text().splitlines()]
    told = {row["condition"]: "choices" in row for row in videos}
    assert told == {method: "best of" in method for method in told} and len(told) == 5
    tables = [path for path in folder.rglob("*.json*") if path.name != "settings.json"]
    again = {path: path.read_bytes() for path in tables}
    assert len(again) >= 6
    assert evaluate.main([str(copied), "--best-of", "2", "--simple", "1"]) == 0
    assert all(path.read_bytes() == data for path, data in again.items())


def test_an_evaluation_with_another_seed_leaves_the_runs_own_alone(copied: Path) -> None:
    kept = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert evaluate.main([str(copied), "--seed", "9", "--simple", "1"]) == 0
    assert all(path.read_bytes() == data for path, data in kept.items())
    (folder,) = (copied / "evaluations").iterdir()
    found, own = read_origin(folder), read_origin(copied)
    assert found and own and (found.seed, found.videos) == (9, {"simple": 1, "hard": 1})
    assert (found.checkpoint, found.weights) == ("step-000001", own.weights) and found.suite != own.suite
    text = (folder / "report.html").read_text()
    assert f"Test split, seed 9, 1 simple and 1 hard videos of each method, step-000001 (weights {own.weights})" in text
    assert "evaluation.seed</code></dt><dd><code>9<" in text


@pytest.mark.slow
def test_the_stricter_suite_has_a_table_of_its_own_with_the_rows_of_overfitting(copied: Path) -> None:
    kept = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    line = [str(copied), "--suite", "shapeworld-strict", "--strict", "1"]
    assert evaluate.main([*line, "--split", "validation"]) == 0
    assert all(path.read_bytes() == data for path, data in kept.items())
    (folder,) = (copied / "evaluations").iterdir()
    assert folder.name.startswith("validation-seed-1234-paraphrase-1-long-1-crowded-1-")
    found, own = read_origin(folder), read_origin(copied)
    assert found and own and found.videos == dict.fromkeys(STRICT_SETS, 1) and found.weights == own.weights
    cells = {(method, name) for method, name, _ in by_cell(folder)}
    assert cells == {(method.name, name) for method in (*METHODS, *OVERFITTING) for name in STRICT_SETS}
    rows = (json.loads(line) for line in next(folder.rglob("videos.jsonl")).read_text().splitlines())
    told = {(row["prompt_id"], row["condition"]): [step["prompt"] for step in row["steps"]] for row in rows}
    assert told["validation-long-0", "reworded steps"] == told["validation-long-0", "reworded steps, trained executor"]
    config = from_yaml(folder / "config.yaml").evaluation
    assert (config.suite, config.strict, config.split) == ("shapeworld-strict", 1, "validation")


def test_what_runs_are_compared_by_has_a_hash(finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is the same for other weights and settings of videos, and another one for other instructions and judges."""
    own = read_origin(finished)
    assert own and len(own.tests) == 12
    config = from_yaml(finished / "config.yaml")
    judges = [FakeJudge("verifier", "1"), FakeJudge("matcher", "m")]

    def tests(version: str = "m", **settings: object) -> str:
        judges[1].version = version
        other = replace(config, evaluation=replace(config.evaluation, **settings))
        prompts = evaluation.instructions(other.evaluation)
        suite = Suite(prompts, dict.fromkeys(prompts, 24), METHODS, 1, judges, other.evaluation.seed, 2)
        return evaluation.tests_digest(suite)

    usual = tests()
    assert (
        usual == tests(bootstrap=7, batch=1) and len({usual, tests("n"), tests(seed=5), tests(split="validation")}) == 4
    )
    assert usual != tests(suite="shapeworld-strict") != tests(suite="shapeworld-strict", strict=3)
    monkeypatch.setattr(evaluation, "shapeworld_code", lambda: "other")
    assert tests() != usual


@pytest.mark.parametrize("suite", [pytest.param("shapeworld", marks=pytest.mark.slow), "temporal-order"])
def test_scores_are_filed_under_the_checkpoint_that_made_the_videos(
    suite: str, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is replaced by another of the same step while its adapters are read, and a later one comes while
    the videos are made."""
    path, told = copied / "checkpoints" / "step-000001", list[str]()
    before, load, real = verify(path), run.load_adapters, Evaluation.run

    def replaced(policies, checkpoint: Checkpoint) -> None:
        policies.planner.load_adapter(checkpoint.planner_dir)
        if checkpoint == before:
            write_again(copied, 1, checkpoint)
        policies.executor.load_adapter(checkpoint.executor_dir)

    def late(self: Evaluation, policies: str, *given) -> None:
        told.append(policies)
        write_again(copied, 2, verify(path))
        real(self, policies, *given)

    monkeypatch.setattr(run, "load_adapters", replaced)
    monkeypatch.setattr(Evaluation, "run", late)
    line = [str(copied), "--suite", suite]
    if suite == "temporal-order":
        texts = tmp_path / "texts.txt"
        texts.write_text("A red circle is at the top left. First, the circle grows.\n")
        line += ["--prompts", f"simple={texts}", "--judge", "--export", "vbench", "--seeds", "1"]
    assert evaluate.main([*line, "--conditions", "trained"] if suite == "temporal-order" else line) == 0
    now = verify(path)
    assert now.digest != before.digest and (copied / "checkpoints" / "step-000002").is_dir()
    if suite == "temporal-order":
        assert now.name in told[0] and now.name in (copied / "temporal-order" / "settings.json").read_text()
        return
    policies = run.build_policies(from_yaml(copied / "config.yaml"))
    load(policies, now)
    found = read_origin(copied)
    assert found and (found.checkpoint, found.weights) == ("step-000001", evaluation.adapters_digest(policies))


def write_again(folder: Path, step: int, like: Checkpoint, change: float = 0.001) -> None:
    """A checkpoint with other weights in both adapters."""

    def writer(source: Path):
        tensors = {
            k: v + change * torch.randn(v.shape) for k, v in load_file(source / "adapter_model.safetensors").items()
        }
        settings = (source / "adapter_config.json").read_bytes()

        def write(target: Path) -> None:
            (target / "adapter_config.json").write_bytes(settings)
            save_file(tensors, target / "adapter_model.safetensors")

        return write

    writers = {"planner": writer(like.planner_dir), "executor": writer(like.executor_dir)}
    save(folder, step, writers, like.state, from_yaml(folder / "config.yaml"), 5)


def test_a_cut_cell_is_made_again_and_the_table_stays_the_same(copied: Path) -> None:
    table = (copied / "evaluation.json").read_bytes()
    cells = sorted((copied / "evaluation").rglob("*.safetensors"))
    whole, frames = [cell.read_bytes() for cell in cells], [load_file(cell)["frames"].float() for cell in cells]
    assert len(cells) == 3 * len(METHODS)
    cells[0].write_bytes(whole[0][: len(whole[0]) // 2])
    cells[4].write_bytes(b"")
    cells[7].unlink()
    cells[9].write_bytes(whole[8])
    assert evaluate.main([str(copied)]) == 0
    for cell, before in zip(cells, frames, strict=True):  # up to the rounding of another batch
        torch.testing.assert_close(load_file(cell)["frames"].float(), before, atol=3.0, rtol=0.0)
    scores = json.loads(table)
    again = json.loads((copied / "evaluation.json").read_bytes())
    assert [row["score"] for row in again] == pytest.approx([row["score"] for row in scores], abs=2e-3)


@pytest.mark.parametrize("verb", ["train", "evaluate", "generate"])
def test_threads_are_one_option_everywhere(
    verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, finished: Path
) -> None:
    taken: list[int] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "train", lambda config, resume: taken.append(config.threads) or run.RunResult(tmp_path, 0))
    monkeypatch.setattr(evaluation, "evaluate_shapeworld", lambda config, *given: taken.append(config.threads) or 0)
    monkeypatch.setattr(
        "tempact.runs.generation.make_videos", lambda config, *given: taken.append(config.threads) or iter(())
    )
    lines = {
        "train": [["shapeworld", "--threads", "1"]],
        "evaluate": [["shapeworld", "--threads", "1"], ["--threads=1", str(finished)]],
        "generate": [["--prompt", "A red circle is at the top left. Then the circle grows.", "--threads", "1"]],
    }
    for line in lines[verb]:
        assert {"train": train, "evaluate": evaluate, "generate": generate}[verb].main(line) == 0
    assert taken == [1] * len(lines[verb])


def test_the_split_decides_the_instructions(finished: Path) -> None:
    config = from_yaml(finished / "config.yaml")
    assert config.evaluation.split == "test"
    other = replace(config, evaluation=replace(config.evaluation, split="validation"))
    texts = [[p.text for p in evaluation.instructions(one.evaluation)["simple"]] for one in (config, other)]
    assert len(texts[0]) == len(texts[1]) == 2 and not set(texts[0]) & set(texts[1])


def test_a_key_that_older_versions_had_not_changes_no_hash_at_its_default() -> None:
    plain = get_preset("shapeworld-smoke")
    uniform = replace(plain, planner=replace(plain.planner, spans="uniform"))
    assert (
        evaluation.policy_digest(plain) == "9db5b53d568b" != evaluation.policy_digest(uniform)
    )  # as before planner.spans
    told = evaluation.table_settings(uniform)
    assert "planner.spans" not in evaluation.table_settings(plain) and told["planner.spans"] == "uniform"
