"""Film strips, and the videos that a run keeps to be looked at: held-out prompts, worst and best samples.

`videos/index.json` lists the held-out prompts with their files, in the order shown; file names are relative to
`videos/`:
[{"prompt_id", "category", "prompt", "strip",
  "videos": [{"title", "mp4", "gif", "plan": [{"start", "end", "prompt"}]}]}]
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from tempact.evaluation.harness import Sample
from tempact.files import safe_name, write_atomic, writing
from tempact.reporting import SAMPLES
from tempact.types import PlanBatch, Rollout, Scored, Step
from tempact.video import cut, font, save_gif, save_mp4

VIDEOS, INDEX = "videos", "index.json"
EXTREMES = 3  # worst and best videos of a sample table

COLUMNS = 12  # pictures of a row
CELL = 96  # greatest height of a strip's picture in pixels
MARGIN, GAP, BORDER, BAR = 14, 3, 3, 4
HEAD, ROW_TITLE, LINE = 22, 18, 14  # heights of a line of the strip's title, of a row's title, of a label
LABEL_LINES = 4
INK = (28, 32, 38)
# one colour a step, told apart also by people who see few colours (Okabe and Ito)
STEP_COLOURS = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (213, 94, 0), (86, 180, 233))


@dataclass(frozen=True)
class StripRow:
    """A video of a strip: frames uint8 [T, 3, height, width], and the steps it was made from.

    latents: the latent frame of each of `frames`; None for a whole video whose latent frames are equally long.
    """

    title: str
    frames: Tensor
    steps: tuple[Step, ...]
    latents: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _Label:
    """A step in a strip: its first and last column, its colour, its text in lines."""

    first: int
    last: int
    colour: tuple[int, int, int]
    lines: list[str]


def write_showcase(run_folder: Path, groups: Iterable[Sequence[Sample]], titles: Mapping[str, str]) -> Path:
    """mp4, GIF and film strip of held-out prompts, each with a row for every method in `titles`, in that order.

    groups: the videos of a prompt. titles: the names of the methods' rows ("step-prompt": "before"); other methods are
    left out.
    """
    folder = Path(run_folder) / VIDEOS
    folder.mkdir(parents=True, exist_ok=True)
    index = []
    for number, videos in enumerate(groups):
        own = {video.method.name: video for video in videos}
        shown = [(title, own[method]) for method, title in titles.items() if method in own]
        prompt = videos[0].prompt
        stem = f"{number:02d}-{safe_name(prompt.category or 'prompt')}"
        rows = [StripRow(title, video.frames, video.steps) for title, video in shown]
        save_strip(film_strip(rows, prompt.text), folder / f"{stem}.png")
        entries = []
        for title, video in shown:
            name = f"{stem}-{safe_name(title)}"
            save_mp4(video.frames, folder / f"{name}.mp4")
            save_gif(video.frames, folder / f"{name}.gif")
            plan = [asdict(step) for step in video.steps]
            entries.append({"title": title, "mp4": f"{name}.mp4", "gif": f"{name}.gif", "plan": plan})
        told = {"prompt_id": prompt.prompt_id, "category": prompt.category, "prompt": prompt.text}
        index.append({**told, "strip": f"{stem}.png", "videos": entries})
    write_atomic(folder / INDEX, json.dumps(index, indent=1))
    return folder / INDEX


def write_extremes(run_folder: Path, step: int, plans: PlanBatch, rollout: Rollout, scored: Scored) -> list[Path]:
    """samples/step-000040-worst.png and -best.png: the continuations with the least and the most temporal
    following. Missing scores are neither; nothing is written when all are missing."""
    following = scored.temporal_following.flatten()
    order = [i for i in torch.argsort(following).tolist() if not following[i].isnan()]
    continuations = scored.temporal_following.shape[1]
    paths = []
    shown = min(EXTREMES, max(1, len(order) // 2))  # none is both, but for a single one
    for name, chosen in (("worst", order[:shown]), ("best", order[::-1][:shown])):
        rows = []
        for i in chosen:
            p, n = divmod(i, continuations)
            title = f"{following[i].item():.2f}  {plans.prompt_of(p).text}"
            rows.append(StripRow(title, rollout.frames[p, n], plans.plans[p].steps))
        if rows:
            path = Path(run_folder) / SAMPLES / f"step-{step:06d}-{name}.png"
            save_strip(film_strip(rows, f"{name.capitalize()} of iteration {step}, by temporal following"), path)
            paths.append(path)
    return paths


def save_strip(strip: Image.Image, path: Path) -> None:
    """A PNG that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as partial:
        strip.save(partial, optimize=True)


def film_strip(rows: Sequence[StripRow], title: str = "", columns: int = COLUMNS) -> Image.Image:
    """Rows of videos, columns of frames. Every row has the text of each step above the step's frames, which have a
    border in the step's colour; a bar stands where the prompt switches."""
    cells = [_cells(row, columns) for row in rows]
    cell_width = max(cell.width for row in cells for cell in row)
    cell_height = max(cell.height for row in cells for cell in row)
    width = 2 * MARGIN + max(len(row) for row in cells) * (cell_width + GAP) - GAP
    labels = [_labels(row, len(own), cell_width) for row, own in zip(rows, cells, strict=True)]
    heads = _wrap(title, font(15, bold=True), width - 2 * MARGIN, LABEL_LINES) if title else []
    text_heights = [ROW_TITLE + LINE * max(len(label.lines) for label in row) + BAR + 3 for row in labels]
    height = MARGIN + HEAD * len(heads) + sum(text_height + cell_height + MARGIN for text_height in text_heights)
    strip = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(strip)
    for i, line in enumerate(heads):
        draw.text((MARGIN, MARGIN + HEAD * i), line, INK, font(15, bold=True))
    y = MARGIN + HEAD * len(heads)
    for row, own, row_labels, text_height in zip(rows, cells, labels, text_heights, strict=True):
        draw.text((MARGIN, y), cut(row.title, font(13, bold=True), width - 2 * MARGIN), INK, font(13, bold=True))
        for label in row_labels:
            _draw_step(strip, label, own, y, y + text_height, cell_width)
        y += text_height + cell_height + MARGIN
    return strip


def _draw_step(
    strip: Image.Image, label: _Label, cells: list[Image.Image], top: int, picture_top: int, cell_width: int
) -> None:
    """One step of a row: its text, a bar over its columns, and its frames, bordered in its colour."""
    draw = ImageDraw.Draw(strip)
    left = MARGIN + label.first * (cell_width + GAP)
    right = MARGIN + label.last * (cell_width + GAP) + cell_width - 1
    for i, line in enumerate(label.lines):
        draw.text((left, top + ROW_TITLE + LINE * i), line, INK, font(11))
    draw.rectangle((left, picture_top - BAR - 1, right, picture_top - 2), label.colour)
    for column in range(label.first, label.last + 1):
        x, cell = MARGIN + column * (cell_width + GAP), cells[column]
        strip.paste(cell, (x, picture_top))
        outline = (x, picture_top, x + cell.width - 1, picture_top + cell.height - 1)
        draw.rectangle(outline, outline=label.colour, width=BORDER)
    if label.first:
        draw.rectangle((left - GAP, picture_top - BAR - 1, left - 1, picture_top + cells[0].height - 1), label.colour)


def shown_frames(frames: int, columns: int) -> list[int]:
    """At most `columns` frame numbers, evenly spread, the last frame among them."""
    columns = min(columns, frames)
    return [(i + 1) * frames // columns - 1 for i in range(columns)]


def _cells(row: StripRow, columns: int) -> list[Image.Image]:
    """The row's pictures with room for a border; small ones are enlarged by a whole number, large ones shrunk."""
    picked = row.frames[shown_frames(len(row.frames), columns)].permute(0, 2, 3, 1).cpu().numpy()
    height, width = picked.shape[1:3]
    scale = max(1, CELL // height) if height <= CELL else CELL / height
    size = (round(width * scale), round(height * scale))
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return [ImageOps.expand(Image.fromarray(picture).resize(size, how), BORDER) for picture in picked]


def _labels(row: StripRow, columns: int, cell_width: int) -> list[_Label]:
    """Labels of the steps that have a column."""
    length = len(row.frames)
    of_all = row.latents or [frame * row.steps[-1].end // length for frame in range(length)]
    latent = [of_all[frame] for frame in shown_frames(length, columns)]
    labels = []
    for i, step in enumerate(row.steps):
        held = [column for column, frame in enumerate(latent) if step.start <= frame < step.end]
        if held:
            room = len(held) * (cell_width + GAP) - 2 * GAP
            lines = _wrap(f"{step.start}\u2013{step.end}: {step.prompt}", font(11), room, LABEL_LINES)
            labels.append(_Label(held[0], held[-1], STEP_COLOURS[i % len(STEP_COLOURS)], lines))
    return labels


def _wrap(text: str, face: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Lines no wider than `width` pixels, at most `most`, the last one with an ellipsis if text is left."""
    lines: list[str] = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if face.getlength(joined) <= width or not lines[-1]:
            lines[-1] = cut(joined, face, width)
        elif len(lines) < most:
            lines.append(cut(word, face, width))
        else:
            lines[-1] = cut(lines[-1] + "\u2026", face, width)
            break
    return lines
