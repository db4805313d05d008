"""Post-training of autoregressive video models for temporal order: a planner and an executor, together.

    import tempact

    config = tempact.get_preset("shapeworld-smoke")
    run = tempact.train(config, callbacks=[lambda iteration: print(iteration.metrics["planner/reward"])])
    policies = tempact.load_policies(run.folder)
    for frames in tempact.generate(policies, "A red circle is at the top left. The circle turns blue."):
        ...  # uint8 [t, 3, height, width]

`train`, `evaluate` and `generate` are also the commands `python -m tempact.train ...`. Importing this package imports
neither torch nor transformers; the first use of a function does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tempact.config import RunConfig
    from tempact.errors import UserError
    from tempact.presets import get_preset
    from tempact.rewards import Reward
    from tempact.runs.run import RunResult, load_policies
    from tempact.trainer import Iteration
    from tempact.types import Plan, Prompt, Step

__version__ = "0.2.0"
__all__ = [
    "Iteration", "Plan", "Prompt", "Reward", "RunConfig", "RunResult", "Step", "UserError", "evaluate", "generate",
    "get_preset", "load_policies", "train",
]  # fmt: skip

_HOMES = {
    "Iteration": "trainer", "Plan": "types", "Prompt": "types", "Reward": "rewards", "RunConfig": "config",
    "RunResult": "runs.run", "Step": "types", "UserError": "errors", "get_preset": "presets",
    "load_policies": "runs.run",
}  # fmt: skip
_COMMANDS = ("train", "evaluate", "generate")  # modules that can be called (`tempact.cli.callable_command`)


def __getattr__(name: str) -> Any:
    if name in _COMMANDS:
        return importlib.import_module(f"tempact.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"tempact.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'tempact' has no attribute {name!r}")
