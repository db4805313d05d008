"""From a plan's raw step prompts to what the executor reads."""

from __future__ import annotations

from collections.abc import Sequence

SEPARATOR = " Next: "


def smooth_prompts(prompts: Sequence[str], separator: str = SEPARATOR) -> list[str]:
    """Each prompt with the raw next one appended, so that a step prepares its successor; the last as it is.

    Judges keep the raw prompts (ALGORITHM.md decision 3): the given sequence is not changed.
    """
    following = prompts[1:]
    return [*(f"{prompt}{separator}{after}" for prompt, after in zip(prompts, following, strict=False)), *prompts[-1:]]
