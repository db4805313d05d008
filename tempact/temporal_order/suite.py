"""The Temporal Order Benchmark (ALGORITHM.md section 7): prompts, conditions and seeds to videos to scored rows.

All that is done is written down at once under the evaluation's folder, so a killed evaluation goes on where it was:

settings.json  what scores depend on, registered before the first one
plans.jsonl    every plan, by prompt, planner and seed
videos.jsonl   every video in videos/, by prompt, condition and seed
scores.jsonl   every verdict, by prompt, condition, seed and judge; "scores" is null where it is missing
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path

from tempact.temporal_order.conditions import Method
from tempact.temporal_order.frames import PICKSCORE_FRAMES, judged_frames, read_video
from tempact.temporal_order.judging import JudgedVideo, Verdict, VideoJudge
from tempact.temporal_order.ledger import Key, Ledger, Row, register
from tempact.temporal_order.making import Maker, at_length
from tempact.temporal_order.prompts import OrderPrompt

log = logging.getLogger(__name__)

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
