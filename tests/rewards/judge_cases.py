"""What the tests of the judge client share: a rubric, calls, and a client in front of given addresses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from rewards.fault_proxy import score_of

from tempact.rewards.judges import JudgeCall, JudgeResult, Rubric
from tempact.rewards.judges.client import JudgeClient
from tempact.rewards.judges.config import EndpointConfig, JudgeConfig

KEY = "sk-canary-5f2e9c71"
ROLE = "plan_quality"


class Score(BaseModel):
    model_config = ConfigDict(extra="forbid")
    score: float = Field(ge=0, le=1)
    reason: str = ""


RUBRIC = Rubric("tests", "1", "Score the plan.", Score)


def call(number: int, **more: Any) -> JudgeCall:
    return JudgeCall(ROLE, RUBRIC, f"plan {number}", **more)


@contextmanager
def client_of(urls: Sequence[str], **limits: Any) -> Iterator[JudgeClient]:
    """Fast limits, unless given; endpoint fields concurrency and requests_per_minute may be given too."""
    of_endpoint = {name: limits.pop(name) for name in ("concurrency", "requests_per_minute") if name in limits}
    endpoints = tuple(EndpointConfig(url, "judge", KEY, **of_endpoint) for url in urls)
    settings: dict[str, Any] = {"deadline_s": 5.0, "attempt_s": 2.0, "backoff_s": 0.01, "outage_s": 30.0}
    with JudgeClient(JudgeConfig({ROLE: endpoints}, **(settings | limits))) as client:
        yield client


def is_right(result: JudgeResult, number: int) -> bool:
    return isinstance(result, Score) and result.score == score_of(f"plan {number}")
