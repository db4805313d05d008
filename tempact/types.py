"""What the stages hand on to each other.

Shapes use the letters of docs/algorithm.md section 1: B prompts, M plans a prompt, P = B*M plans,
N continuations a plan, F latent frames, c frames a chunk, K denoising steps, T = K-1 stochastic
transitions, C latent channels, H x W latent size. G groups of siblings and S siblings of each: P and N where every plan
forks once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from torch import Tensor

RewardLevel: TypeAlias = Literal["plan", "execution"]


@dataclass(frozen=True)
class Prompt:
    """One user instruction. `category` is free text ("simple", "hard" in ShapeWorld)."""

    prompt_id: str
    text: str
    category: str = ""


@dataclass(frozen=True)
class Step:
    """One step of a plan: `prompt` holds on latent frames [start, end)."""

    start: int
    end: int
    prompt: str


@dataclass(frozen=True)
class Plan:
    """A span-aware plan.

    `steps` cover [0, F) in order without gap or overlap, every bound a multiple of the chunk.
    `format_score` is 1 (usable as written), 0.5 (usable after the repairs named in `repairs`) or
    0 (unusable: one step that holds the whole instruction). `response` is the planner's raw text.
    """

    instruction: str
    steps: tuple[Step, ...]
    format_score: float = 1.0
    repairs: tuple[str, ...] = ()
    response: str = ""

    @property
    def frames(self) -> int:
        return self.steps[-1].end

    def step_at(self, frame: int) -> int:
        """Index of the step whose span holds latent frame `frame`."""
        return next(i for i, step in enumerate(self.steps) if step.start <= frame < step.end)


@dataclass
class PlanTokens:
    """Token sequences of P sampled plans, right-padded.

    input_ids      [P, L] int64, prompt then response
    attention_mask [P, L] bool, False on padding
    response_mask  [P, L] bool, True on the tokens whose log-probs count (docs/algorithm.md 2.4)
    log_probs      [P, L] fp32, of the counted tokens when they were drawn, 0 elsewhere
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    log_probs: Tensor

    def select(self, plans: list[int]) -> PlanTokens:
        """The sequences of the given plans."""
        return PlanTokens(*(own[plans] for own in vars(self).values()))


@dataclass
class PlanBatch:
    """B prompts with M plans each; `plans[p]` belongs to `prompts[p // plans_per_prompt]`.

    `tokens` is None for plans that no policy sampled (evaluation baselines, plans from a file).
    """

    prompts: list[Prompt]
    plans: list[Plan]
    plans_per_prompt: int
    tokens: PlanTokens | None = None

    def prompt_of(self, plan: int) -> Prompt:
        return self.prompts[plan // self.plans_per_prompt]


@dataclass(frozen=True)
class Forks:
    """Where a plan's video forks into its continuations: a tree, whose leaves they are.

    frames   latent frames of the forks, rising
    numbers  branches that each branch becomes there; their product is N. 1: it goes on alone, and its chunk is trained
             like that at the fork before
    """

    frames: tuple[int, ...]
    numbers: tuple[int, ...]

    def branches(self, depth: int) -> int:
        """Branches after the first `depth` forks."""
        return math.prod(self.numbers[:depth])

    def branches_at(self, frame: int) -> int:
        """Branches that make the chunk at a latent frame."""
        return self.branches(sum(fork <= frame for fork in self.frames))


Fork: TypeAlias = int | Forks  # a latent frame is that of the only fork, into all continuations


def tree_of(fork: Fork, continuations: int) -> Forks:
    """The tree of a plan with so many continuations."""
    return fork if isinstance(fork, Forks) else Forks((fork,), (continuations,))


def first_frame(fork: Fork) -> int:
    """The latent frame of the first fork."""
    return fork.frames[0] if isinstance(fork, Forks) else fork


@dataclass(frozen=True)
class Siblings:
    """Branches of one fork, which share their context: a row of a record. A fork may have several rows.

    plan     number of the plan
    depth    number of the fork into several on the way from the first trained chunk, from 0
    start    latent frame of the fork
    context  a continuation whose video before the fork is the context
    leaves   of each branch, its continuations
    """

    plan: int
    depth: int
    start: int
    context: int
    leaves: tuple[range, ...]

    @property
    def shared(self) -> tuple[int, int, int]:
        """The same for all rows of one context."""
        return self.plan, self.start, self.context


def siblings_of(forks: Sequence[Fork], continuations: int, width: int = 0) -> list[Siblings]:
    """Rows of the record of these plans, of `width` branches each: a common divisor of all numbers of branches; 0: of
    all continuations. The first chunk is not trained: a fork at frame 0 has none where others follow it."""
    rows, width = [], math.gcd(width, continuations)
    for plan, own in enumerate(tree_of(fork, continuations) for fork in forks):
        depth = -1
        for place, (start, number) in enumerate(zip(own.frames, own.numbers, strict=True)):
            if not start and len(own.frames) > 1:
                continue
            count = own.branches(place + 1)
            each = continuations // count  # leaves of a branch
            depth += number > 1 or depth < 0
            for first in range(0, count, width):
                leaves = tuple(range(m * each, (m + 1) * each) for m in range(first, first + width))
                rows.append(Siblings(plan, depth, start, first // number * number * each, leaves))
    return rows


@dataclass
class Transition:
    """The trained chunks of P plans x N continuations, on the host: pinned, where a GPU made them.

    Of transitions (docs/algorithm.md 2.3, Flow-GRPO):
    states   [G, S, T+1, C, c, H, W] fp32, x at sigma_0 .. sigma_T (sigma_T is the last noisy one)
    noises   [G, S, T, C, c, H, W] fp32, the Gaussian draw of each stochastic transition
    Of the forward process (DiffusionNFT):
    states   [G, S, K, C, c, H, W] fp32, the clean chunk noised anew to sigma_0 .. sigma_{K-1}
    noises   [G, S, K, C, c, H, W] fp32, each noise less the clean chunk: the velocity that flow matching aims at
    Of both:
    start    [G] int64, first latent frame s of the chunk (the fork)
    prefix   [G, C, max(start) of the roll-out, H, W] fp32: the shared clean context, zeros past start[g]
    prompts  executor prompt of every chunk of the plan up to and including the trained one;
             prompts[g][k] holds on chunk k
    siblings what the rows are; nothing: row p is of plan p, which forks once
    first    number of the first of the denoising calls in `noises`; others than 0 in a part of a record (`at`)
    """

    states: Tensor
    noises: Tensor
    start: Tensor
    prefix: Tensor
    prompts: list[list[str]]
    siblings: list[Siblings] = field(default_factory=list)
    first: int = 0

    @property
    def levels(self) -> range:
        """Numbers of the recorded denoising calls."""
        return range(self.first, self.first + self.noises.shape[2])

    def part(self, plans: slice) -> Transition:
        """The record of consecutive plans; tensors are views."""
        rows, siblings = plans, list[Siblings]()
        if self.siblings:
            whole = range(1 + self.siblings[-1].plan)[plans]
            own = [i for i, row in enumerate(self.siblings) if row.plan in whole]
            siblings = [replace(self.siblings[i], plan=self.siblings[i].plan - whole.start) for i in own]
            rows = slice(own[0], own[-1] + 1)
        parts = {name: values[rows] for name, values in vars(self).items() if name not in ("siblings", "first")}
        return replace(self, siblings=siblings, **parts)

    def at(self, levels: range) -> Transition:
        """The record of consecutive levels; tensors are views."""
        first, extra = levels.start - self.first, self.states.shape[2] - self.noises.shape[2]
        states = self.states[:, :, first : first + len(levels) + extra]
        return replace(self, states=states, noises=self.noises[:, :, first : first + len(levels)], first=levels.start)


def starts_of(record: Transition, depth: int = 0) -> dict[int, int]:
    """First trained frames of the plans at a depth, of the plans that have it."""
    if not record.siblings:
        return dict(enumerate(record.start.tolist()))
    return {row.plan: row.start for row in reversed(record.siblings) if row.depth == depth}


@dataclass
class Rollout:
    """Videos of P plans x N continuations.

    frames      [P, N, T_pixel, 3, height, width] uint8
    transition  the recorded chunks, None when nothing is trained (evaluation)
    broken      [P, N] bool, videos whose latents were NaN or infinite, which have no score; None for none
    """

    frames: Tensor
    transition: Transition | None = None
    broken: Tensor | None = None


@dataclass(frozen=True)
class CustomScores:
    """Raw scores of one of the user's own rewards (docs/rewards.md).

    name    as in the metrics `rewards/<name>/...` and in the samples
    level   "plan": added to a plan's reward R; "execution": added to a continuation's reward U
    weight  factor of the scores in that sum
    scores  [P] or [P, N] fp32 on the CPU ([P, N] at the execution level), any finite number; NaN is *missing*
    """

    name: str
    level: RewardLevel
    weight: float
    scores: Tensor


@dataclass
class Scored:
    """Raw rewards on the CPU; NaN is *missing*, never a score (docs/algorithm.md, decision 7).

    plan_quality        [P]     J in [0, 0.9]
    format_score        [P]     f in {0, 0.5, 1}, never missing
    temporal_following  [P, N]  V in [0, 1]
    step_following      [P, N]  L in [0, 1]
    aesthetics          [P, N]  P in [0, 1]
    custom              the user's own rewards, in the order in which they were given
    later               of plans that fork several times, the same with L, P and own scores of continuations of the
                        second fork's step, the third's, ...; NaN for plans that have no such fork
    """

    plan_quality: Tensor
    format_score: Tensor
    temporal_following: Tensor
    step_following: Tensor
    aesthetics: Tensor
    custom: tuple[CustomScores, ...] = ()
    later: tuple[Scored, ...] = ()

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Name and raw scores of every reward: the five of the method, then the user's own."""
        for name, scores in vars(self).items():
            if name not in ("custom", "later"):
                yield name, scores
        for own in self.custom:
            yield own.name, own.scores


@dataclass
class Batch:
    """What the two losses see. Masks are False where a reward is missing or a group has too few.

    plan_advantage       [P] fp32, plan_mask [P] bool
    execution_advantage  [G, S] fp32, execution_mask [G, S] bool: of the rows of a record
    siblings             those rows; nothing: row p is of plan p, which forks once
    """

    plan_advantage: Tensor
    plan_mask: Tensor
    execution_advantage: Tensor
    execution_mask: Tensor
    tokens: PlanTokens | None
    transition: Transition | None
    siblings: list[Siblings] = field(default_factory=list)


@dataclass(frozen=True)
class Missing:
    """A reward that could not be obtained, and why."""

    reason: str
