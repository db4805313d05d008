"""The command that tells the score that plans allow from what executors make of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import bench_plans
from bench.bench_plans import DRAWN, REFERENCE, UNTRAINED, drawn, rows_of
from tempact.errors import UserError
from tempact.presets import get_preset
from tempact.shapeworld.grammar import parse_instruction, reference_plan
from tempact.shapeworld.verifier import verify
from tempact.shapeworld.world import held_out_prompts
from tempact.types import Plan, Step


def test_drawings_of_the_reference_are_perfect_and_those_of_short_steps_are_cut() -> None:
    texts = [prompt.text for prompt in held_out_prompts("hard", 12, 3, "validation")]
    plans, stories = [*map(reference_plan, texts)], [*map(parse_instruction, texts)]
    assert verify(drawn(plans), stories).score.min() > 0.99
    slow = next(i for i, story in enumerate(stories) if story.events[0].slow)
    opening, first, *rest = plans[slow].steps
    early = Step(opening.start, first.end - 3, opening.prompt), Step(first.end - 3, first.end, first.prompt)
    cut = drawn([plans[slow], Plan(texts[slow], (*early, *rest))])
    assert cut.shape == (2, 24, 3, 24, 24) and torch.equal(cut[0, :3], cut[1, :3])
    assert verify(cut, [stories[slow]] * 2).score.diff() < -0.2


def test_steps_that_cannot_be_read_show_nothing() -> None:
    [prompt] = held_out_prompts("simple", 1, 3, "validation")
    plan = reference_plan(prompt.text)
    nothing = Plan(prompt.text, (plan.steps[0], *(Step(s.start, s.end, "Something happens.") for s in plan.steps[1:])))
    [frames] = drawn([nothing])
    assert torch.equal(frames, frames[:1].expand_as(frames))


def test_a_preset_has_rows_of_untrained_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plans.json"
    assert bench_plans.main(["shapeworld-smoke", "--videos", "2", "--device", "cpu", "--save", str(file)]) == 0
    found = json.loads(file.read_text())
    assert [(row["set"], row["planner"], row["executor"]) for row in found["rows"]] == [
        (name, planner, executor)
        for name in ("simple", "hard")
        for planner in (UNTRAINED, REFERENCE)
        for executor in (UNTRAINED, DRAWN)
    ]
    assert found["split"] == "validation" and all(row["videos"] == 2 for row in found["rows"])
    assert found["rows"][3]["verifier"] > 0.99 and found["rows"][2]["verifier"] < 0.99
    assert capsys.readouterr().out.splitlines()[3].split()[:3] == ["simple", "reference", "drawn"]


def test_an_instruction_has_the_same_video_whatever_is_made_beside_it() -> None:
    policies = bench_plans.build_policies(get_preset("shapeworld-smoke"))
    prompts = held_out_prompts("simple", 2, 3, "validation")
    plans = bench_plans.plans_of(policies, REFERENCE, prompts, 1)
    both, alone = (bench_plans.made(policies, some, 1, trained=False) for some in (plans, plans[1:]))
    assert torch.equal(both[1:], alone)
    told: list[dict[str, object]] = []
    rows = rows_of(policies, {"simple": prompts}, 1, trained=True, tell=told.append)
    assert rows == told and [row["planner"] for row in rows[::3]] == ["untrained", "trained", "reference"]
    fresh = [[row[judge] for judge in ("verifier", "matcher")] for row in rows[:2]]
    assert fresh[0] == fresh[1]  # a fresh adapter changes nothing


def test_bad_input_is_told_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match="--videos: found 0; accepted: at least 1"):
        bench_plans.main(["shapeworld-smoke", "--videos", "0"])
    with pytest.raises(
        UserError, match="longlive: found videos of a backbone; accepted: a run or preset of ShapeWorld"
    ):
        bench_plans.main(["longlive"])
