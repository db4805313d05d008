"""What the own prompts share with other sets: `python -m tempact.evaluation.temporal_order.overlap FILE...`.

For every n, the share of the own prompts' word n-grams that also stand in the other files, and the prompt with the
longest run of words in common.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tempact.cli import LineParser, guarded
from tempact.evaluation.temporal_order.prompts import SETS, OrderPrompt, own_prompts, read_prompts

LENGTHS = (3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Overlap:
    """shared[n] is the share of distinct word n-grams that the others have too; `longest` is the longest run of words
    in common, of `prompt`, and `equal` the number of prompts that the others hold whole."""

    shared: dict[int, float]
    longest: str
    prompt: str
    equal: int


def words(text: str) -> list[str]:
    """Lower-case words and numbers, without punctuation."""
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower())


def n_grams(text: str, n: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


def overlap(own: Sequence[OrderPrompt], others: Sequence[str]) -> Overlap:
    """What `own` shares with the texts of others."""
    shared = {}
    for n in LENGTHS:
        mine = set().union(*(n_grams(prompt.text, n) for prompt in own))
        theirs = set().union(*(n_grams(text, n) for text in others))
        shared[n] = len(mine & theirs) / len(mine) if mine else 0.0
    whole = {" ".join(words(text)) for text in others}
    equal = sum(" ".join(words(prompt.text)) in whole for prompt in own)
    run, prompt = _longest(own, others)
    return Overlap(shared, " ".join(run), prompt, equal)


def _longest(own: Sequence[OrderPrompt], others: Sequence[str]) -> tuple[tuple[str, ...], str]:
    best: tuple[tuple[str, ...], str] = (), ""
    n = 1
    while True:  # a run of n + 1 words holds one of n
        theirs = set().union(*(n_grams(text, n) for text in others))
        found = next(((gram, p.prompt_id) for p in own for gram in sorted(n_grams(p.text, n)) if gram in theirs), None)
        if found is None:
            return best
        best, n = found, n + 1


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 for a file that cannot be read."""
    parser = LineParser("python -m tempact.evaluation.temporal_order.overlap", description=__doc__)
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
                f"longest run: {len(found.longest.split())} words, {found.longest!r} ({found.prompt})\n"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
