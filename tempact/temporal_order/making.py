"""Plans and videos of the benchmark. What was made stays made: ledgers in the evaluation's folder list it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tempact.infra.files import safe_name
from tempact.infra.rng import derive_seed
from tempact.infra.video import save_mp4
from tempact.temporal_order.conditions import Method
from tempact.temporal_order.frames import file_hash
from tempact.temporal_order.ledger import Ledger, Row
from tempact.temporal_order.prompts import OrderPrompt
from tempact.types import Plan, PlanBatch, Prompt, Rollout, Step

NoiseSource = Callable[[int], Tensor]
Noise = Callable[[int, tuple[int, ...], torch.device], NoiseSource]  # executor.rollout.gaussian_noise


class PlannerPolicy(Protocol):
    frames: int

    def sample(self, prompts: list[Prompt], plans_per_prompt: int, seed: int, *, reference: bool = False) -> PlanBatch:
        """Plans by the trained policy or, with `reference`, by its start."""
        ...


class ExecutorPolicy(Protocol):
    settings: Any  # executor.rollout.RolloutSettings

    @property
    def device(self) -> torch.device: ...

    def noise_shape(self, plans: int, continuations: int) -> tuple[int, ...]: ...

    def rollout(self, plans: list[Plan], fork_frames: list[int], noise: NoiseSource) -> Rollout: ...

    def reference(self) -> AbstractContextManager[None]: ...


@contextmanager
def at_length(planner: PlannerPolicy, executor: ExecutorPolicy, frames: int) -> Iterator[None]:
    """Inside, plans and videos are `frames` latent frames long. UserError for a length that the window cannot make."""
    before = planner.frames, executor.settings
    executor.settings.window.check(frames, executor.settings.chunk)
    planner.frames, executor.settings = frames, replace(executor.settings, frames=frames)
    try:
        yield
    finally:
        planner.frames, executor.settings = before


class Maker:
    """Makes what is missing of an evaluation's plans and videos.

    Noise depends on the prompt and the seed alone, whatever batch a video is made in and under whatever method.
    Plans are sampled in batches of the whole set, each with a seed of its own, alike for the planner and its start.
    """

    def __init__(
        self, folder: Path, planner: PlannerPolicy, executor: ExecutorPolicy, noise: Noise, *, batch: int, seed: int,
        fps: float,
    ):  # fmt: skip
        self.folder, self.planner, self.executor, self.noise = folder, planner, executor, noise
        self.batch, self.seed, self.fps = batch, seed, fps
        self._plans = Ledger(folder / "plans.jsonl", ("prompt_id", "planner", "seed"))
        self._videos = Ledger(folder / "videos.jsonl", ("prompt_id", "condition", "seed"))

    def video(self, method: Method, prompt: OrderPrompt, seed: int) -> Row | None:
        """What is known of a video that has been made: its `file`, `sha256` and the `steps` it was made from."""
        row = self._videos.get((prompt.prompt_id, method.name, seed))
        return row if row is not None and (self.folder / row["file"]).is_file() else None

    def make(self, method: Method, prompts: Sequence[OrderPrompt], seeds: int, frames: int) -> Iterator[list[Row]]:
        """Makes the missing videos of a set, `frames` latent frames long, and yields their rows batch by batch."""
        for seed in range(seeds):
            missing = [prompt for prompt in prompts if self.video(method, prompt, seed) is None]
            if not missing:
                continue
            plans = self._planned(method.planner, prompts, seed, frames)
            for some in _batches(missing, self.batch):
                chosen = [plans[prompt.prompt_id] for prompt in some]
                yield self._store(method, some, seed, chosen, self._roll_out(method, some, seed, chosen))

    def _roll_out(self, method: Method, prompts: Sequence[OrderPrompt], seed: int, plans: list[Plan]) -> Tensor:
        """uint8 [P, T, 3, height, width]."""
        shape, device = self.executor.noise_shape(1, 1), self.executor.device
        numbers = [derive_seed(self.seed, seed, f"{prompt.prompt_id} noise") for prompt in prompts]
        sources = [self.noise(number, shape, device) for number in numbers]

        def together(chunk: int) -> Tensor:
            return torch.cat([source(chunk) for source in sources])

        with self.executor.reference() if method.executor == "start" else nullcontext():
            return self.executor.rollout(plans, [0] * len(plans), together).frames[:, 0]

    def _store(
        self, method: Method, prompts: Sequence[OrderPrompt], seed: int, plans: list[Plan], videos: Tensor
    ) -> list[Row]:
        rows: list[Row] = []
        for prompt, plan, frames in zip(prompts, plans, videos, strict=True):
            name = f"videos/{safe_name(method.name)}/{prompt.prompt_id}-{seed}.mp4"
            save_mp4(frames, self.folder / name, self.fps)
            rows.append(
                {
                    "prompt_id": prompt.prompt_id, "condition": method.name, "seed": seed, "file": name,
                    "frames": len(frames), "sha256": file_hash(self.folder / name), "prompt": prompt.text,
                    "steps": [asdict(step) for step in plan.steps],
                }
            )  # fmt: skip
        self._videos.add(rows, again=True)  # a file may have been removed
        return rows

    def _planned(self, who: str | None, prompts: Sequence[OrderPrompt], seed: int, frames: int) -> dict[str, Plan]:
        """The plans of a set under one seed, by prompt_id."""
        if who is None:
            return {prompt.prompt_id: Plan(prompt.text, (Step(0, frames, prompt.text),)) for prompt in prompts}
        for some in _batches(prompts, self.batch):
            missing = [prompt for prompt in some if (prompt.prompt_id, who, seed) not in self._plans]
            if missing:
                asked = [Prompt(prompt.prompt_id, prompt.text, prompt.category) for prompt in some]
                number = derive_seed(self.seed, seed, f"{some[0].prompt_id} plans")
                sampled = self.planner.sample(asked, 1, number, reference=who == "start").plans
                rows = [_plan_row(p, who, seed, plan) for p, plan in zip(some, sampled, strict=True) if p in missing]
                self._plans.add(rows)
        return {prompt.prompt_id: _plan(self._plans.get((prompt.prompt_id, who, seed)), prompt) for prompt in prompts}


def _batches(prompts: Sequence[OrderPrompt], size: int) -> Iterator[Sequence[OrderPrompt]]:
    return (prompts[first : first + size] for first in range(0, len(prompts), size))


def _plan_row(prompt: OrderPrompt, who: str, seed: int, plan: Plan) -> Row:
    return {
        "prompt_id": prompt.prompt_id, "planner": who, "seed": seed, "steps": [asdict(step) for step in plan.steps],
        "format_score": plan.format_score, "repairs": list(plan.repairs), "response": plan.response,
    }  # fmt: skip


def _plan(row: dict[str, Any] | None, prompt: OrderPrompt) -> Plan:
    assert row is not None, prompt
    steps = tuple(Step(**step) for step in row["steps"])
    return Plan(prompt.text, steps, row["format_score"], tuple(row["repairs"]), row["response"])
