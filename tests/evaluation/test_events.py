"""How often events happen as told: the verifier's verdicts by event, pooled by kind, with intervals over videos."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shapeworld_films import picture, reference_cues, shape_indices, tell

from tempact.evaluation.events import event_rates, read_events, write_events
from tempact.evaluation.judges import JudgedVideo, shapeworld_judges
from tempact.evaluation.prompts import OrderPrompt
from tempact.shapeworld.grammar import parse_instruction

TEXT = (
    "A red circle is at the top left. First, the circle moves to the right. Then the circle turns blue. "
    "Finally, the circle moves to the left."
)


def row(prompt: str, method: str, **scores: float) -> dict:
    named = {name.replace("_", " ").strip(): score for name, score in scores.items()}
    return {"prompt_id": prompt, "condition": method, "judge": "verifier", "scores": named or None}


def test_the_verifier_tells_of_every_event_beside_its_score() -> None:
    story = parse_instruction(TEXT)
    cues = reference_cues(story)
    tracks = [tell(story.entities, told) for told in (cues, cues[:2])]
    frames = (picture(tracks, [shape_indices(story.entities)] * 2) * 255).round().to(torch.uint8)
    judge = next(judge for judge in shapeworld_judges(torch.device("cpu")) if judge.name == "verifier")
    prompt = OrderPrompt("p", "simple", "simple", TEXT)
    verdicts = [one.result().scores for one in judge.submit([JudgedVideo(prompt, film) for film in frames])]
    fields = ["verifier", "0 move", "1 turn", "2 move"]
    assert [[*one] for one in verdicts] == [fields, fields] and verdicts[0]["verifier"] > 0.95
    assert [[*one.values()][1:] for one in verdicts] == [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]


def test_shares_are_of_events_and_intervals_over_videos(tmp_path: Path) -> None:
    rows = [
        row("b", "step-prompt", verifier=0.5, **{"0 move": 1.0, "1 move": 0.0, "2 turn": 1.0}),
        row("a", "step-prompt", verifier=0.5, **{"0 move": 1.0}),
        row("c", "step-prompt"),  # missing
        {**row("a", "step-prompt", verifier=0.1, **{"0 move": 0.0}), "judge": "matcher"},
        row("a", "+ TempAct", verifier=1.0, **{"0 move": 1.0}),
    ]
    found = event_rates(rows, ["step-prompt", "+ TempAct", "none"], 200, 1)
    assert [(one.method, one.kind, one.n) for one in found] == [
        ("step-prompt", "move", 3), ("step-prompt", "turn", 1), ("+ TempAct", "move", 1)
    ]  # fmt: skip
    assert [one.share for one in found] == [pytest.approx(2 / 3), 1.0, 1.0]
    assert [one.ci95 for one in found] == [(0.5, 1.0), (1.0, 1.0), (1.0, 1.0)]
    assert found == event_rates(rows[::-1], ["step-prompt", "+ TempAct"], 200, 1)  # whoever was faster
    write_events(tmp_path, found, {"seed": 3})
    assert read_events(tmp_path) == [replace(one, share=round(one.share, 6)) for one in found]
    assert read_events(tmp_path / "none") == []
    assert event_rates([row("a", "step-prompt", verifier=0.5)], ["step-prompt"], 10, 1) == []


def test_a_draw_without_the_kind_says_nothing(tmp_path: Path) -> None:
    """With one draw of ten videos the only one that tells a turn may not be among them."""
    rows = [row(f"{n}", "step-prompt", verifier=0.5, **{f"0 {'turn' if n == 9 else 'move'}": 1.0}) for n in range(10)]
    spans = []
    for seed in range(8):
        found = {one.kind: one for one in event_rates(rows, ["step-prompt"], 1, seed)}
        assert found["turn"].share == 1.0 and found["move"].ci95 == (1.0, 1.0)
        write_events(tmp_path, list(found.values()), {})
        assert repr(read_events(tmp_path)) == repr(list(found.values()))
        spans.append(found["turn"].ci95)
    assert (1.0, 1.0) in spans and any(low != low for low, _ in spans)
