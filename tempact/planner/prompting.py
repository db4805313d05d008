"""What the planner is asked, and the form in which it answers."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tempact.types import Step

SYSTEM = """You direct a video of {frames} latent frames, made in chunks of {chunk} frames. \
Split the user's instruction into consecutive steps and answer with a JSON array only, in this form:
{example}
Rules: the first step starts at 0 and shows the opening scene; each step starts where the one before ends; \
the last step ends at {frames}; every start and end is a multiple of {chunk}; slow events get longer spans. \
Each prompt stands alone: it names its subjects with their looks, says what happens in this step only, \
and adds nothing that the instruction does not say. Keep the order of the instruction."""


def plan_messages(instruction: str, frames: int, chunk: int) -> list[dict[str, str]]:
    """Chat messages that ask for a plan of `frames` latent frames in chunks of `chunk`."""
    middle = frames // chunk // 2 * chunk
    steps = [Step(0, middle, "A cat sits on a red sofa."), Step(middle, frames, "The cat jumps off the red sofa.")]
    example = plan_json([step for step in steps if step.start < step.end])
    system = SYSTEM.format(frames=frames, chunk=chunk, example=example)
    return [{"role": "system", "content": system}, {"role": "user", "content": instruction}]


def plan_json(steps: Sequence[Step]) -> str:
    """The compact JSON that a planner answers with; `parse_plan` reads it back."""
    rows = [{"start": step.start, "end": step.end, "prompt": step.prompt} for step in steps]
    return json.dumps(rows, ensure_ascii=False, separators=(",", ":"))
