"""Video files hold the pictures that were given."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from tempact.errors import Stopped, StopRequest, UserError
from tempact.reporting.strips import save_strip
from tempact.video import enlarge, read_mp4, save_gif, save_mp4


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


def test_a_signal_while_ffmpeg_starts_ends_it_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    started, popen = list[subprocess.Popen](), subprocess.Popen

    def slow(command: list[str], *given: object, **options: object) -> subprocess.Popen:
        process = popen(command, *given, **options)
        if command[-1].endswith(".mp4"):  # else ffmpeg is asked what it can do
            started.append(process)
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.2)
        return process

    monkeypatch.setattr(subprocess, "Popen", slow)
    stop = StopRequest()
    with stop.listening(), pytest.raises(Stopped):
        save_mp4(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), tmp_path / "a.mp4")
    monkeypatch.undo()
    (process,) = started
    assert process.wait(10) == -signal.SIGKILL
    assert not [*tmp_path.iterdir()] and capfd.readouterr().err == ""


def test_gif_plays_back_what_was_written(tmp_path: Path) -> None:
    save_gif(clip(), tmp_path / "a.gif", fps=10)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.info["duration"] == 100 and gif.info["loop"] == 0
        frames = np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)])
    assert np.abs(frames.astype(int) - enlarge(clip())).max() <= 8


def test_a_written_video_is_read_frame_by_frame(tmp_path: Path) -> None:
    frames = (
        torch.zeros(29, 3, 48, 80, dtype=torch.uint8) + (8 * torch.arange(29, dtype=torch.uint8))[:, None, None, None]
    )
    save_mp4(frames, tmp_path / "a.mp4", 16.0)
    found = read_mp4(tmp_path / "a.mp4")
    assert found.shape[0] == 29 and (found.float().mean((1, 2, 3)) - frames.float().mean((1, 2, 3))).abs().max() < 4
    (tmp_path / "b.mp4").write_bytes(b"no video")
    for name in ("b.mp4", "c.mp4"):
        with pytest.raises(UserError, match="cannot be read as a video"):
            read_mp4(tmp_path / name)


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
