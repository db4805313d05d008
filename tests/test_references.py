"""The references in docs/ are those of the code, and name everything that a run logs."""

from __future__ import annotations

import re

import pytest
from write_references import DOCS, PAGES

from tempact.config import RunConfig, flatten, keys_of
from tempact.presets import PRESETS
from tempact.reporting import MEANINGS, folded

PLACES = {
    "POLICY": "(planner|executor)", "SIGMA": r"\d\.\d{3}", "REWARD": r"[\w.]+", "ROLE": r"\w+", "PHASE": r"\w+",
    "DEPTH": r"depth\d+", "KIND": r"\w+", "ALARM": r"\w+",
}  # fmt: skip


@pytest.mark.parametrize("name", PAGES)
def test_a_reference_is_what_the_code_says(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name](), (
        "stale: PYTHONPATH=tests python tests/write_references.py"
    )


def test_every_key_and_preset_is_in_the_reference() -> None:
    text = PAGES["config.md"]()
    assert [name for name in keys_of(RunConfig) if f"| `{name}` |" not in text] == []
    assert [name for name in PRESETS if f"| `{name}` |" not in text] == []
    assert flatten(PRESETS["longlive"]()).keys() == keys_of(RunConfig).keys()


def undocumented(row: dict[str, object]) -> list[str]:
    """Keys of a row of metrics.jsonl that MEANINGS does not name."""
    patterns = []
    for name in MEANINGS:
        pattern = re.escape(name)
        for place, words in PLACES.items():
            pattern = pattern.replace(place, words)
        patterns.append(pattern)
    updates = {key: re.sub(r"(?<=^planner)(/.*)@\d+$|(?<=^executor)(/.*)@\d+$", r"\1\2", key) for key in folded(row)}
    return [key for key, name in updates.items() if not any(re.fullmatch(pattern, name) for pattern in patterns)]


def test_an_unknown_metric_is_seen() -> None:
    known = {
        "planner/kl": 0.0,
        "executor/rollout_gap/0.938": 0.0,
        "rewards/mine.smooth/mean": 0.0,
        "judge/a/calls": 1.0,
    }
    assert undocumented(known | {"planner/rollout_gap/0.938": 0.0, "luck": 1.0}) == [
        "planner/rollout_gap/0.938",
        "luck",
    ]
