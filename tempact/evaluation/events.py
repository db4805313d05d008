"""How often events of each kind happen as told in an evaluation's videos of ShapeWorld, by the verifier.

The verifier's verdict on a video has, beside its score, a field "NUMBER KIND" for each event of the instruction: 1
where it happened as told (`Verdict.as_told`), else 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tempact.evaluation.ledger import Row
from tempact.evaluation.statistics import NAN, interval, plain
from tempact.files import reading, write_atomic
from tempact.shapeworld.story import KINDS, Story

EVENTS, VERIFIER = "events.json", "verifier"


@dataclass(frozen=True)
class EventRate:
    """Share of the `n` events of a kind, in a method's videos, that happen as told; its 95% interval over videos."""

    method: str
    kind: str
    share: float
    ci95: tuple[float, float]
    n: int


def event_fields(story: Story, as_told: Sequence[bool]) -> dict[str, float]:
    """Fields of the verifier's verdict on one video; `as_told` may go on beyond the story's last event."""
    pairs = enumerate(zip(story.events, as_told, strict=False))
    return {f"{number} {event.kind}": float(good) for number, (event, good) in pairs}


def event_rates(rows: Iterable[Row], methods: Sequence[str], resamples: int, seed: int) -> list[EventRate]:
    """Of every method and kind, from rows of scores.jsonl; none where verdicts have no such fields, as those of
    version 0.1."""
    found = sorted((row for row in rows if row["judge"] == VERIFIER and row["scores"]), key=lambda r: r["prompt_id"])
    counted = [_counts([row["scores"] for row in found if row["condition"] == method]) for method in methods]
    rates = []
    for method, counts in zip(methods, counted, strict=True):
        for kind, (done, told) in counts.items():
            # every draw is of whole videos, the same for all methods that have the verdicts of all videos
            drawn = np.random.default_rng(seed).integers(0, len(told), (resamples, len(told)))
            total = told[drawn].sum(1)
            shares = done[drawn].sum(1)[total > 0] / total[total > 0]
            share = float(done.sum() / told.sum())
            rates.append(EventRate(method, kind, share, interval(shares), int(told.sum())))
    return rates


def _counts(verdicts: Sequence[Mapping[str, float]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By kind, for each video: how many of its events happened, and how many were told."""
    counts = {}
    for kind in KINDS:
        own = [[score for name, score in verdict.items() if name.endswith(f" {kind}")] for verdict in verdicts]
        if any(own):
            counts[kind] = np.array([sum(each) for each in own]), np.array([len(each) for each in own])
    return counts


def write_events(run_folder: Path, rates: Sequence[EventRate], told: dict[str, Any]) -> None:
    """Writes events.json beside the table, each row with the table's origin."""
    write_atomic(run_folder / EVENTS, json.dumps([plain(one) | told for one in rates], indent=1) + "\n")


def read_events(run_folder: Path) -> list[EventRate]:
    """What `write_events` wrote; nothing where there is none."""
    path = run_folder / EVENTS
    if not path.is_file():
        return []
    with reading(path):
        rows = json.loads(path.read_text(encoding="utf-8"))
        spans = [tuple(NAN if end is None else end for end in row["ci95"]) for row in rows]
        return [
            EventRate(r["method"], r["kind"], r["share"], (a, b), r["n"]) for r, (a, b) in zip(rows, spans, strict=True)
        ]
