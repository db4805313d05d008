"""The examples of docs/kernels.md run, and its numbers are those of the result file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import csrc_triton

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs/kernels.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python( gpu)?\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def executed(*, gpu: bool) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for of_gpu, code in BLOCKS:
        if gpu or not of_gpu:
            exec(compile(code, "docs/kernels.md", "exec"), names)
    return names


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs all examples")
def test_the_examples_run() -> None:
    names = executed(gpu=False)
    assert len(BLOCKS) >= 8 and names["gradient"].shape == names["each"].shape == names["q"].shape
    assert names["to_qkv"][0].weight.grad.abs().max() > 0
    assert names["cache"].length(names["moved"]) == names["filled"]


@pytest.mark.gpu
def test_all_examples_run() -> None:
    names = executed(gpu=True)
    past = names["cache"].views(names["branches"], [(0, names["tokens"])])[0]
    expected = csrc_triton.fork_attention(names["x"], names["x"], names["x"], past)
    torch.testing.assert_close(names["out"], expected)


def test_every_op_has_a_line_and_its_numbers_are_measured() -> None:
    table = PAGE[PAGE.index("| op | shapes") : PAGE.index("## A chunk at a time")]
    functions = [name for name in csrc_triton.__all__ if name[0].islower()]
    assert [name for name in functions if f"`{name}`" not in table] == []
    rows = json.loads((REPOSITORY / "bench/baselines/nvidia-h200.json").read_text(encoding="utf-8"))["rows"]
    measured = {f"{row['ms']:.3f}" for row in rows if row["impl"] == "ours" and row["ms"] is not None}
    measured |= {f"{row['ms']:.1f}" for row in rows if row["impl"] == "ours" and row["ms"] is not None}
    rates = {f"{row['gbps']:,.0f}" for row in rows if row["impl"] == "ours" and row["gbps"] is not None}
    rates |= {f"{row['tflops']:.0f}" for row in rows if row["impl"] == "ours" and row["tflops"] is not None}
    assert [number for number in re.findall(r"([\d.]+) ms", table) if number not in measured] == []
    assert [number for number in re.findall(r"([\d,]+) (?:GB|TFLOP)/s", table) if number not in rates] == []
