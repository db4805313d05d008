"""The report of a made-up run: complete, offline, escaped, and honest about what is not there yet."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tempact.errors import UserError
from tempact.evaluation import METHODS
from tempact.evaluation.harness import Sample
from tempact.evaluation.prompts import OrderPrompt
from tempact.evaluation.statistics import Bootstrap, MethodScores, write_evaluation
from tempact.files import UMASK
from tempact.policies import build_policies
from tempact.presets import get_preset
from tempact.report import main
from tempact.reporting import model_card, read_metrics, write_samples
from tempact.reporting.charts import PANELS, charts, thinned
from tempact.reporting.report import leave_report, write_report
from tempact.reporting.strips import videos_of_extremes, write_extremes, write_showcase
from tempact.runs.logs import MetricsLogger
from tempact.types import Batch, Plan, PlanBatch, Prompt, Scored, Step

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
    write_extremes(run, step, plans, {(p, n): frames[p, n] for p, n in videos_of_extremes(run, step)})


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
    assert html.count("data:image/gif") == 2 and html.count("<svg") == 6
    assert html.count("data:image/png") == (2 + 1 + 1) * 12  # before and after, worst, best
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
    assert html.index("<dd>0.10</dd>") < html.index("<h3>Best</h3>") < html.index("<dd>0.90</dd>")


def grey(value: int) -> torch.Tensor:
    return torch.full((24, 3, 24, 24), value, dtype=torch.uint8)


def test_the_pictures_of_a_sample_are_those_of_its_row(tmp_path: Path) -> None:
    """With scores that are equal, and equal once rounded; every video is of one grey, 10 times its number."""
    count = 12
    texts = [f"Video {p}." for p in range(count // 2)]
    plans = PlanBatch([Prompt("", text) for text in texts], [Plan(t, (Step(0, 24, t),)) for t in texts], 1)
    following = torch.tensor([0.5, 0.5, 0.5, 0.1, 0.1, 0.50000004, 0.5, 0.9, 0.9, 0.9, 0.9, 0.1]).view(-1, 2)
    plan = torch.full((count // 2,), 0.5)
    scored = Scored(plan, plan, following, following, following)
    mask = torch.ones(count // 2, dtype=torch.bool)
    write_samples(tmp_path, 7, plans, scored, Batch(plan, mask, following, following > 0, None, None))
    shown = videos_of_extremes(tmp_path, 7)
    write_extremes(tmp_path, 7, plans, {(p, n): grey(20 * p + 10 * n) for p, n in shown})
    (tmp_path / "config.yaml").write_text("preset: tiny\n")
    html = write_report(tmp_path).read_text(encoding="utf-8")
    parts = re.findall(r'<p>Video (\d)\.</p>.*?<dd>([\d.]+)</dd>.*?base64,([^"]+)"', html, flags=re.DOTALL)
    assert len(parts) == 6
    for video, score, picture in parts:
        number = int(np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))[0, 0, 0]) // 10
        assert number // 2 == int(video) and f"{following.flatten()[number]:.2f}" == score


def test_texts_are_texts_and_all_colours_are_of_the_theme(finished: tuple[Path, str]) -> None:
    _, html = finished
    style = html[html.index("<style>") : html.index("</style>")]
    assert "prefers-color-scheme: dark" in style and "max-width: 760px" in style
    rules = re.sub(r":root \{[^}]*\}", "", style) + html[html.index("<body>") :]
    assert not re.findall(r"(?<![&\w])#[0-9a-fA-F]{3,6}\b", re.sub(r'"data:[^"]*', "", rules))
    assert html.count("A red square is at the top left.</p>") == 2 + 1  # over the pictures: before and after, best


def metrics_of(run: Path, *lines: str) -> str:
    (run / "config.yaml").write_text("preset: tiny\n")
    (run / "metrics.jsonl").write_text("\n".join(lines))
    return write_report(run).read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_of_a_long_run_is_small_and_loses_no_peak(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    names = [name for panel in PANELS for _, name in panel.lines]
    values = generator.normal(0.5, 0.1, (100_000, len(names))).round(6)
    values[31_415, 0] = 7.5
    rows = [dict(zip(names, own, strict=True)) | {"step": i + 1, "time_s": i} for i, own in enumerate(values.tolist())]
    html = metrics_of(tmp_path, *map(json.dumps, rows))
    assert len(html) < 2e6 and "100000 of" not in html and "100000 iterations" in html
    (line, *_) = charts(rows)[0].lines
    heights = [float(point.split()[1]) for point in line.values[1:].split("L")]
    kept = thinned(values[:, 0])
    assert len(kept) <= 802 and len(heights) == len(kept) and 31_415 in kept and min(heights) < 40
    assert {values[kept, 0].min(), values[kept, 0].max()} == {values[:, 0].min(), 7.5}
    gaps = np.where(np.arange(5_000) % 2, np.nan, np.arange(5_000.0))
    assert thinned(gaps)[[0, -1]].tolist() == [0, 4_998] and np.isfinite(gaps[thinned(gaps)]).all()


def test_lines_that_are_zero_all_the_time_are_not_drawn(tmp_path: Path) -> None:
    row = {"time_s": 1, "executor/clip_ratio/low": 0.0, "executor/clip_ratio/high": 0.0, "executor/reward": 0.5}
    html = metrics_of(tmp_path, *(json.dumps(row | {"step": step}) for step in (1, 2)))
    assert html.count("<svg") == 1 and "Reward that is optimised" in html and "Clipped fraction" not in html
    row["executor/clip_ratio/high"] = 0.1
    assert "Clipped fraction" in metrics_of(tmp_path, json.dumps(row | {"step": 1}))


@pytest.mark.parametrize(
    "value", ['"0.5"', "null", "true", "[0.5]", '{"a": 1}', "NaN", "-Infinity", "1e400", "1" + "0" * 400, "1e300",
              "9" * 5000, "[" * 100_000, "5e-324", "-0.0"],
)  # fmt: skip
def test_odd_values_of_metrics_are_missing_and_odd_rows_left_out(tmp_path: Path, value: str) -> None:
    names = ("executor/reward", "rewards/aesthetics/missing", "timing_s/plan", "executor/kl")
    odd = ", ".join(f'"{name}": {value}' for name in names)
    good = (
        '{{"step": {}, "time_s": {}, "executor/reward": 0.5, "rewards/aesthetics/missing": 0.25, "timing_s/plan": 1}}'
    )
    lines = [
        good.format(1, 1.0), f'{{"step": 2, "time_s": 2, {odd}}}', f'{{"step": {value}, "time_s": 1}}',
        f'{{"step": 1, "time_s": {value}}}', value, '{"step": 1.5, "time_s": 1}', '{"step": 0, "time_s": 1}', "[]", "",
        "{", good.format(3, 3), '{"step": 4, "time_s": 4, "execu',
    ]  # fmt: skip
    html = metrics_of(tmp_path, *lines)
    assert "3 iterations" in html and "nan" not in re.sub(r"data:[^\"]*", "", html).lower()
    logger = MetricsLogger(tmp_path, resumed_step=3)
    logger.log(4, {"executor/reward": 0.5})
    logger.close()
    assert [row["step"] for row in read_metrics(tmp_path)][-1] == 4


def test_texts_that_utf_8_cannot_hold_are_shown_all_the_same(tmp_path: Path) -> None:
    name = "run-" + os.fsdecode(b"\xff")
    (tmp_path / name).mkdir()
    assert "No iteration is done yet" in metrics_of(tmp_path / name)
    (tmp_path / name / "config.yaml").write_text('preset: "\\ud83d"\n')
    assert write_report(tmp_path / name).is_file()


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


def test_a_run_ends_with_its_table_on_80_columns_and_the_path(finished: tuple[Path, str]) -> None:
    lines = leave_report(finished[0])
    assert max(map(len, lines)) <= 80 and lines[-1] == f"report: {finished[0] / 'report.html'}"
    assert lines[1].split()[-2:] == ["only", "only"] and lines[0].split() == ["single-", "step-", "planner", "executor"]
    assert any(re.fullmatch(r"average +0.320 +0.420 +0.620 +0.470 +0.520", line) for line in lines)
    (told,) = [line for line in lines if line.startswith("+ TempAct against step-prompt, video by video: +47.")]
    assert told.endswith("%]")


def test_a_report_that_cannot_be_written_does_not_end_a_run_another_way(
    finished: tuple[Path, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_started_run(tmp_path, 1)
    assert leave_report(tmp_path) == [f"report: {tmp_path / 'report.html'}"]  # stopped before its evaluation
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "evaluation.json").write_text('[{"method": 1, "set": [], "judge": {}, "score": "x"}]')
    (tmp_path / "run" / "videos" / "index.json").write_text("{")
    for run in (tmp_path / "run", tmp_path / "gone", tmp_path / "run" / "config.yaml"):
        assert leave_report(run) == []
    assert len(caplog.messages) == 1 and all("no way to write the report" in line for line in caplog.messages)


@pytest.mark.parametrize("policy", ["planner", "executor"])
def test_the_code_of_a_model_card_loads_its_adapter(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With values that are not the preset's."""
    base = get_preset("shapeworld-smoke")
    part = getattr(base, policy)
    config = replace(base, seed=3, device="cpu", **{policy: replace(part, lora=replace(part.lora, rank=4))})
    built = getattr(build_policies(config), policy)
    with torch.no_grad():
        for parameter in built.parameters().values():
            parameter.add_(0.25)
    built.save_adapter(tmp_path / policy)
    card = model_card(policy, config, 40, "+28.9% [+15.8%, +44.0%] in temporal order")
    for told in (policy.capitalize(), "iteration 40", "GSPO", "| base | shapeworld |", "rank 4", "+28.9%", "seed 3"):
        assert told in card
    assert "not evaluated when it was saved" in model_card(policy, config, 40)
    names: dict[str, object] = {}
    monkeypatch.chdir(tmp_path)
    exec(re.findall(r"```python\n(.*)\n```", card, re.DOTALL)[0], names)  # as a reader would
    loaded = names[policy].parameters()
    assert all(torch.equal(loaded[name], value) for name, value in built.parameters().items())
    assert (tmp_path / policy / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o666 & ~UMASK


def test_the_report_says_what_the_held_out_judge_confirms(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("preset: shapeworld\n")
    levels = {("step-prompt", "verifier"): 0.4, ("step-prompt", "matcher"): 0.5, ("+ TempAct", "verifier"): 0.8,
              ("+ TempAct", "matcher"): 0.8}  # fmt: skip
    scores = [MethodScores(method, "long", judge, [level] * 4) for (method, judge), level in levels.items()]
    write_evaluation(tmp_path, scores, Bootstrap(50, 0))
    text = write_report(tmp_path).read_text()
    assert "Of the gain by verifier, matcher confirms 75% [75%, 75%]." in text
