"""One iteration after another: exact first ratios, seeds, switch frames, refused updates, missing rewards
(docs/algorithm.md 6, items 5, 20, 21, 27, 30)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from test_references import undocumented
from torch import Tensor

from tempact.config import RunConfig, TrainerConfig
from tempact.evaluation import BOTH, EXECUTOR_ONLY, METHODS, PLANNER_ONLY, SINGLE, STEP
from tempact.evaluation.harness import Evaluation
from tempact.evaluation.statistics import MethodScores
from tempact.executor import rollout as rollout_module
from tempact.executor.rollout import Branch
from tempact.executor.sampler import gaussian_noise
from tempact.policies import build_policies, build_trainer
from tempact.presets import get_preset
from tempact.rewards import Judging
from tempact.runs.evaluation import shapeworld_suite
from tempact.seeds import derive_seed
from tempact.trainer import (
    Iteration,
    NothingLearned,
    TooManySkippedUpdates,
    Trainer,
    WeightsNotFinite,
    copied,
    judging_of,
    split,
)
from tempact.types import Plan, PlanBatch, Rollout, Scored
from tempact.video import LOSSLESS

NAN = float("nan")


def smoke(seed: int = 0, prompts: int = 1, plans: int = 2, **trainer: int) -> RunConfig:
    """The smoke preset on the CPU, with three noise levels, of which two are trained, and shorter plans."""
    base = get_preset("shapeworld-smoke")
    return replace(
        base,
        seed=seed,
        device="cpu",
        data=replace(base.data, prompts_per_iteration=prompts),
        planner=replace(base.planner, plans_per_prompt=plans, max_new_tokens=64),
        executor=replace(base.executor, timesteps=(1000, 750, 500)),
        trainer=TrainerConfig(**{"iterations": 20, **trainer}),
    )


def make(config: RunConfig, scored: Scored | None = None) -> Trainer:
    """A fresh trainer; with `scored` every iteration gets these rewards."""
    trainer = build_trainer(config, build_policies(config))
    if scored is not None:
        trainer.rewards = FixedRewards(scored)
    return trainer


@dataclass
class FixedRewards:
    scored: Scored
    told: list[object] = field(default_factory=list)

    def begin(self, plans: PlanBatch, *own: object) -> FixedRewards:
        self.told.append(plans)
        return self

    def add(self, rollout: Rollout, own: range) -> None:
        self.told.append(rollout)

    def scores(self) -> list:
        return []

    def whole(self, plans: PlanBatch, processes: list) -> Scored:
        return self.scored

    def metrics(self) -> dict[str, float]:
        return {"judge/told": float(len(self.told))}


def rewards(following: list[list[float]], steps: list[list[float]]) -> Scored:
    """Temporal following V [P, N] and step following L [P, N]; the other rewards are equal for all."""
    count = len(following)
    return Scored(
        torch.full((count,), 0.5), torch.ones(count), torch.tensor(following), torch.tensor(steps),
        torch.full((count, 2), 0.5),
    )  # fmt: skip


def iterate(trainer: Trainer) -> Iteration:
    return trainer.iterate(lambda phase: None)


def test_rewards_know_the_plans_before_there_are_videos_and_say_how_they_did() -> None:
    trainer = make(smoke(), rewards([[0.2, 0.4], [0.6, 0.8]], [[0.1, 0.5], [0.3, 0.7]]))
    rolled_out = trainer.executor.rollout

    def rollout(plans: list[Plan], *more: object) -> Rollout:
        assert [batch.plans for batch in trainer.rewards.told] == [plans]
        return rolled_out(plans, *more)

    trainer.executor.rollout = rollout
    done = iterate(trainer)
    assert trainer.rewards.told == [done.plans, done.rollout] and done.metrics["judge/told"] == 2.0


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that learns, by name, copied."""
    both = {"planner": trainer.planner_policy, "executor": trainer.executor_policy}
    return {f"{who} {name}": p.detach().clone() for who, own in both.items() for name, p in own.parameters.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor], who: str = "") -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one if name.startswith(who))


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith(("timing_s/", "memory/"))}


@dataclass
class Learned:
    """Two iterations of one seed."""

    start: dict[str, Tensor]
    first: Iteration
    second: Iteration
    end: dict[str, Tensor]
    trainer: Trainer


def learn(config: RunConfig) -> Learned:
    trainer = make(config)
    return Learned(weights(trainer), iterate(trainer), iterate(trainer), weights(trainer), trainer)


@pytest.fixture(scope="module")
def learned() -> Learned:
    return learn(smoke())


def test_the_first_update_starts_at_ratio_one_and_distance_zero(learned: Learned) -> None:
    metrics = learned.first.metrics
    for who in ("planner", "executor"):
        assert metrics[f"{who}/ratio_deviation"] == 0.0 and metrics[f"{who}/ratio"] == 1.0
        assert metrics[f"{who}/kl"] == 0.0
        assert metrics[f"{who}/clip_ratio/low"] == metrics[f"{who}/clip_ratio/high"] == 0.0
        assert metrics[f"{who}/grad_norm"] > 0
        assert not equal(learned.start, learned.end, who)


def test_later_iterations_are_on_policy_and_away_from_the_reference(learned: Learned) -> None:
    metrics = learned.second.metrics
    for who in ("planner", "executor"):
        assert metrics[f"{who}/ratio_deviation"] == 0.0 and metrics[f"{who}/kl"] > 0


def same_videos(one: Rollout, other: Rollout) -> bool:
    return torch.equal(one.frames, other.frames) and torch.equal(one.transition.states, other.transition.states)


def test_one_seed_gives_one_run_bit_for_bit(learned: Learned) -> None:
    again = learn(smoke())
    assert equal(again.start, learned.start) and equal(again.end, learned.end)
    for mine, other in ((again.first, learned.first), (again.second, learned.second)):
        assert untimed(mine.metrics) == untimed(other.metrics)
        assert mine.plans.plans == other.plans.plans and same_videos(mine.rollout, other.rollout)


def test_an_iteration_is_the_same_however_many_videos_advance_together() -> None:
    """Videos, records and rewards in every bit, and with them the advantages."""
    found = []
    for together in (0, 2, 5):
        config = smoke(prompts=2)
        config = replace(config, executor=replace(config.executor, rollout_videos=together))
        trainer = make(config)
        done = iterate(trainer)
        found.append((done, trainer.executor.cache.rows_total))
    whole, most = found[0]
    for done, rows in found[1:]:
        assert done.plans.plans == whole.plans.plans and same_videos(done.rollout, whole.rollout) and rows < most
        mine, other = (each.rollout.transition for each in (done, whole))
        assert mine.prompts == other.prompts and torch.equal(mine.start, other.start)
        assert torch.equal(mine.noises, other.noises) and torch.equal(mine.prefix, other.prefix)
        for (name, scores), (_, expected) in zip(done.scored.named(), whole.scored.named(), strict=True):
            assert torch.equal(scores, expected), name
        assert torch.equal(done.batch.execution_advantage, whole.batch.execution_advantage)


def test_another_seed_gives_another_run(learned: Learned) -> None:
    trainer = make(smoke(seed=1))
    start, first = weights(trainer), iterate(trainer)
    assert not equal(start, learned.start)
    assert first.plans.prompts[0].text != learned.first.plans.prompts[0].text
    assert untimed(first.metrics) != untimed(learned.first.metrics)


def test_iterations_draw_anew(learned: Learned) -> None:
    assert learned.first.plans.prompts[0].text != learned.second.plans.prompts[0].text
    assert not torch.equal(learned.first.rollout.transition.noises, learned.second.rollout.transition.noises)
    seeds = {derive_seed(s, i, p) for s in range(5) for i in range(50) for p in ("plans", "noise", "prompts")}
    assert len(seeds) == 750 and all(0 <= seed < 2**63 for seed in seeds)


def test_metrics_describe_the_iteration(learned: Learned) -> None:
    metrics, scored, batch = learned.first.metrics, learned.first.scored, learned.first.batch
    for name, values in scored.named():
        assert metrics[f"rewards/{name}/mean"] == pytest.approx(values.mean().item())
        assert metrics[f"rewards/{name}/std"] == pytest.approx(values.std(correction=0).item())
        assert metrics[f"rewards/{name}/missing"] == 0.0
    following = 0.85 * scored.temporal_following.mean() + 0.15 * scored.plan_quality.mean()
    assert metrics["planner/reward"] == pytest.approx(following.item() - 0.5 * (1 - scored.format_score.mean().item()))
    # a group sums to 0 as precisely as its rewards are known: in units of reward, whatever their deviation
    for name, advantage in (("planner", batch.plan_advantage), ("executor", batch.execution_advantage)):
        assert (advantage.sum(-1) * metrics[f"{name}/reward_std"]).abs().max() < 1e-6
    assert {f"timing_s/{phase}" for phase in ("plan", "rollout", "rewards", "update")} <= metrics.keys()


def test_plans_of_trees_are_judged_one_by_one_where_bits_are_promised() -> None:
    base, cpu, cuda = smoke(), torch.device("cpu"), torch.device("cuda")
    for own in ({"forks": "tree", "branching": (1, 2)}, {"forks": "random_chunk"}):
        config = replace(base, executor=replace(base.executor, **own))
        assert judging_of(config, cpu, True).one_by_one and judging_of(config, cuda, False).one_by_one
        assert judging_of(replace(config, deterministic=True), cuda, True).one_by_one
        assert not judging_of(config, cuda, True).one_by_one
    assert judging_of(base, cpu, False) == Judging()


def test_split_cuts_consecutive_parts_of_near_equal_length() -> None:
    assert split(8, 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert split(5, 2) == [[0, 1], [2, 3, 4]]
    assert split(2, 3) == [[0], [1]] and split(3, 1) == [[0, 1, 2]]
    for count in range(1, 12):
        for parts in range(1, 12):
            pieces = split(count, parts)
            assert [i for piece in pieces for i in piece] == list(range(count)) and all(pieces)
            assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


@pytest.fixture(scope="module")
def two_updates() -> tuple[Trainer, Iteration, list[dict]]:
    """An iteration of two updates, with what each of them was given and measured."""
    seen: list[dict] = []
    trainer = make(smoke(updates_per_iteration=2), rewards([[0.9, 0.9], [0.1, 0.1]], [[0.2, 0.8], [0.8, 0.2]]))

    def watched(who: str, update: Callable) -> Callable:
        def run(batch, plans, old, total, *units):
            metrics = update(batch, plans, old, total, *units)
            seen.append({"who": who, "plans": plans, "old": old, "metrics": metrics})
            return metrics

        return run

    trainer.planner.update = watched("planner", trainer.planner.update)  # type: ignore[method-assign]
    trainer.executor.update = watched("executor", trainer.executor.update)  # type: ignore[method-assign]
    return trainer, iterate(trainer), seen


def test_two_updates_take_halves_and_only_the_second_is_off_policy(two_updates: tuple) -> None:
    _, iteration, seen = two_updates
    assert [(each["who"], each["plans"]) for each in seen] == [
        ("planner", [0]), ("executor", [0]), ("planner", [1]), ("executor", [1])
    ]  # fmt: skip
    first, later = seen[:2], seen[2:]
    assert all(each["old"] is None and each["metrics"]["ratio_deviation"] == 0.0 for each in first)
    assert all(each["metrics"]["ratio_deviation"] > 0 and each["metrics"]["kl"] > 0 for each in later)
    for each, end in zip(seen, ("", "", "@2", "@2"), strict=True):  # no update's metrics hide those of another
        for name, value in each["metrics"].items():
            assert iteration.metrics[f"{each['who']}/{name}{end}"] == value
    assert iteration.metrics["planner/grad_norm"] > 0 and iteration.metrics["executor/grad_norm@2"] > 0
    assert undocumented(iteration.metrics) == ["judge/told"]


def test_old_values_are_those_from_before_the_first_step(two_updates: tuple) -> None:
    """In the first iteration that policy is the reference, which has not moved since."""
    trainer, iteration, seen = two_updates
    with torch.no_grad():
        start = trainer.planner.log_probs(iteration.batch.tokens, reference=True)[[1]]
        moved = trainer.planner.log_probs(iteration.batch.tokens)[[1]]
    old = seen[2]["old"][1]
    start, moved = start[0, : len(old)], moved[0, : len(old)]
    assert torch.allclose(old, start, atol=1e-6) and not torch.allclose(moved, start, atol=1e-6)
    transition = iteration.batch.transition
    with trainer.executor.reference():
        start = trainer.executor.velocities(transition, [1])
    assert torch.equal(seen[3]["old"], start)
    assert not torch.equal(trainer.executor.velocities(transition, [1]), start)


def test_an_unscored_plan_does_not_shift_the_old_values_of_the_others() -> None:
    """Nothing moves at learning rate 0, so the second update's ratios are 1 for the right old velocities only."""
    config = smoke(plans=4, updates_per_iteration=2)
    still = replace(config.executor, optim=replace(config.executor.optim, lr=0.0))
    steps = [[0.2, 0.8], [0.8, 0.2], [NAN, NAN], [0.3, 0.6]]
    iteration = iterate(make(replace(config, executor=still), rewards([[0.1, 0.1], [0.2, 0.2]] * 2, steps)))
    assert iteration.batch.execution_mask.tolist() == [[True, True], [True, True], [False, False], [True, True]]
    assert iteration.metrics["executor/ratio_deviation"] < 1e-6


@pytest.fixture
def learning() -> Trainer:
    """Rewards that always give both policies a gradient."""
    config = smoke(max_skipped_updates=2)
    return make(config, rewards([[0.9, 0.9], [0.1, 0.1]], [[0.2, 0.8], [0.8, 0.2]]))


@pytest.mark.parametrize("who", ["planner", "executor"])
def test_a_gradient_that_is_not_finite_is_refused(learning: Trainer, who: str) -> None:
    policy, other = learning.planner_policy, learning.executor_policy
    if who == "executor":
        policy, other = other, policy
    parameter = next(iter(policy.parameters.values()))
    hook = parameter.register_hook(lambda gradient: gradient * NAN)
    start, average = weights(learning), {name: value.clone() for name, value in learning.ema.average.items()}
    steps = learning.iterations(lambda phase: None)
    for count in (1, 2):
        metrics = next(steps).metrics
        assert metrics[f"{who}/skipped_updates"] == count and np.isnan(metrics[f"{who}/grad_norm"])
        assert equal(weights(learning), start, who) and not policy.optimizer.state
        assert not any(p.grad.any() for p in policy.parameters.values())
    assert other.skipped == 0 and not equal(weights(learning), start, "executor" if who == "planner" else "planner")
    assert learning.ema.updates == (0 if who == "executor" else 2)
    assert equal(learning.ema.average, average) == (who == "executor")
    assert learning.state()["skipped"] == ([2, 0] if who == "planner" else [0, 2])
    hook.remove()
    assert next(steps).metrics[f"{who}/skipped_updates"] == 0.0
    assert not equal(weights(learning), start, who)


def test_too_many_refused_updates_end_the_run_after_a_whole_iteration(learning: Trainer) -> None:
    for parameter in learning.executor_policy.parameters.values():
        parameter.register_hook(lambda gradient: gradient * NAN)
    rows: list[int] = []
    with pytest.raises(TooManySkippedUpdates, match="executor: 3 updates in a row"):
        rows.extend(iteration.number for iteration in learning.iterations(lambda phase: None))
    assert rows == [1, 2, 3] and learning.done == 3  # the third is recorded, too


@pytest.mark.parametrize(
    ("scored", "who"),
    [
        (rewards([[NAN] * 2] * 2, [[NAN] * 2] * 2), "planner"),  # judges that refuse everything
        (rewards([[0.5] * 2] * 2, [[0.5] * 2] * 2), "planner"),  # a judge that gives one score to all
        (rewards([[0.9] * 2, [0.1] * 2], [[NAN, 0.4]] * 2), "executor"),  # one policy goes on, the other has nothing
        (rewards([[0.5] * 2] * 2, [[0.2, 0.8]] * 2), "planner"),
    ],
    ids=["missing", "equal", "executor only", "planner only"],
)
def test_iterations_from_which_nothing_can_be_learned_end_the_run(scored: Scored, who: str) -> None:
    trainer = make(smoke(max_idle_iterations=2), scored)
    done: list[int] = []
    with pytest.raises(NothingLearned, match=f"{who}: 2 iterations in a row .*trainer.max_idle_iterations"):
        done.extend(iteration.number for iteration in trainer.iterations(lambda phase: None))
    assert done == [1, 2] and trainer.state()["idle"][who] == 2


def test_one_scored_group_starts_the_count_of_idle_iterations_anew(learning: Trainer) -> None:
    known, nothing = learning.rewards, FixedRewards(rewards([[NAN] * 2] * 2, [[NAN] * 2] * 2))
    for scored, idle in ((nothing, 1), (nothing, 2), (known, 0), (nothing, 1)):
        learning.rewards = scored
        iterate(learning)
        assert learning.idle == {"planner": idle, "executor": idle}
    frozen = make(replace(smoke(max_idle_iterations=1), planner=replace(smoke().planner, train=False)), known.scored)
    assert next(frozen.iterations(lambda phase: None)).number == 1 and frozen.idle == {"planner": 0, "executor": 0}


def state_of(trainer: Trainer) -> dict:
    return copied(trainer.state() | {"planner": dict(trainer.planner_policy.parameters)})


@pytest.mark.parametrize("who", ["planner", "executor"])
def test_weights_that_a_step_made_infinite_are_taken_back(learning: Trainer, who: str) -> None:
    iterate(learning)
    learning.confirm()
    before = state_of(learning)
    policy = learning.planner_policy if who == "planner" else learning.executor_policy
    step = policy.optimizer.step

    def overflowing() -> None:
        step()
        with torch.no_grad():
            next(reversed(policy.parameters.values())).view(-1)[-1] = float("inf")

    policy.optimizer.step = overflowing  # type: ignore[method-assign]
    with pytest.raises(WeightsNotFinite, match=f"iteration 2: found {who} weights that are not finite"):
        iterate(learning)
    for name, value in state_of(learning)["executor"].items():
        assert torch.equal(value, before["executor"][name])
    assert torch.equal(learning.ema.average[name], before["ema"]["average"][name]) and learning.done == 1
    assert all(torch.equal(value, before["planner"][name]) for name, value in state_of(learning)["planner"].items())


def test_a_rollback_takes_back_what_is_not_confirmed_to_the_bit(learning: Trainer) -> None:
    phases: list[str] = []
    learning.iterate(phases.append)
    assert phases[0] == "plan" and phases[-1] == "step" and phases.index("update") < phases.index("step")
    learning.confirm()
    learning.rollback()
    assert learning.done == 1
    before, first = weights(learning), untimed(iterate(learning).metrics)
    moments = [copied(policy.optimizer.state_dict()) for policy in (learning.planner_policy, learning.executor_policy)]
    end = weights(learning)
    learning.rollback()
    assert learning.done == 1 and equal(weights(learning), before) and not equal(end, before)
    again = untimed(iterate(learning).metrics)
    assert {name for name in first if again[name] != first[name]} == {"judge/told"} and equal(weights(learning), end)
    again = [copied(policy.optimizer.state_dict()) for policy in (learning.planner_policy, learning.executor_policy)]
    for one, other in zip(moments, again, strict=True):
        assert one["state"].keys() == other["state"].keys()
        assert all(torch.equal(one["state"][i]["exp_avg"], other["state"][i]["exp_avg"]) for i in one["state"])


def test_videos_that_are_not_numbers_have_no_score_and_harm_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = smoke(plans=3)
    trainer = make(replace(config, executor=replace(config.executor, continuations=3)))
    denoised = rollout_module.denoised

    def spoiled(history: object, noise: object, start: int, branches: list[Branch], *more: object) -> tuple:
        clean, states, own = denoised(history, noise, start, branches, *more)
        for row, branch in enumerate(branches):
            if branch.plan == 1:  # from its shared context on
                clean[row], states[row] = NAN, NAN
            elif branch.plan == 2 and branch.continuations == [0]:
                states[row] = float("inf")
                if start == 21:  # in the last chunk, so that nothing becomes NaN of it
                    clean[row, 0, -1, 0, 0] = float("inf")
        return clean, states, own

    monkeypatch.setattr(rollout_module, "denoised", spoiled)
    start, iteration = weights(trainer), iterate(trainer)
    broken, mask = iteration.rollout.broken, iteration.batch.execution_mask
    assert broken.tolist() == [[False] * 3, [True] * 3, [True, False, False]]
    for name in ("temporal_following", "aesthetics", "step_following"):
        assert bool(getattr(iteration.scored, name)[broken].isnan().all())
    assert not iteration.scored.temporal_following[~broken].isnan().any()
    assert not mask[broken].any() and bool(mask.any(1)[[0, 2]].any())
    assert "4 videos have latents that are not finite" in caplog.text
    assert iteration.metrics["executor/skipped_updates"] == iteration.metrics["planner/skipped_updates"] == 0.0
    assert not equal(weights(trainer), start, "executor")


def test_a_missing_group_does_not_change_the_advantages_of_others() -> None:
    following = [[0.9, 0.5], [0.4, 0.2], [0.8, 0.1], [0.3, 0.6]]
    steps = [[0.2, 0.8], [0.9, 0.2], [0.5, 0.1], [0.4, 0.4]]
    alone = iterate(make(smoke(), rewards(following[:2], steps[:2]))).batch
    missing = [*following[:2], [NAN, NAN], [0.3, 0.6]], [*steps[:2], [NAN, 0.3], [NAN, NAN]]
    trainer = make(smoke(prompts=2), rewards(*missing))
    start, iteration = weights(trainer), iterate(trainer)
    batch, metrics = iteration.batch, iteration.metrics
    # a planning group of one scored plan compares nothing, neither does an execution group of one continuation
    assert batch.plan_mask.tolist() == [True, True, False, False]
    assert batch.execution_mask.tolist() == [[True, True], [True, True], [False, False], [False, False]]
    assert torch.equal(batch.plan_advantage, torch.cat([alone.plan_advantage, torch.zeros(2)]))
    assert torch.equal(batch.execution_advantage, torch.cat([alone.execution_advantage, torch.zeros(2, 2)]))
    assert alone.plan_advantage.tolist() == pytest.approx([1.0, -1.0], abs=1e-3)
    assert metrics["rewards/temporal_following/missing"] == 0.25 and metrics["rewards/step_following/missing"] == 0.375
    assert metrics["planner/missing"] == 0.25 and metrics["executor/missing"] == pytest.approx(0.375)
    assert metrics["rewards/temporal_following/mean"] == pytest.approx(2.9 / 6)
    assert all(np.isfinite(value) for value in metrics.values())
    assert not equal(weights(trainer), start, "planner") and not equal(weights(trainer), start, "executor")


def test_one_missing_continuation_counts_for_nothing() -> None:
    base = rewards([[0.9, 0.5], [0.4, 0.4]], [[0.2, 0.8], [0.9, 0.2]])
    gone = rewards([[0.7, NAN], [0.4, 0.4]], [[0.2, 0.8], [0.9, 0.2]])
    one, two = (iterate(make(smoke(), scored)).batch for scored in (base, gone))
    assert torch.equal(one.plan_advantage, two.plan_advantage)  # both means are 0.7
    assert torch.equal(one.execution_advantage, two.execution_advantage)


def test_an_iteration_without_any_reward_changes_nothing(learning: Trainer, caplog: pytest.LogCaptureFixture) -> None:
    iterate(learning)  # momentum that an empty update would follow
    start, known = weights(learning), learning.rewards
    learning.rewards = FixedRewards(rewards([[NAN] * 2] * 2, [[NAN] * 2] * 2))
    metrics = iterate(learning).metrics
    assert equal(weights(learning), start) and learning.done == 2 and learning.ema.updates == 1
    assert metrics["rewards/step_following/missing"] == metrics["planner/missing"] == 1.0
    assert all(f"iteration 2: no group of the {who} has rewards" in caplog.text for who in ("planner", "executor"))
    learning.rewards = known
    iterate(learning)
    assert not equal(weights(learning), start, "planner") and not equal(weights(learning), start, "executor")


@pytest.mark.parametrize("who", ["planner", "executor"])
def test_a_policy_that_is_not_trained_stays(who: str) -> None:
    config = smoke()
    frozen = replace(config, **{who: replace(getattr(config, who), train=False)})
    trainer = make(frozen, rewards([[0.9, 0.9], [0.1, 0.1]], [[0.2, 0.8], [0.8, 0.2]]))
    start, metrics = weights(trainer), iterate(trainer).metrics
    other = "executor" if who == "planner" else "planner"
    assert equal(weights(trainer), start, who) and not equal(weights(trainer), start, other)
    assert f"{who}/loss" not in metrics and f"{other}/loss" in metrics


def test_shuffled_advantages_are_the_same_numbers_elsewhere() -> None:
    config = smoke(seed=2, prompts=2)  # a seed whose permutations are not the identity
    control = replace(config, rewards=replace(config.rewards, shuffle_advantages=True))
    scored = rewards([[0.9, 0.5], [0.4, 0.2], [0.8, 0.1], [0.3, 0.7]], [[0.2, 0.8], [0.9, 0.1], [0.5, 0.1], [0.4, 0.7]])
    plain, mixed = (iterate(make(each, scored)).batch for each in (config, control))
    for name in ("plan_advantage", "execution_advantage"):
        one, other = getattr(plain, name), getattr(mixed, name)
        assert not torch.equal(one, other) and torch.equal(one.flatten().sort()[0], other.flatten().sort()[0])


@dataclass
class Evaluated:
    """An untrained pair of policies, evaluated, then trained for an iteration."""

    scores: list[MethodScores]
    rng_kept: bool
    weights_kept: bool
    first: Iteration


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evaluated]:
    config = smoke()
    policies = build_policies(config)
    trainer = build_trainer(config, policies)
    start, before = weights(trainer), global_rng()
    suite = shapeworld_suite(config, policies, METHODS)
    folder = tmp_path_factory.mktemp("evaluation")
    evaluation = Evaluation(folder, suite, policies.planner, policies.executor, gaussian_noise, LOSSLESS)
    evaluation.run("w", lambda word: None)
    scores = evaluation.method_scores()
    yield Evaluated(scores, global_rng() == before, equal(weights(trainer), start), iterate(trainer))


def global_rng() -> tuple[bytes, object, bytes]:
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state()[1].tobytes()


def test_evaluation_leaves_random_state_and_training_untouched(evaluated: Evaluated, learned: Learned) -> None:
    assert evaluated.rng_kept and evaluated.weights_kept
    assert untimed(evaluated.first.metrics) == untimed(learned.first.metrics)
    assert same_videos(evaluated.first.rollout, learned.first.rollout)


def test_methods_share_noise_so_untrained_policies_score_alike(evaluated: Evaluated) -> None:
    scores: dict[str, dict[tuple[str, str], list[float]]] = {}
    for one in evaluated.scores:
        scores.setdefault(one.method, {})[one.set, one.judge] = one.scores
        assert len(one.scores) == 2 and all(0 <= score <= 1 for score in one.scores)
    assert set(scores) == {SINGLE, STEP, PLANNER_ONLY, EXECUTOR_ONLY, BOTH}
    assert scores[STEP] == scores[PLANNER_ONLY] == scores[EXECUTOR_ONLY] == scores[BOTH]
    assert scores[SINGLE] != scores[STEP]
    judges = ("verifier", "matcher", "picture quality", "clearness", "duplicates")
    assert set(scores[STEP]) == {(category, judge) for category in ("simple", "hard") for judge in judges}


@pytest.mark.parametrize("who", ["planner", "executor"])
def test_learning_rate_falls_linearly_to_its_end(who: str) -> None:
    config = smoke(iterations=3)
    own = getattr(config, who)
    trainer = make(replace(config, **{who: replace(own, optim=replace(own.optim, lr=4e-4, lr_end=0.25))}))
    rates = []
    for _ in range(3):
        iterate(trainer)
        rates += [group["lr"] for group in getattr(trainer, f"{who}_policy").optimizer.param_groups]
    assert rates == pytest.approx([4e-4, 2.5e-4, 1e-4])
