"""`import tempact`: the commands' functions, light to import, callable beside the modules of the same names."""

from __future__ import annotations

import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tempact
from tempact.config import RunConfig
from tempact.executor.sampler import gaussian_noise
from tempact.shapeworld.story import CHUNK, FRAMES, SIZE
from tempact.trainer import Iteration, Trainer

PROMPT = "A red circle is at the top left and a blue square is at the bottom right. The circle turns green."


def smoke(output: Path) -> RunConfig:
    base = tempact.get_preset("shapeworld-smoke")
    return replace(
        base, output=str(output), device="cpu", planner=replace(base.planner, max_new_tokens=64),
        executor=replace(base.executor, timesteps=(1000, 500)),
        evaluation=replace(base.evaluation, simple=1, hard=1),
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[tempact.RunResult, list[Iteration]]:
    seen: list[Iteration] = []
    result = tempact.train(smoke(tmp_path_factory.mktemp("api") / "run"), callbacks=[seen.append])
    return result, seen


def test_importing_the_package_imports_nothing_heavy_and_names_what_it_has() -> None:
    code = (
        "import sys, tempact; from tempact import train; import tempact.train; "
        "assert callable(tempact.train) and callable(train.main) and tempact.train is train; "
        "assert not {'torch', 'numpy', 'transformers', 'peft'} & set(sys.modules); print(len(tempact.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{len(tempact.__all__)}\n"), done.stderr
    assert all(getattr(tempact, name) is not None for name in tempact.__all__)
    with pytest.raises(AttributeError, match="no attribute 'fly'"):
        _ = tempact.fly


def test_training_calls_back_with_every_iteration(finished: tuple[tempact.RunResult, list[Iteration]]) -> None:
    result, seen = finished
    assert result.exit_code == 0 and (result.folder / "evaluation.json").is_file()
    assert [iteration.number for iteration in seen] == [1, 2]
    assert seen[0].rollout.frames.shape == (2, 2, FRAMES, 3, SIZE, SIZE)
    assert seen[0].metrics["executor/ratio"] == 1.0


def test_a_video_comes_chunk_by_chunk_and_is_that_of_the_policies(
    finished: tuple[tempact.RunResult, list[Iteration]],
) -> None:
    policies = tempact.load_policies(finished[0].folder, device="cpu")
    chunks = list(tempact.generate(policies, PROMPT, seed=3))
    assert [chunk.shape for chunk in chunks] == [(CHUNK, 3, SIZE, SIZE)] * (FRAMES // CHUNK)
    plan = policies.planner.sample([tempact.Prompt("", PROMPT)], 1, 3).plans[0]
    executor = policies.executor
    rolled = executor.rollout([plan], [0], gaussian_noise(3, executor.noise_shape(1, 1), executor.device))
    assert torch.equal(torch.cat(chunks), rolled.frames[0, 0])
    again = list(tempact.generate(finished[0].folder, PROMPT, plan=plan, seed=3))
    assert torch.equal(torch.cat(again), torch.cat(chunks))


def test_a_wrong_configuration_and_a_folder_that_is_no_run_are_one_line(tmp_path: Path) -> None:
    config = smoke(tmp_path / "run")
    with pytest.raises(tempact.UserError, match=r"planner\.plans_per_prompt: found 1; accepted: at least 2"):
        tempact.train(replace(config, planner=replace(config.planner, plans_per_prompt=1)))
    with pytest.raises(tempact.UserError, match=r"config\.yaml"):
        tempact.load_policies(tmp_path)


@pytest.mark.slow
def test_an_iterations_videos_end_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref] = []
    iterate = Trainer.iterate

    def watched(trainer: Trainer, phase) -> Iteration:
        assert [ref() for ref in made] == [None] * len(made), "videos or recorded states live on through the next one"
        iteration = iterate(trainer, phase)
        made.extend(weakref.ref(tensor) for tensor in (iteration.rollout.frames, iteration.batch.transition.states))
        return iteration

    monkeypatch.setattr(Trainer, "iterate", watched)
    config = smoke(tmp_path / "run")
    assert tempact.train(config).exit_code == 0 and len(made) == 4


def test_a_reward_of_ones_own_is_one_function(tmp_path: Path) -> None:
    seen: list[tempact.Iteration] = []

    def brightness(prompts, plans, frames, spans) -> torch.Tensor:
        assert len(prompts) == len(plans) == len(spans) == len(frames)
        return frames.float().mean(dim=(2, 3, 4, 5)) / 255

    config = smoke(tmp_path / "run")
    tempact.train(config, rewards=[tempact.Reward("brightness", brightness, weight=2.0)], callbacks=[seen.append])
    own = seen[0].scored.custom[0]
    assert own.name == "brightness" and own.scores.shape == (2, 2)
    assert seen[0].metrics["rewards/brightness/mean"] == pytest.approx(own.scores.mean().item())
