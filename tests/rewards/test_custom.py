"""Rewards of one's own: where they come from, what they are given, what they add, and what is refused."""

from __future__ import annotations

import json
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rewards.reward_cases import STEPS, plan_batch, result, rollout_of, score
from torch import Tensor

from tempact import train
from tempact.config import RewardConfig
from tempact.errors import UserError
from tempact.reporting import read_metrics
from tempact.rewards import Judging, Reward, RewardFunction, RewardSet, Span, load_rewards, switch_spans
from tempact.rl.advantages import execution_rewards, plan_rewards
from tempact.runs import run as run_module
from tempact.trainer import named_by_depth
from tempact.types import CustomScores, Forks, Plan, Scored, Step, siblings_of

NAN = float("nan")
MODULE = '''
"""The example of docs/rewards.md."""

import torch

from tempact.rewards import Reward


def brightness(prompts, plans, frames, spans):
    return frames.float().mean((2, 3, 4, 5)) / 255


def brevity(prompts, plans, frames, spans):
    return [1 / len(plan.steps) for plan in plans]


def stillness(prompts, plans, frames, spans):
    scores = torch.full(frames.shape[:2], float("nan"))
    for p, span in enumerate(spans):
        if span is not None:
            part = frames[p, :, span.first : span.last + 1].float() / 255
            scores[p] = 1 - part.diff(dim=1).abs().mean((1, 2, 3, 4)).cpu()
    return scores


calm = Reward("calm", stillness, weight=0.2)
brief = Reward("brief", brevity, weight=-0.5, level="plan")
number = 3
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder, of a name that no other test has imported."""
    name = f"own_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / "broken_import.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def base(*custom: Reward) -> RewardSet:
    def videos(prompts: list[str], plans: list[Plan], frames: Tensor, spans: list[Span | None]) -> Tensor:
        return torch.full(frames.shape[:2], 0.5)

    def quality(prompts: list[str], plans: list[Plan], frames: Tensor, spans: list[Span | None]) -> Tensor:
        assert frames.shape[:3] == (len(plans), 0, 0) and spans == [None] * len(plans)
        return torch.full((len(plans),), 0.9)

    return RewardSet(quality, videos, videos, videos).extended(custom)


def test_functions_and_rewards_are_loaded(module: str) -> None:
    plain, calm, brief = load_rewards([f"{module}:brightness", f"{module}:calm", f"{module}:brief"])
    assert (plain.name, plain.weight, plain.level) == ("brightness", 1.0, "execution")
    assert (calm.name, calm.weight, calm.level) == ("calm", 0.2, "execution")
    assert (brief.name, brief.weight, brief.level) == ("brief", -0.5, "plan")
    assert load_rewards([]) == ()


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ("brightness", "found 'brightness'; accepted: module:function"),
        (":f", "found ':f'; accepted: module:function"),
        ("a-b:f", "found 'a-b:f'; accepted: module:function"),
        ("no_such_module:f", "no_such_module:f: No module named 'no_such_module'; accepted: a module that can be"),
        ("broken_import:f", "broken_import:f: No module named 'no_such_package'"),
        ("{}:nothing", "nothing: found nothing of that name; accepted: a function or a Reward"),
        (
            "{}:number",
            r"found Reward\(name='number', score=3, .*; accepted: an identifier, a function",
        ),
    ],
)
def test_what_is_no_reward_is_refused_in_one_line(module: str, entry: str, found: str) -> None:
    with pytest.raises(UserError, match=f"^rewards.custom: .*{found}") as error:
        load_rewards([entry.format(module)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changed", [{"name": "a b"}, {"weight": NAN}, {"weight": float("inf")}, {"level": "video"}])
def test_rewards_of_a_wrong_kind_are_refused(changed: dict[str, object]) -> None:
    with pytest.raises(UserError, match="^rewards.custom: found Reward.*accepted: an identifier"):
        Reward(**{"name": "a", "score": len} | changed)


@pytest.mark.parametrize("names", [["aesthetics"], ["format_score"], ["custom"], ["a", "b", "a"]])
def test_two_rewards_of_one_name_are_refused(names: list[str]) -> None:
    with pytest.raises(UserError, match=f"^rewards.custom: found '{names[-1]}' a second time; accepted: a name"):
        base(*(Reward(name, len) for name in names))


def test_a_reward_is_given_prompts_plans_frames_and_the_switched_steps() -> None:
    plans = plan_batch(STEPS, [Step(0, 30, "all")], STEPS)
    seen: list[tuple] = []

    def look(prompts: list[str], plans: list[Plan], frames: Tensor, spans: list[Span | None]) -> Tensor:
        seen.append((prompts, plans, spans))
        return frames[:, :, 0, 0, 0, 0].float()

    scoring = base(Reward("look", look)).begin(plans)
    scoring.add(rollout_of(plan_batch(STEPS), [6]))
    scoring.add(rollout_of(plan_batch([Step(0, 30, "all")], STEPS), [3, 15]))
    (own,) = result(scoring).custom
    assert own.scores.shape == (3, 2) and own.scores.dtype == torch.float32
    texts = ["a cat sits, jumps, sleeps"]
    assert [prompts for prompts, _, _ in seen] == [texts, texts * 2]
    assert [given for _, given, _ in seen] == [plans.plans[:1], plans.plans[1:]]
    assert [spans for _, _, spans in seen] == [[Span(21, 56, STEPS[1])], [None, Span(57, 116, STEPS[2])]]


@pytest.mark.parametrize("one_by_one", [True, False])
def test_every_fork_of_a_tree_is_judged_by_its_own_step(one_by_one: bool) -> None:
    """Rewards of continuations are asked once a fork, those of plans and whole videos once."""
    plans = plan_batch(STEPS, [Step(0, 15, "first"), Step(15, 30, "second")])
    rollout = rollout_of(plans, [6, 15], continuations=4)
    rows = siblings_of([Forks((6, 15), (2, 2)), Forks((15,), (4,))], 4, 2)
    rollout.transition = replace(rollout.transition, siblings=rows)
    rollout.broken = torch.zeros(2, 4, dtype=torch.bool)
    rollout.broken[0, 1] = True
    seen: dict[str, list] = {}

    def look(name: str) -> RewardFunction:
        def asked(prompts: list[str], plans: list[Plan], frames: Tensor, spans: list[Span | None]) -> Tensor:
            if frames.shape[1]:
                seen.setdefault(name, []).append(spans)
            firsts = torch.tensor([0.0 if span is None else span.first / 1000 for span in spans])
            return firsts[:, None].expand(-1, 4) if frames.shape[1] else firsts

        return asked

    named = ("plan_quality", "temporal_following", "step_following", "aesthetics")
    own = Reward("mine", look("mine")), Reward("whole", look("whole"), level="plan")
    scoring = RewardSet(*map(look, named)).extended(own).begin(plans, None, None, Judging(2, one_by_one=one_by_one))
    scoring.add(rollout)
    scored = result(scoring)
    first = [Span(21, 56, STEPS[1]), Span(57, 116, plans.plans[1].steps[1])]
    second = [Span(57, 116, STEPS[2]), None]
    for name in ("step_following", "aesthetics", "mine"):
        assert seen[name] == ([[span] for span in first + second] if one_by_one else [first, second]), name
    assert seen["temporal_following"] == seen["whole"] == ([[span] for span in first] if one_by_one else [first])
    (later,) = scored.later
    told = (
        torch.tensor([[0.021, NAN, 0.021, 0.021], [0.057] * 4]), torch.tensor([[0.057, NAN, 0.057, 0.057], [NAN] * 4])
    )  # fmt: skip
    for own_scores, expected in zip((scored, later), told, strict=True):
        for values in (own_scores.step_following, own_scores.aesthetics, own_scores.custom[0].scores):
            torch.testing.assert_close(values, expected, equal_nan=True)
    assert later.temporal_following is scored.temporal_following and later.custom[1] is not None
    assert torch.equal(later.custom[1].scores.nan_to_num(9), scored.custom[1].scores.nan_to_num(9))
    assert [name for name, _ in named_by_depth(scored)][-3:] == [
        "step_following/depth2", "aesthetics/depth2", "mine/depth2"
    ]  # fmt: skip


def test_a_fork_within_a_step_is_judged_by_that_step() -> None:
    plans = plan_batch(STEPS, STEPS, [Step(0, 30, "all")])
    rollout = rollout_of(plans, [9, 6, 3])
    assert switch_spans(plans, rollout) == [None, Span(21, 56, STEPS[1]), None]
    whole = Span(0, 116, plans.plans[2].steps[0], 9)
    assert switch_spans(plans, rollout, within=True) == [Span(21, 56, STEPS[1], 33), Span(21, 56, STEPS[1]), whole]


def test_scores_may_be_sequences_or_on_their_way() -> None:
    plans = plan_batch(STEPS, STEPS)
    later: Future = Future()
    own = [
        Reward("rows", lambda *given: [[1, 2], [3, NAN]]),
        Reward("each", lambda *given: [1.0, -2.0], level="plan"),
        Reward("later", lambda *given: later, level="plan"),
    ]
    scoring = base(*own).begin(plans)
    scoring.add(rollout_of(plans, [6, 6]))
    later.set_result(torch.tensor([[1, 2], [3, 4]]))
    scored = result(scoring)
    assert [each.name for each in scored.custom] == ["rows", "each", "later"]
    torch.testing.assert_close(scored.custom[0].scores, torch.tensor([[1, 2], [3, NAN]]), equal_nan=True)
    assert scored.custom[1].scores.tolist() == [1.0, -2.0]
    assert scored.custom[2].scores.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert [name for name, _ in scored.named()][-3:] == ["rows", "each", "later"]


@pytest.mark.parametrize(
    ("scores", "level", "found"),
    [
        ([1.0, 2.0], "execution", r"found scores of shape \[2\]; accepted: \[2, 2\]"),
        ([[1.0], [2.0]], "plan", r"found scores of shape \[2, 1\]; accepted: \[2, 2\] or \[2\]"),
        (0.5, "execution", r"found scores of shape \[\]"),
        (None, "execution", "found NoneType"),
        ([[1.0], [2.0, 3.0]], "execution", "found list"),
        ([[1.0, float("inf")], [1.0, 1.0]], "execution", "found infinite scores; accepted: finite ones, NaN"),
    ],
)
def test_scores_of_a_wrong_kind_are_refused(scores: object, level: str, found: str) -> None:
    plans = plan_batch(STEPS, STEPS)
    with pytest.raises(UserError, match=f"^rewards.custom: own: {found}"):
        score(base(Reward("own", lambda *given: scores, level=level)), plans, rollout_of(plans, [6, 6]))


def test_weighted_scores_are_added_to_their_level() -> None:
    values = torch.tensor([[0.2, 0.6], [0.4, 0.8]])
    plain = Scored(torch.tensor([0.8, 0.5]), torch.tensor([1.0, 0.5]), values, values, values)
    own = (
        CustomScores("a", "plan", 0.5, torch.tensor([1.0, NAN])),
        CustomScores("b", "plan", 2.0, torch.tensor([[NAN, 0.5], [0.1, 0.3]])),
        CustomScores("c", "execution", -1.0, torch.tensor([[0.1, NAN], [0.3, 0.4]])),
        CustomScores("d", "execution", 0.0, torch.full((2, 2), NAN)),  # a reward of no weight cannot be missed
    )
    weights, scored = RewardConfig(), replace(plain, custom=own)
    before, after = plan_rewards(plain, weights), plan_rewards(scored, weights)
    assert after[0].item() == pytest.approx(before[0].item() + 0.5 * 1.0 + 2.0 * 0.5) and torch.isnan(after[1])
    before, after = execution_rewards(plain, weights), execution_rewards(scored, weights)
    expected = before - torch.tensor([[0.1, NAN], [0.3, 0.4]])
    torch.testing.assert_close(after, expected, equal_nan=True)


def test_a_run_learns_from_its_own_reward_and_records_it(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_handlers: None
) -> None:
    monkeypatch.setattr(run_module, "evaluate", lambda *given, **more: None)

    def run(name: str, *custom: str) -> tuple[dict[str, float], list[dict]]:
        folder = tmp_path / name
        given = ["--device", "cpu", "--trainer.iterations", "1", "--output", str(folder)]
        given += ["--rewards.custom", *(f"{module}:{each}" for each in custom)] if custom else []
        assert train.main(["shapeworld-smoke", *given]) == 0
        samples = (folder / "samples" / "step-000001.jsonl").read_text().splitlines()
        return read_metrics(folder)[0], [json.loads(line) for line in samples]

    (plain, rows), (own, own_rows) = run("plain"), run("own", "calm", "brief")
    assert own.keys() - plain.keys() == {
        f"rewards/{n}/{k}" for n in ("calm", "brief") for k in ("mean", "std", "missing")
    }
    for name, values in (("calm", 0.2), ("brief", -0.5)):
        policy = "executor" if name == "calm" else "planner"
        assert own[f"{policy}/reward"] == pytest.approx(
            plain[f"{policy}/reward"] + values * own[f"rewards/{name}/mean"]
        )
    assert own["executor/reward_std"] != plain["executor/reward_std"] and own["rewards/calm/missing"] == 0.0
    for key in ("rewards/temporal_following/mean", "rewards/aesthetics/std", "rewards/step_following/mean"):
        assert own[key] == plain[key]  # what is scored is the same
    assert all("custom" not in row for row in rows)
    for row in own_rows:
        assert row["custom"].keys() == {"calm", "brief"} and 0 <= row["custom"]["calm"] <= 1
        assert row["custom"]["brief"] == pytest.approx(1 / len(row["plan"]), abs=1e-6)


def test_a_run_refuses_before_anything_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["shapeworld-smoke", "--output", str(tmp_path / "run"), "--rewards.custom", "no_such_module:f"]
    assert train.main(given) == 2 and not (tmp_path / "run" / "metrics.jsonl").exists()
    found = "error: rewards.custom: no_such_module:f: No module named 'no_such_module'; accepted: "
    assert capsys.readouterr().err.startswith(found)
