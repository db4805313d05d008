"""Video files: mp4 written and read, GIF written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType

import imageio_ffmpeg
import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torch import Tensor

from tempact.errors import UserError
from tempact.files import disk_full, writing

FPS = 8.0
VIDEO_SIDE = 240  # pixels that the longer side of a small video is enlarged to
CAPTION_MARGIN = 3


def enlarge(frames: Tensor, side: int = VIDEO_SIDE) -> np.ndarray:
    """uint8 [F, 3, h, w] to uint8 [F, H, W, 3], every pixel repeated a whole number of times.

    The longer side comes close to `side` without passing it, and is never made smaller. Odd sides get their last line
    twice, because video codecs want even ones.
    """
    assert frames.dtype == torch.uint8 and frames.ndim == 4 and frames.shape[1] == 3, (frames.dtype, frames.shape)
    factor = max(1, side // max(frames.shape[2:]))
    pictures = frames.permute(0, 2, 3, 1).cpu().numpy().repeat(factor, axis=1).repeat(factor, axis=2)
    odd = [(0, n % 2) for n in pictures.shape[1:3]]
    return np.ascontiguousarray(np.pad(pictures, ((0, 0), *odd, (0, 0)), mode="edge"))


def save_mp4(frames: Tensor, path: Path, fps: float = FPS) -> None:
    """A whole video, frames uint8 [F, 3, h, w], as `Mp4Writer` writes it."""
    with Mp4Writer(path, fps) as writer:
        writer.write(frames)


class Mp4Writer:
    """H.264 that every browser plays, a few frames at a time; `fps` frames a second.

    The file appears whole when the `with` block ends, and not at all when the block ends with an error. caption: a
    line at the foot of every frame. UserError where ffmpeg cannot write.
    """

    def __init__(self, path: Path, fps: float = FPS, caption: str = ""):
        self.path, self.fps, self.caption = path, fps, caption
        self.frames = 0  # written so far
        # in a folder of its own: an ffmpeg that is just being killed finds no place to begin a file
        self._folder = path.with_name(f".{path.stem}.partial")
        self._partial = self._folder / path.name
        self._ffmpeg: Generator[None, np.ndarray | None, None] | None = None
        self._line: np.ndarray | None = None  # the caption as pixels [height, width, 3]

    def __enter__(self) -> Mp4Writer:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if not disk_full(error):
                raise
            raise self._unwritten() from error
        return self

    def write(self, frames: Tensor) -> None:
        """Appends uint8 [n, 3, h, w], of the size of the first ones."""
        pictures = enlarge(frames)
        if self._ffmpeg is None:
            size = (pictures.shape[2], pictures.shape[1])
            self._ffmpeg = imageio_ffmpeg.write_frames(
                str(self._partial), size, fps=self.fps, quality=8, macro_block_size=2,
                ffmpeg_log_level="error",  # it warns of a video that is given up
            )  # fmt: skip
            with ThreadPoolExecutor(1) as starter:  # a signal interrupts the main thread: nobody would hold the process
                starter.submit(self._ffmpeg.send, None).result()
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
            if kind is None and self._ffmpeg is not None:
                self._ffmpeg.close()
            elif self._ffmpeg is not None:
                with suppress(KeyboardInterrupt):  # at which ffmpeg is killed, and writes no line of its own
                    self._ffmpeg.throw(KeyboardInterrupt())
            if kind is None:
                self._check()
                self._partial.replace(self.path)
        finally:
            for _ in range(2):  # once more for a file begun between the folder's last look and its removal
                shutil.rmtree(self._folder, ignore_errors=True)

    def _check(self) -> None:
        """UserError if the disk filled up after ffmpeg took the last frame, which ffmpeg's end does not tell."""
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
    face = font(max(9, width // 40), bold=True)
    text = cut(text, face, width - 2 * CAPTION_MARGIN)
    line = Image.new("RGB", (round(face.getlength(text)) + 2 * CAPTION_MARGIN, round(1.5 * face.size)))
    ImageDraw.Draw(line).text((CAPTION_MARGIN, line.height // 2), text, "white", face, anchor="lm")
    return np.asarray(line)


def read_mp4(path: Path) -> Tensor:
    """uint8 [F, 3, height, width]. UserError for a file that is no video."""
    accepted = "accepted: a video as it was written"
    try:
        reader = imageio_ffmpeg.read_frames(str(path))
        width, height = next(reader)["size"]
        pictures = [np.frombuffer(data, np.uint8).reshape(height, width, 3) for data in reader]
    except (OSError, RuntimeError, StopIteration, KeyError) as error:
        raise UserError(f"{path}: cannot be read as a video; {accepted}") from error
    if not pictures:
        raise UserError(f"{path}: found no frames; {accepted}")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def save_gif(frames: Tensor, path: Path, fps: float = FPS) -> None:
    """A GIF that repeats for ever. `frames` uint8 [F, 3, h, w]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [Image.fromarray(picture).convert("P", palette=Image.Palette.ADAPTIVE) for picture in enlarge(frames)]
    with writing(path) as partial:
        pictures[0].save(partial, save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0)


def cut(text: str, face: ImageFont.FreeTypeFont, width: int) -> str:
    """`text`, or its longest beginning that fits with an ellipsis."""
    if face.getlength(text) <= width:
        return text
    text = text.rstrip("\u2026")
    while text and face.getlength(text + "\u2026") > width:
        text = text[:-1]
    return text + "\u2026"


@lru_cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib ships."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")), size)


@dataclass(frozen=True)
class VideoFormat:
    """How videos are kept. save and read take the path of a file; frames are uint8 [T, 3, height, width]."""

    suffix: str
    save: Callable[[Tensor, Path], None]
    read: Callable[[Path], Tensor]


def mp4_format(fps: float) -> VideoFormat:
    """H.264, which anyone can look at and score again."""
    return VideoFormat(".mp4", partial(save_mp4, fps=fps), read_mp4)


def _save_frames(frames: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as partial_file:
        save_file({"frames": frames.cpu().contiguous()}, partial_file)


# for judges that measure single pixels
LOSSLESS = VideoFormat(".safetensors", _save_frames, lambda path: load_file(path)["frames"])
