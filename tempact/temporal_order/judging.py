"""Judges of whole videos: a vision-language model behind a server, or PickScore."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from tempact.rewards.judge_types import JudgeCall, JudgeResult
from tempact.temporal_order.frames import judged_frames, pick_frames, to_jpeg
from tempact.temporal_order.options import ROLES
from tempact.temporal_order.prompts import OrderPrompt
from tempact.temporal_order.rubric import NAME, VERSION, question, rubric, scores_of
from tempact.types import Missing


@dataclass(frozen=True)
class JudgedVideo:
    """A video to be scored: frames uint8 [T, 3, height, width], and the hash of its file."""

    prompt: OrderPrompt
    frames: Tensor = field(repr=False)
    media_hash: str


@dataclass(frozen=True)
class Verdict:
    """`scores` by name, in [0, 1] but for PickScore; empty where there are none, and `missing` says why."""

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
    """Sends the registered frames of a video with the benchmark's rubric to a judge client."""

    def __init__(self, name: str, model: str, client: Client):
        self.name, self.client = name, client
        self.version = f"{model}, {NAME} {VERSION}"

    def submit(self, videos: Sequence[JudgedVideo]) -> list[Future[Verdict]]:
        picks = [tuple(pick_frames(len(video.frames), judged_frames(video.prompt.set))) for video in videos]
        calls = [self._call(video, own) for video, own in zip(videos, picks, strict=True)]
        return [_verdict(asked, own) for asked, own in zip(self.client.submit(calls), picks, strict=True)]

    def _call(self, video: JudgedVideo, picks: tuple[int, ...]) -> JudgeCall:
        return JudgeCall(
            role=ROLES[self.name],
            rubric=rubric(len(picks)),
            text=question(video.prompt.text, len(picks)),
            images=tuple(to_jpeg(video.frames[pick]) for pick in picks),
            media_hash=f"{video.media_hash}:{','.join(map(str, picks))}",
        )


def _verdict(asked: Future[JudgeResult], picks: tuple[int, ...]) -> Future[Verdict]:
    """The verdict that follows from a judge's reply, once it is there."""
    verdict: Future[Verdict] = Future()

    def finish(done: Future[JudgeResult]) -> None:
        error = done.exception()
        if error is not None:
            verdict.set_exception(error)
            return
        reply = done.result()
        if isinstance(reply, Missing):
            verdict.set_result(Verdict({}, reply.reason, picks))
        else:
            verdict.set_result(Verdict(scores_of(reply), "", picks))

    asked.add_done_callback(finish)
    return verdict
