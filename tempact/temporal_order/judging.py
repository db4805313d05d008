"""Judges of whole videos: a vision-language model behind a server, asked as in training, or PickScore."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from tempact.rewards.judge_types import JudgeCall, JudgeResult
from tempact.rewards.temporal_following import TOP_MARK, VideoVerdict, rubric_version, video_call, video_score
from tempact.temporal_order.frames import judged_picks, pickscore_picks
from tempact.temporal_order.options import ROLES
from tempact.temporal_order.prompts import OrderPrompt
from tempact.temporal_order.protocol import PICKSCORE
from tempact.types import Missing

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
    """What is used of `tempact.rewards.judge_client.JudgeClient`."""

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
    return {COMBINED: video_score(reply), **{name: mark / TOP_MARK for name, mark in marks.items()}}


class Picture(Protocol):
    """What is used of `tempact.rewards.aesthetics.PickScorer`."""

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
