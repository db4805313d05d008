"""Prompts of the benchmark: this project's own (`prompts.jsonl`) and files of others.

Own prompts: 100 simple ones (1-2 steps) and 100 hard ones (3-4 steps that depend on each other), 25 of each set about a
person, an animal, an object and a scene, with their steps in order. They stand in turn, so that the first n of a set
are balanced too.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tempact.errors import UserError
from tempact.files import safe_name

log = logging.getLogger(__name__)

OWN = Path(__file__).with_name("prompts.jsonl")
SETS = ("simple", "hard")
CATEGORIES = ("person", "animal", "object", "scene")


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

    A file as `tempact.prompt_file` reads it (the authors' CSV, VBench's text), with `steps`, a list of texts, where
    they are annotated. A prompt that stands there twice is taken once, which is logged. UserError that names file and
    row for anything else.
    """
    from tempact.prompt_file import SHOWN, read_rows  # late: parsing options must not import torch

    prompts: dict[str, OrderPrompt] = {}
    for row in read_rows(path, ("steps",)):
        text = " ".join(row.prompt.text.split())
        if text in prompts:
            log.warning("%s: stands there twice; taken once: %s", row.where, text[:SHOWN])
            continue
        own_id = safe_name(row.prompt.prompt_id or f"{name}-{len(prompts) + 1:04d}")
        if any(other.prompt_id == own_id for other in prompts.values()):
            raise UserError(f"{row.where}: prompt_id: found {own_id!r} again; accepted: one of its own for each prompt")
        steps = row.cells.get("steps") or ()
        if not isinstance(steps, list | tuple) or not all(isinstance(step, str) for step in steps):
            raise UserError(f"{row.where}: steps: found {str(steps)[:SHOWN]!r}; accepted: a list of texts")
        prompts[text] = OrderPrompt(own_id, name, row.prompt.category, text, tuple(steps))
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
