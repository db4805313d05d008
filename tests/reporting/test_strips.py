"""Film strips mark the switches; a showcase lists its files."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_video import clip

from tempact.evaluation import CONDITIONS
from tempact.evaluation.harness import Sample
from tempact.evaluation.prompts import OrderPrompt
from tempact.reporting.strips import (
    BORDER,
    CELL,
    GAP,
    MARGIN,
    STEP_COLOURS,
    StripRow,
    extremes,
    film_strip,
    scenes,
    sheet,
    shown_frames,
    write_showcase,
)
from tempact.types import Step

STEPS = (Step(0, 6, "A square."), Step(6, 24, "It turns green."))


def test_strips_show_evenly_spread_frames_and_the_last() -> None:
    assert shown_frames(24, 12) == list(range(1, 24, 2))
    assert shown_frames(24, 8) == [2, 5, 8, 11, 14, 17, 20, 23]
    assert shown_frames(5, 12) == [0, 1, 2, 3, 4]


def test_a_strip_borders_frames_in_the_colour_of_their_step() -> None:
    strip = np.asarray(
        film_strip([StripRow("before", clip(), STEPS), StripRow("after", clip(), STEPS[:1])], "A title", 8)
    )
    assert len(strip[0]) == 2 * MARGIN + 8 * (CELL + 2 * BORDER + GAP) - GAP
    starts = [y for y in range(1, len(strip)) if _is(strip[y, MARGIN], 0) and not _is(strip[y - 1, MARGIN], 0)]
    top = starts[1]  # below the bar over the step's columns
    for column, frame in enumerate(shown_frames(24, 8)):
        x = MARGIN + column * (CELL + 2 * BORDER + GAP)
        assert _is(strip[top + 50, x + 1], 0 if frame < 6 else 1), column
        inside = strip[top + BORDER + CELL // 2, x + BORDER + 10]
        assert tuple(inside) == ((255, 0, 0) if frame < 6 else (0, 255, 0))
        assert strip[top + BORDER + CELL // 2, x + BORDER + CELL - 10, 0] == frame * 8
    switch = MARGIN + 2 * (CELL + 2 * BORDER + GAP) - 1  # the gap before the first frame of step two
    other = MARGIN + 3 * (CELL + 2 * BORDER + GAP) - 1
    assert _is(strip[top + 50, switch], 1) and tuple(strip[top + 50, other]) == (255, 255, 255)


def test_a_strip_of_large_pictures_is_shrunk_and_long_texts_stay_inside() -> None:
    steps = (Step(0, 3, "word " * 200), Step(3, 24, "x" * 500))
    row = StripRow("title " * 100, clip(24, 96 * 5, 160 * 5), steps)
    strip = film_strip([row], "long " * 300, 4)
    assert strip.width == 2 * MARGIN + 4 * (160 + 2 * BORDER + GAP) - GAP and strip.height < 330
    assert (np.asarray(strip)[:, -MARGIN:] == 255).all()


def _is(pixel: np.ndarray, step: int) -> bool:
    return tuple(pixel) == STEP_COLOURS[step]


def test_a_showcase_lists_its_files_in_order_under_safe_names(tmp_path: Path) -> None:
    prompts = [OrderPrompt("p/1", "hard", "../hard", "One & <two>."), OrderPrompt("p2", "hard", "", "Three.")]
    shown = [
        [Sample(CONDITIONS[name], prompt, STEPS, clip()) for name in ("trained", "step-prompt", "planner-only")]
        for prompt in prompts
    ]
    index = json.loads(write_showcase(tmp_path, shown, {"step-prompt": "before", "+ TempAct": "after"}).read_text())
    assert [entry["prompt"] for entry in index] == ["One & <two>.", "Three."]
    assert [video["title"] for video in index[0]["videos"]] == ["before", "after"]
    assert index[0]["videos"][0]["plan"][1] == {"start": 6, "end": 24, "prompt": "It turns green."}
    named = {entry["strip"] for entry in index} | {
        v[kind] for e in index for v in e["videos"] for kind in ("mp4", "gif", "sheet")
    }
    assert {path.name for path in (tmp_path / "videos").iterdir()} == named | {"index.json"} and len(named) == 14


def test_a_sheet_gives_the_pictures_of_each_step_and_no_text() -> None:
    """Small pictures as they are; large ones shrunk."""
    row = StripRow("before", clip(), (*STEPS, Step(24, 24, "Never.")))
    first, second = scenes(sheet(row), row.steps)
    assert (first.step, first.colour, first.count) == (STEPS[0], 0, 3)
    assert (second.step, second.colour, second.count) == (STEPS[1], 1, 9)
    pictures = [Image.open(io.BytesIO(data)) for data in (*first.pictures, *second.pictures)]
    for picture, frame in zip(pictures, shown_frames(24, 12), strict=True):
        assert np.array_equal(np.asarray(picture), clip()[frame].permute(1, 2, 0).numpy())
    large = scenes(sheet(StripRow("", clip(24, 480, 832), STEPS)), STEPS)
    assert {(p.format, p.size) for one in large for p in map(Image.open, map(io.BytesIO, one.pictures))} == {
        ("JPEG", (166, CELL))
    }
    picked = StripRow("", clip()[[0, 20]], STEPS, latents=(0, 7))
    assert [one.count for one in scenes(sheet(picked), STEPS)] == [1, 1]


@pytest.mark.parametrize("following", [[0.5] * 20, [0.0] * 9 + [1.0] * 11, [0.3], [0.3, None], [None, 0.2, 0.2, 0.7]])
def test_worst_and_best_are_ranked_once(following: list[float | None]) -> None:
    rows = [{"temporal_following": score, "number": i} for i, score in enumerate(following)]
    chosen = {name: [row["number"] for row in own] for name, own in extremes(rows).items()}
    there = [score for score in following if score is not None]
    for name, order in (("worst", sorted(there)), ("best", sorted(there, reverse=True))):
        assert [following[i] for i in chosen[name]] == order[: len(chosen[name])]
    assert len(chosen["worst"]) == len(chosen["best"]) == min(3, max(1, len(there) // 2))
    assert len(there) == 1 or not {*chosen["worst"]} & {*chosen["best"]}
