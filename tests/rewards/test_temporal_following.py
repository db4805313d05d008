"""Temporal following: the formula of docs/algorithm.md 2.6, the frames that are seen, as many frame scores."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from rewards.reward_cases import STEPS, FakeJudges, always, data_of, plan_batch, rollout_of, scores_of, tint, told

from tempact.rewards.judged import (
    FOLDER,
    HELD_OUT,
    VIDEO,
    JudgedReward,
    VideoVerdict,
    rubric_version,
    video_fields,
)
from tempact.rewards.judges import JudgeCall
from tempact.types import PlanBatch, Rollout

VERDICT: dict[str, Any] = {
    "frame_scores": [1, 2, 3, 4, 5, 9], "temporal_order": 7, "physical": 6, "consistency": 5, "alignment": 3,
    "final": 8,
}  # fmt: skip
SCORE = (0.2 * 4 + 0.3 * 8 + 0.2 * 7 + 0.1 * 6 + 0.1 * 5 + 0.1 * 3) / 10


def temporal_following(judges: FakeJudges, plans: PlanBatch, rollout: Rollout, *settings: Any) -> torch.Tensor:
    return scores_of(JudgedReward(judges, VIDEO, *settings), plans, rollout).result()


def test_the_formula_and_its_ends() -> None:
    assert VideoVerdict(**VERDICT).score() == pytest.approx(SCORE, abs=1e-12)
    for mark, score in ((0, 0.0), (10, 1.0)):
        marks = dict.fromkeys(VERDICT, mark) | {"frame_scores": [mark] * 6}
        assert VideoVerdict(**marks).score() == pytest.approx(score, abs=1e-12)
    assert VideoVerdict(**dict.fromkeys(VERDICT, 10) | {"frame_scores": [10] * 7}).score() <= 1


@pytest.mark.parametrize(
    ("name", "weight"),
    {"final": 0.3, "temporal_order": 0.2, "physical": 0.1, "consistency": 0.1, "alignment": 0.1}.items(),
)
def test_each_weight(name: str, weight: float) -> None:
    marks = dict.fromkeys(VERDICT, 0) | {"frame_scores": [0, 0], name: 10}
    assert VideoVerdict(**marks).score() == pytest.approx(weight)


def test_the_judge_sees_the_whole_of_its_video_and_nothing_of_the_plan() -> None:
    plans = plan_batch(STEPS, STEPS[:1])
    judges = FakeJudges(always(**VERDICT))
    scores = temporal_following(judges, plans, rollout_of(plans, [6, 6], continuations=3))
    torch.testing.assert_close(scores, torch.full((2, 3), SCORE))
    assert len(judges.calls) == 6
    for i, call in enumerate(judges.calls):
        seen = [told(image) for image in call.images]
        assert seen == [(t, tint(*divmod(i, 3))) for t in (0, 23, 46, 70, 93, 116)]
        assert call.role == "temporal_following" and data_of(call) == {"instruction": "a cat sits, jumps, sleeps"}
    assert len({call.media_hash for call in judges.calls}) == 6


def test_the_number_of_pictures_is_a_setting_and_a_short_video_is_shown_whole() -> None:
    plans = plan_batch()
    rollout = rollout_of(plans, [6], continuations=1)
    judges = FakeJudges(always(**VERDICT))
    temporal_following(judges, plans, rollout, 10, HELD_OUT)
    call = judges.calls[0]
    assert [told(image)[0] for image in call.images] == [0, 13, 26, 39, 52, 64, 77, 90, 103, 116]
    assert "10 pictures" in call.rubric.system and call.role == "held_out"
    JudgedReward(judges, VIDEO, 10)([], plans.plans, rollout.frames[:, :, :3], [None])
    short = judges.calls[1]
    assert len(short.images) == 3 and "3 pictures" in short.rubric.system and short.role == "temporal_following"
    assert short.rubric.fields is video_fields(3)


@pytest.mark.parametrize("scores", [[5] * 5, [5] * 7, [], [5, 5, 5, 5, 5, 11], [5, 5, 5, 5, 5, None], 5])
def test_frame_scores_that_do_not_fit_the_pictures_are_missing(scores: object) -> None:
    plans = plan_batch()

    def says(call: JudgeCall) -> str:
        bad = told(call.images[0])[1] == tint(0, 1)
        return json.dumps(VERDICT | {"frame_scores": scores} if bad else VERDICT)

    found = temporal_following(FakeJudges(says), plans, rollout_of(plans, [6], continuations=3))
    assert torch.isnan(found).tolist() == [[False, True, False]]
    assert found[0, 0].item() == pytest.approx(SCORE)


@pytest.mark.parametrize(
    "changed",
    [{"final": -1}, {"final": "8"}, {"temporal_order": None}, {"physical": float("nan")}, {"alignment": 1e999}],
)
def test_a_reply_that_is_not_as_asked_for_is_missing(changed: dict[str, object]) -> None:
    plans = plan_batch()
    judges = FakeJudges(lambda call: json.dumps(VERDICT | changed))
    assert torch.isnan(temporal_following(judges, plans, rollout_of(plans, [6]))).all()
    lost = {name: mark for name, mark in VERDICT.items() if name not in changed}
    judges = FakeJudges(lambda call: json.dumps(lost))
    assert torch.isnan(temporal_following(judges, plans, rollout_of(plans, [6]))).all()


def test_the_version_is_that_of_the_file() -> None:
    head = (FOLDER / "temporal_following.md").read_text().splitlines()[0]
    assert head == f"version: {rubric_version()}"


def test_scores_go_to_their_videos() -> None:
    plans = plan_batch(STEPS, STEPS)

    def says(call: JudgeCall) -> str:
        return json.dumps(VERDICT | {"final": told(call.images[0])[1] / 20})

    found = temporal_following(FakeJudges(says), plans, rollout_of(plans, [6, 6], continuations=3))
    without = SCORE - 0.3 * 8 / 10
    expected = [[without + 0.3 * tint(p, n) / 200 for n in range(3)] for p in range(2)]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_a_whole_group_may_be_missing_and_keeps_its_shape() -> None:
    plans = plan_batch(STEPS, STEPS)
    found = temporal_following(FakeJudges(lambda call: None), plans, rollout_of(plans, [6, 6]))
    assert found.shape == (2, 2) and found.dtype == torch.float32 and torch.isnan(found).all()
