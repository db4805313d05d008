"""The reward set: shapes, the format score, and missing scores that stay missing."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tempact.rewards.base import RewardSet
from tempact.types import Plan, PlanBatch, Prompt, Rollout, Step


@dataclass
class Fixed:
    """Gives back what it was made with."""

    scores: Tensor

    def score(self, plans: PlanBatch, rollout: Rollout | None = None) -> Tensor:
        return self.scores


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
    return RewardSet(**{name: Fixed(value) for name, value in scores.items()})


def test_scores_go_where_they_belong() -> None:
    scored = reward_set().score(*world())
    assert scored.plan_quality.tolist() == pytest.approx([0.9, 0.1])
    assert scored.format_score.tolist() == [1.0, 0.5]
    assert scored.temporal_following.unique().tolist() == [0.5]
    assert scored.step_following.unique().tolist() == [0.25]
    assert scored.aesthetics.unique().tolist() == [1.0]
    assert all(v.dtype == torch.float32 for v in vars(scored).values())


def test_missing_stays_missing() -> None:
    lost = torch.tensor([[0.1, float("nan"), 0.3], [float("nan")] * 3])
    scored = reward_set(step_following=lost).score(*world())
    torch.testing.assert_close(scored.step_following, lost, equal_nan=True)
    assert not torch.isnan(scored.temporal_following).any()


def test_what_is_no_score_is_missing_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    wild = torch.tensor([[0.0, 1.0, 1.2], [-0.1, float("inf"), 0.5]])
    with caplog.at_level(logging.WARNING):
        scored = reward_set(aesthetics=wild).score(*world())
    assert torch.isnan(scored.aesthetics).tolist() == [[False, False, True], [True, True, False]]
    assert [r.getMessage() for r in caplog.records] == ["aesthetics: 3 scores outside [0, 1] count as missing"]
