"""Which frames a judge sees, registered here before any score is known, and how they reach it.

A judge sees what the video file holds, so that anyone can score the files again.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tempact.errors import UserError

# as many as the reference's judge saw (ALGORITHM.md section 7); other sets have those of the simple one
JUDGED_FRAMES = {"simple": 6, "hard": 10}
PICKSCORE_FRAMES = 8
JPEG_QUALITY = 85


def judged_frames(set_name: str) -> int:
    """How many frames of a video of this set a judge sees."""
    return JUDGED_FRAMES.get(set_name, JUDGED_FRAMES["simple"])


def pick_frames(frames: int, count: int) -> list[int]:
    """`count` frame numbers in [0, frames), evenly spread, the first and the last among them; all if fewer."""
    assert frames > 0 and count > 1, (frames, count)
    count = min(count, frames)
    return [(2 * i * (frames - 1) + count - 1) // (2 * (count - 1)) if count > 1 else 0 for i in range(count)]


def to_jpeg(frame: Tensor) -> bytes:
    """uint8 [3, height, width] as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).cpu().numpy()).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


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
