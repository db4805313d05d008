"""The reward set: shapes, the format score, and missing scores that stay missing."""

from __future__ import annotations

import logging

import pytest
import torch
from rewards.reward_cases import score
from torch import Tensor

from tempact.rewards import RewardSet
from tempact.types import Plan, PlanBatch, Prompt, Rollout, Step


def world(plans: int = 2, continuations: int = 3) -> tuple[PlanBatch, Rollout]:
    made = [Plan("words", (Step(0, 24, "words"),), format_score=score) for score in (1.0, 0.5)][:plans]
    frames = torch.zeros(plans, continuations, 24, 3, 24, 24, dtype=torch.uint8)
    return PlanBatch([Prompt("a", "words")], made, plans), Rollout(frames)


def reward_set(**changed: Tensor) -> RewardSet:
    scores = {
        "plan_quality": torch.tensor([0.9, 0.1]),
        "temporal_following": torch.full((2, 3), 0.5),
        "step_following": torch.full((2, 3), 0.25),
        "aesthetics": torch.ones(2, 3),
    } | changed
    return RewardSet(**{name: lambda *given, value=value: value for name, value in scores.items()})


def test_scores_go_where_they_belong() -> None:
    scored = score(reward_set(), *world())
    assert scored.plan_quality.tolist() == pytest.approx([0.9, 0.1])
    assert scored.format_score.tolist() == [1.0, 0.5]
    assert scored.temporal_following.unique().tolist() == [0.5]
    assert scored.step_following.unique().tolist() == [0.25]
    assert scored.aesthetics.unique().tolist() == [1.0]
    assert all(v.dtype == torch.float32 for _, v in scored.named())


def test_missing_stays_missing() -> None:
    lost = torch.tensor([[0.1, float("nan"), 0.3], [float("nan")] * 3])
    scored = score(reward_set(step_following=lost), *world())
    torch.testing.assert_close(scored.step_following, lost, equal_nan=True)
    assert not torch.isnan(scored.temporal_following).any()


def test_a_plan_quality_out_of_range_is_missing() -> None:
    for wild in (1.01, -0.01, float("inf"), -float("inf")):
        scored = score(reward_set(plan_quality=torch.tensor([0.9, wild])), *world())
        assert scored.plan_quality[0].item() == pytest.approx(0.9) and torch.isnan(scored.plan_quality[1])


def test_what_is_no_score_is_missing_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    wild = torch.tensor([[0.0, 1.0, 1.2], [-0.1, float("inf"), 0.5]])
    with caplog.at_level(logging.WARNING):
        scored = score(reward_set(aesthetics=wild), *world())
    assert torch.isnan(scored.aesthetics).tolist() == [[False, False, True], [True, True, False]]
    assert [r.getMessage() for r in caplog.records] == ["aesthetics: 3 scores outside [0, 1] count as missing"]


@pytest.mark.parametrize("name", ["plan_quality", "temporal_following", "step_following", "aesthetics"])
def test_every_reward_of_the_method_has_its_range(name: str) -> None:
    """A number outside it is no score, and the others stay as they are."""
    shape = [(2,), (2, 3)][name != "plan_quality"]
    for wild in (-0.01, 1.01, 300.0, float("inf"), float("-inf")):
        scored = score(reward_set(**{name: torch.full(shape, 0.5).index_fill(0, torch.tensor([1]), wild)}), *world())
        kept, *rest = dict(scored.named())[name]
        assert (kept == 0.5).all() and all(torch.isnan(lost).all() for lost in rest)
        others = [value for other, value in scored.named() if other != name]
        assert not any(torch.isnan(value).any() for value in others)
    for edge in (0.0, 1.0):
        scored = score(reward_set(**{name: torch.full(shape, edge)}), *world())
        assert (dict(scored.named())[name] == edge).all()


def test_scores_that_are_none_for_a_whole_run_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    rewards = reward_set(plan_quality=torch.tensor([7.0, 0.5]))
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            score(rewards, *world())
    assert len(caplog.messages) == 8 and caplog.messages[-1].endswith("(64 so far)")
