"""What an evaluation by cells (a method on a whole set) has done, so that a killed one goes on with the next cell."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tempact.infra.files import safe_name, writing
from tempact.temporal_order.ledger import Ledger
from tempact.temporal_order.protocol import MethodScores
from tempact.types import Plan, Prompt, Step

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
