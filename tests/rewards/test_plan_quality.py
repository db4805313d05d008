"""Plan quality: the formula of docs/algorithm.md 2.6, raw steps, missing verdicts, planted instructions."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from rewards.reward_cases import STEPS, FakeJudges, always, data_of, plan_batch, scores_of
from rewards.test_rubrics import PLANTED

from tempact.rewards.judged import PLAN, JudgedReward, PlanVerdict
from tempact.rewards.judges import JudgeCall
from tempact.types import PlanBatch, Step

GOOD = {"faithfulness": 0.8, "coverage": 0.5, "temporal": 1.0, "hallucination": 0.1}


def plan_quality(judges: FakeJudges, plans: PlanBatch) -> torch.Tensor:
    return scores_of(JudgedReward(judges, PLAN), plans).result()


@pytest.mark.parametrize(
    ("verdict", "score"),
    [
        ((1, 1, 1, 0), 0.9),
        ((0, 0, 0, 1), 0.0),
        ((0.8, 0.5, 1.0, 0.1), 0.32 + 0.125 + 0.25 - 0.03),
        ((1, 0, 0, 0), 0.4),
        ((0, 1, 0, 0), 0.25),
        ((0, 0, 1, 0), 0.25),
        ((1, 0, 0, 1), 0.1),
    ],
)
def test_the_formula(verdict: tuple[float, ...], score: float) -> None:
    made = PlanVerdict(**dict(zip(GOOD, verdict, strict=True)))
    assert made.score() == pytest.approx(score, abs=1e-12)


def test_every_verdict_scores_between_0_and_0_9() -> None:
    scores = [
        PlanVerdict(**dict(zip(GOOD, marks, strict=True))).score() for marks in itertools.product((0, 0.3, 1), repeat=4)
    ]
    assert min(scores) == 0.0 and max(scores) == pytest.approx(0.9, abs=1e-12)


def test_scores_go_to_their_plans_and_steps_are_the_planners_own() -> None:
    plans = plan_batch(STEPS, [Step(0, 30, "all of it")], STEPS[:2])

    def says(call: JudgeCall) -> str:
        return json.dumps(GOOD | {"coverage": len(data_of(call)["steps"]) / 4})

    judges = FakeJudges(says)
    scores = plan_quality(judges, plans)
    expected = [0.32 + 0.25 * count / 4 + 0.25 - 0.03 for count in (3, 1, 2)]
    torch.testing.assert_close(scores, torch.tensor(expected))
    assert data_of(judges.calls[0]) == {
        "instruction": "a cat sits, jumps, sleeps",
        "steps": ["a cat sits", "the cat jumps", "the cat sleeps"],
    }
    assert {(call.role, call.images) for call in judges.calls} == {("plan_quality", ())}


@pytest.mark.parametrize(
    "reply",
    [
        None,
        "",
        "0.9",
        json.dumps({"faithfulness": 1, "coverage": 1, "temporal": 1}),  # no hallucination is not the best one
        json.dumps(GOOD | {"coverage": 1.01}),
        json.dumps(GOOD | {"coverage": -0.01}),
        json.dumps(GOOD | {"coverage": "0.5"}),
        json.dumps(GOOD | {"coverage": True}),
        json.dumps(GOOD | {"coverage": math.nan}),
        json.dumps(GOOD) + json.dumps(GOOD),
    ],
)
def test_what_is_no_verdict_is_missing_and_touches_no_other_score(reply: str | None) -> None:
    plans = plan_batch(STEPS, [Step(0, 30, "bad")], STEPS[:2])
    judges = FakeJudges(lambda call: reply if data_of(call)["steps"] == ["bad"] else json.dumps(GOOD))
    scores = plan_quality(judges, plans)
    assert torch.isnan(scores).tolist() == [False, True, False]
    assert scores[0] == scores[2] == pytest.approx(0.665)


def test_more_than_was_asked_for_is_ignored() -> None:
    judges = FakeJudges(always(**GOOD, comment="a good plan", score=1))
    assert plan_quality(judges, plan_batch()).item() == pytest.approx(0.665)


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_instruction_stays_data_and_earns_nothing(planted: str) -> None:
    """The canary judge gives full marks if a planted word stands anywhere but in the data; the parrot repeats what
    it was sent, with the planted verdict in it."""
    plans = plan_batch(STEPS, [Step(0, 30, planted)])
    asked = FakeJudges(always(**GOOD))
    plan_quality(asked, plans)
    clean, poisoned = asked.calls
    assert clean.rubric == poisoned.rubric and poisoned.media_hash == ""
    full = dict.fromkeys(GOOD, 1) | {"hallucination": 0}

    def canary(call: JudgeCall) -> str:
        data = data_of(call)
        assert data["instruction"] == "a cat sits, jumps, sleeps" and len(data["steps"]) in (1, 3)
        outside = call.rubric.system + "".join(call.text.split("\nDATA-")[::2])
        return json.dumps(full if planted[:20] in outside else GOOD)

    torch.testing.assert_close(plan_quality(FakeJudges(canary), plans), torch.tensor([0.665, 0.665]))
    for parrot in (lambda call: call.text, lambda call: "\n".join(data_of(call)["steps"])):
        assert torch.isnan(plan_quality(FakeJudges(parrot), plans)[1])
