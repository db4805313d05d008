"""Runs of one process that nothing has stopped, to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from distributed.processes import trained


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder, read only, of a run with these arguments."""
    made: dict[tuple, Path] = {}

    def run(*more: str, plant: Callable[[], None] | None = None) -> Path:
        key = (*more, plant)
        if key not in made:
            made[key] = trained(tmp_path_factory.mktemp("alone"), 1, *more, plant=plant)
        return made[key]

    return run
