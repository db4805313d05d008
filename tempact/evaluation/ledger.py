"""Append-only JSONL files of an evaluation's work, so that a killed evaluation goes on where it stopped.

Every row has a key. A key stands once in a file, unless its row is written again on purpose; then the last row counts.
Rows are on the disk when `add` returns. The part of a last line that a kill left is cut off when the file is opened.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tempact.errors import UserError
from tempact.files import disk_full, reading, write_atomic

log = logging.getLogger(__name__)
Key = tuple[str | int, ...]
Row = dict[str, Any]


class Ledger:
    """Rows of one file by the values of their `key` fields, in the order they were written.

    elsewhere: of a process that leaves the file to another one, takes the rows that would be written.
    """

    def __init__(
        self, path: Path, key: tuple[str, ...], more: tuple[str, ...] = (),
        elsewhere: Callable[[list[Row]], object] | None = None,
    ):  # fmt: skip
        """UserError that names the line for a file that is not a ledger with this key and `more` in every row."""
        self.path, self.key, self.more, self.elsewhere = path, key, more, elsewhere
        self._rows: dict[Key, Row] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._read()

    def __contains__(self, key: Key) -> bool:
        return key in self._rows

    def __getitem__(self, key: Key) -> Row:
        return self._rows[key]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: Key) -> Row | None:
        return self._rows.get(key)

    def add(self, rows: Iterable[Row], *, again: bool = False) -> None:
        """Writes rows; `again` allows keys that are there already. UserError when the disk is full."""
        added = {self._key_of(row): row for row in rows}
        twice = next((key for key in added if key in self._rows and not again), None)
        assert twice is None, f"{self.path}: {twice} twice"
        if not added:
            return
        (self.elsewhere or self._write)([*added.values()])
        self._rows |= added

    def _write(self, rows: list[Row]) -> None:
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        try:
            with self.path.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if not disk_full(error):
                raise
            raise UserError(
                f"{self.path}: found no space left on the disk; accepted: {len(data)} free bytes"
            ) from error

    def _key_of(self, row: Mapping[str, Any]) -> Key:
        return tuple(row[name] for name in self.key)

    def _read(self) -> None:
        data = self.path.read_bytes() if self.path.is_file() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data) and self.elsewhere is None:
            log.warning("%s: the last line was cut off; left out", self.path)
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = json.loads(line)
                if not row.keys() >= {*self.more}:
                    raise KeyError
                self._rows[self._key_of(row)] = row
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                found = line[:80].decode(errors="replace")
                accepted = f"a JSON object with {', '.join(self.key + self.more)}"
                raise UserError(f"{self.path} line {number}: found {found!r}; accepted: {accepted}") from error


def register(path: Path, settings: Mapping[str, str | int | float], unnamed: Mapping[str, str] | None = None) -> None:
    """Writes the settings of an evaluation down before it begins, and holds later ones in its folder to them.

    New keys (another judge, more prompts) are added, but for those of `unnamed`: their values in files that do not name
    them. UserError for a key that had another value: scores that were obtained differently would be mixed.
    """
    with reading(path):
        known = {**(unnamed or {}), **dict(json.loads(path.read_text(encoding="utf-8")))} if path.is_file() else {}
    for key, value in settings.items():
        if known.get(key, value) != value:
            raise UserError(
                f"{path}: {key}: found {value!r}, but what is scored there had {known[key]!r}; accepted: the same, or "
                "another --output"
            )
    write_atomic(path, json.dumps({**known, **settings}, indent=1, ensure_ascii=False))
