"""Window policies as data: which earlier frames a chunk attends to, and at which RoPE positions.

The tables of BACKBONES.md section 2 follow from three numbers. While all history and the own chunk fit
into the window, everything is attended at absolute positions; beyond it, the sink frames and the most
recent ones are.

RoPE makes scores of differences of positions alone. Where a window renumbers its frames from 0, positions here are
those numbers plus what lets the newest frames keep their absolute ones: only the sink moves, and it alone is turned.
"""

from __future__ import annotations

from dataclasses import dataclass

from tempact.errors import UserError

ROPE_POSITIONS = 1024  # that Wan's models know; a reference implementation's table ends there


@dataclass(frozen=True)
class WindowPolicy:
    """`window` counts attended frames including the sink and the own chunk; None attends to everything.

    sink: first frames that are always attended. positions: "absolute", or "relative": beyond the window
    the attended frames are numbered without the gap behind the sink. max_frames: longest video, None where only the
    positions end.
    """

    window: int | None = None
    sink: int = 0
    positions: str = "absolute"
    max_frames: int | None = None

    def attended(self, start: int, chunk: int) -> list[int]:
        """History frames (before `start`) that the chunk [start, start + chunk) attends to, in order."""
        if self.window is None or self._fits(start + chunk):
            return list(range(start))
        recent = self.window - chunk - self.sink
        return [*range(self.sink), *range(start - recent, start)]

    def temporal_positions(self, start: int, chunk: int) -> tuple[list[int], list[int]]:
        """RoPE positions of `attended(start, chunk)` and of the chunk's own frames."""
        history = self.attended(start, chunk)
        return self._numbered(history, [*range(start, start + chunk)], beyond=not self._fits(start + chunk))

    def recached(self, start: int) -> list[int]:
        """Frames whose K/V a text switch at frame `start` recomputes under the "recache" policy.

        The newest ones of a window, all of them if there are no more; else the sink keeps the old text.
        """
        if self.window is None or self._fits(start):
            return list(range(start))
        return list(range(start - self.window + self.sink, start))

    def recache_positions(self, start: int) -> tuple[list[int], list[int]]:
        """RoPE positions, during that pass, of the sink frames that stay and of `recached(start)`."""
        frames = self.recached(start)
        return self._numbered(list(range(min(self.sink, frames[0]))), frames, beyond=not self._fits(start))

    def _fits(self, frames: int) -> bool:
        return self.window is None or frames <= self.window

    def _numbered(self, history: list[int], own: list[int], *, beyond: bool) -> tuple[list[int], list[int]]:
        if self.positions == "absolute" or not beyond:
            return history, own
        return list(range(own[0] - len(history), own[0])), own

    def check(self, frames: int, chunk: int) -> None:
        """Raises UserError if a video of `frames` latent frames cannot be made in chunks of `chunk`."""
        if self.window is not None and not 1 <= chunk <= self.window - self.sink:
            accepted = (
                f"1 to {self.window - self.sink} with this window ({self.window} frames, {self.sink} of them sink)"
            )
            raise UserError(f"executor.chunk_frames: found {chunk}; accepted: {accepted}")
        if frames < 1 or frames % chunk:
            raise UserError(f"executor.frames: found {frames}; accepted: a positive multiple of the chunk ({chunk})")
        if self.max_frames is not None and frames > self.max_frames:
            raise UserError(f"executor.frames: found {frames}; accepted: at most {self.max_frames} with this window")
        if self.positions == "absolute" and frames > ROPE_POSITIONS:
            accepted = f"at most {ROPE_POSITIONS} (RoPE positions) with this window, or a window of relative positions"
            raise UserError(f"executor.frames: found {frames}; accepted: {accepted}")


# BACKBONES.md section 2
WINDOWS: dict[str, WindowPolicy] = {
    "full": WindowPolicy(),
    "self-forcing": WindowPolicy(max_frames=21),  # Causal-Forcing's too
    "longlive": WindowPolicy(window=12, sink=3),
    "longlive-infinite": WindowPolicy(window=12, sink=3, positions="relative"),
    "tempact-self-forcing": WindowPolicy(window=12, sink=1, positions="relative"),
    "infinity-rope": WindowPolicy(window=6, sink=1, positions="relative"),
}
