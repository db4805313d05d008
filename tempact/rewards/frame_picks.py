"""Frames of a video for a judge: their choice, the span of the switched step, JPEG files (docs/algorithm.md 2.6)."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tempact.types import PlanBatch, Rollout, Step

JPEG_QUALITY = 85
ENCODERS = 8  # threads at most; Pillow compresses without the interpreter's lock


class Span(NamedTuple):
    """The step that begins at a plan's switch frame, and its pixel frames: `first` to `last`, both included."""

    first: int
    last: int
    step: Step


def switch_spans(plans: PlanBatch, rollout: Rollout) -> list[Span | None]:
    """The span of every plan's switched step. None where no step begins at the switch frame (a plan of one step), and
    for a rollout without a trained chunk."""
    if rollout.transition is None:
        return [None] * len(plans.plans)
    spans: list[Span | None] = []
    for plan, start in zip(plans.plans, rollout.transition.start.tolist(), strict=True):
        step = next((step for step in plan.steps if step.start == start), None)
        pixels = rollout.frames.shape[2]
        spans.append(Span(*pixel_window(step.start, step.end, plan.frames, pixels), step) if step else None)
    return spans


def spread(first: int, last: int, count: int) -> list[int]:
    """At most `count` (at least 2) frames, evenly spaced in whole numbers from `first` to `last`, both included.

    Ascending, without repeats: a window of fewer than `count` frames is taken whole.
    """
    assert 0 <= first <= last and count >= 2, (first, last, count)
    gaps = min(count - 1, last - first)
    # halves round up, the same on every machine
    return [first + (2 * i * (last - first) + gaps) // (2 * gaps) for i in range(gaps + 1)] if gaps else [first]


def pixel_window(start: int, end: int, frames: int, pixel_frames: int) -> tuple[int, int]:
    """First and last pixel frame of latent frames [start, end).

    frames        F, latent frames of the video
    pixel_frames  r(F - 1) + 1, pixel frames of the video; r = 4 for Wan's VAE, 1 for ShapeWorld. Latent frame 0 is
                  pixel frame 0, latent frame i > 0 is pixel frames r(i - 1) + 1 to ri
    """
    assert 0 <= start < end <= frames, (start, end, frames)
    rate, rest = divmod(pixel_frames - 1, max(1, frames - 1))
    assert not rest, f"{pixel_frames} pixel frames of {frames} latent ones"
    return max(0, rate * (start - 1) + 1) if start else 0, rate * (end - 1)


def jpegs(frames: Tensor) -> tuple[bytes, ...]:
    """One JPEG file for each of uint8 [k, 3, height, width], in order."""
    assert frames.dtype == torch.uint8 and frames.ndim == 4 and frames.shape[1] == 3, (frames.dtype, frames.shape)
    pictures = frames.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    with ThreadPoolExecutor(min(ENCODERS, len(pictures), os.cpu_count() or 1)) as pool:
        return tuple(pool.map(_jpeg, pictures))


def _jpeg(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def media_hash(images: Sequence[bytes]) -> str:
    """SHA-256 of the files in their order, part of a reply's key in the cache."""
    total = hashlib.sha256()
    for image in images:
        total.update(hashlib.sha256(image).digest())
    return total.hexdigest()
