"""A run that nothing has stopped, to compare with."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs.same_run import start


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert start(folder) == 0
    return folder
