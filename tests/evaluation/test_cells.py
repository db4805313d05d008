"""Finished cells of an evaluation: what a full disk leaves of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tempact.errors import UserError
from tempact.evaluation import harness as cells
from tempact.evaluation.harness import Cell, CellStore
from tempact.evaluation.statistics import MethodScores
from tempact.types import Plan, Prompt, Step

PROMPTS = [Prompt("a", "A cat sits."), Prompt("b", "A dog runs.")]
PLANS = [Plan(prompt.text, (Step(0, 24, prompt.text),)) for prompt in PROMPTS]
FRAMES = torch.arange(2 * 3 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 3, 4, 4)
CELL = Cell([MethodScores("step-prompt", "simple", "verifier", [0.25, 0.75])], PLANS, FRAMES)


def test_a_full_disk_is_one_line_and_the_cell_can_be_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CellStore(tmp_path / "evaluation", 1)

    def full(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"a part")
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(cells, "save_file", full)
        with pytest.raises(UserError, match="step-prompt-simple.safetensors: found no space left on the disk"):
            store.save("step-prompt", "simple", PROMPTS, CELL)
    assert list((tmp_path / "evaluation" / "samples").iterdir()) == []
    assert store.load("step-prompt", "simple", ["verifier"], PROMPTS) is None
    store.save("step-prompt", "simple", PROMPTS, CELL)
    again = CellStore(tmp_path / "evaluation", 1).load("step-prompt", "simple", ["verifier"], PROMPTS)
    assert again is not None and again.scores == CELL.scores
    assert [plan.steps for plan in again.plans] == [plan.steps for plan in PLANS]
    assert torch.equal(again.frames, FRAMES)
