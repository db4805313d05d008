"""What training never sees, of videos that it has made: the signals of alarms (docs/metrics.md)."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from tempact.shapeworld.grammar import parse_instruction
from tempact.shapeworld.matcher import ShapeWorldJudge, clearness
from tempact.shapeworld.verifier import duplicates


class ShapeWorldWatch:
    """Scores videos of ShapeWorld by judges that are no reward, on `device`."""

    def __init__(self, device: torch.device):
        self.device = device

    @cached_property
    def matcher(self) -> ShapeWorldJudge:
        return ShapeWorldJudge.load(device=self.device)

    def __call__(self, instructions: list[str], frames: Tensor) -> dict[str, list[float]]:
        """The held-out judge's score, clearness and the share of frames with an extra or a misplaced shape.

        frames: uint8 [V, T, 3, height, width], a video of each instruction. Returns V numbers in [0, 1] by name.
        """
        pixels = frames.to(self.device).float() / 255.0
        scores = {
            "held_out": self.matcher.score(pixels, instructions),
            "clearness": clearness(pixels),
            "duplicates": duplicates(pixels, [parse_instruction(text) for text in instructions]),
        }
        return {name: values.tolist() for name, values in scores.items()}
