"""Video files hold the pictures that were given; strips mark the switches."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from tempact.errors import UserError
from tempact.reporting.strips import write_showcase
from tempact.types import Plan, Prompt, Step
from tempact.video import (
    BORDER,
    CELL,
    GAP,
    MARGIN,
    STEP_COLOURS,
    StripRow,
    enlarge,
    film_strip,
    save_gif,
    save_mp4,
    save_strip,
    shown_frames,
)

STEPS = (Step(0, 6, "A square."), Step(6, 24, "It turns green."))


def clip(frames: int = 24, height: int = 24, width: int = 24) -> torch.Tensor:
    """A left half that is red and then green from frame 6; brightness of the right half counts frames."""
    video = torch.zeros(frames, 3, height, width, dtype=torch.uint8)
    video[:6, 0, :, : width // 2] = 255
    video[6:, 1, :, : width // 2] = 255
    video[:, :, :, width // 2 :] = (torch.arange(frames) * 8).to(torch.uint8).view(-1, 1, 1, 1)
    return video


def test_enlarging_repeats_pixels_and_evens_the_sides() -> None:
    pictures = enlarge(clip(), 250)
    assert pictures.shape == (24, 240, 240, 3)
    assert np.array_equal(pictures[7, ::10, ::10], clip()[7].permute(1, 2, 0).numpy())
    assert enlarge(clip(2, 301, 33), 240).shape == (2, 302, 34, 3)
    with pytest.raises(AssertionError):
        enlarge(clip().float(), 240)


def test_mp4_plays_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "videos" / "a.mp4"
    save_mp4(clip(), path, fps=6)
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    assert meta["size"] == (240, 240) and meta["fps"] == 6 and meta["codec"] == "h264" and "yuv420p" in meta["pix_fmt"]
    frames = [np.frombuffer(raw, np.uint8).reshape(240, 240, 3) for raw in reader]
    assert len(frames) == 24
    assert np.abs(np.stack(frames).astype(int) - enlarge(clip())).mean() < 6
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]


def test_gif_plays_back_what_was_written(tmp_path: Path) -> None:
    save_gif(clip(), tmp_path / "a.gif", fps=10)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.info["duration"] == 100 and gif.info["loop"] == 0
        frames = np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)])
    assert np.abs(frames.astype(int) - enlarge(clip())).max() <= 8


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
    prompts = [Prompt("p/1", "One & <two>.", "../hard"), Prompt("p2", "Three.", "")]
    shown = [
        SimpleNamespace(method=method, prompt=prompt, plan=Plan(prompt.text, STEPS), frames=clip())
        for method in ("+ TempAct", "step-prompt", "planner only")
        for prompt in prompts
    ]
    index = json.loads(write_showcase(tmp_path, shown, {"step-prompt": "before", "+ TempAct": "after"}).read_text())
    assert [entry["prompt"] for entry in index] == ["One & <two>.", "Three."]
    assert [video["title"] for video in index[0]["videos"]] == ["before", "after"]
    assert index[0]["videos"][0]["plan"][1] == {"start": 6, "end": 24, "prompt": "It turns green."}
    named = {entry["strip"] for entry in index} | {
        v[kind] for e in index for v in e["videos"] for kind in ("mp4", "gif")
    }
    assert {path.name for path in (tmp_path / "videos").iterdir()} == named | {"index.json"} and len(named) == 10


@pytest.mark.parametrize("name", ["a.gif", "a.png"])
def test_a_full_disk_is_one_line_and_keeps_the_old_picture(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_bytes(b"old")

    def full(image: Image.Image, file: Path, **options: object) -> None:
        Path(file).write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match=f"{name}: found no space left on the disk"):
        save_gif(clip(), path) if name == "a.gif" else save_strip(Image.new("RGB", (4, 4)), path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
