"""Film strips, and the videos that a run keeps to be looked at: held-out prompts, worst and best samples.

`videos/index.json` lists the held-out prompts with their files, in the order shown; file names are relative to
`videos/`:
[{"prompt_id", "category", "prompt", "strip",
  "videos": [{"title", "mp4", "gif", "sheet", "plan": [{"start", "end", "prompt"}]}]}]

A sheet is a strip without texts, which the report sets itself: the pictures of one video side by side, and in the PNG's
text `LATENTS` the latent frame of each.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from tempact.evaluation.harness import Sample
from tempact.files import reading, safe_name, write_atomic, writing
from tempact.reporting import SAMPLES
from tempact.types import PlanBatch, Step
from tempact.video import cut, font, save_gif, save_mp4

VIDEOS, INDEX, LATENTS = "videos", "index.json", "latents"
SCORES = ("temporal_following", "step_following", "aesthetics", "plan_quality", "format_score")  # of a sample
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
class Scene:
    """A step of a video with its pictures, encoded, and the number of its colour."""

    step: Step
    colour: int
    pictures: list[bytes]

    @property
    def count(self) -> int:
        return len(self.pictures)


@dataclass(frozen=True)
class Film:
    """A video on the page: its steps with pictures, its whole plan, and it moving, as a data URI."""

    title: str
    scenes: Sequence[Scene]
    plan: Sequence[Step] = ()
    gif: str | None = None


@dataclass(frozen=True)
class Shown:
    """A prompt on the page with its videos. strip: a picture of all in the place of scenes; steps: told by a set."""

    prompt: str
    films: Sequence[Film]
    category: str = ""
    strip: str | None = None
    steps: Sequence[str] = ()


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
        for row, (title, video) in zip(rows, shown, strict=True):
            name = f"{stem}-{safe_name(title)}"
            files = {"mp4": f"{name}.mp4", "gif": f"{name}.gif", "sheet": f"{name}-sheet.png"}
            save_mp4(video.frames, folder / files["mp4"])
            save_gif(video.frames, folder / files["gif"])
            write_atomic(folder / files["sheet"], sheet(row))
            entries.append({"title": title, **files, "plan": [asdict(step) for step in video.steps]})
        told = {"prompt_id": prompt.prompt_id, "category": prompt.category, "prompt": prompt.text}
        index.append({**told, "strip": f"{stem}.png", "videos": entries})
    write_atomic(folder / INDEX, json.dumps(index, indent=1))
    return folder / INDEX


def videos_of_extremes(run_folder: Path, step: int) -> list[tuple[int, int]]:
    """Plan and continuation of each video that `write_extremes` shows."""
    found = extremes(read_samples(Path(run_folder) / SAMPLES / f"step-{step:06d}.jsonl"))
    return [(row["plan_index"], row["continuation"]) for own in found.values() for row in own]


def write_extremes(
    run_folder: Path, step: int, plans: PlanBatch, frames: Mapping[tuple[int, int], Tensor]
) -> list[Path]:
    """samples/step-000040-worst.png and -best.png: the `extremes` of the sample table of that step, which is there.

    frames: uint8 [T, 3, height, width] of `videos_of_extremes`, by plan and continuation. Beside the strips is the
    sheet of each video, under `sheet_name`. Nothing is written when all scores are missing.
    """
    folder, paths = Path(run_folder) / SAMPLES, []
    for name, own in extremes(read_samples(folder / f"step-{step:06d}.jsonl")).items():
        shown = []
        for row in own:
            p, n = row["plan_index"], row["continuation"]
            title = f"{row['temporal_following']:.2f}  {row['prompt']}"
            shown.append(StripRow(title, frames[p, n], plans.plans[p].steps))
            write_atomic(folder / sheet_name(row), sheet(shown[-1]))
        if shown:
            paths.append(folder / f"step-{step:06d}-{name}.png")
            save_strip(film_strip(shown, f"{name.capitalize()} of iteration {step}, by temporal following"), paths[-1])
    return paths


def read_samples(path: Path) -> list[dict]:
    """Rows of a sample table; UserError for a file that is not as `write_samples` wrote it."""
    with reading(path):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            row["plan"] = [Step(**step) for step in row["plan"]]
            row |= {key: row[key] if row[key] is None else float(row[key]) for key in SCORES}
            row |= {key: int(row[key]) for key in ("step", "plan_index", "continuation")}
    return rows


def extremes(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """The rows of a sample table with the least ("worst") and the most ("best") temporal following, in that order.

    Missing scores are neither, and no row is both but a single one. Of equal scores the earlier row comes first.
    """
    scored = [row for row in rows if row["temporal_following"] is not None]
    shown = min(EXTREMES, max(1, len(scored) // 2))
    worst = sorted(scored, key=lambda row: row["temporal_following"])
    left = worst if len(scored) == 1 else [row for row in scored if all(row is not one for one in worst[:shown])]
    best = sorted(left, key=lambda row: -row["temporal_following"])
    return {"worst": worst[:shown], "best": best[:shown]}


def sheet_name(row: dict) -> str:
    """Of a row of a sample table: step-000040-plan-03-video-01.png."""
    return f"step-{row['step']:06d}-plan-{row['plan_index']:02d}-video-{row['continuation']:02d}.png"


def sheet(row: StripRow, columns: int = COLUMNS) -> bytes:
    """The sheet of a video, a PNG; pictures higher than CELL are shrunk."""
    shown = shown_frames(len(row.frames), columns)
    pictures = [Image.fromarray(picture) for picture in row.frames[shown].permute(0, 2, 3, 1).cpu().numpy()]
    for picture in pictures:
        picture.thumbnail((picture.width, CELL))
    width, height = pictures[0].size
    joined = Image.new("RGB", (len(shown) * width, height))
    for column, picture in enumerate(pictures):
        joined.paste(picture, (column * width, 0))
    told = PngInfo()
    told.add_text(LATENTS, json.dumps(_latents(row, shown)))
    return _encoded(joined, "PNG", pnginfo=told)


def scenes(sheet: bytes, steps: Sequence[Step]) -> list[Scene]:
    """The steps that have a picture in a sheet, with their pictures: small ones as PNG, others as JPEG."""
    with Image.open(io.BytesIO(sheet)) as joined:
        latents = json.loads(joined.info[LATENTS])
        width, height = joined.width // len(latents), joined.height
        cells = [joined.crop((x * width, 0, (x + 1) * width, height)).convert("RGB") for x in range(len(latents))]
    kind = "PNG" if height < CELL else "JPEG"
    return [
        Scene(step, number % len(STEP_COLOURS), [_encoded(cells[column], kind) for column in held])
        for number, step, held in _held(steps, latents)
    ]


def _encoded(picture: Image.Image, kind: str, **more: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, optimize=True, **more)
    return file.getvalue()


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
    shown = shown_frames(len(row.frames), columns)
    labels = []
    for i, step, held in _held(row.steps, _latents(row, shown)):
        room = len(held) * (cell_width + GAP) - 2 * GAP
        lines = _wrap(f"{step.start}\u2013{step.end}: {step.prompt}", font(11), room, LABEL_LINES)
        labels.append(_Label(held[0], held[-1], STEP_COLOURS[i % len(STEP_COLOURS)], lines))
    return labels


def _latents(row: StripRow, shown: Sequence[int]) -> list[int]:
    """The latent frame of each of the frames `shown`."""
    length = len(row.frames)
    return [row.latents[frame] if row.latents else frame * row.steps[-1].end // length for frame in shown]


def _held(steps: Sequence[Step], latents: Sequence[int]) -> Iterator[tuple[int, Step, list[int]]]:
    """Number, step and columns of each step that has a column; latents: the latent frame of each column."""
    for number, step in enumerate(steps):
        held = [column for column, latent in enumerate(latents) if step.start <= latent < step.end]
        if held:
            yield number, step, held


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


def read_showcase(run: Path) -> list[Shown]:
    """Entries of videos/index.json with their pictures; a picture that is gone is left out."""
    index = run / VIDEOS / INDEX
    if not index.is_file():
        return []
    shown = []
    with reading(index):
        for entry in json.loads(index.read_text(encoding="utf-8")):
            films = []
            for video in entry["videos"]:
                steps = [Step(**step) for step in video["plan"]]
                films.append(_film(run / VIDEOS, video["title"], video.get("sheet"), steps, video["gif"]))
            bare = not any(film.scenes for film in films)  # a run of an earlier version has strips alone
            strip = _picture(run / VIDEOS / Path(entry["strip"]).name) if bare else None
            shown.append(Shown(str(entry["prompt"]), films, str(entry["category"]), strip))
    return shown


def _film(folder: Path, title: str, sheet: str | None, steps: Sequence[Step], gif: str | None = None) -> Film:
    """A video's pictures, as far as they are there. sheet, gif: names of files in `folder`."""
    file = folder / Path(sheet or ".").name
    return Film(
        str(title), scenes(file.read_bytes(), steps) if file.is_file() else [], tuple(steps),
        _picture(folder / Path(gif).name) if gif else None,
    )  # fmt: skip


def read_extremes(run: Path) -> dict | None:
    """Worst and best continuations of the newest sample table, with their pictures where the run made them."""
    tables = sorted((run / SAMPLES).glob("step-*.jsonl"))
    if not tables:
        return None
    rows = read_samples(tables[-1])
    parts: dict[str, list[tuple[dict, Film]]] = {}
    for name, own in extremes(rows).items():
        with reading(tables[-1]):
            parts[name] = [(row, _film(run / SAMPLES, row["prompt"], sheet_name(row), row["plan"])) for row in own]
    if not any(parts.values()):
        return None
    unscored = sum(row["temporal_following"] is None for row in rows)
    return {"step": rows[0]["step"], "unscored": unscored, "parts": parts}


def _picture(path: Path) -> str | None:
    return data_uri(path.read_bytes()) if path.is_file() else None


def data_uri(picture: bytes) -> str:
    """A PNG, GIF or JPEG for a page that needs no other file."""
    kind = {b"\x89PNG": "png", b"GIF8": "gif"}.get(picture[:4], "jpeg")
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
