"""Window policies as data: which earlier frames a chunk attends to, and at which RoPE positions.

The tables of BACKBONES.md section 2 follow from three numbers. While all history and the own chunk fit
into the window, everything is attended at absolute positions; beyond it, the sink frames and the most
recent ones are.
"""

from __future__ import annotations

from dataclasses import dataclass

from tempact.errors import UserError


@dataclass(frozen=True)
class WindowPolicy:
    """`window` counts attended frames including the sink and the own chunk; None attends to everything.

    sink: first frames that are always attended. positions: "absolute", or "relative": beyond the window
    the attended frames are renumbered from 0, which needs keys stored without RoPE. max_frames: longest
    video, None for no limit. rewrite_sink: whether a text recache beyond the window also rewrites the sink.
    """

    window: int | None = None
    sink: int = 0
    positions: str = "absolute"
    max_frames: int | None = None
    rewrite_sink: bool = False

    def attended(self, start: int, chunk: int) -> list[int]:
        """History frames (before `start`) that the chunk [start, start + chunk) attends to, in order."""
        if self.window is None or start + chunk <= self.window:
            return list(range(start))
        recent = self.window - chunk - self.sink
        return [*range(self.sink), *range(start - recent, start)]

    def temporal_positions(self, start: int, chunk: int) -> tuple[list[int], list[int]]:
        """RoPE positions of `attended(start, chunk)` and of the chunk's own frames."""
        history = self.attended(start, chunk)
        if self.positions == "absolute" or self.window is None or start + chunk <= self.window:
            return history, list(range(start, start + chunk))
        return list(range(len(history))), list(range(len(history), len(history) + chunk))

    def recached(self, start: int) -> list[int]:
        """Frames whose K/V a text switch at frame `start` recomputes under the "recache" policy."""
        if self.window is None or start <= self.window:
            return list(range(start))
        kept = 0 if self.rewrite_sink else self.sink
        return list(range(start - self.window + kept, start))

    def check(self, frames: int, chunk: int) -> None:
        """Raises UserError if a video of `frames` latent frames cannot be made in chunks of `chunk`."""
        if frames < 1 or frames % chunk:
            raise UserError(f"executor.frames: found {frames}; accepted: a positive multiple of the chunk ({chunk})")
        if self.max_frames is not None and frames > self.max_frames:
            raise UserError(f"executor.frames: found {frames}; accepted: at most {self.max_frames} with this window")


WINDOWS: dict[str, WindowPolicy] = {
    "full": WindowPolicy(),
    "self-forcing": WindowPolicy(max_frames=21),
    "longlive": WindowPolicy(window=12, sink=3),
    "tempact-self-forcing": WindowPolicy(window=12, sink=1, positions="relative"),
}
