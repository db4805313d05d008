"""The files of a generated video, written while it is made: mp4, film strip and plan."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from tempact.infra.files import safe_name, write_atomic
from tempact.infra.video import Mp4Writer, StripRow, film_strip, save_strip, shown_frames
from tempact.types import Plan

COLUMNS = 12  # pictures of a film strip


def write_video(
    folder: Path,
    name: str,
    plan: Plan,
    frames: Iterable[Tensor],
    latents: Sequence[int],
    fps: float,
    facts: Mapping[str, object],
    note: str = "",
) -> list[Path]:
    """mp4, film strip (PNG) and plan (JSON, which is also a plan file) of one video; returns their paths.

    frames: uint8 [n, 3, height, width], a few at a time; no more of them are held than the strip shows. latents: the
    latent frame of each frame of the whole video. facts: what else the JSON tells. note: stands in every name, on
    every frame of the mp4, on the strip and in the JSON.
    """
    stem = safe_name(note.replace(" ", "-")) + f"-{name}" if note else name
    mp4, strip, told = (folder / f"{stem}{ending}" for ending in (".mp4", ".png", ".json"))
    shown = shown_frames(len(latents), COLUMNS)
    pictures: list[Tensor] = []
    with Mp4Writer(mp4, fps, note) as writer:
        for some in frames:
            own = [frame - writer.frames for frame in shown if 0 <= frame - writer.frames < len(some)]
            pictures.append(some[own])  # a copy
            writer.write(some)
        assert writer.frames == len(latents), (writer.frames, len(latents))
    length = f"{len(latents) / fps:.1f} s"
    row = StripRow(
        f"{note}, {length}" if note else length,
        torch.cat(pictures),
        plan.steps,
        tuple(latents[frame] for frame in shown),
    )
    title = f"({note}) {plan.instruction}" if note else plan.instruction
    save_strip(film_strip([row], title, COLUMNS), strip)
    steps = [asdict(step) for step in plan.steps]
    content = {"instruction": plan.instruction, "steps": steps, "repairs": plan.repairs, **facts}
    write_atomic(told, json.dumps({**content, "note": note} if note else content, indent=1))
    return [mp4, strip, told]
