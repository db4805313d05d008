"""How far the judges can be relied on with ShapeWorld's stricter sets: exact drawings, told right and with one fault.

    python -m bench.bench_strict_judges [--videos 64] [--save FILE]

The drawings are of validation instructions, without any policy; a fault is drawn as far as the stories offer it.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import report
from bench.bench_shapeworld import rows_on_lines
from tempact.errors import guarded
from tempact.files import write_atomic
from tempact.shapeworld import STRICT_SETS
from tempact.shapeworld.crowd import actors_only, behind, with_bystander, without_bystanders
from tempact.shapeworld.grammar import parse_instruction
from tempact.shapeworld.matcher import ShapeWorldJudge
from tempact.shapeworld.pretraining.matcher import CORRUPTIONS, corrupt, corrupted_tracks
from tempact.shapeworld.story import FRAMES, draw
from tempact.shapeworld.strict import in_trained_words
from tempact.shapeworld.verifier import verify
from tempact.shapeworld.world import held_out_prompts

SEED = 11  # of the instructions
NOTES = (
    "drawing: truth, as told; else the kind of fault. told_right: share of the events that is told right, times 0.3 "
    "for a fault of the picture. correlation: of matcher and told_right over all drawings of a set. matcher_by_events: "
    "of the drawings as told.",
)


@dataclass(frozen=True)
class Judged:
    """V exact drawings of one kind: scores of both judges, the share told right and the number of events, each [V].

    standing: the least `without_bystanders` finds; 1 where every bystander is there, or none is told.
    """

    kind: str
    verifier: Tensor
    matcher: Tensor
    told_right: Tensor
    events: Tensor
    standing: float


def judged(name: str, videos: int, judge: ShapeWorldJudge, kinds: Sequence[str] = CORRUPTIONS) -> list[Judged]:
    """Drawings of the first `videos` validation instructions of a stricter set, kind by kind."""
    prompts = held_out_prompts(name, videos, SEED, "validation")
    stories = [parse_instruction(prompt.text) for prompt in prompts]
    actors, texts, rng = [*map(actors_only, stories)], [in_trained_words(p.text) for p in prompts], random.Random(0)
    found = []
    for kind in kinds:
        shows = [corrupt(story, kind, rng) for story in actors]
        tracks, shapes = behind(*corrupted_tracks(shows), stories)
        frames, standing = without_bystanders(draw(tracks, shapes[:, None].expand(-1, FRAMES, -1)), stories)
        exact = with_bystander(verify(frames, actors).score, standing)
        learned = with_bystander(judge.score(frames, texts), standing)
        own = [i for i, show in enumerate(shows) if show.kind == kind]
        targets = torch.tensor([show.target for show in shows])
        events = torch.tensor([len(story.events) for story in actors])
        found.append(Judged(kind, exact[own], learned[own], targets[own], events[own], float(standing.min())))
    return found


def correlation(rows: Sequence[Judged]) -> float:
    """Of the matcher with the share that is told right, over all drawings."""
    pairs = torch.stack([torch.cat([row.matcher for row in rows]), torch.cat([row.told_right for row in rows])])
    return float(torch.corrcoef(pairs)[0, 1])


def results(videos: int) -> dict[str, Any]:
    judge, drawings, sets = ShapeWorldJudge.load(), list[dict[str, Any]](), list[dict[str, Any]]()
    for name in STRICT_SETS:
        rows = judged(name, videos, judge)
        for row in rows:
            means = {key: round(float(getattr(row, key).mean()), 3) for key in ("verifier", "matcher", "told_right")}
            drawings.append({"set": name, "drawing": row.kind, "videos": len(row.verifier), **means})
        truth = rows[0]
        by_events = {
            str(n): round(float(truth.matcher[truth.events == n].mean()), 3) for n in sorted({*truth.events.tolist()})
        }
        sets.append({"set": name, "correlation": round(correlation(rows), 3), "matcher_by_events": by_events})
    return {
        "command": report.command("bench.bench_strict_judges"),
        "commit": report.commit(),
        "notes": list(NOTES),
        "drawings": drawings,
        "sets": sets,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--videos", type=int, default=64, help="instructions of each set")
    parser.add_argument("--save", type=Path, help="results file")
    given = parser.parse_args(argv)
    text = rows_on_lines(results(given.videos)) + "\n"
    if given.save:
        write_atomic(given.save, text)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
