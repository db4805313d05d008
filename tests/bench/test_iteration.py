"""The bench of whole iterations: stories that are plans, weights of the published sizes, a run that is cut off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, Qwen3Config, Qwen3ForCausalLM, UMT5Config, UMT5EncoderModel

from bench import stories, weights
from bench.bench_iteration import TINY, Work, main, measured, table
from tempact.errors import EXIT_STOPPED, EXIT_USER_ERROR, guarded
from tempact.models.wan.transformer import WanTransformer
from tempact.planner.plans import parse_plan

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("frames", "chunk", "starts"),
    [(30, 3, [0, 6, 12, 18, 24]), (30, 1, [0, 6, 12, 18, 24]), (21, 3, [0, 3, 6, 12, 15]), (6, 3, [0, 3])],
)
def test_every_story_is_a_plan_as_written(frames: int, chunk: int, starts: list[int]) -> None:
    plans = [parse_plan(stories.answer(story, frames, chunk), "i", frames, chunk) for story in range(600)]
    assert all(plan.format_score == 1.0 and [step.start for step in plan.steps] == starts for plan in plans)
    assert len({step.prompt for plan in plans for step in plan.steps}) == len(plans) * len(starts)
    assert len({stories.instruction(story) for story in range(600)}) == 600


def test_the_script_reads_another_story_in_every_answer() -> None:
    script = stories.Script()
    one, other = (script("no plan", "An instruction.", 30, 3) for _ in range(2))
    assert one.instruction == other.instruction == "An instruction." and one.steps[0].prompt != other.steps[0].prompt


def test_weights_have_the_published_sizes() -> None:
    sizes = weights.REAL
    text, vision, width = sizes.clip
    with torch.device("meta"):
        models = (
            WanTransformer(sizes.wan), Qwen3ForCausalLM(Qwen3Config(**sizes.planner)),
            UMT5EncoderModel(UMT5Config(**sizes.text)),
            CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)),
        )  # fmt: skip
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    assert counts == [1_418_996_800, 1_720_574_976, 5_680_910_336, 986_109_441]
    tokenizer = weights.chat_tokenizer(sizes.tokens)
    assert sizes.tokens < len(tokenizer) <= models[1].config.vocab_size
    told = "Turn around. <|im_end|>"
    ids = tokenizer(told, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == told and ids[-1] == tokenizer.eos_token_id and len(ids) < 12
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") >= sizes.tokens


def test_figures_of_a_row_stand_beside_the_dry_run() -> None:
    row = {
        "step": 2, "time_s": 300.0, "timing_s/plan": 30.0, "timing_s/rollout": 60.0, "memory/plan_gib": 20.0,
        "memory/rollout_gib": 63.0, "memory/peak_gib": 64.0, "judge/plan_quality/calls": 64.0,
        "judge/plan_quality/missing": 0.0, "judge/step_following/calls": 512.0, "judge/step_following/missing": 0.25,
        "rewards/format_score/mean": 1.0, "planner/missing": 0.0, "executor/missing": 0.125, "planner/grad_norm": 1.0,
        "executor/grad_norm": None, "executor/rollout_gap/0.938": 0.25, "planner/sampling_gap": 0.5,
    }  # fmt: skip
    found = measured(row, 100.0, 12.0)
    assert found["seconds"] == {"plan": 30.0, "rollout": 60.0, "all": 90.0, "between rows": 200.0}
    assert found["peak_gib"] == {"plan": 20.0, "rollout": 63.0, "peak": 64.0} and found["gpu_hours"] == 0.025
    assert (found["judge_calls"], found["judge_missing"]) == (576, 128)
    assert found["gaps"] == {"executor/rollout_gap/0.938": 0.25, "planner/sampling_gap": 0.5}
    lines = [line.split() for line in table(found, {"plan": 21.0, "rollout": 60.0}).splitlines()]
    assert ["plan", "30.0", "20.0", "21.0", "-4.8%"] in lines and ["rollout", "60.0", "63.0", "60.0", "+5.0%"] in lines
    assert ["peak", "64.0"] in lines and ["all", "90.0"] in lines


def test_a_number_that_the_run_refuses_is_one_line_before_weights_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(lambda: main(["--tiny", "--frames", "31", "--folder", str(tmp_path)])) == EXIT_USER_ERROR
    assert capsys.readouterr().err.startswith("error: executor.frames: found 31") and not any(tmp_path.iterdir())


def test_keys_that_are_given_go_to_the_run() -> None:
    given = ["--executor.window", "longlive"]
    work = Work(TINY, gpus=1, tiny=True, memory_only=False, judge_delay_s=0.0, given=given)
    config = work.config(Path("/a folder"))
    assert (config.executor.window, config.executor.frames, config.executor.video_size) == ("longlive", 15, (16, 32))
    assert config.output == "/a folder/made/run" and config.executor.max_rollout_gap == 1e9


def children(process: int) -> list[int]:
    """Processes that a process has started, and those that they have."""
    try:
        own = [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return own + [grandchild for child in own for grandchild in children(child)]


@pytest.mark.slow
def test_a_run_that_is_cut_off_leaves_what_it_finished_and_no_process(tmp_path: Path) -> None:
    """Cut short in time as well (--memory-only); `pytest bench` makes whole ones."""
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "bench.bench_iteration", "--tiny", "--memory-only", "--prompts", "3",
               "--iterations", "99", "--judge-delay", "0", "--folder", str(tmp_path / "made"),
               "--save", str(result)]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        while not result.exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        started = children(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        told, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED
    assert len(started) == 2 and not any(Path(f"/proc/{child}").exists() for child in started)
    found = json.loads(result.read_text())
    first = found["measured"][0]
    assert "iteration: number 1" in told and found["device"] == "cpu" and found["videos"] == 12 and found["commit"]
    assert first["usable_plans"] == 1.0 and first["missing"] == {"planner": 0.0, "executor": 0.0}
    assert first["judge_calls"] == 6 + 2 * 2 * 2 and first["judge_missing"] == 0  # videos of two of the six plans
    assert all(norm > 0 for norm in first["grad_norm"].values()) and first["host_gib"] > 0.1
    assert found["dry_run_peak_gib"].keys() == {"plan", "rollout", "update"}
