"""ShapeWorld's prompts: an endless training split, fixed validation and test sets."""

from __future__ import annotations

import random

from tempact.shapeworld.grammar import sample_story, write_instruction
from tempact.types import Prompt

HARD_SHARE = 0.5  # of training prompts


class ShapeWorldPrompts:
    """Training prompts drawn from the grammar's training split."""

    def draw(self, count: int, seed: int) -> list[Prompt]:
        rng = random.Random(seed)
        return [_prompt(rng, "train", "hard" if rng.random() < HARD_SHARE else "simple", i) for i in range(count)]


def held_out_prompts(category: str, count: int, seed: int, split: str = "test") -> list[Prompt]:
    """`count` instructions of one category of a held-out split, the same for the same seed."""
    rng = random.Random(f"{seed}/{category}")
    return [_prompt(rng, split, category, i) for i in range(count)]


def _prompt(rng: random.Random, split: str, category: str, number: int) -> Prompt:
    text = write_instruction(sample_story(rng, split, None, category=category), rng)
    return Prompt(f"{split}-{category}-{number}", text, category)
