"""The report of a made-up run: complete, offline, escaped, and honest about what is not there yet."""

from __future__ import annotations

import json
import re
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml

from tempact.errors import UserError
from tempact.evaluation import METHODS
from tempact.evaluation.harness import Sample
from tempact.evaluation.prompts import OrderPrompt
from tempact.evaluation.statistics import Bootstrap, MethodScores, write_evaluation
from tempact.report import main
from tempact.reporting import write_samples
from tempact.reporting.report import write_report
from tempact.reporting.strips import write_extremes, write_showcase
from tempact.runs.logs import MetricsLogger
from tempact.types import Batch, Plan, PlanBatch, Prompt, Rollout, Scored, Step

STEPS = (
    Step(0, 3, "A red square is at the top left."),
    Step(3, 12, "The red square slowly moves to the right."),
    Step(12, 24, "The red square turns <b>blue</b>."),
)
PROMPT = Prompt(
    "s0", "A red square is at the top left; it slowly moves to the right & turns <script>blue</script>.", "simple"
)
LEVELS = {"single-prompt": 0.3, "step-prompt": 0.4, "+ TempAct": 0.6, "planner only": 0.45, "executor only": 0.5}


def video(moves: bool) -> torch.Tensor:
    frames = torch.zeros(24, 3, 24, 24, dtype=torch.uint8)
    for i in range(24):
        x = 2 + (i * 2 // 3 if moves else 0)
        frames[i, 2 if moves and i > 14 else 0, 4:10, x : x + 6] = 255
    return frames


def make_started_run(run: Path, iterations: int) -> None:
    (run / "config.yaml").write_text(
        yaml.safe_dump({"preset": "tiny", "seed": 3, "trainer": {"iterations": 60}, "executor": {"continuations": 2}})
    )
    logger = MetricsLogger(run)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, iterations + 1):
        noise = 0.05 * torch.randn(8, generator=generator)
        metrics = {
            "executor/reward": 0.4 + step / 200 + noise[0].item(),
            "planner/reward": 0.5 + step / 300 + noise[1].item(),
            "executor/kl": 1e-3 * step,
            "planner/kl": float("nan") if step == 1 else 5e-4 * step,
            "executor/clip_ratio/low": 0.1 + noise[2].item(),
            "executor/clip_ratio/high": 0.1,
            "planner/clip_ratio/low": 0.05,
            "planner/clip_ratio/high": 0.04 + 0.1 * noise[3].item(),
            "executor/frac_reward_zero_std": 0.0,
            "planner/frac_reward_zero_std": 0.25,
            "rewards/temporal_following/mean": 0.4 + step / 200 + noise[4].item(),
            "rewards/step_following/mean": 0.5 + noise[5].item(),
            "rewards/step_following/missing": 0.25,
            "rewards/plan_quality/mean": 0.7,
            "timing_s/plan": 0.5,
            "timing_s/rollout": 2.0,
            "timing_s/rewards": 0.25,
            "timing_s/update": 1.25,
        }
        logger.log(step, metrics)
    logger.close()


def make_sampled(run: Path, step: int) -> None:
    plans = PlanBatch([PROMPT], [Plan(PROMPT.text, STEPS), Plan(PROMPT.text, (Step(0, 24, PROMPT.text),), 0.0)], 2)
    following = torch.tensor([[0.9, 0.6], [0.1, float("nan")]])
    scored = Scored(torch.tensor([0.8, 0.2]), torch.tensor([1.0, 0.0]), following, following.nan_to_num(0.3), following)
    mask = torch.tensor([[True, True], [True, False]])
    batch = Batch(torch.tensor([1.0, -1.0]), torch.tensor([True, True]), following, mask, None, None)
    write_samples(run, step, plans, scored, batch)
    frames = torch.stack([video(True), video(False), video(False), video(True)]).view(2, 2, 24, 3, 24, 24)
    write_extremes(run, step, plans, Rollout(frames), scored)


def make_evaluated(run: Path, levels: dict[str, float] = LEVELS) -> None:
    scores = [
        MethodScores(method, name, judge, [level + 0.01 * (i % 5) for i in range(20)])
        for method, level in levels.items()
        for name in ("simple", "hard")
        for judge in ("verifier", "matcher", "picture quality", "duplicates")
    ]
    scores[0].scores[4] = float("nan")
    write_evaluation(run, scores, Bootstrap(200, 0))
    prompt = OrderPrompt(PROMPT.prompt_id, "simple", PROMPT.category, PROMPT.text)
    shown = [Sample(method, prompt, STEPS, video(method.name == "+ TempAct")) for method in METHODS]
    write_showcase(run, [shown], {"step-prompt": "before", "+ TempAct": "after"})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("run")
    make_started_run(run, 60)
    make_sampled(run, 20)
    make_sampled(run, 60)
    make_evaluated(run)
    return run, write_report(run).read_text()


def test_a_finished_run_shows_numbers_videos_and_how_it_was_run(finished: tuple[Path, str]) -> None:
    _, html = finished
    for text in (
        "+47.6%",
        "0.420 → 0.620",
        "60 of 60 iterations",
        "Samples of iteration 60",
        "continuations a plan (N)",
    ):
        assert text in html, text
    assert "verifier gave no score to 1 of 20 videos (single-prompt, simple)" in html
    assert "step following: 25.0% of the rewards were missing" in html
    assert re.search(r"<td>rollout</td><td>2.00</td><td>50%</td>", html)
    assert html.count("data:image/gif") == 2 and html.count("data:image/svg+xml") == 1
    assert html.count("data:image/png") == 3  # one strip before and after, worst, best
    assert f"torch {torch.__version__.split('+')[0]}" in html
    assert "Not evaluated yet" not in html and "; 1 without a score" in html


@pytest.mark.parametrize(("trained", "change", "colour"), [(0.6, "+47.6%", "change"), (0.28, "-28.6%", "soft"),
                                                           (0.4, "+0.0%", "soft")])  # fmt: skip
def test_only_a_gain_has_the_colour_of_gains(trained: float, change: str, colour: str, tmp_path: Path) -> None:
    make_started_run(tmp_path, 2)
    make_evaluated(tmp_path, LEVELS | {"+ TempAct": trained})
    html = write_report(tmp_path).read_text()
    assert re.search(rf'<div class="tile{" gained" if colour == "change" else ""}"><b>{re.escape(change)}</b>', html)
    assert f'<span class="{colour}">{change}</span>' in html


def test_the_file_needs_nothing_else_and_runs_nothing(finished: tuple[Path, str]) -> None:
    _, html = finished
    sources = re.findall(r'(?:src|href)="([^"]{0,20})', html)
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert "<script" not in html and "&lt;script&gt;blue" in html and "&lt;b&gt;blue" in html
    assert "http" not in re.sub(r"data:[^\"]*", "", html)


def test_best_and_worst_are_ranked_and_missing_scores_are_neither(finished: tuple[Path, str]) -> None:
    run, html = finished
    rows = [json.loads(line) for line in (run / "samples" / "step-000060.jsonl").read_text().splitlines()]
    assert [row["temporal_following"] for row in rows] == [0.9, 0.6, 0.1, None]
    assert [row["execution_advantage"] for row in rows] == [0.9, 0.6, 0.1, None]
    assert html.index("<td>0.10</td>") < html.index("<h3>Best</h3>") < html.index("<td>0.90</td>")


def test_a_run_in_progress_says_what_is_missing(tmp_path: Path) -> None:
    make_started_run(tmp_path, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "time')  # a row being written
    html = write_report(tmp_path).read_text()
    assert "2 of 60 iterations" in html and "Not evaluated yet" in html and "No videos yet" in html


def test_a_run_without_an_iteration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("preset: tiny\n")
    assert "No iteration is done yet" in write_report(tmp_path).read_text()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no run folder"):
        write_report(tmp_path)
    assert main([str(tmp_path / "absent")]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.strip().splitlines()) == 1 and "config.yaml" in shown.err


FILES = (
    "evaluation.json", "evaluation_scores.jsonl", "comparisons.json", "environment.json", "videos/index.json",
    "samples/step-000060.jsonl",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "damage"),
    [("config.yaml", b"{"), ("config.yaml", b"\xff\xfe"), *product(FILES, (b"{", b"\xff\xfe", b"[1]"))],
)
def test_a_damaged_file_of_a_run_is_named(
    name: str, damage: bytes, finished: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(damage)
    before = (tmp_path / "run" / "report.html").read_bytes()
    assert main([str(tmp_path / "run")]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and f"{name}: cannot be read (" in shown and "accepted: the file as" in shown
    assert (tmp_path / "run" / "report.html").read_bytes() == before
