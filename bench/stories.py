"""Prompts and plans for a run whose planner knows nothing, and a run in which they stand in for its answers.

    python -m bench.stories [--memory-only] PRESET ...     # as python -m tempact.train

A planner with random weights never answers with a plan, and without plans the executor is not trained. So sampling does
all its work; then the text that is read as a plan is one of these stories, and tokens and their losses stay those that
were sampled. Nothing else of the run is changed.

With --memory-only the run is cut short in time, not in what is held: the planner samples one batch, whose tokens serve
for all plans; two plans, those with the latest and the earliest switch, are rolled out, their transitions copied to
the others and their scores repeated; the executor's update rebuilds every context, and computes the first MICRO_BATCHES
micro-batches of each switch frame. On the host, videos of all plans are views of these two's, so that its memory is
not that of a run.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, islice, pairwise
from typing import Any

import torch
from torch import Tensor

from tempact import train
from tempact.executor import executor
from tempact.executor.executor import Executor
from tempact.executor.rollout import chunk_prompts, joined
from tempact.executor.sampler import NoiseSource
from tempact.planner import planner
from tempact.planner.planner import Planner
from tempact.planner.plans import parse_plan, plan_json
from tempact.rewards import Scoring
from tempact.types import Plan, PlanBatch, Prompt, Rollout, Scored, Step, Transition

SAMPLE, ROLLOUT, RESULT = Planner.sample, Executor.rollout, Scoring.result
FORWARD, GROUP, MICRO = Executor._forward, Executor._forward_group, executor.micro_batches
STEPS = 5
MICRO_BATCHES = 8  # of a shape: a call is recorded as a CUDA graph at its sixth
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


class Short:
    """The stand-ins of --memory-only. `made` counts the micro-batches of each switch frame in a pass of an update."""

    def __init__(self, script: Script) -> None:
        self.script, self.made, self.start = script, Counter[int](), 0

    def sample(self, own: Planner, prompts: list[Prompt], plans_per_prompt: int, seed: int) -> PlanBatch:
        total = len(prompts) * plans_per_prompt
        few = max(1, (own.config.sampled_together or total) // plans_per_prompt)
        batch = SAMPLE(own, prompts[:few], plans_per_prompt, seed)
        assert batch.tokens is not None
        sampled = len(batch.plans)
        more = [self.script("", p.text, own.frames, own.chunk) for p in prompts[few:] for _ in range(plans_per_prompt)]
        tokens = batch.tokens.select([i % sampled for i in range(total)])
        return PlanBatch(prompts, [*batch.plans, *more], plans_per_prompt, tokens)

    def rollout(
        self, own: Executor, plans: list[Plan], switches: list[int], noise: NoiseSource,
        made: Callable[[Rollout], None],
    ) -> Rollout:  # fmt: skip
        if len(plans) <= 2:
            return ROLLOUT(own, plans, switches, noise, made)
        by_switch = sorted(range(len(plans)), key=lambda plan: switches[plan])
        last, first = by_switch[-1], by_switch[0]  # what is held is most, and the others are there, in the first one's
        with own.precision():
            own.encode([prompt for plan in plans for prompt in chunk_prompts(plan, own.settings)])

        def rolled_out(p: int) -> Rollout:
            return ROLLOUT(own, [plans[p]], [switches[p]], noise.part(slice(p, p + 1)), made)

        late = rolled_out(last)
        parts = [self.copied(late.transition, own, plan, switch) for plan, switch in zip(plans, switches, strict=True)]
        parts[last], parts[first] = late.transition, None
        early = rolled_out(first)
        parts[first] = early.transition
        shape = early.frames.shape[1:]
        return Rollout(early.frames.expand(len(plans), *shape), joined(parts), early.broken.expand(len(plans), -1))

    def copied(self, transition: Transition | None, own: Executor, plan: Plan, switch: int) -> Transition | None:
        """A transition at `switch` with the states of another; its context is noise."""
        assert transition is not None
        prefix = transition.prefix
        prompts = chunk_prompts(plan, own.settings)[: switch // own.settings.chunk + 1]
        return replace(
            transition, states=transition.states.clone(), noises=transition.noises.clone(),
            start=torch.tensor([switch]), prefix=torch.randn_like(prefix[:, :, :1].expand(-1, -1, switch, -1, -1)),
            prompts=[prompts],
        )  # fmt: skip

    def result(self, scoring: Scoring) -> Scored:
        """With the scores of the videos that were made for all others, too."""
        made = len(scoring.parts)
        for kept in (scoring.parts, scoring.shapes, scoring.broken):
            kept += [kept[i % made] for i in range(len(scoring.plans.plans) - sum(n for n, _ in scoring.shapes[:made]))]
        return RESULT(scoring)

    def forward(
        self, own: Executor, transition: Transition, plans: list[int], *, grad: bool
    ) -> Iterator[tuple[Any, Tensor]]:
        self.made.clear()
        yield from FORWARD(own, transition, plans, grad=grad)

    def group(
        self, own: Executor, transition: Transition, group: list[int], start: int, grad: bool
    ) -> Iterator[tuple[Any, Tensor]]:
        self.start = start
        yield from GROUP(own, transition, group, start, grad)

    def micro_batches(self, *given: Any) -> Iterator[Any]:
        for entries in islice(MICRO(*given), MICRO_BATCHES - self.made[self.start]):
            self.made[self.start] += 1
            yield entries

    def install(self) -> None:
        """Puts the stand-ins into the product's classes, for the rest of the process."""
        for kind, name, own in (
            (Planner, "sample", self.sample), (Executor, "rollout", self.rollout), (Scoring, "result", self.result),
            (Executor, "_forward", self.forward), (Executor, "_forward_group", self.group),
        ):  # fmt: skip
            setattr(kind, name, method(own))
        executor.micro_batches = self.micro_batches


def method(function: Callable[..., Any]) -> Callable[..., Any]:
    """A bound method as a plain function, which a class binds to its instances."""
    return lambda *given, **named: function(*given, **named)


def main(argv: list[str]) -> int:
    script = Script()
    planner.parse_plan = script
    if argv[:1] == ["--memory-only"]:
        Short(script).install()
        argv = argv[1:]
    return train.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
