"""A judge that comes back soon."""

from __future__ import annotations

import pytest

from tempact.rewards.judges import endpoints


@pytest.fixture
def soon_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken endpoint is probed after 0.05 s and 0.1 s in place of 1 s and 2 s."""
    monkeypatch.setattr(endpoints, "COOLDOWN_S", 0.05)
