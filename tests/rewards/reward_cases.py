"""What the tests of the rewards share: judges that answer as told, plans, videos whose frames tell their number."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tempact.rewards import RewardFunction, RewardSet, Scoring, switch_spans
from tempact.rewards.judges import JudgeCall, JudgeResult
from tempact.rewards.judges.replies import BadReply, read_reply
from tempact.types import Missing, Plan, PlanBatch, Prompt, Rollout, Scored, Step, Transition

FRAMES, RATE = 30, 4  # latent frames; pixel frames of each after the first
PIXEL_FRAMES = RATE * (FRAMES - 1) + 1
STEPS = (Step(0, 6, "a cat sits"), Step(6, 15, "the cat jumps"), Step(15, 30, "the cat sleeps"))


class FakeJudges:
    """Gives back what `says` says to a call, read as strictly as the client reads it; None is no answer at all."""

    def __init__(self, says: Callable[[JudgeCall], str | None], hold: bool = False):
        self.says, self.hold, self.closed = says, hold, False
        self.calls: list[JudgeCall] = []
        self.waiting: list[tuple[JudgeCall, Future[JudgeResult]]] = []

    def submit(self, calls: Sequence[JudgeCall]) -> list[Future[JudgeResult]]:
        started = [(call, Future()) for call in calls]
        self.calls += calls
        self.waiting += started
        if not self.hold:
            self.release()
        return [future for _, future in started]

    def release(self) -> None:
        """Answers all that wait."""
        for call, future in self.waiting:
            future.set_result(self._result(call))
        self.waiting = []

    def _result(self, call: JudgeCall) -> JudgeResult:
        text = self.says(call)
        if text is None:
            return Missing("no answer")
        try:
            return read_reply(text, call.rubric.fields)
        except BadReply as error:
            return Missing(str(error))

    def stats(self) -> dict[str, float]:
        return {"judge/calls": float(len(self.calls))}

    def close(self) -> None:
        self.closed = True


def always(**verdict: Any) -> Callable[[JudgeCall], str]:
    return lambda call: json.dumps(verdict)


def plan_batch(*plans: Sequence[Step], instruction: str = "a cat sits, jumps, sleeps") -> PlanBatch:
    made = [Plan(instruction, tuple(steps)) for steps in plans or [STEPS]]
    return PlanBatch([Prompt("0", instruction)], made, len(made))


def rollout_of(plans: PlanBatch, starts: Sequence[int], continuations: int = 2, size: int = 8) -> Rollout:
    """Frame t of every video has the brightness 2t, and continuation n of plan p the colour it is given by `tint`."""
    count = len(plans.plans)
    frames = torch.arange(PIXEL_FRAMES, dtype=torch.uint8).mul(2).view(1, 1, -1, 1, 1, 1)
    frames = frames.repeat(count, continuations, 1, 3, size, size)
    for p in range(count):
        for n in range(continuations):
            frames[p, n, :, 2] = tint(p, n)
    empty = torch.empty(0)
    return Rollout(frames, Transition(empty, empty, torch.tensor(starts), empty, [[] for _ in range(count)]))


def scores_of(reward: RewardFunction, plans: PlanBatch, rollout: Rollout | None = None) -> Any:
    """What the function returns, as a reward set calls it: before there are videos, or with them."""
    given = rollout or Rollout(torch.empty(len(plans.plans), 0, 0, 3, 0, 0, dtype=torch.uint8))
    prompts = [plans.prompt_of(p).text for p in range(len(plans.plans))]
    return reward(prompts, plans.plans, given.frames, switch_spans(plans, given))


def score(rewards: RewardSet, plans: PlanBatch, rollout: Rollout) -> Scored:
    """All raw rewards of a whole rollout."""
    scoring = rewards.begin(plans)
    scoring.add(rollout)
    return result(scoring)


def result(scoring: Scoring) -> Scored:
    """What a process that is alone makes of its scores."""
    return scoring.rewards.whole(scoring.plans, [scoring.scores()])


def tint(plan: int, continuation: int) -> int:
    return 60 * plan + 20 * continuation


def picture_of(file: bytes) -> Tensor:
    """uint8 [3, height, width] of a JPEG file."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(file)))).permute(2, 0, 1)


def told(file: bytes) -> tuple[int, int]:
    """Frame number and tint that a picture of `rollout_of` tells."""
    means = picture_of(file).float().mean((1, 2))
    return round(means[:2].mean().item() / 2), round(means[2].item() / 20) * 20


def data_of(call: JudgeCall) -> dict[str, Any]:
    """What a call quotes; the boundary stands as a line of its own exactly twice."""
    lines = call.text.split("\n")
    bounds = [i for i, line in enumerate(lines) if line.startswith("DATA-")]
    assert len(bounds) == 2 and lines[bounds[0]] == lines[bounds[1]], bounds
    return json.loads("\n".join(lines[bounds[0] + 1 : bounds[1]]))
