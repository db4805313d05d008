"""Prompts from a CSV, JSONL or parquet file.

One row a prompt: `prompt`, and where they are wanted `category` and `prompt_id`; other columns are left alone. Rows
in which nothing stands are passed over; of a prompt that stands there twice the first row counts. Everything else that
does not fit is a UserError that names the row, counted from 1 after the header.
"""

from __future__ import annotations

import csv
import difflib
import json
import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tempact.errors import UserError
from tempact.types import Prompt

log = logging.getLogger(__name__)

COLUMNS = ("prompt", "category", "prompt_id")
LONGEST = 10_000  # characters of a prompt; a longer one is a file that was cut wrongly
SHOWN = 80  # characters of a wrong value in a message

Row = Mapping[str, Any]


class FilePrompts:
    """The prompts of a file, drawn without repetition within an iteration."""

    def __init__(self, path: Path, at_least: int):
        """UserError if the file cannot be read or holds fewer than `at_least` prompts."""
        self.prompts = read_prompts(path)
        if len(self.prompts) < at_least:
            raise UserError(
                f"{path}: found {len(self.prompts)} prompts; accepted: at least data.prompts_per_iteration ({at_least})"
            )

    def draw(self, count: int, seed: int) -> list[Prompt]:
        """`count` different prompts, the same for the same seed."""
        return random.Random(seed).sample(self.prompts, count)


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file in its order, each once; a prompt without an id gets the name `row-<number>`.

    Raises UserError for a file that cannot be read, one without prompts or without that column, and for a row whose
    prompt is empty, no text, or has the id of another one.
    """
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: found the ending {path.suffix!r}; accepted: {', '.join(readers)}")
    try:
        return _prompts(path, readers[path.suffix.lower()](path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); accepted: a file of prompts") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: found bytes that are no UTF-8 (at {error.start}); accepted: UTF-8") from error


def _prompts(path: Path, rows: Iterable[tuple[int, Row]]) -> list[Prompt]:
    prompts: dict[str, Prompt] = {}  # by text
    ids: dict[str, int] = {}
    empty = repeated = 0
    for number, row in rows:
        text, category, name = (_text(path, number, key, row.get(key)) for key in COLUMNS)
        if not any(value not in (None, "") and str(value).strip() for value in row.values()):
            empty += 1
            continue
        if not text or len(text) > LONGEST:
            found = f"{len(text)} characters" if text else "no prompt"
            raise UserError(f"{path}: row {number}: found {found}; accepted: a text of 1 to {LONGEST} characters")
        if text in prompts:
            repeated += 1
            continue
        name = name or f"row-{number}"
        if name in ids:
            raise UserError(
                f"{path}: row {number}: prompt_id: found {name[:SHOWN]!r}, which row {ids[name]} has; accepted: an id "
                "for each prompt"
            )
        ids[name] = number
        prompts[text] = Prompt(name, text, category)
    if not prompts:
        raise UserError(f"{path}: found no prompts; accepted: at least one row")
    if empty or repeated:
        log.warning("%s: %d empty rows and %d repeated prompts are left out", path, empty, repeated)
    return list(prompts.values())


def _text(path: Path, number: int, key: str, value: object) -> str:
    """A cell as text; ids may be whole numbers."""
    if value is None:
        return ""
    if isinstance(value, str) and _encodes(value):
        return value.strip()
    if key == "prompt_id" and type(value) is int:
        return str(value)
    raise UserError(f"{path}: row {number}: {key}: found {repr(value)[:SHOWN]}; accepted: text")


def _encodes(text: str) -> bool:
    """JSON can hold halves of characters, which nothing that reads text takes."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _check_columns(path: Path, found: Iterable[object], where: str = "") -> None:
    names = [str(name) for name in found]
    if "prompt" not in names:
        near = difflib.get_close_matches("prompt", names, 1)
        hint = f" (nearest: {near[0]})" if near else ""
        shown = ", ".join(names)[:SHOWN] or "none"
        raise UserError(f"{path}: {where}found the columns {shown}; accepted: a column called prompt{hint}")


def _csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            _check_columns(path, header)
            if len(set(header)) < len(header):
                raise UserError(f"{path}: found a column twice in {', '.join(header)[:SHOWN]}; accepted: each once")
            for number, cells in enumerate(reader, 1):
                if len(cells) > len(header):
                    raise UserError(
                        f"{path}: row {number}: found {len(cells)} cells; accepted: {len(header)}, as in the header "
                        "(text with commas stands in quotes)"
                    )
                yield number, dict(zip(header, cells, strict=False))
        except csv.Error as error:
            raise UserError(f"{path}: line {reader.line_num}: cannot be read ({error}); accepted: CSV") from error


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                yield number, {}
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: row {number}: cannot be read ({error}); accepted: a JSON object") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}: row {number}: found {type(row).__name__}; accepted: a JSON object")
            _check_columns(path, row, f"row {number}: ")
            yield number, row


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: needs pyarrow; accepted: pip install -e '.[parquet]', or a CSV file") from error
    with path.open("rb") as file:
        try:
            names = pyarrow.parquet.read_schema(file).names
            _check_columns(path, names)
            table = pyarrow.parquet.read_table(file, columns=[name for name in COLUMNS if name in names])
        except pyarrow.ArrowException as error:
            reason = str(error).splitlines()[0][:SHOWN]
            raise UserError(f"{path}: cannot be read ({reason}); accepted: a parquet file") from error
    yield from enumerate(table.to_pylist(), 1)
