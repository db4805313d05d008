"""Judges of whole videos: vision-language models behind servers, PickScore, and ShapeWorld's own; suites of them.

How many frames a judge sees is registered here, before any score is known. A judge is shown what the video's file
holds, so that anyone can score the files again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tempact import shapeworld
from tempact.config import JudgeSettings
from tempact.errors import UserError
from tempact.evaluation import ROLES, Method
from tempact.evaluation.events import VERIFIER, event_fields
from tempact.evaluation.prompts import OrderPrompt
from tempact.evaluation.statistics import CLEARNESS, DUPLICATES, NOT_TEMPORAL, PICKSCORE, PICTURE_QUALITY
from tempact.rewards import spread
from tempact.rewards.judged import TOP_MARK, VideoVerdict, rubric_version, video_call
from tempact.rewards.judges import JudgeResult, Judges
from tempact.rewards.judges.config import ROLES as FALLBACKS
from tempact.rewards.judges.config import JudgeConfig
from tempact.shapeworld.crowd import actors_only, with_bystander, without_bystanders
from tempact.shapeworld.grammar import parse_instruction
from tempact.shapeworld.matcher import WEIGHTS, ShapeWorldJudge, clearness
from tempact.shapeworld.story import Story
from tempact.shapeworld.strict import in_trained_words
from tempact.shapeworld.verifier import duplicates, picture_quality, verify
from tempact.types import Missing, Plan

if TYPE_CHECKING:  # it needs transformers' CLIP
    from tempact.rewards.pickscore import PickScorer

# as many as the reference's judge saw (docs/algorithm.md section 7); other sets have those of the simple one
JUDGED_FRAMES = {"simple": 6, "hard": 10}
PICKSCORE_FRAMES = 8
DRAWS, DRAWS_OF_OLD = {"draws": "a seed a video"}, {"draws": "a seed a batch"}  # of a folder that does not name them
# of ShapeWorld's package: what its instructions mean, its pictures, its judges and what they read texts by
CODE = (
    "story.py", "wording.py", "grammar.py", "crowd.py", "strict.py", "matcher.py", "verifier/*.py",
    "weights/judge/*.json",
)  # fmt: skip
COMBINED, TEMPORAL_ORDER = "combined", "temporal_order"
CUT = "cut"  # beside a PickScore: 1 where CLIP did not read all of the prompt, else 0


@dataclass(frozen=True)
class JudgedVideo:
    """A video to be scored: frames uint8 [T, 3, height, width]."""

    prompt: OrderPrompt
    frames: Tensor = field(repr=False)


@dataclass(frozen=True)
class Verdict:
    """Scores of a video by name, in [0, 1] but for PickScore; empty where there are none, and `missing` says why.

    picks: the frames that the judge saw; empty for all.
    """

    scores: dict[str, float]
    missing: str = ""
    picks: tuple[int, ...] = ()


def no_verdict(why: str) -> Future[Verdict]:
    """That a video has no scores, without asking the judge."""
    verdict: Future[Verdict] = Future()
    verdict.set_result(Verdict({}, why))
    return verdict


class VideoJudge(Protocol):
    """`name` is the judge's column in the table; `version` says what its scores depend on beside the video."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...

    def submit(self, videos: Sequence[JudgedVideo]) -> list[Future[Verdict]]:
        """Starts scoring. A future that raises ends the evaluation; the videos without a verdict stay unscored."""
        ...


@dataclass(frozen=True)
class Suite:
    """What is evaluated: the prompts of every set, each set's length in latent frames, methods, seeds and judges.

    seed     of the videos' noise, which belongs to prompt and seed, and of the plans, which belong to a prompt's number
             in its set and to the seed: neither depends on the batch
    batch    videos made together
    batched  a judge is shown a batch at a time, and rounds as the batch has it; else one video
    reword   gives a plan in words that training never has, for the methods that are `reworded`
    best_of  what the videos of methods with several continuations depend on beside all others; nothing without such
    """

    prompts: Mapping[str, Sequence[OrderPrompt]]
    frames: Mapping[str, int]
    methods: Sequence[Method]
    seeds: int
    judges: Sequence[VideoJudge]
    seed: int
    batch: int
    batched: bool = False
    reword: Callable[[Plan], Plan] = lambda plan: plan
    best_of: Mapping[str, object] = field(default_factory=dict)

    @property
    def all_prompts(self) -> list[OrderPrompt]:
        return [prompt for prompts in self.prompts.values() for prompt in prompts]

    def settings(self, policies: str) -> dict[str, str | int | float]:
        """What scores depend on. policies: which weights and sampler settings make the videos."""
        found: dict[str, str | int | float] = {"seed": self.seed, **DRAWS, "policies": policies}
        found |= {"batch": self.batch} if self.batched else {"frames.PickScore": PICKSCORE_FRAMES}
        for name in self.prompts:
            found |= {f"latent_frames.{name}": self.frames[name], f"judged_frames.{name}": judged_frames(name)}
        if self.best_of:
            counts = sorted({method.best_of for method in self.methods} - {1})
            found |= {f"best_of.{count}": json.dumps(self.best_of, sort_keys=True) for count in counts}
        return found | self.tests

    @property
    def tests(self) -> dict[str, str]:
        """The part of `settings` that no policy has a say in: the prompts, and the judges' versions."""
        found = {}
        for prompt in self.all_prompts:
            digest = hashlib.sha256(f"{prompt.set}\n{prompt.text}".encode()).hexdigest()[:12]
            found[f"prompt.{prompt.prompt_id}"] = digest
        return found | {f"judge.{judge.name}": judge.version for judge in self.judges}


def judged_frames(set_name: str) -> int:
    """How many frames of a video of this set a served judge sees."""
    return JUDGED_FRAMES.get(set_name, JUDGED_FRAMES["simple"])


def picks(frames: int, count: int) -> list[int]:
    """`count` of the numbers 0 to frames - 1, evenly spread, the first and the last among them."""
    return spread(0, frames - 1, count)


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class ServedJudge:
    """Asks a judge client about the registered frames of a video, with the rubric of the training reward V."""

    def __init__(self, name: str, model: str, client: Judges):
        self.name, self.client = name, client
        self.version = f"{model}, temporal following {rubric_version()}"

    def submit(self, videos: Sequence[JudgedVideo]) -> list[Future[Verdict]]:
        seen = [picks(len(video.frames), judged_frames(video.prompt.set)) for video in videos]
        role = ROLES[self.name]
        calls = [video_call(v.prompt.text, v.frames[own], role) for v, own in zip(videos, seen, strict=True)]
        return [_verdict(asked, tuple(own)) for asked, own in zip(self.client.submit(calls), seen, strict=True)]


def _verdict(asked: Future[JudgeResult], seen: tuple[int, ...]) -> Future[Verdict]:
    """The verdict that follows from a judge's reply, once the reply is there."""
    verdict: Future[Verdict] = Future()

    def finish(done: Future[JudgeResult]) -> None:
        error = done.exception()
        if error is not None:
            verdict.set_exception(error)
            return
        reply: Any = done.result()
        missing = isinstance(reply, Missing)
        verdict.set_result(Verdict({}, reply.reason, seen) if missing else Verdict(scores_of(reply), "", seen))

    asked.add_done_callback(finish)
    return verdict


def scores_of(reply: VideoVerdict) -> dict[str, float]:
    """V of docs/algorithm.md 2.6 as `combined`, and each field of a reply, in [0, 1]; of frame scores the mean."""
    fields = reply.model_dump()
    frame_scores = fields.pop("frame_scores")
    marks = {"frame_scores": sum(frame_scores) / len(frame_scores), **fields}
    return {COMBINED: reply.score(), **{name: mark / TOP_MARK for name, mark in marks.items()}}


@dataclass(frozen=True)
class LocalJudge:
    """A judge of this process, which scores while the caller waits. `score` gives one verdict a video."""

    name: str
    version: str
    score: Callable[[Sequence[JudgedVideo]], Sequence[Verdict]]

    def submit(self, videos: Sequence[JudgedVideo]) -> list[Future[Verdict]]:
        """A verdict with a score that is not finite is missing."""
        futures: list[Future[Verdict]] = [Future() for _ in videos]
        for future, verdict in zip(futures, self.score(videos), strict=True):
            finite = all(map(math.isfinite, verdict.scores.values()))
            future.set_result(verdict if finite else Verdict({}, "not finite", verdict.picks))
        return futures


def pickscore_judge(weights: str, scorer: PickScorer) -> LocalJudge:
    """PickScore of 8 frames against the whole instruction (docs/algorithm.md section 7): about 20.8 for the published
    models."""

    def verdict(video: JudgedVideo) -> Verdict:
        seen = picks(len(video.frames), PICKSCORE_FRAMES)
        score = scorer.score(video.prompt.text, video.frames[seen][None]).item()
        return Verdict({PICKSCORE: score, CUT: float(scorer.cuts(video.prompt.text))}, "", tuple(seen))

    return LocalJudge(PICKSCORE, weights, lambda videos: [verdict(video) for video in videos])


def load_pickscore(settings: JudgeSettings, device: torch.device) -> list[VideoJudge]:
    """PickScore as in training, of the frames and prompts of the benchmark. UserError if it cannot be had."""
    from tempact.rewards.pickscore import PickScorer  # late: it needs transformers' CLIP

    return [pickscore_judge(settings.aesthetics_weights, PickScorer.load(settings, device))]


def shapeworld_judges(device: torch.device) -> list[VideoJudge]:
    """The exact verifier, the learned matcher, picture quality (the training reward), clearness and duplicates, each a
    score in [0, 1] of videos with ShapeWorld's instructions; they run on `device`.

    A bystander (`shapeworld/crowd.py`) is taken out of the pictures before anyone looks; verifier and matcher give half
    of their scores where it is told and not there. The matcher is told held-out wordings in the words of training.
    """
    matcher = ShapeWorldJudge.load(device=device)

    def shown(videos: Sequence[JudgedVideo]) -> tuple[Tensor, list[Story], list[str], Tensor]:
        """Pixels [V, F, 3, height, width] in [0, 1], stories and instructions, all without bystanders; where [V] a
        bystander stands."""
        texts = [video.prompt.text for video in videos]
        stories = [parse_instruction(text) for text in texts]
        pixels = torch.stack([video.frames for video in videos]).to(device).float() / 255.0
        pixels, standing = without_bystanders(pixels, stories)
        return pixels, [*map(actors_only, stories)], [*map(in_trained_words, texts)], standing

    def judge(name: str, version: str, score: Callable[[Tensor, list[Story], list[str]], Tensor]) -> LocalJudge:
        def verdicts(videos: Sequence[JudgedVideo]) -> list[Verdict]:
            pixels, stories, texts, standing = shown(videos)
            found = score(pixels, stories, texts)
            found = found if name in NOT_TEMPORAL else with_bystander(found, standing)
            return [Verdict({name: one}) for one in found.tolist()]

        return LocalJudge(name, version, verdicts)

    def verified(videos: Sequence[JudgedVideo]) -> list[Verdict]:
        pixels, stories, _, standing = shown(videos)
        verdict = verify(pixels, stories)
        scores = with_bystander(verdict.score, standing).tolist()
        rows = zip(scores, stories, verdict.as_told.tolist(), strict=True)
        return [Verdict({VERIFIER: score} | event_fields(story, as_told)) for score, story, as_told in rows]

    weights = file_hash(WEIGHTS / "judge.safetensors")[:12]
    return [
        LocalJudge(VERIFIER, "1", verified),
        judge("matcher", weights, lambda pixels, stories, texts: matcher.score(pixels, texts)),
        judge(PICTURE_QUALITY, "1", lambda pixels, stories, texts: picture_quality(pixels).mean(1)),
        judge(CLEARNESS, "1", lambda pixels, stories, texts: clearness(pixels)),
        judge(DUPLICATES, "1", lambda pixels, stories, texts: duplicates(pixels, stories)),
    ]


def shapeworld_code() -> str:
    """Hash of the code that ShapeWorld's instructions and scores come from."""
    package, found = Path(shapeworld.__file__).parent, hashlib.sha256()
    for file in sorted(file for pattern in CODE for file in package.glob(pattern)):
        found.update(f"{file.relative_to(package).as_posix()}\n{file.read_text(encoding='utf-8')}".encode())
    return found.hexdigest()[:12]


@contextmanager
def served_judges(names: Sequence[str], settings: JudgeSettings, processes: int = 1) -> Iterator[list[VideoJudge]]:
    """The judges of `names` (keys of ROLES) behind one client, which shares training's cache of replies.

    processes: of the evaluation; each keeps to its part of the judges' limits.

    UserError where the environment does not say where a judge is, or names one model for both judges.
    """
    if not names:
        yield []
        return
    from tempact.rewards.judges.client import JudgeClient

    config = JudgeConfig.from_environment({ROLES[name]: FALLBACKS.get(ROLES[name], "") for name in names}, settings)
    models = {name: config.roles[ROLES[name]][0].model for name in dict.fromkeys(names)}
    if len(set(models.values())) < len(models):
        accepted = "another model for the held-out judge: TEMPACT_JUDGE_HELD_OUT_BASE_URL, _MODEL and _API_KEY"
        raise UserError(f"--judge: found {next(iter(models.values()))!r} for all judges; accepted: {accepted}")
    with JudgeClient(config.divided(processes)) as client:
        yield [ServedJudge(name, model, client) for name, model in models.items()]
