"""One evaluation: methods x sets of prompts x seeds give videos, videos x judges give scores.

An evaluation's folder holds what is done, written down at once, so that a killed evaluation goes on from there:

settings.json  what scores depend on, registered before the first one
plans.jsonl    every plan, by prompt, planner and seed
videos.jsonl   every file of videos/, by prompt, condition (the method's name) and seed
scores.jsonl   every verdict, by prompt, condition, seed and judge; "scores" is null where it is missing

Several processes take whole batches, the longest first: a judge that is shown a batch rounds as the batch has it. The
folder is one that all of them see, as that of the checkpoints is. Whoever makes a video writes its file, as nobody else
has its name and frames are not to travel. What says what is done is rank 0's to write; the others post it their rows.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from tempact.distributed import Ranks
from tempact.errors import UserError
from tempact.evaluation import Method
from tempact.evaluation.judges import DRAWS_OF_OLD, JudgedVideo, Suite, Verdict, VideoJudge, no_verdict
from tempact.evaluation.ledger import Ledger, Row, register
from tempact.evaluation.prompts import OrderPrompt
from tempact.evaluation.statistics import MethodScores
from tempact.files import file_hash, safe_name
from tempact.seeds import derive_seed
from tempact.types import Plan, Prompt, Step
from tempact.video import VideoFormat

if TYPE_CHECKING:  # reports read scores without loading what makes videos
    from tempact.executor.executor import Executor
    from tempact.executor.sampler import NoiseSource
    from tempact.planner.planner import Planner

log = logging.getLogger(__name__)

SETTINGS, PLANS, VIDEOS, SCORES = "settings.json", "plans.jsonl", "videos.jsonl", "scores.jsonl"
DONE = "done"  # what is posted beside rows of VIDEOS and SCORES: how many videos are done
# makes a plan's video with continuations: its frames, and what was chosen at every switch
BestVideo: TypeAlias = Callable[["Executor", Plan, "NoiseSource"], tuple[Tensor, bool, list[dict[str, Any]]]]
WAITING = 128  # verdicts on their way before the next video is made: their frames are held in memory


@dataclass(frozen=True)
class Sample:
    """A finished video: frames uint8 [T, 3, height, width], and the plan's steps that it was made from."""

    method: Method
    prompt: OrderPrompt
    steps: tuple[Step, ...]
    frames: Tensor


@dataclass(frozen=True)
class Unit:
    """Videos that are made one after the other and judged together: of a method and seed, a batch of a set's prompts.

    left: how many of them are not made or lack a judge's verdict.
    """

    set: str
    method: Method
    seed: int
    prompts: Sequence[OrderPrompt]
    left: int


class Evaluation:
    """A suite in a folder: makes and scores what is missing there, and gives what is done.

    noise: `executor.sampler.gaussian_noise`, from seed, shape and device. again: missing scores are asked for again.
    ranks: the processes that make and score; rank 0 alone has all that is done. best_of: makes a plan's video where a
    method has several continuations: frames uint8 [T, 3, height, width], and what was chosen.
    """

    def __init__(
        self, folder: Path, suite: Suite, planner: Planner, executor: Executor,
        noise: Callable[[int, tuple[int, ...], torch.device], NoiseSource], files: VideoFormat, again: bool = False,
        ranks: Ranks | None = None, best_of: BestVideo | None = None,
    ):  # fmt: skip
        """UserError for a ledger in `folder` that cannot be read."""
        self.folder, self.suite, self.files = folder, suite, files
        self.planner, self.executor, self.noise = planner, executor, noise
        self._waiting: dict[Future[Verdict], Row] = {}
        self._again, self.ranks, self._best_of = again, ranks or Ranks(), best_of
        self.ranks.from_first(self._open)  # first: it mends what a kill has cut off
        if not self.ranks.first:
            self._open()

    def _open(self) -> None:
        """Reads the ledgers. Plans are known to all ranks, so that rank 0 is told of videos and scores alone."""
        post = None if self.ranks.first else self.ranks.post
        plan, video = ("steps", "format_score", "repairs", "response"), ("file", "sha256", "steps")
        key = ("prompt_id", "condition", "seed")
        self._plans = Ledger(self.folder / PLANS, ("prompt_id", "planner", "seed"), plan, post and (lambda rows: None))
        self._videos = Ledger(self.folder / VIDEOS, key, video, post and (lambda rows: post((VIDEOS, rows))))
        self.scores = Ledger(
            self.folder / SCORES, (*key, "judge"), ("scores", "sha256"), post and (lambda rows: post((SCORES, rows)))
        )

    def run(
        self, policies: str, tell: Callable[[str], None], step: Callable[[int], None] = lambda videos: None
    ) -> None:
        """Makes and scores what is missing; `tell` is given a word on what is being done here, `step`, on rank 0, how
        many of `left` have been made and shown to the judges since.

        All plans come first; videos are judged while the next ones are made. Leaves the global random state as it was.
        UserError where the folder holds scores that were obtained under other settings (policies: as for
        `Suite.settings`), for a folder that a rank does not see, and for a length that the window cannot make. Whatever
        ends this early, what a judge raises too, is raised once the verdicts that came are written.
        """
        ranks, suite, now = self.ranks, self.suite, ""

        def told(what: str) -> None:
            nonlocal now
            ranks.phase(f"evaluation, {what}")
            if what != now:
                tell(now := what)

        ranks.from_first(lambda: register(self.folder / SETTINGS, suite.settings(policies), DRAWS_OF_OLD))
        ranks.agreed(self._see, UserError)
        if len(self.scores):
            log.info("%s: goes on with %d scores", self.scores.path, len(self.scores))
        with ExitStack() as last:
            last.callback(self._receive, step)
            last.callback(self._write_down, block=False)  # before that
            units, unplanned = ranks.from_first(self._work)
            for name, prompts in suite.prompts.items():
                with self._at_length(suite.frames[name]):
                    for _, who, seed in (each for each in unplanned if each[0] == name):
                        told(f"plans, {name}")
                        self._plan(who, prompts, seed)
            self._encode(units)
            for unit in ranks.take(units, lambda unit: suite.frames[unit.set] * unit.left):
                told(f"{unit.method.name}, {unit.set}")
                self._work_off(unit)
                self._receive(step)
                step(unit.left) if ranks.first else ranks.post((DONE, unit.left))
            while self._waiting:
                told("waiting for the judges")
                self._write_down(block=True)
            self._receive(step, wait=True)
            ranks.arrive()

    def _encode(self, units: Sequence[Unit]) -> None:
        """The first rank of a machine alone loads the text encoder; the others find the rows in its cache on disk."""
        first = self.ranks.local_rank == 0 and not self.ranks.alone
        for number, unit in enumerate(units if first else ()):
            self.ranks.phase(f"evaluation, texts of batch {number}")
            with self._at_length(self.suite.frames[unit.set]):
                if missing := self._missing(unit.method, unit.prompts, unit.seed):
                    plans = self._planned(unit.method, missing, unit.seed)
                    self.executor.read(self.executor.prompts(plans))
        self.ranks.arrive()

    def _see(self) -> None:
        if not (self.folder / SETTINGS).is_file():
            found = f"{self.folder}: found another folder on rank {self.ranks.rank}"
            raise UserError(f"{found}; accepted: one that all machines share")

    def _work(self) -> tuple[list[Unit], list[tuple[str, str, int]]]:
        """What is left, and the sets, planners and seeds of which a video lacks its plan."""
        size = self.suite.batch
        units = [
            Unit(name, method, seed, some, len(left))
            for name, prompts in self.suite.prompts.items()
            for method, seed in itertools.product(self.suite.methods, range(self.suite.seeds))
            for some in (prompts[first : first + size] for first in range(0, len(prompts), size))
            if (left := self._left(method, some, seed))
        ]
        lacking = {
            (unit.set, unit.method.planner, unit.seed): None
            for unit in units
            for prompt in self._missing(unit.method, unit.prompts, unit.seed)
            if unit.method.planner and (prompt.prompt_id, unit.method.planner, unit.seed) not in self._plans
        }
        return units, list(lacking)

    def _receive(self, step: Callable[[int], None], wait: bool = False) -> None:
        """On rank 0, writes down what the others have posted since; wait: until they have no more."""
        for what, posted in self.ranks.posted(wait):
            if what == DONE:
                step(posted)
            else:
                (self._videos if what == VIDEOS else self.scores).add(posted, again=True)

    @property
    def left(self) -> int:
        """How many videos are not made or lack a judge's verdict."""
        return sum(unit.left for unit in self._work()[0])

    def video(self, method: Method, prompt: OrderPrompt, seed: int) -> Row | None:
        """The row of a video whose file is as it was made: its `file`, `sha256` and the `steps` it was made from."""
        row = self._videos.get((prompt.prompt_id, method.name, seed))
        try:
            return row if row is not None and file_hash(self.folder / row["file"]) == row["sha256"] else None
        except OSError:  # not there, or not readable
            return None

    def samples(self, count: int) -> Iterator[list[Sample]]:
        """The first `count` prompts of each set: the first seed's video of every method."""
        for prompts in self.suite.prompts.values():
            for prompt in prompts[:count]:
                found = []
                for method in self.suite.methods:
                    row = self.video(method, prompt, 0)
                    assert row is not None, (prompt.prompt_id, method.name)
                    found.append(Sample(method, prompt, _steps(row), self.files.read(self.folder / row["file"])))
                yield found

    def method_scores(self, metric: str = "") -> list[MethodScores]:
        """Scores of every set, method and judge, prompt by prompt, each with its seeds; NaN where missing.

        metric: the field of verdicts that have several; of a judge with one score it is the judge's name.
        """
        found = []
        for (name, prompts), method, judge in itertools.product(
            self.suite.prompts.items(), self.suite.methods, self.suite.judges
        ):
            keys = ((p.prompt_id, seed) for p in prompts for seed in range(self.suite.seeds))
            own = [self.score(prompt_id, method, seed, judge.name, metric) for prompt_id, seed in keys]
            found.append(MethodScores(method.name, name, judge.name, own))
        return found

    def score(self, prompt_id: str, method: Method, seed: int, judge: str, metric: str) -> float:
        """One score, as `method_scores` reads it."""
        row = self.scores.get((prompt_id, method.name, seed, judge))
        assert row is not None, f"{prompt_id}, {method.name}, {seed}, {judge}: not evaluated"
        scores = row["scores"]
        return math.nan if scores is None else scores[judge if judge in scores else metric]

    @contextmanager
    def _at_length(self, frames: int) -> Iterator[None]:
        """Inside, plans and videos are `frames` latent frames long."""
        planner, executor = self.planner, self.executor
        before = planner.frames, executor.settings
        executor.settings.window.check(frames, executor.settings.chunk)
        planner.frames, executor.settings = frames, replace(executor.settings, frames=frames)
        try:
            yield
        finally:
            planner.frames, executor.settings = before

    def _left(self, method: Method, prompts: Sequence[OrderPrompt], seed: int) -> list[OrderPrompt]:
        """Those of a method's videos that are not made or lack a judge's verdict."""

        def done(prompt: OrderPrompt) -> bool:
            made = self.video(method, prompt, seed)
            return made is not None and all(self._scored(made, judge) for judge in self.suite.judges)

        return [prompt for prompt in prompts if not done(prompt)]

    def _scored(self, made: Row, judge: VideoJudge) -> bool:
        """Has the judge given its verdict on this very file?"""
        known = self.scores.get((made["prompt_id"], made["condition"], made["seed"], judge.name))
        if known is None or known["sha256"] != made["sha256"]:
            return False
        return known["scores"] is not None or not self._again

    def _work_off(self, unit: Unit) -> None:
        """Makes the videos of a batch and shows them to the judges."""
        with self._at_length(self.suite.frames[unit.set]):
            self._make(unit.method, unit.prompts, unit.seed)
            for group in [unit.prompts] if self.suite.batched else [[prompt] for prompt in unit.prompts]:
                self._judge(unit.method, group, unit.seed)

    def _make(self, method: Method, prompts: Sequence[OrderPrompt], seed: int) -> None:
        """Those videos that are missing."""
        from tempact.executor.sampler import NoiseSource

        if not (missing := self._missing(method, prompts, seed)):
            return
        chosen = self._planned(method, missing, seed)
        shape, device = self.executor.noise_shape(1, method.best_of), self.executor.device
        seeds = [derive_seed(self.suite.seed, seed, f"{prompt.prompt_id} noise") for prompt in missing]
        sources = [self.noise(own, shape, device) for own in seeds]
        noise = NoiseSource((len(missing), *shape[1:]), lambda plan, *video: sources[plan].draw(0, *video))
        with self.executor.reference() if method.executor == "start" else nullcontext():
            if method.best_of > 1:
                assert self._best_of is not None, method
                for prompt, plan, source in zip(missing, chosen, sources, strict=True):
                    own, bad, choices = self._best_of(self.executor, plan, source)
                    self._keep(method, seed, [(prompt, plan, own, bad)], choices=choices)
                return
            made = self.executor.rollout(chosen, [0] * len(chosen), noise)
        broken = [False] * len(chosen) if made.broken is None else made.broken[:, 0].tolist()
        self._keep(method, seed, zip(missing, chosen, made.frames[:, 0], broken, strict=True))

    def _keep(
        self, method: Method, seed: int, made: Iterable[tuple[OrderPrompt, Plan, Tensor, bool]], **more: Any
    ) -> None:
        """Writes videos and their rows; `more` stands in each of these rows."""
        rows = []
        for prompt, plan, frames, bad in made:
            name = f"videos/{safe_name(method.name)}/{prompt.prompt_id}-{seed}{self.files.suffix}"
            self.files.save(frames, self.folder / name)
            rows.append(
                {
                    "prompt_id": prompt.prompt_id, "condition": method.name, "seed": seed, "file": name,
                    "frames": len(frames), "sha256": file_hash(self.folder / name), "prompt": prompt.text,
                    "steps": [asdict(step) for step in plan.steps], "broken": bad, **more,
                }
            )  # fmt: skip
        self._videos.add(rows, again=True)  # a file may have been removed or changed

    def _missing(self, method: Method, prompts: Sequence[OrderPrompt], seed: int) -> list[OrderPrompt]:
        return [prompt for prompt in prompts if self.video(method, prompt, seed) is None]

    def _plan(self, who: str, prompts: Sequence[OrderPrompt], seed: int) -> None:
        """Samples the plans of a set, which all ranks share: each plan has its seed by its number in the set, the same
        for the planner and its start."""
        of_set = [Prompt(prompt.prompt_id, prompt.text, prompt.category) for prompt in prompts]
        number = derive_seed(self.suite.seed, seed, f"{prompts[0].set} plans")
        sampled = self.planner.sample(of_set, 1, number, reference=who == "start", ranks=self.ranks).plans
        self._plans.add(
            {
                "prompt_id": prompt.prompt_id, "planner": who, "seed": seed,
                "steps": [asdict(step) for step in plan.steps], "format_score": plan.format_score,
                "repairs": list(plan.repairs), "response": plan.response,
            }
            for prompt, plan in zip(prompts, sampled, strict=True)
            if (prompt.prompt_id, who, seed) not in self._plans
        )  # fmt: skip

    def _planned(self, method: Method, asked: Sequence[OrderPrompt], seed: int) -> list[Plan]:
        """The plans of these prompts as the method has them; the prompts themselves where nobody plans."""
        if method.planner is None:
            return [Plan(p.text, (Step(0, self.planner.frames, p.text),)) for p in asked]
        rows = [self._plans[prompt.prompt_id, method.planner, seed] for prompt in asked]
        plans = [
            Plan(p.text, _steps(row), row["format_score"], tuple(row["repairs"]), row["response"])
            for p, row in zip(asked, rows, strict=True)
        ]
        return [self.suite.reword(plan) for plan in plans] if method.reworded else plans

    def _judge(self, method: Method, prompts: Sequence[OrderPrompt], seed: int) -> None:
        """Asks the judges about those of these videos that they have not scored yet."""
        shown: list[tuple[Row, JudgedVideo]] = []
        for prompt in self._left(method, prompts, seed):
            made = self.video(method, prompt, seed)
            assert made is not None, (prompt.prompt_id, method.name, seed)
            shown.append((made, JudgedVideo(prompt, self.files.read(self.folder / made["file"]))))
        for judge in self.suite.judges:
            due = [(made, video) for made, video in shown if not self._scored(made, judge)]
            asked = [
                {
                    "prompt_id": video.prompt.prompt_id, "condition": method.name, "seed": seed, "judge": judge.name,
                    "set": video.prompt.set, "category": video.prompt.category, "sha256": made["sha256"],
                }
                for made, video in due
            ]  # fmt: skip
            sound = [video for made, video in due if not made.get("broken")]
            verdicts = iter(judge.submit(sound) if sound else ())
            for (made, _), row in zip(due, asked, strict=True):
                self._waiting[
                    no_verdict("the video's latents are not finite") if made.get("broken") else next(verdicts)
                ] = row
        self._write_down(block=False)
        while len(self._waiting) >= WAITING:
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
        self.scores.add(rows, again=True)  # a video may have been made anew, a missing score asked for again
        if errors:
            raise errors[0]


def _steps(row: Row) -> tuple[Step, ...]:
    return tuple(Step(**step) for step in row["steps"])
