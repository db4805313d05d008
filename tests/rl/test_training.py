"""The smoke preset under each algorithm: what is better becomes more probable."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_references import undocumented
from test_trainer import iterate, make, rewards, smoke

from tempact.planner.plans import uniform_spans
from tempact.rl.advantages import EXECUTION_EPS, PLAN_EPS, execution_rewards, group_advantages, plan_rewards
from tempact.rl.planner_losses import LOSSES
from tempact.trainer import Trainer
from tempact.types import Batch

SCORES = rewards([[0.2, 0.3], [0.6, 0.9]], [[0.1, 0.5], [0.9, 0.7]])


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return make(smoke(plans=2))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_planner_moves_towards_the_better_plan(trainer: Trainer, loss: str) -> None:
    """The second plan is the better one; after a step its log-prob has risen against the first plan's. The gradients
    tell the losses apart: that of a sum over tokens is as many times that of their mean as there are tokens."""
    planner, start = trainer.planner, trainer.planner_policy.parameters
    kept = {name: p.detach().clone() for name, p in start.items()}
    planner.config = replace(trainer.config.planner, loss=loss, kl_weight=0.0)
    plans = planner.sample(trainer.prompts.draw(1, 5), 2, seed=3)
    tokens, advantage, every = plans.tokens, torch.tensor([-1.0, 1.0]), torch.ones(2, dtype=torch.bool)
    assert tokens is not None and not torch.equal(tokens.input_ids[0], tokens.input_ids[1])
    metrics = planner.update(Batch(advantage, every, torch.empty(0), torch.empty(0), tokens, None), [0, 1], None)
    assert metrics["ratio"] == 1.0 and metrics["ratio_deviation"] == 0.0
    found = torch.cat([p.grad.flatten() for p in start.values()])
    trainer.planner_policy.clear()
    lengths = tokens.response_mask.sum(1)
    before = planner.log_probs(tokens).sum(1)
    (-(before * advantage / (1 if loss == "rloo" else lengths)).mean()).backward()
    wanted = torch.cat([p.grad.flatten() for p in start.values()])
    trainer.planner_policy.clear()
    assert (found - wanted).norm() < 1e-3 * wanted.norm() and wanted.norm() > 0
    with torch.no_grad():
        for parameter, direction in zip(start.values(), found.split([p.numel() for p in start.values()]), strict=True):
            parameter.sub_(0.01 / found.norm() * direction.view_as(parameter))
        gain = planner.log_probs(tokens).sum(1) - before
        for name, parameter in start.items():
            parameter.copy_(kept[name])
    assert gain[1] - gain[0] > 1e-3


def test_the_advantages_are_those_of_the_configuration() -> None:
    config = smoke(plans=2)
    planner = replace(config.planner, loss="rloo", advantage_std="none")
    config = replace(config, planner=planner, executor=replace(config.executor, advantage_std="group"))
    batch = iterate(make(config, SCORES)).batch
    grouped = plan_rewards(SCORES, config.rewards).view(1, 2)
    plan = group_advantages(grouped, 1.0, PLAN_EPS, std="none", leave_one_out=True)[0]
    execution = execution_rewards(SCORES, config.rewards)
    assert torch.equal(batch.plan_advantage, plan.flatten()) and plan.abs().max() < 0.5
    assert plan[0, 1].item() == pytest.approx((grouped[0, 1] - grouped[0, 0]).item())
    expected = group_advantages(execution, 2.0, EXECUTION_EPS, std="group")[0]
    assert torch.equal(batch.execution_advantage, expected)
    assert not torch.allclose(expected, group_advantages(execution, 2.0, EXECUTION_EPS)[0], atol=0.1)


def test_a_run_on_the_forward_process() -> None:
    """The second update is off-policy, and both move the executor."""
    config = smoke(plans=2, updates_per_iteration=2)
    trainer = make(replace(config, executor=replace(config.executor, loss="diffusion_nft")), SCORES)
    before = {name: p.detach().clone() for name, p in trainer.executor_policy.parameters.items()}
    metrics = iterate(trainer).metrics
    own = {name: value for name, value in metrics.items() if name.startswith("executor/")}
    assert own["executor/velocity_change"] == 0.0 and own["executor/velocity_change@2"] > 0
    assert all(own[f"executor/{name}{of}"] > 0 for name in ("clean_error", "grad_norm") for of in ("", "@2"))
    assert not any("ratio" in name or "gap" in name for name in own)
    assert any(not torch.equal(p, before[name]) for name, p in trainer.executor_policy.parameters.items())
    assert undocumented(metrics) == ["judge/told"]  # of the rewards here


def test_a_run_on_one_level_at_a_time() -> None:
    config = smoke(plans=2, updates_per_iteration=2)
    executor = replace(config.executor, levels="sliding", timesteps=(1000, 750, 500, 250))
    trainer = make(replace(config, executor=executor), SCORES)
    trainer.done = 4  # the level is the second of three
    metrics = iterate(trainer).metrics
    assert metrics["executor/level"] == 1.0 and metrics["executor/grad_norm@2"] > 0
    assert [name for name in metrics if "gap/" in name] == ["executor/rollout_gap/0.938"]
    assert undocumented(metrics) == ["judge/told"]


@pytest.mark.slow
def test_policies_take_turns() -> None:
    """Two iterations of the planner, two of the executor, and again; who waits neither moves nor is idle."""
    trainer = make(smoke(plans=2, alternate=2), SCORES)
    policies = {"planner": trainer.planner_policy, "executor": trainer.executor_policy}
    for turn in ("planner", "planner", "executor", "executor", "planner"):
        before = {name: [p.detach().clone() for p in own.parameters.values()] for name, own in policies.items()}
        metrics = iterate(trainer).metrics
        for name, own in policies.items():
            moved = any(not torch.equal(p, q) for p, q in zip(own.parameters.values(), before[name], strict=True))
            assert moved == (f"{name}/grad_norm" in metrics) == (name == turn)
    equal = rewards([[0.5, 0.5], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]])
    trainer = make(smoke(plans=2, alternate=2), equal)
    for _ in range(3):
        iterate(trainer)
    assert trainer.idle == {"planner": 2, "executor": 1}


def test_plans_of_equal_spans_are_trained_as_they_are_made() -> None:
    config = smoke(plans=2)
    plain = iterate(make(config, SCORES)).plans
    even = iterate(make(replace(config, planner=replace(config.planner, spans="uniform")), SCORES)).plans
    chunk = config.executor.chunk_frames
    assert even.plans == [uniform_spans(plan, chunk) for plan in plain.plans] != plain.plans
    assert torch.equal(even.tokens.input_ids, plain.tokens.input_ids)
