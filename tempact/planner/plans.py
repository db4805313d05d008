"""What the planner is asked, and the form in which it answers.

From a planner's response to a plan. Never raises, whatever the planner wrote.

A response is usable as written (format score 1) when what follows `</think>` is a JSON array of
{"start", "end", "prompt"} objects, and nothing else, whose spans cover [0, F) in order on chunk bounds. Other
responses are repaired (format score 0.5); `Plan.repairs` holds the names of the repairs made:

  extracted          the steps were found inside other text, another JSON value or a truncated array
  steps dropped      an object without a usable prompt (blank, missing, not a string) is left out
  keys ignored       a step has keys beside start, end and prompt
  bounds converted   a bound is a whole number written as a string or a float
  bounds filled      a bound is missing or unreadable; its neighbours give it
  sorted             the steps are not in order of their starts
  too many steps     there are more steps than chunks; the surplus at the end is left out
  prompt cleaned     a prompt has characters that are no text (half a surrogate pair)
  prompt shortened   a prompt is longer than MAX_PROMPT_CHARS
  gaps closed        a step does not end where the next one starts; the next one's start counts
  starts at 0        the first step starts elsewhere
  ends at F          the last step ends elsewhere
  snapped            a bound is off the chunk grid (nearest multiple, ties upwards) or leaves a step no chunk

A response without one usable step is unusable: format score 0, one step that holds the whole instruction.

A plan from a file, in the place of a planner's.

Requests for videos from a file of prompts.

Beside what such a file holds (tempact.prompt_file) a row may have `plan` (the steps, as in a plan file) and `seed`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from tempact.config import LARGEST_SEED
from tempact.errors import UserError
from tempact.prompt_file import SHOWN, PromptRow, check_ids, read_rows
from tempact.types import Plan, Prompt, Step

log = logging.getLogger(__name__)

SYSTEM = """You direct a video of {frames} latent frames, made in chunks of {chunk} frames. \
Split the user's instruction into consecutive steps and answer with a JSON array only, in this form:
{example}
Rules: the first step starts at 0 and shows the opening scene; each step starts where the one before ends; \
the last step ends at {frames}; every start and end is a multiple of {chunk}; slow events get longer spans. \
Each prompt stands alone: it names its subjects with their looks, says what happens in this step only, \
and adds nothing that the instruction does not say. Keep the order of the instruction."""


def plan_messages(instruction: str, frames: int, chunk: int) -> list[dict[str, str]]:
    """Chat messages that ask for a plan of `frames` latent frames in chunks of `chunk`."""
    middle = frames // chunk // 2 * chunk
    steps = [Step(0, middle, "A cat sits on a red sofa."), Step(middle, frames, "The cat jumps off the red sofa.")]
    example = plan_json([step for step in steps if step.start < step.end])
    system = SYSTEM.format(frames=frames, chunk=chunk, example=example)
    return [{"role": "system", "content": system}, {"role": "user", "content": instruction}]


def plan_json(steps: Sequence[Step]) -> str:
    """The compact JSON that a planner answers with; `parse_plan` reads it back."""
    rows = [{"start": step.start, "end": step.end, "prompt": step.prompt} for step in steps]
    return json.dumps(rows, ensure_ascii=False, separators=(",", ":"))


THINK_START, THINK_END = "<think>", "</think>"
MAX_RESPONSE_CHARS = 20_000  # after </think>; longer ones are unusable
MAX_PROMPT_CHARS = 600  # about what text encoders of video models read
MAX_DECODES = 200  # JSON objects looked for in a response that is no bare array
UNUSABLE = "unusable"


class _Step(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    start: int
    end: int
    prompt: str


_STEPS = TypeAdapter(list[_Step])


@dataclass
class _Draft:
    """A step on its way to repair; a bound is None where nothing readable was given."""

    start: int | None
    end: int | None
    prompt: str


def parse_plan(response: str, instruction: str, frames: int, chunk: int) -> Plan:
    """The plan in `response` for `frames` latent frames in chunks of `chunk` (a divisor of `frames`).

    The module's docstring lists the repairs.
    """
    repairs: dict[str, None] = {}  # an ordered set
    drafts = _read(response, repairs)
    if not drafts:
        whole = (Step(0, frames, instruction),)
        return Plan(instruction, whole, format_score=0.0, repairs=(UNUSABLE,), response=response)
    drafts = _tidy(drafts, frames // chunk, repairs)
    bounds = _bounds(drafts, frames, chunk, repairs)
    steps = tuple(Step(a, b, d.prompt) for a, b, d in zip(bounds[:-1], bounds[1:], drafts, strict=True))
    return Plan(instruction, steps, format_score=0.5 if repairs else 1.0, repairs=tuple(repairs), response=response)


def answer_of(response: str) -> str:
    """What follows the last `</think>`; all of it without that tag, nothing of a thought that never ends."""
    _, closed, answer = response.rpartition(THINK_END)
    return "" if not closed and THINK_START in answer else answer


def _read(response: str, repairs: dict[str, None]) -> list[_Draft]:
    answer = answer_of(response).strip()
    if len(answer) > MAX_RESPONSE_CHARS:
        return []
    try:
        strict = _STEPS.validate_json(_clean(answer))
    except ValidationError:
        strict = None
    if strict and all(step.prompt.strip() for step in strict):
        return [_Draft(_clamped(step.start), _clamped(step.end), step.prompt.strip()) for step in strict]
    found, whole = _find_steps(answer)
    if not whole:
        repairs["extracted"] = None
    return _drafts(found, repairs)


def _find_steps(answer: str) -> tuple[list[dict], bool]:
    """Objects that look like steps, and whether they are the entries of one bare array."""
    decoder = json.JSONDecoder()
    try:
        value = decoder.decode(answer)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        return value, True
    found, position = [], answer.find("{")
    for _ in range(MAX_DECODES):
        if position < 0:
            break
        try:
            value, end = decoder.raw_decode(answer, position)
        except (ValueError, RecursionError):
            value, end = None, position + 1
        if isinstance(value, dict) and "prompt" in value:
            found.append(value)
        else:
            end = position + 1  # a wrapper: look inside
        position = answer.find("{", end)
    return found, False


def _drafts(found: list[dict], repairs: dict[str, None]) -> list[_Draft]:
    drafts = []
    for entry in found:
        prompt = entry.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            repairs["steps dropped"] = None
            continue
        if entry.keys() - {"start", "end", "prompt"}:
            repairs["keys ignored"] = None
        clean = _clean(prompt)
        if clean != prompt:
            repairs["prompt cleaned"] = None
        drafts.append(_Draft(_bound(entry.get("start"), repairs), _bound(entry.get("end"), repairs), clean.strip()))
    return drafts


def _clean(text: str) -> str:
    """Half surrogate pairs, which JSON escapes can write and no tokenizer takes, become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _bound(value: object, repairs: dict[str, None]) -> int | None:
    """A whole number, or None; numbers as strings and floats are converted."""
    if isinstance(value, int) and not isinstance(value, bool):
        return _clamped(value)
    if isinstance(value, str) and len(value) <= 12:
        try:
            value = float(value)
        except ValueError:
            value = None
    if isinstance(value, float) and math.isfinite(value):
        repairs["bounds converted"] = None
        return _clamped(round(value))
    repairs["bounds filled"] = None
    return None


def _clamped(value: int) -> int:
    """Keeps absurd numbers in a range where arithmetic is cheap; they are off any video either way."""
    return max(-1_000_000, min(1_000_000, value))


def _tidy(drafts: list[_Draft], most: int, repairs: dict[str, None]) -> list[_Draft]:
    """Order, number and prompt length."""
    starts = [draft.start for draft in drafts if draft.start is not None]
    if len(starts) == len(drafts) and starts != sorted(starts):
        repairs["sorted"] = None
        drafts = sorted(drafts, key=lambda draft: draft.start or 0)
    if len(drafts) > most:
        repairs["too many steps"] = None
        drafts = drafts[:most]
    for draft in drafts:
        if len(draft.prompt) > MAX_PROMPT_CHARS:
            repairs["prompt shortened"] = None
            draft.prompt = draft.prompt[:MAX_PROMPT_CHARS].rstrip()
    return drafts


def _bounds(drafts: list[_Draft], frames: int, chunk: int, repairs: dict[str, None]) -> list[int]:
    """n + 1 increasing chunk bounds from 0 to `frames` for n steps, at most one step a chunk."""
    first, last = drafts[0].start, drafts[-1].end
    if first is not None and first != 0:
        repairs["starts at 0"] = None
    if last is not None and last != frames:
        repairs["ends at F"] = None
    wanted: list[int | None] = [0]
    for before, after in pairwise(drafts):
        if before.end is not None and after.start is not None and before.end != after.start:
            repairs["gaps closed"] = None
        wanted.append(before.end if after.start is None else after.start)
    filled = _fill([*wanted, frames])
    bounds = [(bound + chunk // 2) // chunk * chunk for bound in filled]
    count = len(drafts)
    for i in range(1, count):  # a chunk for every step before, then for every step after
        bounds[i] = max(bounds[i], bounds[i - 1] + chunk)
    for i in range(count - 1, 0, -1):
        bounds[i] = min(bounds[i], bounds[i + 1] - chunk)
    if bounds != filled:
        repairs["snapped"] = None
    return bounds


def _fill(bounds: list[int | None]) -> list[int]:
    """Spreads unknown bounds evenly between their known neighbours; the first and last are known."""
    filled: list[int] = []
    for i, bound in enumerate(bounds):
        if bound is None:
            steps, known = next((n, b) for n, b in enumerate(bounds[i:], start=1) if b is not None)
            bound = round(filled[-1] + (known - filled[-1]) / steps)
        filled.append(bound)
    return filled


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


@dataclass(frozen=True)
class Request:
    """An instruction to make videos of. `where`: what messages call it; plan, seed: its own, None if it has none."""

    where: str
    prompt: Prompt
    plan: Plan | None = None
    seed: int | None = None


def read_requests(path: Path, frames: int, chunk: int) -> list[Request]:
    """The file's rows in order; plans are of `frames` latent frames in chunks of `chunk`.

    Raises UserError that names the row: for all that `tempact.prompt_file` refuses, an id given twice, a plan without
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
