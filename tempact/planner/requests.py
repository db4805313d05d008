"""Requests for videos from a file of prompts.

Beside what such a file holds (infra.prompt_file) a row may have `plan` (the steps, as in a plan file) and `seed`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempact.config import LARGEST_SEED
from tempact.errors import UserError
from tempact.infra.prompt_file import SHOWN, PromptRow, check_ids, read_rows
from tempact.planner.plan_file import plan_of
from tempact.types import Plan, Prompt


@dataclass(frozen=True)
class Request:
    """An instruction to make videos of. `where`: what messages call it; plan, seed: its own, None if it has none."""

    where: str
    prompt: Prompt
    plan: Plan | None = None
    seed: int | None = None


def read_requests(path: Path, frames: int, chunk: int) -> list[Request]:
    """The file's rows in order; plans are of `frames` latent frames in chunks of `chunk`.

    Raises UserError that names the row: for all that `infra.prompt_file` refuses, an id given twice, a plan without
    steps, a seed that is none.
    """
    rows = read_rows(path, ("plan", "seed"))
    check_ids(rows)
    return [Request(row.where, row.prompt, _plan(row, frames, chunk), _seed(row)) for row in rows]


def _plan(row: PromptRow, frames: int, chunk: int) -> Plan | None:
    steps = _given(row.cells, "plan")
    if steps is None:
        return None
    if not isinstance(steps, str | list | dict):
        raise UserError(f"{row.where}: plan: found {repr(steps)[:SHOWN]}; accepted: steps, as in a plan file")
    text = steps if isinstance(steps, str) else json.dumps(steps)
    return plan_of(text, f"{row.where}: plan", row.prompt.text, frames, chunk)


def _seed(row: PromptRow) -> int | None:
    found = _given(row.cells, "seed")
    if found is None:
        return None
    try:
        seed = int(found) if isinstance(found, str) else found
    except ValueError:
        seed = None
    if type(seed) is not int or not 0 <= seed <= LARGEST_SEED:
        accepted = f"a whole number from 0 to {LARGEST_SEED}"
        raise UserError(f"{row.where}: seed: found {repr(found)[:SHOWN]}; accepted: {accepted}")
    return seed


def _given(cells: Mapping[str, Any], key: str) -> Any:
    """A cell's value, None where it is empty."""
    value = cells.get(key)
    return None if isinstance(value, str) and not value.strip() else value
