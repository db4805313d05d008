"""Prompts from a CSV, JSONL, parquet or text file (a prompt a line).

One row a prompt: `prompt`, and where they are wanted `category`, `prompt_id` and what the reader asks for besides;
other columns are left alone. Rows in which nothing stands are passed over. Everything else that does not fit is a
UserError that names the row, counted from 1 after the header.
"""

from __future__ import annotations

import csv
import difflib
import json
import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempact.errors import UserError
from tempact.types import Prompt

log = logging.getLogger(__name__)

COLUMNS = ("prompt", "category", "prompt_id")
LONGEST = 10_000  # characters of a prompt; a longer one is a file that was cut wrongly
SHOWN = 80  # characters of a wrong value in a message

Cells = Mapping[str, Any]


@dataclass(frozen=True)
class PromptRow:
    """A row. prompt_id is "" if it has none; cells: all that was read of it."""

    path: Path
    number: int
    prompt: Prompt
    cells: Cells

    @property
    def where(self) -> str:
        """What messages call it."""
        return f"{self.path}: row {self.number}"


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
    """The prompts of a file in its order; of one that stands there twice the first row counts, and a prompt without an
    id gets the name `row-<number>`. Raises UserError as `read_rows` does."""
    rows = read_rows(path)
    first: dict[str, PromptRow] = {}
    for row in rows:
        first.setdefault(row.prompt.text, row)
    if len(first) < len(rows):
        log.warning("%s: %d repeated prompts are left out", path, len(rows) - len(first))
    check_ids(first.values())
    named = ((row, row.prompt.prompt_id or f"row-{row.number}") for row in first.values())
    return [Prompt(name, row.prompt.text, row.prompt.category) for row, name in named]


def read_rows(path: Path, columns: tuple[str, ...] = ()) -> list[PromptRow]:
    """The rows of a file in its order, with the cells of `columns` too.

    Raises UserError for a file that cannot be read, one without prompts or without that column, and for a row whose
    prompt is empty or no text.
    """
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows, ".txt": _text_rows}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: found the ending {path.suffix!r}; accepted: {', '.join(readers)}")
    try:
        return _checked(path, readers[path.suffix.lower()](path, COLUMNS + columns), COLUMNS + columns)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); accepted: a file of prompts") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: found bytes that are no UTF-8 (at {error.start}); accepted: UTF-8") from error


def check_ids(rows: Iterable[PromptRow]) -> None:
    """UserError for an id that an earlier row has."""
    ids: dict[str, int] = {}
    for row in rows:
        name = row.prompt.prompt_id
        if name and ids.setdefault(name, row.number) != row.number:
            raise UserError(
                f"{row.where}: prompt_id: found {name[:SHOWN]!r}, which row {ids[name]} has; accepted: an id for each "
                "prompt"
            )


def _checked(path: Path, rows: Iterable[tuple[int, Cells]], columns: tuple[str, ...]) -> list[PromptRow]:
    found: list[PromptRow] = []
    empty, unread = 0, set()
    for number, cells in rows:
        unread |= cells.keys() - set(columns)
        if not any(value not in (None, "") and str(value).strip() for value in cells.values()):
            empty += 1
            continue
        text, category, name = (_text(path, number, key, cells.get(key)) for key in COLUMNS)
        if not text or len(text) > LONGEST:
            short = f"{len(text)} characters" if text else "no prompt"
            raise UserError(f"{path}: row {number}: found {short}; accepted: a text of 1 to {LONGEST} characters")
        found.append(PromptRow(path, number, Prompt(name, text, category), cells))
    if not found:
        raise UserError(f"{path}: found no prompts; accepted: at least one row")
    if empty:
        log.warning("%s: %d empty rows are left out", path, empty)
    if unread:
        log.info("%s: not read: %s; read: %s", path, ", ".join(sorted(unread)), ", ".join(columns))
    return found


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


def _csv_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, Cells]]:
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


def _jsonl_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, Cells]]:
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


def _text_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, Cells]]:
    with path.open(encoding="utf-8-sig") as file:
        yield from ((number, {"prompt": line.strip()}) for number, line in enumerate(file, 1))


def _parquet_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, Cells]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: needs pyarrow; accepted: pip install -e '.[parquet]', or a CSV file") from error
    with path.open("rb") as file:
        try:
            names = pyarrow.parquet.read_schema(file).names
            _check_columns(path, names)
            table = pyarrow.parquet.read_table(file, columns=[name for name in columns if name in names])
        except pyarrow.ArrowException as error:
            reason = str(error).splitlines()[0][:SHOWN]
            raise UserError(f"{path}: cannot be read ({reason}); accepted: a parquet file") from error
    yield from enumerate(table.to_pylist(), 1)
