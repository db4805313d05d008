"""Prompts of the benchmark: this project's own (`prompts.jsonl`) and files of others.

Own prompts: 100 simple ones (1-2 steps) and 100 hard ones (3-4 steps that depend on each other), 25 of each set about a
person, an animal, an object and a scene, with their steps in order. They stand in turn, so that the first n of a set
are balanced too.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tempact.errors import UserError
from tempact.infra.files import safe_name

log = logging.getLogger(__name__)

OWN = Path(__file__).with_name("prompts.jsonl")
SETS = ("simple", "hard")
CATEGORIES = ("person", "animal", "object", "scene")
SUFFIXES = (".csv", ".jsonl", ".txt")


@dataclass(frozen=True)
class OrderPrompt:
    """`steps` are what should happen, in order; empty where nobody has annotated them."""

    prompt_id: str
    set: str
    category: str
    text: str
    steps: tuple[str, ...] = ()


def own_prompts(name: str) -> list[OrderPrompt]:
    """The 100 own prompts of the set "simple" or "hard"."""
    rows = (json.loads(line) for line in OWN.read_text(encoding="utf-8").splitlines())
    return [
        OrderPrompt(row["prompt_id"], row["set"], row["category"], row["prompt"], tuple(row["steps"]))
        for row in rows
        if row["set"] == name
    ]


def read_prompts(path: Path, name: str) -> list[OrderPrompt]:
    """The prompts of a file, as the set `name`.

    CSV with a column `prompt`, optionally `category` and `prompt_id` (the authors' layout); JSONL with these keys and
    optionally `steps`; a text file with a prompt a line (VBench's layout). A prompt that stands there twice is taken
    once, which is logged. UserError that names file and row for anything else.
    """
    prompts: dict[str, OrderPrompt] = {}
    ids: set[str] = set()
    for where, row in _rows(path):
        text = row.get("prompt")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path} {where}: prompt: found {text!r}; accepted: a text")
        text = " ".join(text.split())
        if text in prompts:
            log.warning("%s %s: stands there twice; taken once: %s", path, where, text[:80])
            continue
        steps = row.get("steps") or ()
        if not isinstance(steps, list | tuple) or not all(isinstance(step, str) for step in steps):
            raise UserError(f"{path} {where}: steps: found {str(steps)[:80]!r}; accepted: a list of texts")
        given = row.get("prompt_id")
        own_id = safe_name(f"{name}-{len(prompts) + 1:04d}" if given in (None, "") else str(given))
        if own_id in ids:
            raise UserError(
                f"{path} {where}: prompt_id: found {given!r} again; accepted: one of its own for each prompt"
            )
        ids.add(own_id)
        prompts[text] = OrderPrompt(own_id, name, str(row.get("category") or ""), text, tuple(steps))
    if not prompts:
        raise UserError(f"{path}: found no prompts; accepted: at least one")
    return list(prompts.values())


def choose_prompts(files: Sequence[str], counts: Mapping[str, int | None]) -> dict[str, list[OrderPrompt]]:
    """The prompts of every set: the own ones, or those of `files` ("SET=PATH").

    counts: how many of a set's first prompts are used, all where it says nothing. UserError for more than there are
    or for two prompts with one prompt_id.
    """
    chosen: dict[str, list[OrderPrompt]] = {}
    for given in files:
        name, equals, path = given.partition("=")
        if not equals or safe_name(name) != name or name in chosen:
            raise UserError(f"--prompts: found {given!r}; accepted: SET=FILE, each set once, as hard=prompts.csv")
        chosen[name] = read_prompts(Path(path), name)
    if not files:
        chosen = {name: own_prompts(name) for name in SETS}
    for name, count in counts.items():
        if count is None:
            continue
        most = len(chosen.get(name, ()))
        if not 0 < count <= most:
            raise UserError(f"--{name}: found {count}; accepted: 1 to {most}, the prompts of that set")
        chosen[name] = chosen[name][:count]
    ids = [prompt.prompt_id for prompts in chosen.values() for prompt in prompts]
    twice = next((own_id for own_id in ids if ids.count(own_id) > 1), None)
    if twice is not None:
        raise UserError(
            f"--prompts: found the prompt_id {twice!r} in two sets; accepted: one of its own for each prompt"
        )
    return chosen


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Rows of a file, and where they stand."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: found the ending {path.suffix!r}; accepted: {', '.join(SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); accepted: a file in UTF-8") from error
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        columns = reader.fieldnames or []
        if "prompt" not in columns:
            raise UserError(f"{path}: found the columns {', '.join(columns)[:80]!r}; accepted: prompt, category")
        for row in reader:
            yield f"line {reader.line_num}", row
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if path.suffix == ".txt":
            if line.strip():
                yield f"line {number}", {"prompt": line}
        elif line.strip():
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            if not isinstance(found, dict):
                raise UserError(f"{path} line {number}: found {line[:80]!r}; accepted: a JSON object with prompt")
            yield f"line {number}", found
