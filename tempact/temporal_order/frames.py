"""Which frames a judge sees, registered here before any score is known, and how they are read.

A judge sees what the video file holds, so that anyone can score the files again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from torch import Tensor

from tempact.errors import UserError
from tempact.rewards.frame_picks import spread

# as many as the reference's judge saw (ALGORITHM.md section 7); other sets have those of the simple one
JUDGED_FRAMES = {"simple": 6, "hard": 10}
PICKSCORE_FRAMES = 8


def judged_frames(set_name: str) -> int:
    """How many frames of a video of this set a judge sees."""
    return JUDGED_FRAMES.get(set_name, JUDGED_FRAMES["simple"])


def judged_picks(frames: int, set_name: str) -> list[int]:
    """Which frames of a video of `frames` frames a judge sees, the first and the last among them."""
    return spread(0, frames - 1, judged_frames(set_name))


def pickscore_picks(frames: int) -> list[int]:
    """Which frames PickScore sees, the first and the last among them."""
    return spread(0, frames - 1, PICKSCORE_FRAMES)


def read_video(path: Path) -> Tensor:
    """uint8 [T, 3, height, width]. UserError for a file that is no video."""
    try:
        reader = imageio_ffmpeg.read_frames(str(path))
        width, height = next(reader)["size"]
        pictures = [np.frombuffer(data, np.uint8).reshape(height, width, 3) for data in reader]
    except (OSError, RuntimeError, StopIteration, KeyError) as error:
        raise UserError(f"{path}: cannot be read as a video; accepted: what the evaluation wrote there") from error
    if not pictures:
        raise UserError(f"{path}: found no frames; accepted: what the evaluation wrote there")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
