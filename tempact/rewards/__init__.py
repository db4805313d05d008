"""Frames of a video for a judge: their choice, the span of the switched step, JPEG files (docs/algorithm.md 2.6).

Rewards: functions that score plans or their videos, and the set of them that a run trains on.

The method has four (docs/algorithm.md 2.6), a user may add more (docs/rewards.md). A score that could not be had is
missing (NaN), never a number.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from itertools import product
from typing import Any, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tempact.errors import UserError
from tempact.rewards.judges import Repeated
from tempact.types import CustomScores, Plan, PlanBatch, RewardLevel, Rollout, Scored, Step, starts_of

log = logging.getLogger(__name__)

JPEG_QUALITY = 85
ENCODERS = 8  # threads at most; Pillow compresses without the interpreter's lock


class Span(NamedTuple):
    """The step that begins at a plan's fork, and its pixel frames: `first` to `last`, both included. fork: the first
    pixel frame of the fork, where that lies within the step; until there the videos are the same."""

    first: int
    last: int
    step: Step
    fork: int = 0


@dataclass(frozen=True)
class Judging:
    """What of a video is judged. depths: forks on the way through it, each with the step that begins there. within: a
    fork need not be a step's start; judged is the step that holds it. one_by_one: plans are scored each alone, because
    rules may round as the longest step of a batch has it.
    """

    depths: int = 1
    within: bool = False
    one_by_one: bool = False

    def together(self, plans: int) -> list[slice]:
        """Which of so many plans are scored together."""
        return [slice(p, p + 1) for p in range(plans)] if self.one_by_one else [slice(plans)]


def switch_spans(plans: PlanBatch, rollout: Rollout, depth: int = 0, *, within: bool = False) -> list[Span | None]:
    """The span of the step at every plan's fork of a depth, as `Judging` has it. None where no step begins at the fork
    (a plan of one step), where a plan has no such fork, and for a rollout without a trained chunk."""
    starts = {} if rollout.transition is None else starts_of(rollout.transition, depth)
    spans: list[Span | None] = []
    for number, plan in enumerate(plans.plans):
        start = starts.get(number)
        step = next((s for s in plan.steps if start is not None and s.start <= start < s.end), None)
        if start is None or step is None or not (within or step.start == start):
            spans.append(None)
            continue
        pixels = rollout.frames.shape[2]
        window, fork = (pixel_window(first, step.end, plan.frames, pixels) for first in (step.start, start))
        spans.append(Span(*window, step, fork[0] if start > step.start else 0))
    return spans


def spread(first: int, last: int, count: int) -> list[int]:
    """At most `count` (at least 2) frames, evenly spaced in whole numbers from `first` to `last`, both included.

    Ascending, without repeats: a window of fewer than `count` frames is taken whole.
    """
    assert 0 <= first <= last and count >= 2, (first, last, count)
    gaps = min(count - 1, last - first)
    # halves round up, the same on every machine
    return [first + (2 * i * (last - first) + gaps) // (2 * gaps) for i in range(gaps + 1)] if gaps else [first]


def pixel_window(start: int, end: int, frames: int, pixel_frames: int) -> tuple[int, int]:
    """First and last pixel frame of latent frames [start, end).

    frames        F, latent frames of the video
    pixel_frames  r(F - 1) + 1, pixel frames of the video; r = 4 for Wan's VAE, 1 for ShapeWorld. Latent frame 0 is
                  pixel frame 0, latent frame i > 0 is pixel frames r(i - 1) + 1 to ri
    """
    assert 0 <= start < end <= frames, (start, end, frames)
    rate, rest = divmod(pixel_frames - 1, max(1, frames - 1))
    assert not rest, f"{pixel_frames} pixel frames of {frames} latent ones"
    return max(0, rate * (start - 1) + 1) if start else 0, rate * (end - 1)


def jpegs(frames: Tensor) -> tuple[bytes, ...]:
    """One JPEG file for each of uint8 [k, 3, height, width], in order."""
    assert frames.dtype == torch.uint8 and frames.ndim == 4 and frames.shape[1] == 3, (frames.dtype, frames.shape)
    pictures = frames.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    with ThreadPoolExecutor(min(ENCODERS, len(pictures), os.cpu_count() or 1)) as pool:
        return tuple(pool.map(_jpeg, pictures))


def _jpeg(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def media_hash(images: Sequence[bytes]) -> str:
    """SHA-256 of the files in their order, part of a reply's key in the cache."""
    total = hashlib.sha256()
    for image in images:
        total.update(hashlib.sha256(image).digest())
    return total.hexdigest()


# (prompts, plans, frames, spans) -> scores, of the P plans of a rollout or of a part of it:
#   prompts  the user's instruction of each plan
#   plans    steps as the planner wrote them, not smoothed
#   frames   uint8 [P, N, T, 3, height, width], T pixel frames, N continuations of each plan
#   spans    the switched step of each plan and its pixel frames; None where no step begins at the switch frame
#   scores   [P] or [P, N], NaN where missing: a tensor, a sequence, or an object whose `result()` waits for them
RewardFunction: TypeAlias = Callable[[list[str], list[Plan], Tensor, list[Span | None]], Any]


@dataclass(frozen=True)
class Reward:
    """A reward of one's own, added to the method's (docs/rewards.md).

    name    a Python identifier, as in the metrics `rewards/<name>/mean`, `std` and `missing`
    score   the function; it runs on the training thread, on the frames' device
    weight  factor of the scores in the reward of their level, any finite number
    level   "execution": [P, N] scores, added to each continuation's reward; "plan": [P] scores, or [P, N] of which the
            mean is taken, added to each plan's reward

    Raises UserError for another name, weight or level.
    """

    name: str
    score: RewardFunction
    weight: float = 1.0
    level: RewardLevel = "execution"

    def __post_init__(self) -> None:
        good = self.name.isidentifier() and callable(self.score) and math.isfinite(self.weight)
        if not good or self.level not in get_args(RewardLevel):
            accepted = "an identifier, a function, a finite weight, and the level execution or plan"
            raise UserError(f"rewards.custom: found {self}; accepted: {accepted}")


def load_rewards(entries: Iterable[str]) -> tuple[Reward, ...]:
    """The rewards that `rewards.custom` names: "module:name" of a Reward, or of a function, which is a reward of that
    name, of weight 1, at the execution level.

    Modules are found as `import` finds them, and in the current folder. Raises UserError for an entry that is none.
    """
    return tuple(_loaded(entry) for entry in entries)


def _loaded(entry: str) -> Reward:
    module, _, name = entry.partition(":")
    if not (name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise UserError(f"rewards.custom: found {entry!r}; accepted: module:function")
    if os.getcwd() not in sys.path:  # `python -m` has it there, the console script has not
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise UserError(f"rewards.custom: {entry}: {error}; accepted: a module that can be imported") from error
    if found is None:
        raise UserError(f"rewards.custom: {entry}: found nothing of that name; accepted: a function or a Reward")
    return found if isinstance(found, Reward) else Reward(name, found)


def unasked(prompts: list[str], plans: list[Plan], frames: Tensor, spans: list[Span | None]) -> Tensor:
    """The `RewardFunction` of a reward that has no say: all scores are missing."""
    return torch.full(frames.shape[:2] if frames.shape[1] else (len(plans),), float("nan"))


@dataclass(frozen=True)
class RewardSet:
    """The rewards of a run. The weights of the method's four are `rewards.<name>` in the configuration.

    plan_quality        J [P]; called before there are videos, with no frames ([P, 0, 0, 3, 0, 0]) and no spans
    temporal_following  V [P, N] of whole videos
    step_following      L [P, N] of the switched step
    aesthetics          P [P, N] of the pictures after the switch
    custom              the user's own
    metrics             gives metrics of the scoring itself since its last call, named as in `metrics.jsonl`
    check               asks what the rewards depend on for an example, before there is a plan; raises as
                        `Scoring.scores`
    close               ends what the rewards have started; they score nothing afterwards
    warn                writes warnings that may come with every iteration

    Raises UserError where two rewards have one name.
    """

    plan_quality: RewardFunction
    temporal_following: RewardFunction
    step_following: RewardFunction
    aesthetics: RewardFunction
    custom: tuple[Reward, ...] = ()
    metrics: Callable[[], dict[str, float]] = dict
    check: Callable[[], None] = lambda: None
    close: Callable[[], None] = lambda: None
    warn: Repeated = field(default_factory=lambda: Repeated(log), repr=False, compare=False)

    def __post_init__(self) -> None:
        taken = {each.name for each in fields(Scored)} - {"later"}
        for reward in self.custom:
            if reward.name in taken:
                accepted = f"a name of its own, beside {', '.join(sorted(taken))}"
                raise UserError(f"rewards.custom: found {reward.name!r} a second time; accepted: {accepted}")
            taken.add(reward.name)

    def extended(self, rewards: Iterable[Reward]) -> RewardSet:
        """The set with more of the user's rewards. Raises UserError where two have one name."""
        return replace(self, custom=(*self.custom, *rewards))

    def begin(
        self, plans: PlanBatch, own: range | None = None, continuations: range | None = None,
        judging: Judging = Judging(),
    ) -> Scoring:  # fmt: skip
        """Starts to score plans whose videos are still to be made; own: the plans whose quality is scored here, where
        others are scored by other processes; continuations: those whose videos are, where others make the rest;
        judging: what of the videos is."""
        own = range(len(plans.plans)) if own is None else own
        none = torch.empty(len(own), 0, 0, 3, 0, 0, dtype=torch.uint8)
        prompts, spans = [plans.prompt_of(p).text for p in own], list[Span | None]([None] * len(own))
        quality = self.plan_quality(prompts, [plans.plans[p] for p in own], none, spans) if own else []
        return Scoring(self, plans, own, quality, continuations, judging)

    def whole(self, plans: PlanBatch, processes: Iterable[Scores]) -> Scored:
        """The scores of all plans from those of every process. Every tensor has its whole shape."""
        count, parts = len(plans.plans), [part for own in processes for part in own]
        continuations = max(videos.stop for _, videos, _ in parts)
        names = dict.fromkeys(name for part in parts for name in part[2])
        whole = {
            name: placed([(*part[:2], part[2][name]) for part in parts if name in part[2]], count, continuations)
            for name in names
        }
        first = Scored(
            plan_quality=whole["plan_quality"],
            format_score=torch.tensor([plan.format_score for plan in plans.plans]),
            temporal_following=whole["temporal_following"],
            step_following=whole["step_following"],
            aesthetics=whole["aesthetics"],
            custom=tuple(CustomScores(r.name, r.level, r.weight, whole[r.name]) for r in self.custom),
        )
        depths = range(1, sum(name.partition("/")[0] == STEP_REWARDS[0] for name in names))
        return replace(first, later=tuple(_at_depth(first, whole, depth) for depth in depths))


VIDEO_REWARDS = ("temporal_following", "step_following", "aesthetics")
STEP_REWARDS = VIDEO_REWARDS[1:]
# of consecutive plans and consecutive continuations of them, by the reward's name
Scores: TypeAlias = list[tuple[range, range, dict[str, Tensor]]]


def placed(parts: Sequence[tuple[range, range, Tensor]], plans: int, continuations: int) -> Tensor:
    """Scores [P] or [P, N] from those of consecutive plans and continuations, which must be all of them."""
    shape = (plans, continuations)[: max(scores.ndim for *_, scores in parts)]
    whole = torch.empty(shape)
    assert sum(scores.numel() for *_, scores in parts) == whole.numel(), f"scores of others than {list(shape)}"
    for own, videos, scores in parts:
        rows = whole[own.start : own.stop]
        (rows[:, videos.start : videos.stop] if whole.ndim == 2 else rows).copy_(scores)
    return whole


def at_depth(name: str, depth: int) -> str:
    """The name of a reward's scores by the step at a fork of this depth, from 0."""
    return f"{name}/{depth}" if depth else name


def _at_depth(first: Scored, whole: dict[str, Tensor], depth: int) -> Scored:
    """The scores of all plans, those of continuations by the step at a fork of this depth."""
    custom = tuple(replace(own, scores=whole.get(at_depth(own.name, depth), own.scores)) for own in first.custom)
    following, aesthetics = (whole[at_depth(name, depth)] for name in STEP_REWARDS)
    return replace(first, custom=custom, step_following=following, aesthetics=aesthetics)


@dataclass
class Scoring:
    """Raw rewards on their way: of a batch of plans whose videos come a few plans at a time.

    Judges work while the next videos are made.
    """

    rewards: RewardSet
    plans: PlanBatch
    own: range  # plans whose quality is scored here
    quality: Any  # what the function of plan quality has returned
    continuations: range | None = None  # whose videos come here; None: all
    judging: Judging = Judging()
    # what the others have returned, by their names `at_depth`
    parts: list[tuple[range, dict[str, Any]]] = field(default_factory=list)
    broken: list[Tensor] = field(default_factory=list)  # of the parts: videos that have no score

    def add(self, rollout: Rollout, own: range | None = None) -> None:
        """Starts to score the videos of these plans; None: of the next ones."""
        shape = rollout.frames.shape[:2]
        first = self.parts[-1][0].stop if self.parts else 0
        own = range(first, first + shape[0]) if own is None else own
        part = PlanBatch([self.plans.prompt_of(p) for p in own], [self.plans.plans[p] for p in own], 1)
        broken = torch.zeros(shape, dtype=torch.bool) if rollout.broken is None else rollout.broken
        for depth, rows in product(range(self.judging.depths), self.judging.together(shape[0])):
            spans = switch_spans(part, rollout, depth, within=self.judging.within)
            self.ask(own[rows], rollout.frames[rows], spans[rows], broken[rows], depth)

    def ask(self, own: range, frames: Tensor, spans: list[Span | None], broken: Tensor, depth: int = 0) -> None:
        """Starts to score videos of these plans by the steps in `spans`; frames and spans as a `RewardFunction` takes
        them, broken [P, N]. depth: of the steps' forks; by later ones continuations alone are scored, of plans that
        have them."""
        prompts, plans = [self.plans.prompt_of(p).text for p in own], [self.plans.plans[p] for p in own]
        functions = {name: getattr(self.rewards, name) for name in (STEP_REWARDS if depth else VIDEO_REWARDS)}
        functions |= {r.name: r.score for r in self.rewards.custom if not depth or r.level == "execution"}
        given = prompts, plans, frames, spans
        self.parts.append((own, {at_depth(name, depth): call(*given) for name, call in functions.items()}))
        without = torch.tensor([[bool(depth) and span is None] for span in spans])
        self.broken.append(broken.cpu() | without)

    def scores(self) -> Scores:
        """Waits for the scores of this process. NaN where missing, as for a broken video.

        A number outside [0, 1] of the method's rewards is logged and counts as missing. Raises UserError for own
        scores of a wrong shape and for infinite ones.
        """
        name = "plan_quality"
        scores = {name: self._valid(name, _tensor(name, self.quality, [[len(self.own)]]))}
        found: Scores = [(self.own, range(0), scores)]
        levels: dict[str, RewardLevel] = {reward.name: reward.level for reward in self.rewards.custom}
        for (own, returned), broken in zip(self.parts, self.broken, strict=True):
            scores = {}
            for name, value in returned.items():
                level = levels.get(name.partition("/")[0])
                # a plan's one score is that of all its videos
                alone = level == "plan" and self.continuations is None
                whole = _tensor(name, value, [list(broken.shape)] + [[len(own)]] * alone)
                whole = whole.masked_fill(broken if whole.ndim == 2 else broken.all(1), float("nan"))
                scores[name] = self._finite(name, whole) if level else self._valid(name, whole)
            found.append((own, self.continuations or range(broken.shape[1]), scores))
        return found

    def _finite(self, name: str, scores: Tensor) -> Tensor:
        if torch.isinf(scores).any():
            raise UserError(f"rewards.custom: {name}: found infinite scores; accepted: finite ones, NaN for missing")
        return scores

    def _valid(self, name: str, scores: Tensor) -> Tensor:
        """Scores of the method's own, of which a number outside [0, 1] is none."""
        outside = ~torch.isnan(scores) & ~((scores >= 0) & (scores <= 1))
        if outside.any():
            self.rewards.warn(name, "%s: %d scores outside [0, 1] count as missing", name, int(outside.sum()))
        return scores.masked_fill(outside, float("nan"))


def _tensor(name: str, returned: Any, shapes: list[list[int]]) -> Tensor:
    """What a reward has returned, fp32 on the CPU, of one of the shapes."""
    scores = returned.result() if hasattr(returned, "result") else returned
    try:
        found = torch.as_tensor(scores).detach().float().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"rewards.custom: {name}: found {type(scores).__name__} ({error}); accepted: numbers"
        ) from error
    if list(found.shape) not in shapes:
        accepted = f"{' or '.join(map(str, shapes))} (plans, continuations)"
        raise UserError(f"rewards.custom: {name}: found scores of shape {list(found.shape)}; accepted: {accepted}")
    return found
