"""Video files: mp4, GIF, and film strips as PNG."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType

import imageio_ffmpeg
import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from tempact.errors import UserError
from tempact.files import writing
from tempact.types import Step

FPS = 8.0
VIDEO_SIDE = 240  # pixels that the longer side of a small video is enlarged to
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

    latents: the latent frame that each of `frames` belongs to; None where the frames are a whole video whose latent
    frames are as long as each other.
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


def enlarge(frames: Tensor, side: int = VIDEO_SIDE) -> np.ndarray:
    """uint8 [F, 3, h, w] to uint8 [F, H, W, 3], every pixel repeated a whole number of times.

    The longer side comes close to `side` without passing it (never smaller than given); odd sides get their
    last line twice, because video codecs want even ones.
    """
    assert frames.dtype == torch.uint8 and frames.ndim == 4 and frames.shape[1] == 3, (frames.dtype, frames.shape)
    factor = max(1, side // max(frames.shape[2:]))
    pictures = frames.permute(0, 2, 3, 1).cpu().numpy().repeat(factor, axis=1).repeat(factor, axis=2)
    odd = [(0, n % 2) for n in pictures.shape[1:3]]
    return np.ascontiguousarray(np.pad(pictures, ((0, 0), *odd, (0, 0)), mode="edge"))


def save_mp4(frames: Tensor, path: Path, fps: float = FPS) -> None:
    """H.264 that every browser plays. `frames` uint8 [F, 3, h, w]; the file appears whole or not at all."""
    with Mp4Writer(path, fps) as writer:
        writer.write(frames)


class Mp4Writer:
    """H.264 that every browser plays, a few frames at a time.

    The file appears when the `with` block ends, whole; not at all when that ends with an error. caption: a line at
    the foot of every frame. Raises UserError where ffmpeg cannot write.
    """

    def __init__(self, path: Path, fps: float = FPS, caption: str = ""):
        self.path, self.fps, self.caption = path, fps, caption
        self.frames = 0  # written so far
        self._partial = path.with_name(f".{path.stem}.partial.mp4")
        self._ffmpeg: Generator[None, np.ndarray | None, None] | None = None
        self._line: np.ndarray | None = None  # the caption as pixels [height, width, 3]

    def __enter__(self) -> Mp4Writer:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self

    def write(self, frames: Tensor) -> None:
        """Appends uint8 [n, 3, h, w], of the size of the first ones."""
        pictures = enlarge(frames)
        if self._ffmpeg is None:
            size = (pictures.shape[2], pictures.shape[1])
            self._ffmpeg = imageio_ffmpeg.write_frames(
                str(self._partial), size, fps=self.fps, quality=8, macro_block_size=2
            )
            self._ffmpeg.send(None)
            self._line = _caption(self.caption, size[0]) if self.caption else None
        if self._line is not None:
            height, width = (min(a, b) for a, b in zip(self._line.shape, pictures.shape[1:3], strict=False))
            pictures[:, -height:, :width] = self._line[:height, :width]
        try:
            for picture in pictures:
                self._ffmpeg.send(picture)
        except OSError as error:
            raise self._unwritten() from error
        self.frames += len(pictures)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._ffmpeg is not None:
                self._ffmpeg.close()
            if kind is None:
                self._check()
                self._partial.replace(self.path)
        finally:
            self._partial.unlink(missing_ok=True)

    def _check(self) -> None:
        """A disk may have filled up after the last frame was taken, of which ffmpeg's end says nothing."""
        assert self.frames, f"{self.path}: no frames"
        try:
            found = imageio_ffmpeg.count_frames_and_secs(str(self._partial))[0]
        except RuntimeError as error:
            raise self._unwritten() from error
        if found != self.frames:
            raise self._unwritten()

    def _unwritten(self) -> UserError:
        return UserError(f"{self.path}: found that ffmpeg cannot write it; accepted: a disk with space left")


def _caption(text: str, width: int) -> np.ndarray:
    """`text` in white on black, uint8 [height, at most width, 3]."""
    font = _font(max(9, width // 40), bold=True)
    text = _cut(text, font, width - 2 * GAP)
    line = Image.new("RGB", (round(font.getlength(text)) + 2 * GAP, round(1.5 * font.size)))
    ImageDraw.Draw(line).text((GAP, line.height // 2), text, "white", font, anchor="lm")
    return np.asarray(line)


def save_gif(frames: Tensor, path: Path, fps: float = FPS) -> None:
    """A GIF that repeats for ever. `frames` uint8 [F, 3, h, w]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [Image.fromarray(picture).convert("P", palette=Image.Palette.ADAPTIVE) for picture in enlarge(frames)]
    with writing(path) as partial:
        pictures[0].save(partial, save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0)


def save_strip(strip: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as partial:
        strip.save(partial, optimize=True)


def film_strip(rows: Sequence[StripRow], title: str = "", columns: int = 12) -> Image.Image:
    """Rows of videos, columns of frames. Every row names its steps above the frames they hold on, each step in
    a colour of its own that also borders its frames; a bar stands where the prompt switches."""
    cells = [_cells(row, columns) for row in rows]
    cell_width = max(cell.width for row in cells for cell in row)
    cell_height = max(cell.height for row in cells for cell in row)
    width = 2 * MARGIN + max(len(row) for row in cells) * (cell_width + GAP) - GAP
    labels = [_labels(row, len(own), cell_width) for row, own in zip(rows, cells, strict=True)]
    heads = _wrap(title, _font(15, bold=True), width - 2 * MARGIN, LABEL_LINES) if title else []
    text_heights = [ROW_TITLE + LINE * max(len(label.lines) for label in row) + BAR + 3 for row in labels]
    height = MARGIN + HEAD * len(heads) + sum(text_height + cell_height + MARGIN for text_height in text_heights)
    strip = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(strip)
    for i, line in enumerate(heads):
        draw.text((MARGIN, MARGIN + HEAD * i), line, INK, _font(15, bold=True))
    y = MARGIN + HEAD * len(heads)
    for row, own, row_labels, text_height in zip(rows, cells, labels, text_heights, strict=True):
        draw.text((MARGIN, y), _cut(row.title, _font(13, bold=True), width - 2 * MARGIN), INK, _font(13, bold=True))
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
        draw.text((left, top + ROW_TITLE + LINE * i), line, INK, _font(11))
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
            lines = _wrap(f"{step.start}\u2013{step.end}: {step.prompt}", _font(11), room, LABEL_LINES)
            labels.append(_Label(held[0], held[-1], STEP_COLOURS[i % len(STEP_COLOURS)], lines))
    return labels


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Lines no wider than `width` pixels, at most `most`, the last one with an ellipsis if text is left."""
    lines: list[str] = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width or not lines[-1]:
            lines[-1] = _cut(joined, font, width)
        elif len(lines) < most:
            lines.append(_cut(word, font, width))
        else:
            lines[-1] = _cut(lines[-1] + "\u2026", font, width)
            break
    return lines


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """`text`, or its longest beginning that fits with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    text = text.rstrip("\u2026")
    while text and font.getlength(text + "\u2026") > width:
        text = text[:-1]
    return text + "\u2026"


@lru_cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")), size)
