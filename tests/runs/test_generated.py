"""The files of a generated video, written as its frames come."""

from __future__ import annotations

import gc
import json
import resource
import weakref
from collections.abc import Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch

from tempact.errors import UserError
from tempact.reporting.strips import STEP_COLOURS, StripRow, film_strip
from tempact.runs import generation as generated
from tempact.runs.generation import write_video
from tempact.types import Plan, Step
from tempact.video import Mp4Writer, save_mp4

PLAN = Plan("A cat sits.", (Step(0, 3, "a"), Step(3, 6, "b")), repairs=("sorted",))
LATENTS = [0, *(n for n in range(1, 6) for _ in range(4))]  # 21 frames, as a Wan VAE gives them


def clip(frames: int = 21, height: int = 64, width: int = 96) -> torch.Tensor:
    """Every frame grey, the brighter the later."""
    shade = (torch.arange(frames) * 10).to(torch.uint8)
    return shade.view(-1, 1, 1, 1).repeat(1, 3, height, width)


def played(path: Path) -> tuple[dict, np.ndarray]:
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    return meta, np.stack([np.frombuffer(raw, np.uint8).reshape(height, width, 3) for raw in reader])


def test_a_video_in_pieces_is_the_video_in_one(tmp_path: Path) -> None:
    save_mp4(clip(), tmp_path / "one.mp4", 16)
    with Mp4Writer(tmp_path / "two.mp4", 16) as writer:
        for piece in clip().split([1, 8, 12]):
            writer.write(piece)
        assert writer.frames == 21 and not (tmp_path / "two.mp4").exists()
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Mp4Writer(tmp_path / "a.mp4") as writer:
        writer.write(clip())
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("frames", [20, 400])  # told when ffmpeg ends; told while it is fed
def test_a_full_disk_is_said_in_one_line(tmp_path: Path, frames: int) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = torch.randint(0, 256, (frames, 3, 128, 128), dtype=torch.uint8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"a.mp4: found that ffmpeg cannot write it; accepted: a disk with space"):
            with Mp4Writer(tmp_path / "a.mp4") as writer:
                for piece in noise.split(20):
                    writer.write(piece)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_caption_stands_at_the_foot_of_every_frame(tmp_path: Path) -> None:
    with Mp4Writer(tmp_path / "a.mp4", caption="random weights") as writer:
        for piece in (torch.full_like(clip(), 128) for _ in range(2)):
            writer.write(piece)
    frames = played(tmp_path / "a.mp4")[1]
    assert frames.shape == (42, 128, 192, 3)  # twice as large
    foot, above = frames[:, -10:, :100], frames[:, :100]
    assert np.abs(above.astype(int) - 128).max() < 12
    assert (foot.reshape(42, -1).max(1) > 200).all() and (foot.reshape(42, -1).min(1) < 50).all()
    with Mp4Writer(tmp_path / "tiny.mp4", caption="many words " * 9) as writer:
        writer.write(clip(3, 8, 8))  # cut to what fits
    assert played(tmp_path / "tiny.mp4")[1].shape == (3, 240, 240, 3)


def test_a_strip_of_picked_frames_is_that_of_the_whole_video() -> None:
    """With the latent frame of each: pixel frame t is latent frame ceil(t / 4)."""
    picked = [2, 5, 8, 11, 14, 17, 20]
    whole = film_strip([StripRow("", clip(), PLAN.steps, tuple(LATENTS))], columns=7)
    few = film_strip([StripRow("", clip()[picked], PLAN.steps, tuple(LATENTS[i] for i in picked))], columns=7)
    assert np.array_equal(np.asarray(whole), np.asarray(few))
    # frames 2, 5, 8 are latents 1, 2, 2 and belong to the first step, 11 is latent 3 and to the second
    pixels = np.asarray(few)
    row = next(y for y in range(len(pixels)) if tuple(pixels[y, 14]) == STEP_COLOURS[0])
    colours = [tuple(pixels[row, x]) for x in range(14, pixels.shape[1] - 14)]
    share = colours.count(STEP_COLOURS[0]) / (colours.count(STEP_COLOURS[0]) + colours.count(STEP_COLOURS[1]))
    assert share == pytest.approx(3 / 7, abs=0.02)


def pieces(alive: list[int]) -> Iterator[torch.Tensor]:
    """21 frames, three at a time; notes how many pieces are alive whenever one is asked for."""
    made: list[weakref.ref] = []
    for piece in clip().split(3):
        own = piece.clone()
        made.append(weakref.ref(own))
        yield own
        del own
        gc.collect()
        alive.append(sum(each() is not None for each in made))


def test_files_of_a_video(tmp_path: Path) -> None:
    alive: list[int] = []
    paths = write_video(tmp_path, "cat", PLAN, pieces(alive), LATENTS, 16.0, {"seed": 3})
    assert [path.name for path in paths] == ["cat.mp4", "cat.png", "cat.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    assert alive == [1] * 7  # the one in the writer's hand: a long video is never held
    meta, frames = played(paths[0])
    assert meta["fps"] == 16 and len(frames) == 21
    assert np.abs(frames.mean((1, 2, 3)) - np.arange(21) * 10).max() < 3
    assert json.loads(paths[2].read_text()) == {
        "instruction": "A cat sits.",
        "steps": [{"start": 0, "end": 3, "prompt": "a"}, {"start": 3, "end": 6, "prompt": "b"}],
        "repairs": ["sorted"],
        "seed": 3,
    }


def test_a_note_stands_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, str]] = []

    def strip(rows: list[StripRow], title: str, columns: int) -> object:
        drawn.append((title, rows[0].title))
        assert rows[0].latents == tuple(LATENTS[i] for i in (0, 2, 4, 6, 7, 9, 11, 13, 14, 16, 18, 20))
        assert rows[0].frames[:, 0, 0, 0].tolist() == [0, 20, 40, 60, 70, 90, 110, 130, 140, 160, 180, 200]
        return film_strip(rows, title, columns)

    monkeypatch.setattr(generated, "film_strip", strip)
    paths = write_video(tmp_path, "cat", PLAN, clip().split(9), LATENTS, 16.0, {}, "random weights")
    assert [path.name for path in paths] == [f"random-weights-cat{ending}" for ending in (".mp4", ".png", ".json")]
    assert drawn == [("(random weights) A cat sits.", "random weights, 1.3 s")]
    assert json.loads(paths[2].read_text())["note"] == "random weights"
    plain = write_video(tmp_path, "cat", PLAN, clip().split(9), LATENTS, 16.0, {})
    assert np.abs(played(plain[0])[1].astype(int) - played(paths[0])[1])[:, -10:, :60].max() > 50
