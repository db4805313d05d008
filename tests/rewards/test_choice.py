"""Rewards that choose a continuation: weights, missing scores, who is asked and when."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from tempact.config import RewardConfig
from tempact.errors import UserError
from tempact.rewards import Reward, RewardSet, Span, unasked
from tempact.rewards.choice import TOTAL, Chooser
from tempact.types import Plan, Step

NAN = math.nan
PLAN = Plan("instruction", (Step(0, 3, "one"), Step(3, 9, "two")))
SPAN = Span(3, 5, Step(3, 6, "two"))
FRAMES = torch.zeros(4, 6, 3, 2, 2, dtype=torch.uint8)
SOUND = torch.zeros(4, dtype=torch.bool)


def scoring(*scores: float):
    return lambda prompts, plans, frames, spans: torch.tensor([scores])


def refuses(*_: object) -> None:
    raise AssertionError("asked")


def chosen(step, pictures, names=(), custom=(), broken=SOUND, **weights):
    rewards = RewardSet(refuses, refuses, step, pictures, custom)
    return Chooser.of(rewards, RewardConfig(**weights), names)(PLAN, FRAMES, SPAN, broken)


def test_the_weighted_sum_of_trainings_rewards_chooses() -> None:
    step, pictures = scoring(0.5, 0.6, 0.2, 0.1), scoring(0.5, 0.2, 0.9, 0.0)
    found = chosen(step, pictures)  # 0.6 and 0.4
    assert found.chosen == 0 and found.scores[TOTAL] == pytest.approx([0.5, 0.44, 0.48, 0.06])
    assert found.scores["step_following"] == pytest.approx([0.5, 0.6, 0.2, 0.1])
    assert chosen(step, pictures, aesthetics=0.0).chosen == 1 and chosen(step, refuses, aesthetics=0.0).chosen == 1
    assert chosen(step, pictures, step_following=0.1).chosen == 2
    assert (
        chosen(step, refuses, ["step_following"]).chosen == 1 and chosen(refuses, pictures, ["aesthetics"]).chosen == 2
    )
    assert chosen(scoring(0, 1, 1, 0), scoring(1, 1, 1, 1)).chosen == 1  # the first of equals


def test_rewards_of_ones_own() -> None:
    """Those of continuations choose beside the method's, those of plans only where they are named."""
    step, pictures = scoring(0.5, 0.5, 0.5, 0.5), scoring(0.5, 0.5, 0.5, 0.5)
    own = Reward("own", scoring(0, 0, 0, 7), weight=2.0)
    of_plans = Reward("of_plans", scoring(0, 0, 9, 0), level="plan")
    found = chosen(step, pictures, custom=(own, Reward("asleep", refuses, level="plan")))
    assert found.chosen == 3 and found.scores[TOTAL][3] == pytest.approx(14.5)
    assert chosen(refuses, refuses, ["of_plans"], (own, of_plans)).chosen == 2
    one = Reward("one", lambda prompts, plans, frames, spans: torch.tensor([3.0]), level="plan")
    assert chosen(refuses, refuses, ["one"], (one,)).scores == {"one": [3.0] * 4, TOTAL: [3.0] * 4}


def test_missing_scores_never_win() -> None:
    step, pictures = scoring(NAN, 0.1, 0.9, 0.3), scoring(0.9, 0.9, NAN, 0.9)
    found = chosen(step, pictures)
    assert found.chosen == 3 and [math.isnan(one) for one in found.scores[TOTAL]] == [True, False, True, False]
    nothing = scoring(NAN, NAN, NAN, NAN)
    assert chosen(nothing, scoring(0.1, 0.2, 0.3, 0.1)).chosen == 2  # a reward that nobody has is left out
    none = chosen(nothing, nothing)
    assert none.chosen == 0 and all(map(math.isnan, none.scores[TOTAL]))
    assert chosen(nothing, nothing, broken=torch.tensor([True, False, False, False])).chosen == 1
    broken = torch.tensor([False, False, False, True])
    assert chosen(step, pictures, broken=broken).chosen == 1
    assert chosen(step, pictures, broken=torch.ones(4, dtype=torch.bool)).chosen == 0
    assert chosen(scoring(0.1, 3.0, 0.2, 0.2), pictures).chosen == 3  # outside [0, 1] is no score; 2 lacks the other


def test_all_rewards_are_asked_before_any_is_waited_for() -> None:
    """Each answers once both have been asked."""
    both = Barrier(2)
    with ThreadPoolExecutor(2) as pool:

        def ask(*scores: float):
            def answer() -> torch.Tensor:
                both.wait(timeout=20)
                return torch.tensor([scores])

            return lambda *_: pool.submit(answer)

        assert chosen(ask(0.1, 0.2, 0.3, 0.4), ask(0.1, 0.1, 0.1, 0.1)).chosen == 3


def test_functions_are_given_the_step_as_far_as_it_has_been_made() -> None:
    given: list[tuple] = []

    def step(*asked) -> torch.Tensor:
        given.append(asked)
        return torch.zeros(1, 4)

    chosen(step, step)
    for prompts, plans, frames, spans in given:
        assert (prompts, plans, spans) == (["instruction"], [PLAN], [SPAN]) and frames.shape == (1, *FRAMES.shape)
    assert len(given) == 2


def test_which_frames_are_needed() -> None:
    rewards = RewardSet(unasked, unasked, unasked, unasked, (Reward("own", unasked),))
    for names, local in (((), False), (("step_following", "aesthetics"), True), (("temporal_following",), False)):
        assert Chooser.of(rewards, RewardConfig(), names).local is local


def test_rewards_that_are_not_there_are_named() -> None:
    rewards = RewardSet(unasked, unasked, unasked, unasked, (Reward("own", unasked),))
    with pytest.raises(UserError, match="best_of.rewards: found 'plan_quality'; accepted: temporal_following, .*, own"):
        Chooser.of(rewards, RewardConfig(), ["plan_quality"])
    with pytest.raises(UserError, match="best_of.rewards: found none with a weight"):
        Chooser.of(rewards, RewardConfig(aesthetics=0.0), ["aesthetics"])
