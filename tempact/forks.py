"""Where the plans of an iteration fork (`executor.forks`), drawn by planning groups.

A fork is the same for all plans of a prompt as far as their steps allow: plans are compared, and so are their videos.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from tempact.config import ExecutorConfig
from tempact.types import Fork, Forks, Plan, PlanBatch


def drawn_forks(config: ExecutorConfig, plans: PlanBatch, rngs: Sequence[random.Random]) -> list[Fork]:
    """The forks of every plan, by the prompts' own `rngs`: of a tree, or the frame of the only one."""
    if config.forks == "tree":
        return trees(plans, config.chunk_frames, config.branching, rngs)
    drawn = random_chunks if config.forks == "random_chunk" else switch_frames
    frames = drawn(plans, config.chunk_frames, rngs)
    if config.forks != "none" and config.trained_chunks == "first":
        return [*frames]
    return [_trained(config, plan, frame) for plan, frame in zip(plans.plans, frames, strict=True)]


def _trained(config: ExecutorConfig, plan: Plan, frame: int) -> Forks:
    """Of a plan whose continuations part at `frame`, or at its beginning, and go on alone: every trained chunk."""
    last = {"first": frame + config.chunk_frames, "step": plan.steps[plan.step_at(frame)].end, "video": plan.frames}
    frames = [0] * (config.forks == "none") + [*range(frame, last[config.trained_chunks], config.chunk_frames)]
    return Forks(tuple(frames), (config.continuations, *[1] * (len(frames) - 1)))


def depths_of(config: ExecutorConfig) -> int:
    """Most forks on the way through a video."""
    return len(config.branching) if config.forks == "tree" else 1


def compared_by_depth(config: ExecutorConfig) -> bool:
    """Are the branches of a plan compared with all of their depth, whatever their contexts?"""
    if config.forks == "tree":
        return config.compared == "depth"
    return config.forks == "none" or config.trained_chunks != "first"


def switch_frames(batch: PlanBatch, chunk: int, rngs: Sequence[random.Random]) -> list[int]:
    """The fork frame of every plan: the start of one of its steps, never 0.

    The step's ordinal is drawn once per planning group, by the prompt's own `rng`, over the steps its longest plan
    has; shorter plans use their last step. A plan of one step has no switch: it forks after its first chunk, and
    because no step starts there its continuations are not trained on.
    """
    frames = []
    for group, rng in zip(_groups(batch), rngs, strict=True):
        longest = max(len(plan.steps) for plan in group)
        ordinal = rng.randrange(1, longest) if longest > 1 else 1
        for plan in group:
            step = min(ordinal, len(plan.steps) - 1)
            frames.append(plan.steps[step].start if step else _after_first_chunk(plan, chunk))
    return frames


def trees(
    batch: PlanBatch, chunk: int, branching: Sequence[int], rngs: Sequence[random.Random]
) -> list[Fork]:  # fmt: skip
    """The tree of every plan: forks at the starts of as many of its steps as `branching` has numbers, never at 0.

    The steps' ordinals are drawn without repeats, as that of `switch_frames`. A plan of fewer switches has as many
    forks; the last one makes the branches of those that are missing, so that every plan has all continuations.
    """
    found: list[Fork] = []
    for group, rng in zip(_groups(batch), rngs, strict=True):
        ordinals = range(1, max(len(plan.steps) for plan in group))
        drawn = rng.sample(ordinals, min(len(branching), len(ordinals)))
        for plan in group:
            steps = sorted({min(ordinal, len(plan.steps) - 1) for ordinal in drawn} - {0})
            frames = tuple(plan.steps[step].start for step in steps) or (_after_first_chunk(plan, chunk),)
            last = len(frames) - 1
            found.append(Forks(frames, (*branching[:last], math.prod(branching[last:]))))
    return found


def random_chunks(batch: PlanBatch, chunk: int, rngs: Sequence[random.Random]) -> list[int]:
    """The start of a chunk of every plan, uniform over all but the first, drawn once per planning group (AR-CoPO, arXiv
    2603.17461)."""
    return [
        chunk * number
        for group, rng in zip(_groups(batch), rngs, strict=True)
        for number in [rng.randrange(1, group[0].frames // chunk)] * len(group)
    ]


def _groups(batch: PlanBatch) -> list[list[Plan]]:
    each = batch.plans_per_prompt
    return [batch.plans[first : first + each] for first in range(0, len(batch.prompts) * each, each)]


def _after_first_chunk(plan: Plan, chunk: int) -> int:
    return min(chunk, plan.frames - chunk)
