"""Prompts of the Temporal Order Benchmark: this project's own (`prompts.jsonl`) and files of others.

Own prompts: 100 simple ones (1-2 steps) and 100 hard ones (3-4 steps that depend on each other), 25 of each set about a
person, an animal, an object and a scene, with their steps in order. The categories take turns, so that the first n of a
set are balanced too.

`python -m tempact.evaluation.prompts FILE...` compares the own prompts with files of others: for every
n the share of the own prompts' word n-grams that the file has too, and the longest run of words in common.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tempact.errors import LineParser, UserError, guarded
from tempact.files import safe_name

log = logging.getLogger(__name__)

OWN = Path(__file__).with_name("prompts.jsonl")
SETS = ("simple", "hard")
CATEGORIES = ("person", "animal", "object", "scene")
LENGTHS = (3, 4, 5, 6, 8)  # of the n-grams that are compared


@dataclass(frozen=True)
class OrderPrompt:
    """`steps` are the annotated events in their order; empty where nobody has annotated them."""

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

    The formats are those of `tempact.prompt_file` (the authors' CSV, VBench's text), with a column `steps`, a list of
    texts, where steps are annotated. A prompt that stands there twice is taken once, which is logged. UserError that
    names file and row for anything else.
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

    counts: how many of a set's first prompts are used, all for None. UserError for more than there are, and for two
    prompts with one prompt_id.
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


@dataclass(frozen=True)
class Overlap:
    """Of one's own prompts with others: shared[n] is the share of distinct word n-grams that the others have too,
    `longest` the longest run of words in common, of the prompt_id `prompt`, and `equal` the number of prompts that the
    others hold whole."""

    shared: dict[int, float]
    longest: tuple[str, ...]
    prompt: str
    equal: int


def words(text: str) -> list[str]:
    """Lower-case words and numbers, without punctuation."""
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower())


def n_grams(texts: Sequence[str], n: int) -> set[tuple[str, ...]]:
    """The distinct runs of `n` words."""
    return {tuple(found[i : i + n]) for found in map(words, texts) for i in range(len(found) - n + 1)}


def overlap(own: Sequence[OrderPrompt], others: Sequence[str]) -> Overlap:
    """Compares prompts with the texts of others."""
    shared = {}
    for n in LENGTHS:
        mine = n_grams([prompt.text for prompt in own], n)
        shared[n] = len(mine & n_grams(others, n)) / len(mine) if mine else 0.0
    whole = {tuple(words(text)) for text in others}
    equal = sum(tuple(words(prompt.text)) in whole for prompt in own)
    longest: tuple[tuple[str, ...], str] = (), ""
    while True:  # a run of n + 1 words holds one of n
        n = len(longest[0]) + 1
        theirs = n_grams(others, n)
        runs = ((run, p.prompt_id) for p in own for run in sorted(n_grams([p.text], n) & theirs))
        found = next(runs, None)
        if found is None:
            return Overlap(shared, *longest, equal)
        longest = found


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 for a file that cannot be read."""
    parser = LineParser("python -m tempact.evaluation.prompts", description="Overlap of prompts.")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="prompts of others: .csv, .jsonl or .txt")
    return guarded(lambda: _report(parser.parse_args(argv).files))


def _report(files: list[Path]) -> int:
    texts = {path: [prompt.text for prompt in read_prompts(path, "others")] for path in files}
    for path, others in texts.items():
        for name in SETS:
            found = overlap(own_prompts(name), others)
            shares = ", ".join(f"{n}: {share:.2%}" for n, share in found.shared.items())
            sys.stdout.write(
                f"{path.name} ({len(others)} prompts), {name}: shared n-grams {shares}; equal prompts: {found.equal}; "
                f"longest run: {len(found.longest)} words, {' '.join(found.longest)!r} ({found.prompt})\n"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
