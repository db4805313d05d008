"""What tests of plans before a run share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def no_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment names no judge."""
    for name in [name for name in os.environ if name.startswith(("TEMPACT_JUDGE_", "VLLM_", "LLM_"))]:
        monkeypatch.delenv(name)
