"""Which frames a judge sees, registered here before any score is known, and how they are read.

A judge sees what the video file holds, so that anyone can score the files again.

Judges of whole videos: a vision-language model behind a server, asked as in training, or PickScore.

The judges that were asked for: behind the servers of the environment, and PickScore.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import imageio_ffmpeg
import numpy as np
import torch
from torch import Tensor

from tempact.config import JudgeSettings
from tempact.errors import UserError
from tempact.evaluation.options import ROLES
from tempact.evaluation.statistics import PICKSCORE
from tempact.evaluation.temporal_order.prompts import OrderPrompt
from tempact.rewards.frame_picks import spread
from tempact.rewards.judged import TOP_MARK, VideoVerdict, rubric_version, video_call
from tempact.rewards.judges import JudgeCall, JudgeResult
from tempact.rewards.judges.config import ROLES as FALLBACKS
from tempact.rewards.judges.config import JudgeConfig
from tempact.types import Missing

# as many as the reference's judge saw (ALGORITHM.md section 7); other sets have those of the simple one
JUDGED_FRAMES = {"simple": 6, "hard": 10}
PICKSCORE_FRAMES = 8


def judged_frames(set_name: str) -> int:
    """How many frames of a video of this set a judge sees."""
    return JUDGED_FRAMES.get(set_name, JUDGED_FRAMES["simple"])


def judged_picks(frames: int, set_name: str) -> list[int]:
    """Which frames of a video of `frames` frames a judge sees, the first and the last among them."""
    return spread(0, frames - 1, judged_frames(set_name))


def pickscore_picks(frames: int) -> list[int]:
    """Which frames PickScore sees, the first and the last among them."""
    return spread(0, frames - 1, PICKSCORE_FRAMES)


def read_video(path: Path) -> Tensor:
    """uint8 [T, 3, height, width]. UserError for a file that is no video."""
    try:
        reader = imageio_ffmpeg.read_frames(str(path))
        width, height = next(reader)["size"]
        pictures = [np.frombuffer(data, np.uint8).reshape(height, width, 3) for data in reader]
    except (OSError, RuntimeError, StopIteration, KeyError) as error:
        raise UserError(f"{path}: cannot be read as a video; accepted: what the evaluation wrote there") from error
    if not pictures:
        raise UserError(f"{path}: found no frames; accepted: what the evaluation wrote there")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


COMBINED, TEMPORAL_ORDER = "combined", "temporal_order"
CUT = "cut"  # beside a PickScore: 1 where CLIP did not read all of the prompt, else 0


@dataclass(frozen=True)
class JudgedVideo:
    """A video to be scored: frames uint8 [T, 3, height, width]."""

    prompt: OrderPrompt
    frames: Tensor = field(repr=False)


@dataclass(frozen=True)
class Verdict:
    """`scores` by name, in [0, 1] but for PickScore; empty where there are none, and `missing` says why.

    picks: the frames that were seen.
    """

    scores: dict[str, float]
    missing: str = ""
    picks: tuple[int, ...] = ()


class VideoJudge(Protocol):
    """`name` is its column in the table; `version` says what scores depend on beside the video."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...

    def submit(self, videos: Sequence[JudgedVideo]) -> list[Future[Verdict]]:
        """Starts scoring. A future that raises ends the evaluation; what can be scored later stays unscored."""
        ...


class Client(Protocol):
    """What is used of `tempact.rewards.judges.client.JudgeClient`."""

    def submit(self, calls: Sequence[JudgeCall]) -> list[Future[JudgeResult]]: ...


class ServedJudge:
    """Asks a judge client about the registered frames of a video, in the words of the training reward V."""

    def __init__(self, name: str, model: str, client: Client):
        self.name, self.client = name, client
        self.version = f"{model}, temporal following {rubric_version()}"

    def submit(self, videos: Sequence[JudgedVideo]) -> list[Future[Verdict]]:
        picks = [judged_picks(len(video.frames), video.prompt.set) for video in videos]
        calls = [
            video_call(video.prompt.text, video.frames[own], ROLES[self.name])
            for video, own in zip(videos, picks, strict=True)
        ]
        return [_verdict(asked, tuple(own)) for asked, own in zip(self.client.submit(calls), picks, strict=True)]


def _verdict(asked: Future[JudgeResult], picks: tuple[int, ...]) -> Future[Verdict]:
    """The verdict that follows from a judge's reply, once it is there."""
    verdict: Future[Verdict] = Future()

    def finish(done: Future[JudgeResult]) -> None:
        error = done.exception()
        if error is not None:
            verdict.set_exception(error)
            return
        reply: Any = done.result()
        missing = isinstance(reply, Missing)
        verdict.set_result(Verdict({}, reply.reason, picks) if missing else Verdict(scores_of(reply), "", picks))

    asked.add_done_callback(finish)
    return verdict


def scores_of(reply: VideoVerdict) -> dict[str, float]:
    """V of ALGORITHM.md 2.6 as `combined`, and every field of a reply, in [0, 1]; of the frame scores the mean."""
    fields = reply.model_dump()
    frame_scores = fields.pop("frame_scores")
    marks = {"frame_scores": sum(frame_scores) / len(frame_scores), **fields}
    return {COMBINED: reply.score(), **{name: mark / TOP_MARK for name, mark in marks.items()}}


class Picture(Protocol):
    """What is used of `tempact.rewards.pickscore.PickScorer`."""

    def score(self, text: str, videos: Tensor) -> Tensor: ...

    def cuts(self, text: str) -> bool: ...


class PickScoreJudge:
    """PickScore of 8 frames against the whole instruction (ALGORITHM.md section 7), as the table shows it: about 20.8
    for the published models. It runs here, in the turn of the caller."""

    name = PICKSCORE

    def __init__(self, weights: str, scorer: Picture):
        self.version, self.scorer = weights, scorer

    def submit(self, videos: Sequence[JudgedVideo]) -> list[Future[Verdict]]:
        """A score that is not finite is missing."""
        futures = []
        for video in videos:
            picks = pickscore_picks(len(video.frames))
            score = self.scorer.score(video.prompt.text, video.frames[picks][None]).item()
            future: Future[Verdict] = Future()
            if math.isfinite(score):
                scores = {PICKSCORE: score, CUT: float(self.scorer.cuts(video.prompt.text))}
                future.set_result(Verdict(scores, "", tuple(picks)))
            else:
                future.set_result(Verdict({}, "not finite", tuple(picks)))
            futures.append(future)
        return futures


@contextmanager
def served_judges(names: Sequence[str], settings: JudgeSettings) -> Iterator[list[VideoJudge]]:
    """The asked judges behind one client; its cache of replies is that of training.

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
    with JudgeClient(config) as client:
        yield [ServedJudge(name, model, client) for name, model in models.items()]


def load_pickscore(settings: JudgeSettings, device: torch.device) -> list[VideoJudge]:
    """PickScore as in training, of the frames and prompts of the benchmark. UserError if it cannot be had."""
    from tempact.rewards.pickscore import PickScorer  # late: it needs transformers' CLIP

    return [PickScoreJudge(settings.aesthetics_weights, PickScorer.load(settings, device))]
