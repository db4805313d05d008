"""Which frames of a video a judge sees, and how they are sent (ALGORITHM.md 2.6, invariant 28)."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

JPEG_QUALITY = 85
ENCODERS = 8  # threads at most; Pillow compresses without the interpreter's lock


def spread(first: int, last: int, count: int) -> list[int]:
    """At most `count` frames from `first` to `last`, both among them, as evenly as whole numbers allow.

    Rising and without repeats: a window of fewer than `count` frames is taken whole. `count` is at least 2.
    """
    assert 0 <= first <= last and count >= 2, (first, last, count)
    gaps = min(count - 1, last - first)
    # halves round up, the same on every machine
    return [first + (2 * i * (last - first) + gaps) // (2 * gaps) for i in range(gaps + 1)] if gaps else [first]


def pixel_window(start: int, end: int, frames: int, pixel_frames: int) -> tuple[int, int]:
    """First and last pixel frame of latent frames [start, end).

    frames        F, latent frames of the video
    pixel_frames  of the whole video, r(F - 1) + 1 for a codec that makes r of each latent frame after the first (4 for
                  Wan's VAE, 1 for ShapeWorld): latent frame 0 is pixel frame 0, latent frame i > 0 is
                  r(i - 1) + 1 .. ri
    """
    assert 0 <= start < end <= frames, (start, end, frames)
    rate, rest = divmod(pixel_frames - 1, max(1, frames - 1))
    assert not rest, f"{pixel_frames} pixel frames of {frames} latent ones"
    return max(0, rate * (start - 1) + 1) if start else 0, rate * (end - 1)


def jpegs(frames: Tensor) -> tuple[bytes, ...]:
    """JPEG files of uint8 [k, 3, height, width], in order."""
    assert frames.dtype == torch.uint8 and frames.ndim == 4 and frames.shape[1] == 3, (frames.dtype, frames.shape)
    pictures = frames.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    with ThreadPoolExecutor(min(ENCODERS, len(pictures), os.cpu_count() or 1)) as pool:
        return tuple(pool.map(_jpeg, pictures))


def _jpeg(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def media_hash(images: Sequence[bytes]) -> str:
    """SHA-256 of files in their order, for the cache of replies."""
    total = hashlib.sha256()
    for image in images:
        total.update(hashlib.sha256(image).digest())
    return total.hexdigest()
