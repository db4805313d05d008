"""Plans as text: the chat that asks for one, the parser of answers, plan files, and requests for videos from files.

An answer is usable as written (format score 1) when the text after `</think>` is a JSON array of
{"start", "end", "prompt"} objects and nothing else, whose spans cover [0, F) in order on chunk bounds. Other answers
are repaired (format score 0.5); `Plan.repairs` holds the names of the repairs made:

  extracted          the steps were found inside other text or another JSON value, or are texts or triples
  mended             the JSON itself has mistakes (`tempact.planner` lists those that can be read over)
  keys repeated      a key is given twice in one object; its last value counts
  drafts left out    of several plans the last one counts
  steps dropped      an entry without a usable prompt (blank, missing, cut off, not a text) is left out
  keys renamed       a step has other names for start, end and prompt (`NAMES`)
  keys ignored       a step has further keys
  bounds converted   a bound is a whole number written as a string or a float
  bounds unread      a bound is no number; its neighbours give it
  bounds filled      a bound is missing; its neighbours give it
  sorted             the steps are not in order of their starts
  too many steps     there are more steps than chunks; the surplus at the end is left out
  prompt cleaned     a prompt has characters that are no text (half a surrogate pair)
  prompt shortened   a prompt is longer than MAX_PROMPT_CHARS
  gaps closed        a step does not end where the next one starts; the next one's start counts
  starts at 0        the first step starts elsewhere
  ends at F          the last step ends elsewhere
  snapped            a bound is off the chunk grid (rounded) or leaves a step no chunk

An answer without a usable step is unusable: format score 0, and one step that holds the whole instruction. What a user
gives, in files and cells of them, is read alike, but prompts are not shortened, and mistakes in the JSON itself and
steps or bounds that would be lost are errors.

Bounds off the grid are rounded to the nearest chunk start, ties upwards. Plans from files may instead follow a
backbone that switches prompts at the first chunk start at or after a bound (`executor.switch_rounding`: "up").
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from tempact.config import LARGEST_SEED
from tempact.errors import UserError
from tempact.planner.answers import UNREAD, number, plan_entries, step_fields
from tempact.prompt_file import SHOWN, PromptRow, blank, check_ids, decoded_text, read_rows, whole_number
from tempact.types import Plan, Prompt, Step

log = logging.getLogger(__name__)

THINK_START, THINK_END = "<think>", "</think>"
MAX_RESPONSE_CHARS = 20_000  # after </think>; longer answers are unusable
MAX_PROMPT_CHARS = 600  # of a planner's step
UNUSABLE = "unusable"
ACCEPTED = 'a JSON file with steps: "start" and "end" (latent frames), "prompt"'
ROUND_BY = {"nearest": lambda chunk: chunk // 2, "up": lambda chunk: chunk - 1}  # added before a floor division
UNITS = "to|and|frames?|f|(?:milli)?sec(?:ond)?s?|m?s|min(?:ute)?s?|m"
TIMES = re.compile(rf"(?=.*\d)(?:[\d\s.,:+~\u2013\u2014-]|{UNITS})++", re.IGNORECASE)  # numbers, times, spans
PART = "step|scene|shot|segment"
ORDINAL = re.compile(rf"(?:(?:{PART}|prompt)[\s_-]?)?(?:id|index|number|order|{PART})", re.IGNORECASE)
LOST = {  # what a planner's answer may lose and a user's plan may not, and what is accepted there
    "keys repeated": "each key once",
    "mended": ACCEPTED,
    "drafts left out": "the steps of one plan",
    "steps dropped": 'a text "prompt" in each step',
    "too many steps": "one step for each chunk, or fewer",
    "bounds unread": '"start" and "end", whole numbers of latent frames',
}

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
    """Steps as the compact JSON of a planner's answer, the inverse of `parse_plan`."""
    rows = [{"start": step.start, "end": step.end, "prompt": step.prompt} for step in steps]
    return json.dumps(rows, ensure_ascii=False, separators=(",", ":"))


@dataclass
class _Draft:
    """A step on its way to repair; a bound is None where nothing readable was given."""

    start: int | None
    end: int | None
    prompt: str


def parse_plan(response: str, instruction: str, frames: int, chunk: int, rounding: str = "nearest") -> Plan:
    """The plan in a planner's response. Never raises, whatever the response holds; the module lists the repairs.

    Args:
        response: the planner's text, with or without a thought.
        instruction: the user's, kept in the plan, and the only step of an unusable answer.
        frames, chunk: latent frames of the video and of a chunk, a divisor of `frames`.
        rounding: of bounds off the chunk grid, "nearest" or "up".
    """
    return _parsed(response, instruction, frames, chunk, rounding, given=False)[0]


def _parsed(
    text: str, instruction: str, frames: int, chunk: int, rounding: str, *, given: bool
) -> tuple[Plan, dict[str, str]]:
    """The plan in a planner's response, or in what a user has given; and its repairs with what was found."""
    repairs: dict[str, str] = {}
    answer = text if given else answer_of(text)
    entries = plan_entries(answer, repairs) if given or len(answer) <= MAX_RESPONSE_CHARS else []
    drafts = _drafts(entries, repairs)
    if not drafts:
        whole = (Step(0, frames, instruction),)
        return Plan(instruction, whole, format_score=0.0, repairs=(UNUSABLE,), response=text), repairs
    drafts = _tidy(drafts, frames // chunk, repairs)
    for draft in drafts:
        if len(draft.prompt) > MAX_PROMPT_CHARS and not given:
            repairs["prompt shortened"] = ""
            draft.prompt = draft.prompt[:MAX_PROMPT_CHARS].rstrip()
    bounds = _bounds(drafts, frames, chunk, ROUND_BY[rounding](chunk), repairs)
    steps = tuple(Step(a, b, d.prompt) for (a, b), d in zip(pairwise(bounds), drafts, strict=True))
    plan = Plan(instruction, steps, format_score=0.5 if repairs else 1.0, repairs=tuple(repairs), response=text)
    return plan, repairs


def uniform_spans(plan: Plan, chunk: int) -> Plan:
    """The plan with the same steps in equal spans: step i of n begins at chunk floor(i c / n) of the video's c.

    A plan has at most as many steps as the video has chunks, so that every step keeps one.
    """
    count, chunks = len(plan.steps), plan.frames // chunk
    bounds = [i * chunks // count * chunk for i in range(count + 1)]
    steps = (Step(start, end, step.prompt) for (start, end), step in zip(pairwise(bounds), plan.steps, strict=True))
    return replace(plan, steps=tuple(steps))


def answer_of(response: str) -> str:
    """The text after the last `</think>`; all of it without that tag, nothing of a thought without end."""
    _, closed, answer = response.rpartition(THINK_END)
    return "" if not closed and THINK_START in answer else answer


def _drafts(entries: list[Any], repairs: dict[str, str]) -> list[_Draft]:
    drafts = []
    for place, entry in enumerate(entries, 1):
        fields, renamed, ignored = step_fields(entry) if isinstance(entry, dict) else ({}, [], [])
        prompt = fields.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            repairs.setdefault("steps dropped", f"step {place}: found no text to read in {_shown(entry)}")
            continue
        if renamed:
            repairs.setdefault("keys renamed", f"step {place}: {', '.join(renamed)}")
        if ignored:
            repairs.setdefault("keys ignored", f"step {place}: found the keys {', '.join(ignored)[:SHOWN]}")
        clean = _clean(prompt)
        if clean != prompt:
            repairs["prompt cleaned"] = ""
        start, end = (_bound(fields.get(name), f"step {place}: {name}", repairs) for name in ("start", "end"))
        drafts.append(_Draft(start, end, clean.strip()))
    return drafts


def _shown(value: object) -> str:
    return "what stands there" if value is UNREAD else repr(value)[:SHOWN]


def _clean(text: str) -> str:
    """Half surrogate pairs, which JSON escapes can write and no tokenizer takes, become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _bound(value: object, what: str, repairs: dict[str, str]) -> int | None:
    """A whole number, or None; numbers as strings and floats are converted."""
    if isinstance(value, int) and not isinstance(value, bool):
        return _clamped(value)
    if value is None:
        repairs["bounds filled"] = ""
        return None
    if (found := number(value)) is not None:
        repairs["bounds converted"] = ""
        return _clamped(round(found))
    repairs.setdefault("bounds unread", f"{what}: found {_shown(value)}")
    return None


def _clamped(value: int) -> int:
    """Keeps absurd numbers in a range where arithmetic is cheap; they are off any video either way."""
    return max(-1_000_000, min(1_000_000, value))


def _tidy(drafts: list[_Draft], most: int, repairs: dict[str, str]) -> list[_Draft]:
    """Order and number."""
    starts = [draft.start for draft in drafts if draft.start is not None]
    if len(starts) == len(drafts) and starts != sorted(starts):
        repairs["sorted"] = ""
        drafts = sorted(drafts, key=lambda draft: draft.start or 0)
    if len(drafts) > most:
        repairs["too many steps"] = f"found {len(drafts)} steps in {most} chunks"
    return drafts[:most]


def _bounds(drafts: list[_Draft], frames: int, chunk: int, add: int, repairs: dict[str, str]) -> list[int]:
    """n + 1 increasing chunk bounds from 0 to `frames` for n steps, at most one step a chunk."""
    first, last = drafts[0].start, drafts[-1].end
    if first is not None and first != 0:
        repairs["starts at 0"] = ""
    if last is not None and last != frames:
        repairs["ends at F"] = ""
    wanted: list[int | None] = [0]
    for before, after in pairwise(drafts):
        if before.end is not None and after.start is not None and before.end != after.start:
            repairs["gaps closed"] = ""
        wanted.append(before.end if after.start is None else after.start)
    filled = _fill([*wanted, frames])
    bounds = [(bound + add) // chunk * chunk for bound in filled]
    count = len(drafts)
    for i in range(1, count):  # a chunk for every step before, then for every step after
        bounds[i] = max(bounds[i], bounds[i - 1] + chunk)
    for i in range(count - 1, 0, -1):
        bounds[i] = min(bounds[i], bounds[i + 1] - chunk)
    if bounds != filled:
        repairs["snapped"] = ""
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


def read_plan(path: Path, instruction: str, frames: int, chunk: int, rounding: str = "nearest") -> Plan:
    """The plan in a JSON file: an array of steps, or an object that holds one, fitted to the video.

    Arguments as for `parse_plan`. Logs repairs. Raises UserError for an unreadable file, one without a step, mistakes
    in the JSON (with line and column) and steps or bounds that cannot be read.
    """
    return _given_plan(decoded_text(path, ACCEPTED), str(path), instruction, frames, chunk, rounding)


def _given_plan(text: str, where: str, instruction: str, frames: int, chunk: int, rounding: str) -> Plan:
    """The plan in JSON that a user gave; messages call it `where`."""
    plan, repairs = _parsed(text, instruction, frames, chunk, rounding, given=True)
    if repairs.keys() >= {"keys ignored", "bounds filled"} and (found := _bounds_elsewhere(plan_entries(text, {}))):
        repairs["bounds unread"] = found
    for name, accepted in LOST.items():
        if name in repairs:
            raise UserError(f"{where}: {repairs[name]}; accepted: {accepted}")
    if UNUSABLE in plan.repairs:
        raise UserError(f"{where}: found no steps; accepted: {ACCEPTED}")
    if plan.repairs:
        log.warning("%s: %s", where, ", ".join(plan.repairs))
    return plan


def _bounds_elsewhere(entries: list[Any]) -> str:
    """The first step without a bound that may have the bound under another name, and that name; "" if none has."""
    steps = [entry for entry in entries if isinstance(entry, dict)]
    for place, entry in enumerate(steps, 1):
        fields, _, ignored = step_fields(entry)
        if fields.get("start") is None or fields.get("end") is None:
            held = [key for key in ignored if _holds_bound(entry[key]) and not _counts(key, steps)]
            if held:
                return f"step {place}: found the keys {', '.join(held)[:SHOWN]}"
    return ""


def _holds_bound(value: Any) -> bool:
    """Whether a value is a number or time, or holds nothing else."""
    if isinstance(value, str):
        return bool(TIMES.fullmatch(value))
    inner = list(value.values()) if isinstance(value, dict) else value
    return bool(inner) and all(map(_holds_bound, inner)) if isinstance(inner, list) else number(value) is not None


def _counts(key: str, steps: list[dict[str, Any]]) -> bool:
    """Whether a key numbers the steps from 0 or 1 on."""
    numbers = [number(step.get(key)) for step in steps]
    return bool(ORDINAL.fullmatch(key)) and any(numbers == [*range(n, n + len(steps))] for n in (0, 1))


@dataclass(frozen=True)
class Request:
    """An instruction to make videos of: its name in messages, and its own plan and seed (None: not given).

    chosen: of a video that is made again, the continuation whose noise a chunk follows, by chunk; else 0.
    """

    where: str
    prompt: Prompt
    plan: Plan | None = None
    seed: int | None = None
    chosen: Mapping[int, int] = field(default_factory=dict)


def read_made(path: Path, frames: int, chunk: int, rounding: str = "nearest") -> Request:
    """The request that makes a video again, from the JSON that was written beside the video: its instruction, plan,
    seed and the continuations that were chosen at its switches.

    `frames`, `chunk` and `rounding` are those of `parse_plan`. Raises UserError for a file that is no such JSON, and
    for a video of another length.
    """
    accepted = "the JSON of a video that generate has made"
    text = decoded_text(path, accepted)
    try:
        told = json.loads(text)
        prompt = Prompt(str(told.get("prompt_id", "")), str(told["instruction"]), str(told.get("category", "")))
        seed, length = int(told["seed"]), int(told["latent_frames"])
        chosen = {
            first: int(choice["continuation"])
            for choice in told.get("best_of", {}).get("choices", ())
            for first in range(choice["frame"] // chunk, (choice["frame"] + choice["frames"]) // chunk)
        }
        steps = json.dumps(told["steps"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: found {type(error).__name__}: {error}; accepted: {accepted}") from error
    if length != frames or not 0 <= seed <= LARGEST_SEED or any(number < 0 for number in chosen.values()):
        found = f"{length} latent frames, seed {seed}, continuations {sorted(set(chosen.values()))}"
        raise UserError(f"{path}: found {found}; accepted: {frames} latent frames here, and no negative number")
    return Request(str(path), prompt, _given_plan(steps, str(path), prompt.text, frames, chunk, rounding), seed, chosen)


def read_requests(path: Path, frames: int, chunk: int, rounding: str = "nearest") -> list[Request]:
    """The requests in a file of prompts (`tempact.prompt_file`), in order of its rows.

    Beside a prompt's columns a row may have `plan` (the steps, as in a plan file) and `seed`. `frames`, `chunk` and
    `rounding` are those of `parse_plan`. Raises UserError naming the row for a bad prompt, an id given twice, a plan
    without steps and a bad seed.
    """
    rows = read_rows(path, ("plan", "seed"))
    check_ids(rows)
    return [Request(row.where, row.prompt, _plan_cell(row, frames, chunk, rounding), _seed_cell(row)) for row in rows]


def _plan_cell(row: PromptRow, frames: int, chunk: int, rounding: str) -> Plan | None:
    steps = _cell(row, "plan")
    if steps is None:
        return None
    if not isinstance(steps, str | list | dict):
        raise UserError(f"{row.where}: plan: found {repr(steps)[:SHOWN]}; accepted: steps, as in a plan file")
    text = steps if isinstance(steps, str) else json.dumps(steps)
    return _given_plan(text, f"{row.where}: plan", row.prompt.text, frames, chunk, rounding)


def _seed_cell(row: PromptRow) -> int | None:
    found = _cell(row, "seed")
    seed = whole_number(found)
    if found is not None and (seed is None or not 0 <= seed <= LARGEST_SEED):
        accepted = f"a whole number from 0 to {LARGEST_SEED}"
        raise UserError(f"{row.where}: seed: found {repr(found)[:SHOWN]}; accepted: {accepted}")
    return seed


def _cell(row: PromptRow, key: str) -> Any:
    """A cell's value, None where the cell is empty."""
    value = row.cells.get(key)
    return None if blank(value) else value
