"""Window policies: the earlier frames that a chunk attends to, and their RoPE positions.

The tables of docs/backbones.md section 2 follow from three numbers. While all history and the own chunk fit into the
window, a chunk attends to everything, at absolute positions; beyond it, to the sink frames and the most recent ones.

With RoPE, attention scores depend on differences of positions alone. Where a window renumbers its frames from 0, the
positions here are shifted by a constant so that the newest frames keep their absolute ones: only the sink moves, and
only its keys are rotated.
"""

from __future__ import annotations

from dataclasses import dataclass

from tempact import config
from tempact.config import Window


@dataclass(frozen=True)
class WindowPolicy(Window):
    """A window's numbers, and the frames and positions that follow from them."""

    def attended(self, start: int, chunk: int) -> list[int]:
        """History frames (before `start`) that the chunk [start, start + chunk) attends to, in order."""
        if self.window is None or self._fits(start + chunk):
            return list(range(start))
        recent = self.window - chunk - self.sink
        return [*range(self.sink), *range(start - recent, start)]

    def recached(self, start: int) -> list[int]:
        """Frames whose K/V a text switch at frame `start` recomputes under the "recache" policy.

        The newest ones of a window, all of them if there are no more; else the sink keeps the old text.
        """
        if self.window is None or self._fits(start):
            return list(range(start))
        return list(range(start - self.window + self.sink, start))

    def positions_of(self, history: list[int], start: int, end: int) -> list[int]:
        """RoPE positions of the attended frames `history` in a pass over the frames [start, end), whose positions are
        absolute."""
        if self.positions == "absolute" or self._fits(end):
            return history
        return list(range(start - len(history), start))

    def _fits(self, frames: int) -> bool:
        return self.window is None or frames <= self.window


WINDOWS = {name: WindowPolicy(**vars(numbers)) for name, numbers in config.WINDOWS.items()}
