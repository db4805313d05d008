"""Small faults in the code do not go unseen (tests/mutations.py)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from mutate import REPOSITORY, Mutation, copied, survives
from mutations import MUTATIONS


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_fault_can_be_made_and_its_tests_exist(mutation: Mutation) -> None:
    ast.parse(mutation.mutated(REPOSITORY))
    for test in mutation.tests:
        file, _, name = test.partition("::")
        source = (REPOSITORY / file).read_text(encoding="utf-8")
        assert not name or f"def {name.partition('[')[0]}(" in source, test


@pytest.fixture(scope="module")
def copy() -> Iterator[Path]:
    with copied() as folder:
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_fault_is_seen(mutation: Mutation, copy: Path) -> None:
    assert survives(mutation, copy) == ""
