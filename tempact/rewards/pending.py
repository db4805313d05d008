"""Scores that judges are still working on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from tempact.rewards.judge_types import JudgeCall, JudgeResult
from tempact.types import Missing

Replies: TypeAlias = dict[tuple[int, ...], Future[JudgeResult]]  # by place in the scores


class Judges(Protocol):
    """What a reward needs of `judge_client.JudgeClient`."""

    def submit(self, calls: Sequence[JudgeCall]) -> list[Future[JudgeResult]]:
        """Starts the calls and returns at once."""
        ...

    def stats(self) -> dict[str, float]:
        """Metrics of the calls that ended since the last call of this."""
        ...

    def close(self) -> None:
        """Ends the client."""
        ...


@dataclass(frozen=True)
class Pending:
    """A reward's scores on their way.

    shape     of the scores
    replies   a place without one has no score
    score_of  from a validated reply to a score in [0, 1]
    """

    shape: tuple[int, ...]
    replies: Replies
    score_of: Callable[[Any], float]

    def result(self) -> Tensor:
        """Waits for all. fp32 on the CPU, NaN where no score could be had; always of the whole shape, so that
        ranks stay in step whatever is missing. Raises JudgeOutage, and nothing else on purpose."""
        scores = torch.full(self.shape, float("nan"))
        for place, reply in self.replies.items():
            found = reply.result()
            if not isinstance(found, Missing):
                scores[place] = self.score_of(found)
        return scores
