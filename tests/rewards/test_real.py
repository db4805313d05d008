"""The four rewards together: judges work while other work is done, nothing is asked twice, outages come through."""

from __future__ import annotations

import json
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch
from rewards.reward_cases import STEPS, FakeJudges, plan_batch, result, rollout_of, score
from rewards.tiny_clip import tiny_clip

from tempact.config import JudgeSettings, RewardConfig
from tempact.errors import UserError
from tempact.rewards import RewardSet
from tempact.rewards.judges import JudgeCall, JudgeOutage
from tempact.rewards.judges.client import JudgeClient
from tempact.rewards.judges.config import JudgeConfig
from tempact.rewards.pickscore import PickScorer, real_rewards
from tempact.rl.advantages import execution_rewards, group_advantages, plan_rewards
from tempact.types import PlanBatch, Step

REPLIES = {
    "plan_quality": {"faithfulness": 1, "coverage": 1, "temporal": 1, "hallucination": 0},
    "temporal_following": {
        "frame_scores": [5, 5, 5], "temporal_order": 5, "physical": 5, "consistency": 5, "alignment": 5, "final": 5,
    },
    "step_following": {"subject": 6, "scene": 6, "action": 6, "appearance": 6, "final": 6},
}  # fmt: skip


def says(call: JudgeCall) -> str:
    return json.dumps(REPLIES[call.role])


def rewards_of(judges: FakeJudges) -> RewardSet:
    return real_rewards(judges, PickScorer(*tiny_clip()), JudgeSettings(video_frames=3, step_frames=2))


def test_all_four_scores_and_their_shapes() -> None:
    judges = FakeJudges(says)
    rewards = rewards_of(judges)
    plans = plan_batch(STEPS, [Step(0, 30, "all")])
    scored = score(rewards, plans, rollout_of(plans, [6, 3], continuations=3))
    assert scored.plan_quality.tolist() == pytest.approx([0.9, 0.9])
    assert scored.format_score.tolist() == [1.0, 1.0]
    assert scored.temporal_following.flatten().tolist() == pytest.approx([0.5] * 6)
    assert scored.step_following[0].tolist() == pytest.approx([0.6] * 3)
    assert torch.isfinite(scored.aesthetics[0]).all()
    assert torch.isnan(scored.step_following[1]).all() and torch.isnan(scored.aesthetics[1]).all()
    assert all(v.dtype == torch.float32 and v.device.type == "cpu" for _, v in scored.named())
    assert {call.role for call in judges.calls} == set(REPLIES) and len(judges.calls) == 2 + 6 + 3
    assert {len(call.images) for call in judges.calls} == {0, 3, 2}
    assert rewards.metrics() == {"judge/calls": 11.0, "rewards/aesthetics/truncated": 0.0}
    rewards.close()
    assert judges.closed


def test_judges_work_while_the_next_videos_are_made() -> None:
    judges = FakeJudges(says, hold=True)
    rewards = rewards_of(judges)
    plans = plan_batch(STEPS, STEPS, STEPS)
    scoring = rewards.begin(plans)
    assert [call.role for call in judges.calls] == ["plan_quality"] * 3
    scoring.add(rollout_of(plan_batch(STEPS), [6]))
    assert len(judges.waiting) == 3 + 2 + 2  # no judge has answered
    scoring.add(rollout_of(plan_batch(STEPS, STEPS), [6, 6]))
    assert len(judges.waiting) == 3 + 6 + 6
    assert all(torch.isfinite(returned["aesthetics"]).all() for _, returned in scoring.parts)
    judges.release()
    scored = result(scoring)
    assert scored.plan_quality.tolist() == pytest.approx([0.9] * 3)
    assert scored.temporal_following.shape == scored.step_following.shape == scored.aesthetics.shape == (3, 2)
    assert len(judges.calls) == 3 + 6 + 6  # nothing is asked twice


def test_videos_in_parts_are_scored_as_together() -> None:
    plans = plan_batch(STEPS, STEPS)
    whole = rollout_of(plans, [6, 3])

    def vary(call: JudgeCall) -> str:
        marks = REPLIES[call.role] | ({"final": len(call.images[0]) % 7} if call.images else {})
        return json.dumps(marks)

    together = score(rewards_of(FakeJudges(vary)), plans, whole)
    scoring = rewards_of(FakeJudges(vary)).begin(plans)
    for p, start in enumerate((6, 3)):
        part = rollout_of(plan_batch(STEPS), [start])
        scoring.add(replace(part, frames=whole.frames[p : p + 1]))
    parts = result(scoring)
    for (name, scores), (_, expected) in zip(parts.named(), together.named(), strict=True):
        torch.testing.assert_close(scores, expected, equal_nan=True, msg=name)


def test_scores_of_videos_that_never_came_are_no_scores() -> None:
    scoring = rewards_of(FakeJudges(says)).begin(plan_batch(STEPS, STEPS))
    scoring.add(rollout_of(plan_batch(STEPS), [6]))
    with pytest.raises(AssertionError, match="scores of others than"):
        result(scoring)


def test_missing_scores_leave_the_groups_and_change_nobody_elses_advantage() -> None:
    """Invariant 27, from the judge's reply to the advantage."""
    plans = plan_batch(STEPS, STEPS)
    rollout = rollout_of(plans, [6, 6], continuations=4)

    def advantages(lost: int | None) -> list[torch.Tensor]:
        number = iter(range(1000))

        def vary(call: JudgeCall) -> str | None:
            if call.role != "step_following":
                return says(call)
            i = next(number)
            return None if i == lost else json.dumps(REPLIES["step_following"] | {"action": i % 4 + 1})

        scored = score(rewards_of(FakeJudges(vary)), plans, rollout)
        scored.aesthetics.fill_(0.8)
        of_plans = group_advantages(plan_rewards(scored, RewardConfig()).view(1, -1), 1.0, 1e-4)
        assert of_plans[1].all() and torch.isfinite(of_plans[0]).all()
        return list(group_advantages(execution_rewards(scored, RewardConfig()), 10.0, 1e-6)[:2])

    (whole, all_there), (part, mask) = advantages(None), advantages(1)
    assert all_there.all() and mask.tolist() == [[True, False, True, True], [True] * 4]
    assert part[0, 1] == 0
    unit = whole[1, 3] / part[1, 3]  # the deviation over all changes by one factor
    torch.testing.assert_close(part[1] * unit, whole[1])
    assert part[0].sum().abs() < 1e-5


class DownJudges(FakeJudges):
    def submit(self, calls: list[JudgeCall]) -> list[Future]:
        futures = super().submit([])
        for _ in calls:
            futures.append(Future())
            futures[-1].set_exception(JudgeOutage("judge plan_quality: no answer for 300 s"))
        return futures


def test_an_outage_reaches_the_trainer() -> None:
    plans: PlanBatch = plan_batch(STEPS)
    with pytest.raises(JudgeOutage, match="no answer"):
        score(rewards_of(DownJudges(says)), plans, rollout_of(plans, [6]))


def test_judges_and_pickscore_are_opened_from_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    for name in ("TEMPACT_JUDGE_BASE_URL", "TEMPACT_JUDGE_MODEL", "VLLM_BASE_URL", "LLM_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="found no address of the judge plan_quality"):
        JudgeConfig.from_environment(settings=JudgeSettings())
    monkeypatch.setenv("TEMPACT_JUDGE_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("TEMPACT_JUDGE_MODEL", "judge")
    settings = JudgeSettings(
        deadline_s=7.0, attempt_s=3.0, attempts=2, outage_s=11.0, cache=str(tmp_path / "c.sqlite"),
        aesthetics_weights=str(tmp_path), aesthetics_processor=str(tmp_path),
    )  # fmt: skip
    found = JudgeConfig.from_environment(settings=settings)
    JudgeClient(found).close()
    assert (found.deadline_s, found.attempt_s, found.attempts, found.outage_s) == (7.0, 3.0, 2, 11.0)
    assert found.cache == tmp_path / "c.sqlite" and found.cache.exists()
    with pytest.raises(UserError, match="judges.aesthetics_weights"):
        PickScorer.load(settings, torch.device("cpu"))
