"""A plan from a file, in the place of a planner's."""

from __future__ import annotations

import logging
from pathlib import Path

from tempact.errors import UserError
from tempact.planner.parsing import UNUSABLE, parse_plan
from tempact.types import Plan

log = logging.getLogger(__name__)

ACCEPTED = 'a JSON file with steps: "start" and "end" (latent frames), "prompt"'


def read_plan(path: Path, instruction: str, frames: int, chunk: int) -> Plan:
    """The steps in a JSON file, an array of them or an object that holds one, repaired as a planner's answer is.

    Raises UserError where the file cannot be read or holds no step; repairs are logged.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); accepted: {ACCEPTED}") from error
    return plan_of(text, str(path), instruction, frames, chunk)


def plan_of(text: str, where: str, instruction: str, frames: int, chunk: int) -> Plan:
    """The same from JSON text; `where` says in messages whose text it is."""
    plan = parse_plan(text, instruction, frames, chunk)
    if UNUSABLE in plan.repairs:
        raise UserError(f"{where}: found no steps; accepted: {ACCEPTED}")
    if plan.repairs:
        log.warning("%s: %s", where, ", ".join(plan.repairs))
    return plan
