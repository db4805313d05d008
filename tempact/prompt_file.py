"""Prompts from a table (CSV, TSV, a spreadsheet's text), JSONL, parquet or text file (a prompt a line).

One row a prompt: `prompt`, and where they are wanted `category`, `prompt_id` and what the reader asks for besides, in
any case; other columns are left alone. A row of JSONL or parquet may give its plan as a list `prompts`. Rows in which
nothing stands are passed over. Everything else that does not fit is a UserError that names the row, counted from 1
after the header.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import json
import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempact.errors import UserError
from tempact.types import Prompt

log = logging.getLogger(__name__)

COLUMNS = ("prompt", "category", "prompt_id")
MORE_COLUMNS = ("plan", "seed", "steps")  # that some readers ask for
LONGEST = 10_000  # characters of a prompt; a longer one is a file that was cut wrongly
SHOWN = 80  # characters of a wrong value in a message
DELIMITERS = ",;\t|"
ENCODINGS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}

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
    readers = {
        ".csv": _table_rows, ".tsv": _table_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows, ".txt": _text_rows
    }  # fmt: skip
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: found the ending {path.suffix!r}; accepted: {', '.join(readers)}")
    return _checked(path, readers[path.suffix.lower()](path, COLUMNS + columns), COLUMNS + columns)


def decoded_text(path: Path, accepted: str) -> str:
    """A text file in UTF-8, or in UTF-16 with its mark; line ends as they are. UserError with what else is `accepted`
    for a file that cannot be read."""
    try:
        content = path.read_bytes()
        encoding = next((name for mark, name in ENCODINGS.items() if content.startswith(mark)), "utf-8")
        text = content.decode(encoding)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); accepted: {accepted}") from error
    except UnicodeDecodeError as error:
        found = f"bytes that are no {error.encoding.upper()} (at {error.start})"
        raise UserError(f"{path}: found {found}; accepted: UTF-8, or UTF-16 with a byte order mark") from error
    if "\0" in text:
        found = "zero bytes, as in UTF-16 without a byte order mark"
        raise UserError(f"{path}: found {found}; accepted: UTF-8, or UTF-16 with a byte order mark")
    return text


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
        unread |= cells.keys() - {*columns, ""}
        if all(blank(value) for value in cells.values()):
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


def blank(value: object) -> bool:
    """Whether nothing stands in a cell; tables of numbers write NaN there."""
    return value is None or (isinstance(value, str) and not value.strip()) or value != value


def whole_number(value: object) -> int | None:
    """A cell as a whole number, also where a table of numbers has made 7.0 or "7.0" of it; None if it is none."""
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            with suppress(ValueError):
                value = float(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def _text(path: Path, number: int, key: str, value: object) -> str:
    """A cell as text; ids and categories may be whole numbers."""
    if blank(value):
        return ""
    if isinstance(value, str) and _encodes(value):
        return value.strip()
    if key != "prompt" and not isinstance(value, str) and (whole := whole_number(value)) is not None:
        return str(whole)
    raise UserError(f"{path}: row {number}: {key}: found {repr(value)[:SHOWN]}; accepted: text")


def _encodes(text: str) -> bool:
    """JSON can hold halves of characters, which nothing that reads text takes."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _named(names: Iterable[object], columns: tuple[str, ...]) -> list[str]:
    """Names of columns; those of `columns` may stand there in any case, and with a space or dash."""
    found = [str(name).strip() for name in names]
    plain = [name.lower().replace(" ", "_").replace("-", "_") for name in found]
    return [own if own in columns and own not in found else name for name, own in zip(found, plain, strict=True)]


def _check_columns(path: Path, names: list[str], where: str = "") -> None:
    if "prompt" not in names:
        near = difflib.get_close_matches("prompt", names, 1)
        hint = f" (nearest: {near[0]})" if near else ""
        shown = ", ".join(names)[:SHOWN] or "none"
        raise UserError(f"{path}: {where}found the columns {shown}; accepted: a column called prompt{hint}")
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice:
        raise UserError(f"{path}: {where}found the column {twice[:SHOWN]} twice; accepted: each once")


def _with_steps(path: Path, number: int, row: dict[str, Any], columns: tuple[str, ...]) -> dict[str, Any]:
    """A row whose prompt is a list `prompts`, one for each step, as a row with a prompt and a plan."""
    steps = row.get("prompts")
    if "prompt" in row or not isinstance(steps, list):
        return row
    if "plan" in columns and steps and all(isinstance(step, str) and step.strip() for step in steps):
        return {key: value for key, value in row.items() if key != "prompts"} | {"prompt": " ".join(steps)} | {
            "plan": row.get("plan") or steps
        }  # fmt: skip
    accepted = '"prompt" with one text'
    if "plan" in columns:
        accepted += ', or "prompts" with texts, one for each step, of equal length'
    raise UserError(f"{path}: row {number}: prompts: found {repr(steps)[:SHOWN]}; accepted: {accepted}")


def _table_rows(path: Path, columns: tuple[str, ...], text: str | None = None) -> Iterator[tuple[int, Cells]]:
    text = decoded_text(path, "a file of prompts") if text is None else text
    first, _, rest = text.partition("\n")
    if first.startswith("sep=") and len(first.rstrip("\r")) == 5:  # a spreadsheet's own line
        delimiter, text = first[4], rest
    else:
        usual = DELIMITERS if path.suffix.lower() == ".csv" else "\t"  # where the header is one name
        counts = {mark: first.count(mark) for mark in usual + DELIMITERS if "prompt" in _header(text, mark, columns)}
        delimiter = max(counts, key=lambda mark: counts[mark], default=usual[0])
    header = _header(text, delimiter, columns)
    width = max((i for i, name in enumerate(header, 1) if name), default=0)
    _check_columns(path, header[:width])
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        next(reader)
        for number, cells in enumerate(reader, 1):
            if not all(blank(cell) for cell in cells[width:]):
                raise UserError(
                    f"{path}: row {number}: found {len(cells)} cells; accepted: {width}, as in the header "
                    f"(text with {delimiter!r} stands in quotes)"
                )
            yield number, dict(zip(header[:width], cells, strict=False))
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: cannot be read ({error}); accepted: CSV") from error


def _header(text: str, delimiter: str, columns: tuple[str, ...]) -> list[str]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    with suppress(csv.Error):
        return _named(next(reader, []), columns)
    return []


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's keys and values; ValueError for a key that is given twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def _jsonl_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, Cells]]:
    lines = io.StringIO(decoded_text(path, "a file of prompts"), newline=None)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            yield number, {}
            continue
        try:
            row = json.loads(line, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: row {number}: cannot be read ({error}); accepted: a JSON object") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {number}: found {type(row).__name__}; accepted: a JSON object")
        names = _named(row, columns)
        row = _with_steps(path, number, dict(zip(names, row.values(), strict=True)), columns)
        _check_columns(path, names if names.count("prompt") > 1 else list(row), f"row {number}: ")
        yield number, row


def _text_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, Cells]]:
    text = decoded_text(path, "a file of prompts")
    known = {*COLUMNS, *MORE_COLUMNS, ""}
    headers = {mark: _header(text, mark, COLUMNS + MORE_COLUMNS) for mark in DELIMITERS}
    # a spreadsheet's text; a prompt may have a cell "prompt" between commas, but no tabs
    if any("prompt" in header and (mark == "\t" or known.issuperset(header)) for mark, header in headers.items()):
        yield from _table_rows(path, columns, text)
        return
    yield from ((number, {"prompt": line.strip()}) for number, line in enumerate(io.StringIO(text, newline=None), 1))


def _parquet_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, Cells]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: needs pyarrow; accepted: pip install -e '.[parquet]', or a CSV file") from error
    try:
        with path.open("rb") as file:
            names = pyarrow.parquet.read_schema(file).names
            named = _named(names, columns)
            if "prompts" not in named:
                _check_columns(path, named)
            wanted = [name for name, own in zip(names, named, strict=True) if own in (*columns, "prompts")]
            rows = pyarrow.parquet.read_table(file, columns=wanted).rename_columns(_named(wanted, columns)).to_pylist()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); accepted: a file of prompts") from error
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0][:SHOWN]
        raise UserError(f"{path}: cannot be read ({reason}); accepted: a parquet file") from error
    for number, row in enumerate(rows, 1):
        yield number, _with_steps(path, number, row, columns)
