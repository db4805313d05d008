"""Prompts and plans for a run whose planner knows nothing, and a run in which they stand in for its answers.

    python -m bench.stories [--memory-only] PRESET ...     # as python -m tempact.train

A planner with random weights never answers with a plan, and without plans the executor is not trained. So sampling does
all its work; then the text that is read as a plan is one of these stories, and tokens and their losses stay those that
were sampled. Nothing else of the run is changed.

With --memory-only the run is cut short in time, not in what the GPU holds: the planner samples one batch, whose tokens
serve for all plans; two plans, those with the latest and the earliest switch, are rolled out, and the others have their
transitions and scores; the executor's update computes the first micro-batch of each of its units.
What it does not show: the host's memory (the videos of all plans are views of one plan's), holes between tensors that
grow over hundreds of roll-outs, and what only a switch frame between those two would record as CUDA graphs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from itertools import count, islice, pairwise
from typing import Any

import torch

from tempact import train
from tempact.executor import executor
from tempact.executor.executor import Executor
from tempact.executor.rollout import chunk_prompts
from tempact.executor.sampler import NoiseSource
from tempact.planner import planner
from tempact.planner.planner import Planner
from tempact.planner.plans import parse_plan, plan_json
from tempact.rewards import Scores, Scoring
from tempact.types import Plan, PlanBatch, Prompt, Rollout, Step, Transition

SAMPLE, ROLLOUT, SCORES, MICRO = Planner.sample, Executor.rollout, Scoring.scores, executor.micro_batches
STEPS = 5
SUBJECTS = ("a red fox with a white tail", "an old sailor in a yellow coat", "a small robot with one green eye",
            "a girl in a blue dress", "a grey horse with a braided mane", "a baker with flour on both hands",
            "two children with paper lanterns", "a black cat with a torn ear")  # fmt: skip
ACTIONS = ("waits without a sound", "walks slowly to the left", "turns around and looks back", "jumps over a stone",
           "sits down and rests", "picks up a wooden box", "runs towards the camera")  # fmt: skip
PLACES = ("on the shore of a frozen lake", "in a narrow street after the rain", "beside a field of tall wheat",
          "under the arches of a stone bridge", "in a bright kitchen with open windows")  # fmt: skip
LIGHTS = ("in the light of a low sun", "while snow begins to fall", "as lamps go on one by one")


def sentence(story: int, part: int) -> str:
    """What happens in a part of a story."""
    subject, place = SUBJECTS[story % len(SUBJECTS)], PLACES[story // len(SUBJECTS) % len(PLACES)]
    action, light = ACTIONS[(story + 2 * part) % len(ACTIONS)], LIGHTS[(story + part) % len(LIGHTS)]
    return f"{subject} {action} {place}, {light}, number {story}."


def instruction(story: int) -> str:
    """A user's prompt; no two stories have the same."""
    return "Then ".join(f"{sentence(story, part)} " for part in range(STEPS)).strip()


def answer(story: int, frames: int, chunk: int) -> str:
    """A planner's answer: STEPS steps of near-equal length, or as many as there are chunks."""
    chunks = frames // chunk
    steps = min(STEPS, chunks)
    bounds = [chunk * (i * chunks // steps) for i in range(steps + 1)]
    return plan_json([Step(a, b, sentence(story, i)) for i, (a, b) in enumerate(pairwise(bounds))])


def words() -> list[str]:
    """All words of the stories, but for numbers."""
    texts = (*SUBJECTS, *ACTIONS, *PLACES, *LIGHTS, "number . , Then")
    return sorted({word for text in texts for word in text.split()})


class Script:
    """Reads the next story in the place of every answer."""

    def __init__(self) -> None:
        self.stories = count()

    def __call__(self, text: str, instruction: str, frames: int, chunk: int) -> Plan:
        return parse_plan(answer(next(self.stories), frames, chunk), instruction, frames, chunk)


def few_plans(own: Planner, prompts: list[Prompt], plans_per_prompt: int, seed: int, **more: Any) -> PlanBatch:
    """Plans of as many prompts as are sampled together; their tokens serve for the others, too."""
    total = len(prompts) * plans_per_prompt
    few = max(1, (own.config.sampled_together or total) // plans_per_prompt)
    batch = SAMPLE(own, prompts[:few], plans_per_prompt, seed, **more)
    assert batch.tokens is not None
    others = [prompt.text for prompt in prompts[few:] for _ in range(plans_per_prompt)]
    plans = [*batch.plans, *(planner.parse_plan("", text, own.frames, own.chunk) for text in others)]
    tokens = batch.tokens.select([i % len(batch.plans) for i in range(total)])
    return PlanBatch(prompts, plans, plans_per_prompt, tokens)


def few_videos(
    own: Executor, plans: list[Plan], switches: list[int], noise: NoiseSource, made: Callable[[range, Rollout], None],
    units: Iterable[range] | None,
) -> Rollout:  # fmt: skip
    """Videos of the plans with the latest and the earliest switch, which are those of all plans."""
    if len(plans) <= 2 or units is not None:
        return ROLLOUT(own, plans, switches, noise, made, units)
    by_switch = sorted(range(len(plans)), key=lambda plan: switches[plan])
    first, last = by_switch[0], by_switch[-1]
    with own.precision():  # of all plans, as one roll-out does
        own.encode([prompt for plan in plans for prompt in chunk_prompts(plan, own.settings)])

    def rolled_out(p: int) -> Rollout:
        own_part = noise.part(slice(p, p + 1))
        return ROLLOUT(own, [plans[p]], [switches[p]], own_part, lambda _, part: made(range(p, p + 1), part))

    late = rolled_out(last).transition
    assert late is not None
    states, noises = (torch.cat([values] * len(plans)) for values in (late.states, late.noises))
    prefix = torch.randn_like(late.prefix.expand(len(plans), *late.prefix.shape[1:]))
    upto = [
        chunk_prompts(plan, own.settings)[: switch // own.settings.chunk + 1]
        for plan, switch in zip(plans, switches, strict=True)
    ]
    record = Transition(states, noises, torch.tensor(switches), prefix, upto)
    early = rolled_out(first)  # most is held in this one, and the record of all others is there
    assert early.transition is not None and early.broken is not None
    states[first], noises[first] = early.transition.states[0], early.transition.noises[0]
    frames, broken = (values.expand(len(plans), *values.shape[1:]) for values in (early.frames, early.broken))
    return Rollout(frames, record, broken)


def repeated_scores(scoring: Scoring) -> Scores:
    """With the scores of the videos that were made for all others, too."""
    quality, *made = SCORES(scoring)
    there = {plan for own, *_ in made for plan in own}
    missing = [plan for plan in range(len(scoring.plans.plans)) if plan not in there]
    more = [(range(plan, plan + 1), *made[i % len(made)][1:]) for i, plan in enumerate(missing)]
    return [quality, *made, *more]


def shorten() -> None:
    """Puts the stand-ins of --memory-only in the place of the product's functions, for the rest of the process."""
    Planner.sample, Executor.rollout, Scoring.scores = few_plans, few_videos, repeated_scores
    executor.micro_batches = lambda *given: islice(MICRO(*given), 1)


def main(argv: list[str]) -> int:
    planner.parse_plan = Script()
    if argv[:1] == ["--memory-only"]:
        shorten()
        argv = argv[1:]
    return train.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
