"""The documents say what the code is: links, the picture of the imports, the tour's length."""

from __future__ import annotations

import ast
import re

import pytest
from draw_architecture import FILE, draw
from test_imports import REPOSITORY

NAMES = ("README.md", "CONTRIBUTING.md", "csrc_triton/README.md")
PAGES = sorted([*(REPOSITORY / name for name in NAMES), *(REPOSITORY / "docs").glob("*.md")])
TOUR_LINES = 700


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_leads_somewhere(page) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    lost = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert lost == []


def test_the_picture_is_that_of_the_imports() -> None:
    assert FILE.read_text() == draw(), "stale: PYTHONPATH=tests python tests/draw_architecture.py"


def test_the_tour_names_code_that_exists_and_is_short() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    stops = re.findall(r"^### \d\. .*\n\n((?:- `[^`]+`.*\n)+)", text, flags=re.MULTILINE)
    assert len(stops) == 7
    lines = 0
    for file, names in re.findall(
        r"^- `(tempact/[\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", "".join(stops), flags=re.MULTILINE
    ):
        tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
        for name in re.findall(r"`([\w.]+)`", names):
            node: ast.AST = tree
            for part in name.split("."):
                node = next(n for n in ast.iter_child_nodes(node) if getattr(n, "name", None) == part)
            lines += node.end_lineno - node.lineno + 1
    assert 300 < lines < TOUR_LINES
