"""Instructions from a CSV or JSONL file.

Columns: `prompt`, and if wanted `prompt_id`, `category`, `plan` (the steps, as in a plan file) and `seed`. Empty lines
and empty cells of columns that may be missing count as missing.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tempact.errors import UserError
from tempact.planner.plan_file import plan_of
from tempact.types import Plan, Prompt

log = logging.getLogger(__name__)

LARGEST_SEED = 2**62  # generators take 64 bits, and the seeds of further videos count on from here
SHOWN_CHARACTERS = 80  # of a wrong value in a message


@dataclass(frozen=True)
class Request:
    """An instruction to make videos of. `where`: what messages call it; plan, seed: its own, None if it has none."""

    where: str
    prompt: Prompt
    plan: Plan | None = None
    seed: int | None = None


class _Row(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True)

    prompt: str = Field(min_length=1, description="a text that is not empty")
    prompt_id: str = Field("", description="a text")
    category: str = Field("", description="a text")
    plan: str | list[Any] | dict[str, Any] = Field("", description="steps, as in a plan file")
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED, description=f"a whole number from 0 to {LARGEST_SEED}")


def read_prompts(path: Path, frames: int, chunk: int) -> list[Request]:
    """The file's rows in order; plans are of `frames` latent frames in chunks of `chunk`.

    Raises UserError that names the file, and the line where one is wrong: unreadable, not CSV or JSONL, no prompt, a
    value of another kind, a plan without steps, a prompt_id given twice. Other columns are left alone, with a warning.
    """
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: found {path.suffix or 'no ending'!r}; accepted: a .csv or .jsonl file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); accepted: a .csv or .jsonl file in UTF-8") from error
    requests: list[Request] = []
    named: dict[str, str] = {}
    unread: set[str] = set()
    for line, values in readers[path.suffix.lower()](path, text):
        where = f"{path} line {line}"
        row = _checked(values, where)
        unread |= values.keys() - _Row.model_fields.keys()
        if row.prompt_id and row.prompt_id in named:
            before = named[row.prompt_id]
            raise UserError(f"{where}: prompt_id: found {row.prompt_id!r} as in {before}; accepted: each once")
        named[row.prompt_id] = f"line {line}"
        written = row.plan if isinstance(row.plan, str) else json.dumps(row.plan)
        plan = plan_of(written, f"{where}: plan", row.prompt, frames, chunk) if written else None
        requests.append(Request(where, Prompt(row.prompt_id, row.prompt, row.category), plan, row.seed))
    if not requests:
        raise UserError(f"{path}: found no prompts; accepted: at least one line with a prompt")
    if unread:
        log.warning("%s: not read: %s; read: %s", path, ", ".join(sorted(unread)), ", ".join(_Row.model_fields))
    return requests


def _checked(values: dict[str, Any], where: str) -> _Row:
    given = {key: value.strip() if isinstance(value, str) else value for key, value in values.items()}
    try:
        return _Row.model_validate({key: value for key, value in given.items() if value not in (None, "")})
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        found = repr(given[key])[:SHOWN_CHARACTERS] if given.get(key) not in (None, "") else "nothing"
        raise UserError(f"{where}: {key}: found {found}; accepted: {_Row.model_fields[key].description}") from error


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, cells by column) of every line with a cell that is not empty."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = [name.strip() for name in next(reader, [])]
        if "prompt" not in columns or len(set(columns)) < len(columns):
            found = repr(", ".join(columns))[:SHOWN_CHARACTERS]
            raise UserError(f"{path} line 1: found the columns {found}; accepted: prompt among them, none twice")
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) > len(columns):
                accepted = f"at most {len(columns)}, one a column (quote what holds commas)"
                raise UserError(f"{path} line {reader.line_num}: found {len(cells)} cells; accepted: {accepted}")
            yield reader.line_num, dict(zip(columns, cells, strict=False))
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: found no CSV ({error}); accepted: RFC 4180") from error


def _jsonl_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of every line that is not empty."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number}: found no JSON ({error}); accepted: an object a line") from error
        if not isinstance(value, dict):
            found = repr(value)[:SHOWN_CHARACTERS]
            raise UserError(f"{path} line {number}: found {found}; accepted: an object with a prompt")
        yield number, value
