"""What an evaluation by cells (a method on a whole set) has done, so that a killed one goes on with the next cell.

Plans and videos of the benchmark. What was made stays made: ledgers in the evaluation's folder list it.

The Temporal Order Benchmark (ALGORITHM.md section 7): prompts, conditions and seeds to videos to scored rows.

All that is done is written down at once under the evaluation's folder, so a killed evaluation goes on where it was:

settings.json  what scores depend on, registered before the first one
plans.jsonl    every plan, by prompt, planner and seed
videos.jsonl   every video in videos/, by prompt, condition and seed
scores.jsonl   every verdict, by prompt, condition, seed and judge; "scores" is null where it is missing
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tempact.evaluation.judges import (
    PICKSCORE_FRAMES,
    JudgedVideo,
    Verdict,
    VideoJudge,
    file_hash,
    judged_frames,
    read_video,
)
from tempact.evaluation.ledger import Key, Ledger, Row, register
from tempact.evaluation.methods import Method
from tempact.evaluation.statistics import MethodScores
from tempact.evaluation.temporal_order.prompts import OrderPrompt
from tempact.executor.sampler import NoiseSource
from tempact.files import safe_name, writing
from tempact.seeds import derive_seed
from tempact.types import Plan, PlanBatch, Prompt, Rollout, Step
from tempact.video import save_mp4

log = logging.getLogger(__name__)

FRAMES, PLANS = "frames", "plans"


@dataclass(frozen=True)
class Cell:
    """One method on one set: scores of every judge, and its first videos, frames uint8 [n, T, 3, height, width]."""

    scores: list[MethodScores]
    plans: list[Plan]
    frames: Tensor


class CellStore:
    """Finished cells in a folder: scores.jsonl, a line for every prompt and judge, and samples/."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        self.ledger = Ledger(folder / "scores.jsonl", ("prompt_id", "condition", "seed", "judge"))
        (folder / "samples").mkdir(exist_ok=True)

    def load(self, method: str, set_name: str, judges: Sequence[str], prompts: Sequence[Prompt]) -> Cell | None:
        """The cell if all of it is there."""
        path = self._samples(method, set_name)
        rows = [[self.ledger.get((p.prompt_id, method, self.seed, judge)) for p in prompts] for judge in judges]
        if not path.is_file() or any(row is None for own in rows for row in own):
            return None
        scores = []
        for judge, own in zip(judges, rows, strict=True):
            values = [row["score"] for row in own if row is not None]
            numbers = [math.nan if value is None else value for value in values]
            scores.append(MethodScores(method, set_name, judge, numbers))
        with safe_open(path, "pt") as file:
            plans, frames = json.loads(file.metadata()[PLANS]), file.get_tensor(FRAMES)
        steps = [tuple(Step(**step) for step in plan["steps"]) for plan in plans]
        return Cell(scores, [Plan(**{**plan, "steps": own}) for plan, own in zip(plans, steps, strict=True)], frames)

    def save(self, method: str, set_name: str, prompts: Sequence[Prompt], cell: Cell) -> None:
        """Writes a finished cell; of one that was cut off by a kill, what is missing."""
        path = self._samples(method, set_name)
        plans = json.dumps([asdict(plan) for plan in cell.plans])
        with writing(path) as partial:
            save_file({FRAMES: cell.frames.contiguous()}, partial, {PLANS: plans})
        rows = [
            {"prompt_id": prompt.prompt_id, "condition": method, "seed": self.seed, "judge": one.judge,
             "set": set_name, "score": None if math.isnan(score) else score}
            for one in cell.scores
            for prompt, score in zip(prompts, one.scores, strict=True)
        ]  # fmt: skip
        self.ledger.add(row for row in rows if self.ledger.key_of(row) not in self.ledger)

    def _samples(self, method: str, set_name: str) -> Path:
        return self.folder / "samples" / f"{safe_name(method)}-{safe_name(set_name)}.safetensors"


Noise = Callable[[int, tuple[int, ...], torch.device], NoiseSource]  # executor.sampler.gaussian_noise


class PlannerPolicy(Protocol):
    frames: int

    def sample(self, prompts: list[Prompt], plans_per_prompt: int, seed: int, *, reference: bool = False) -> PlanBatch:
        """Plans by the trained policy or, with `reference`, by its start."""
        ...


class ExecutorPolicy(Protocol):
    settings: Any  # executor.sampler.RolloutSettings

    @property
    def device(self) -> torch.device: ...

    def noise_shape(self, plans: int, continuations: int) -> tuple[int, ...]: ...

    def rollout(self, plans: list[Plan], switch_frames: list[int], noise: NoiseSource) -> Rollout: ...

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

        def draw(chunk: int, own: range) -> Tensor:
            return torch.cat([sources[plan](chunk) for plan in own])

        together = NoiseSource((len(sources), *shape[1:]), draw)
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


SCORES, SETTINGS = "scores.jsonl", "settings.json"
WAITING = 128  # verdicts on their way before the next video is made: their frames are held in memory


@dataclass(frozen=True)
class Suite:
    """What is evaluated: the prompts of every set, each set's length in latent frames, conditions, seeds, judges."""

    prompts: Mapping[str, Sequence[OrderPrompt]]
    frames: Mapping[str, int]
    methods: Sequence[Method]
    seeds: int
    judges: Sequence[VideoJudge]

    def settings(self, seed: int, policies: str) -> dict[str, str | int | float]:
        """What scores depend on. policies: which weights and sampler settings made the videos."""
        found: dict[str, str | int | float] = {"seed": seed, "policies": policies, "frames.PickScore": PICKSCORE_FRAMES}
        for name, prompts in self.prompts.items():
            found |= {f"latent_frames.{name}": self.frames[name], f"judged_frames.{name}": judged_frames(name)}
            for prompt in prompts:
                digest = hashlib.sha256(f"{prompt.set}\n{prompt.text}".encode()).hexdigest()[:12]
                found[f"prompt.{prompt.prompt_id}"] = digest
        return found | {f"judge.{judge.name}": judge.version for judge in self.judges}


class Scorer:
    """Sends videos to the judges and writes down every verdict as it comes."""

    def __init__(self, folder: Path, judges: Sequence[VideoJudge], *, again: bool = False):
        """again: verdicts that are missing so far are asked for once more."""
        self.folder, self.judges, self.again = folder, judges, again
        self.ledger = Ledger(folder / SCORES, ("prompt_id", "condition", "seed", "judge"))
        self._waiting: dict[Future[Verdict], Row] = {}
        self._asked: set[Key] = set()

    def score(self, prompt: OrderPrompt, video: Row) -> None:
        """Asks the judges that have not scored this video yet."""
        asked = []
        for judge in self.judges:
            row = {name: video[name] for name in ("prompt_id", "condition", "seed")} | {"judge": judge.name}
            row |= {"set": prompt.set, "category": prompt.category, "sha256": video["sha256"]}
            key = self.ledger.key_of(row)
            known = self.ledger.get(key)
            if key not in self._asked and (known is None or (self.again and known["scores"] is None)):
                self._asked.add(key)
                asked.append((judge, row))
        if not asked:
            return
        shown = JudgedVideo(prompt, read_video(self.folder / video["file"]))
        for judge, row in asked:
            self._waiting[judge.submit([shown])[0]] = row
        self._write_down(block=False)
        while len(self._waiting) >= WAITING:
            self._write_down(block=True)

    def finish(self) -> None:
        """Waits for all verdicts. What a judge raises is raised when those that have come are written down."""
        while self._waiting:
            self._write_down(block=True)

    def _write_down(self, block: bool) -> None:
        done = wait(self._waiting, None if block else 0, FIRST_COMPLETED).done
        errors = [error for future in done if (error := future.exception()) is not None]
        rows = []
        for future in [future for future in self._waiting if future in done]:
            row = self._waiting.pop(future)
            if future.exception() is None:
                verdict = future.result()
                rows.append(
                    {**row, "scores": verdict.scores or None, "missing": verdict.missing, "picks": verdict.picks}
                )
        self.ledger.add(rows, again=self.again)
        if errors:
            raise errors[0]


def run_suite(suite: Suite, maker: Maker, scorer: Scorer, tell: Callable[[str], None]) -> None:
    """Makes and scores what is missing; `tell` is given a word on what is being done.

    Videos are judged while the next ones are made. Leaves the global random state as it was.
    """
    for name, prompts in suite.prompts.items():
        by_id = {prompt.prompt_id: prompt for prompt in prompts}
        with at_length(maker.planner, maker.executor, suite.frames[name]):
            for method in suite.methods:
                tell(f"{method.name}, {name}")
                for seed in range(suite.seeds):  # those that an earlier evaluation made
                    for prompt in prompts:
                        video = maker.video(method, prompt, seed)
                        if video is not None:
                            scorer.score(prompt, video)
                for rows in maker.make(method, prompts, suite.seeds, suite.frames[name]):
                    for row in rows:
                        scorer.score(by_id[row["prompt_id"]], row)
    tell("waiting for the judges")
    scorer.finish()


def evaluate_suite(
    folder: Path,
    suite: Suite,
    maker: Maker,
    *,
    policies: str,
    retry_missing: bool = False,
    tell: Callable[[str], None],
) -> Ledger:
    """Runs what is left of a suite in `folder` and returns all of its scored rows.

    UserError where the folder holds scores that were obtained under other settings.
    """
    register(folder / SETTINGS, suite.settings(maker.seed, policies))
    scorer = Scorer(folder, suite.judges, again=retry_missing)
    if len(scorer.ledger):
        log.info("%s: goes on with %d scores", scorer.ledger.path, len(scorer.ledger))
    run_suite(suite, maker, scorer, tell)
    return scorer.ledger
