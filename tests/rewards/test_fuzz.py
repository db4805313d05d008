"""Plans and replies of any kind, from a planner's text to advantages: the trainer sees scores or gaps, no exception."""

from __future__ import annotations

import json
import logging
import random
from itertools import count, pairwise

import pytest
import torch
from rewards.fault_proxy import MALFORMED, completion, verdict_of
from rewards.judge_cases import KEY
from rewards.reward_cases import score
from torch import Tensor

from tempact.config import JudgeSettings, RewardConfig
from tempact.forks import switch_frames
from tempact.planner.plans import parse_plan
from tempact.rewards import Span
from tempact.rewards.judged import judged_rewards
from tempact.rewards.judges.client import JudgeClient
from tempact.rewards.judges.config import ROLES, EndpointConfig, JudgeConfig
from tempact.rl.advantages import execution_rewards, group_advantages, plan_rewards
from tempact.types import Plan, PlanBatch, Prompt, Rollout, Transition

FRAMES, CHUNK = 24, 3
EXAMPLES, GROUP, BATCH = 5_000, 4, 100  # plans; of a prompt; scored together
DAMAGED_BODY = 8  # one body in so many is no chat completion: fewer in a row than a breaker takes
CHARACTERS = ["\ud800", "\x00", "\u2028", "é", "🎬", "\\", '"', "\n", "{", "}", "[", "]", "<|im_end|>",
              "</think>", "```"]  # fmt: skip
NUMBERS = ["0", "1", "10", "7.5", "-0.0", "-1", "1e-320", "1e308", "1e999", "9" * 400, "9" * 5000, "NaN", "-Infinity",
           "true", "null", '"5"', "[]", "{}", "[" * 2000]  # fmt: skip
PLAN_WRAPPED = ["{}", "{}", "```json\n{}\n```", "<think>{{}}</think>{}", "<think>{}", "So: {}", '{{"plan": {}}}']
WRAPPED = ["{}", "```json\n{}\n```", "<think>{{}}</think>{}", "<think>{}", "Here you are: {}", "{0}\n{0}", "{}\n\n",
           "</think>{}", "[{}]"]  # fmt: skip


def damaged(text: str, draw: random.Random) -> str:
    """Cut, doubled, or with odd characters put in, at up to two places."""
    for _ in range(draw.choice((0, 0, 0, 1, 2))):
        at, more = draw.randrange(len(text) + 1), draw.randrange(4)
        text = text[:at] + draw.choice(("", text[at : at + 20], draw.choice(CHARACTERS))) + text[at + more :]
    return text[: draw.randrange(len(text) + 1)] if draw.random() < 0.05 else text


def planner_text(draw: random.Random) -> str:
    """What a planner may write."""
    if draw.random() < 0.05:
        return "".join(draw.choices(CHARACTERS, k=draw.randrange(60)))
    bounds = sorted(draw.sample(range(0, FRAMES + 1, draw.choice((CHUNK, CHUNK, 1))), draw.randrange(2, 7)))
    bounds[0], bounds[-1] = 0, FRAMES
    steps = []
    for start, end in pairwise(bounds):
        odd = draw.random() < 0.1
        prompt = json.dumps("a circle " + "".join(draw.choices(CHARACTERS, k=draw.randrange(4))))
        steps.append(f'{{"start": {draw.choice(NUMBERS) if odd else start}, "end": {end}, "prompt": {prompt}}}')
    return damaged(draw.choice(PLAN_WRAPPED).format(f"[{', '.join(steps)}]"), draw)


def judge_text(messages: str | list, draw: random.Random) -> str:
    """What a judge may say to it."""
    if draw.random() < 0.05:
        return draw.choice([*MALFORMED.values(), *CHARACTERS])
    fields = {name: json.dumps(value) for name, value in verdict_of(messages).items()}
    if draw.random() < 0.4:
        name = draw.choice(list(fields))
        fields[name] = draw.choice(NUMBERS)
        if draw.random() < 0.3:
            del fields[name]
    body = ", ".join(f'"{name}": {value}' for name, value in fields.items())
    wrapped = draw.choice(WRAPPED) if draw.random() < 0.4 else "{}"
    return damaged(wrapped.format(f"{{{body}}}"), draw)


def pictures(prompts: list[str], plans: list[Plan], frames: Tensor, spans: list[Span | None]) -> Tensor:
    """Aesthetics of another kind, some of them missing."""
    scores = torch.full(frames.shape[:2], 0.5)
    scores[::7] = float("nan")
    return scores


def client_that_hears(draw: random.Random, monkeypatch: pytest.MonkeyPatch) -> JudgeClient:
    """The real client; only the network is not there."""
    numbers = count()

    async def post(self, call, lease, optional) -> bytes:
        asked = f"{draw.random()}"
        whole = completion(judge_text([asked, *[""] * len(call.images)] if call.images else asked, draw))
        if next(numbers) % DAMAGED_BODY:
            return whole
        at = draw.randrange(len(whole))
        return whole[:at] if draw.random() < 0.5 else whole[:at] + draw.randbytes(1) + whole[at + 1 :]

    monkeypatch.setattr(JudgeClient, "_post", post)
    endpoint = EndpointConfig("http://127.0.0.1:9/v1", "judge", KEY, concurrency=1)
    return JudgeClient(JudgeConfig(dict.fromkeys(ROLES, (endpoint,)), attempts=1, backoff_s=0))


def rollout_of(plans: PlanBatch, draw: random.Random) -> Rollout:
    starts = torch.tensor(switch_frames(plans, CHUNK, [draw] * len(plans.prompts)))
    empty = torch.empty(0)
    frames = torch.randint(256, (len(plans.plans), 1, FRAMES, 3, 8, 8), dtype=torch.uint8)  # no two are one request
    return Rollout(frames, Transition(empty, empty, starts, empty, [[] for _ in plans.plans]))


def check_plans(plans: PlanBatch) -> None:
    for plan in plans.plans:
        bounds = [0, *(step.end for step in plan.steps)]
        assert bounds == sorted(set(bounds)) and bounds[-1] == FRAMES and not any(bound % CHUNK for bound in bounds)
        assert [step.start for step in plan.steps] == bounds[:-1] and plan.format_score in (0, 0.5, 1)
        assert all(step.prompt.encode() for step in plan.steps)


@pytest.mark.parametrize(
    "examples", [EXAMPLES // 5, pytest.param(EXAMPLES, marks=[pytest.mark.slow, pytest.mark.timeout(300)])]
)
def test_fuzzed_plans_and_replies_are_scores_or_gaps(
    examples: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "tempact.rewards.judges.client")  # thousands of lines else
    draw, weights, settings = random.Random(6), RewardConfig(), JudgeSettings(video_frames=2, step_frames=2)
    seen: dict[str, list[Tensor]] = {"plan_quality": [], "temporal_following": [], "step_following": []}
    formats = []
    with client_that_hears(draw, monkeypatch) as judges:
        rewards = judged_rewards(judges, pictures, settings)
        for _ in range(examples // BATCH):
            prompts = [Prompt(str(b), f"a circle moves {draw.random()}") for b in range(BATCH // GROUP)]
            made = [parse_plan(planner_text(draw), each.text, FRAMES, CHUNK) for each in prompts for _ in range(GROUP)]
            plans = PlanBatch(prompts, made, GROUP)
            check_plans(plans)
            scored = score(rewards, plans, rollout_of(plans, draw))
            plan, plan_mask, _ = group_advantages(plan_rewards(scored, weights).view(-1, GROUP), 1.0, 1e-4)
            execution, mask, _ = group_advantages(execution_rewards(scored, weights), 2.0, 1e-6)
            assert torch.isfinite(plan[plan_mask]).all() and torch.isfinite(execution[mask]).all()
            for name, scores in seen.items():
                scores.append(getattr(scored, name).flatten())
            formats += [each.format_score for each in made]
    assert set(formats) == {0.0, 0.5, 1.0} and len(formats) == examples
    for name, parts in seen.items():  # both sides were seen
        scores = torch.cat(parts)
        present = scores[~torch.isnan(scores)]
        assert 0.15 * examples < len(present) < 0.9 * examples, name
        assert ((present >= 0) & (present <= 1)).all() and present.std() > 0.05, name
