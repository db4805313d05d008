"""What the stages hand on to each other.

Shapes use the letters of docs/algorithm.md section 1: B prompts, M plans a prompt, P = B*M plans,
N continuations a plan, F latent frames, c frames a chunk, K denoising steps, T = K-1 stochastic
transitions, C latent channels, H x W latent size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
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


@dataclass
class Transition:
    """The trained chunk of every continuation (P plans x N continuations), on the host: pinned, where a GPU made it.

    Of transitions (docs/algorithm.md 2.3, Flow-GRPO):
    states  [P, N, T+1, C, c, H, W] fp32, x at sigma_0 .. sigma_T (sigma_T is the last noisy one)
    noises  [P, N, T, C, c, H, W] fp32, the Gaussian draw of each stochastic transition
    Of the forward process (DiffusionNFT):
    states  [P, N, K, C, c, H, W] fp32, the clean chunk noised anew to sigma_0 .. sigma_{K-1}
    noises  [P, N, K, C, c, H, W] fp32, each noise less the clean chunk: the velocity that flow matching aims at
    Of both:
    start   [P] int64, first latent frame s of the chunk (the switch frame)
    prefix  [P, C, S, H, W] fp32 with S = max(start) of the roll-out: the shared clean context, zeros past start[p]
    prompts executor prompt of every chunk of the plan up to and including the trained one;
            prompts[p][k] holds on chunk k
    first   number of the first of the denoising calls in `noises`; others than 0 in a part of a record (`at`)
    """

    states: Tensor
    noises: Tensor
    start: Tensor
    prefix: Tensor
    prompts: list[list[str]]
    first: int = 0

    @property
    def levels(self) -> range:
        """Numbers of the recorded denoising calls."""
        return range(self.first, self.first + self.noises.shape[2])

    def part(self, plans: slice) -> Transition:
        """The record of consecutive plans; tensors are views."""
        own = {name: values[plans] for name, values in vars(self).items() if name != "first"}
        return replace(self, **own)

    def at(self, levels: range) -> Transition:
        """The record of consecutive levels; tensors are views."""
        first, extra = levels.start - self.first, self.states.shape[2] - self.noises.shape[2]
        states = self.states[:, :, first : first + len(levels) + extra]
        return replace(self, states=states, noises=self.noises[:, :, first : first + len(levels)], first=levels.start)


@dataclass
class Rollout:
    """Videos of P plans x N continuations.

    frames      [P, N, T_pixel, 3, height, width] uint8
    transition  the recorded chunk, None when nothing is trained (evaluation)
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
    """

    plan_quality: Tensor
    format_score: Tensor
    temporal_following: Tensor
    step_following: Tensor
    aesthetics: Tensor
    custom: tuple[CustomScores, ...] = ()

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Name and raw scores of every reward: the five of the method, then the user's own."""
        for name, scores in vars(self).items():
            if name != "custom":
                yield name, scores
        for own in self.custom:
            yield own.name, own.scores


@dataclass
class Batch:
    """What the two losses see. Masks are False where a reward is missing or a group has too few.

    plan_advantage       [P] fp32, plan_mask [P] bool
    execution_advantage  [P, N] fp32, execution_mask [P, N] bool
    """

    plan_advantage: Tensor
    plan_mask: Tensor
    execution_advantage: Tensor
    execution_mask: Tensor
    tokens: PlanTokens | None
    transition: Transition | None


@dataclass(frozen=True)
class Missing:
    """A reward that could not be obtained, and why."""

    reason: str
