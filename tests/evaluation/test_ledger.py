"""What was written stays, once; what a kill cut off is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tempact.errors import UserError
from tempact.evaluation.ledger import Ledger, register

KEY = ("prompt_id", "seed")


def row(prompt_id: str, seed: int = 0, **more: object) -> dict:
    return {"prompt_id": prompt_id, "seed": seed, **more}


def test_rows_are_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    Ledger(path, KEY).add([row("a", score=0.5), row("a", 1, score=None)])
    Ledger(path, KEY).add([row("ü")])
    again = Ledger(path, KEY)
    assert [(r["prompt_id"], r["seed"]) for r in again] == [("a", 0), ("a", 1), ("ü", 0)] and len(again) == 3
    assert ("a", 1) in again and ("b", 1) not in again and again.get(("a", 0)) == row("a", score=0.5)


def test_a_key_is_written_once_unless_asked_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "a.jsonl", KEY)
    ledger.add([row("a", score=None)])
    with pytest.raises(AssertionError, match="twice"):
        ledger.add([row("a", score=1)])
    ledger.add([row("a", score=1)], again=True)
    assert Ledger(ledger.path, KEY).get(("a", 0)) == row("a", score=1)
    assert len(ledger.path.read_text().splitlines()) == 2


@pytest.mark.parametrize("left", ["{", '{"prompt_id": "b", "seed": 0}', '{"prompt_id": "\udce4'])
def test_a_cut_off_line_is_left_out_and_overwritten(tmp_path: Path, left: str) -> None:
    ledger = Ledger(tmp_path / "a.jsonl", KEY)
    ledger.add([row("a")])
    with ledger.path.open("ab") as file:
        file.write(left.encode(errors="surrogateescape"))
    again = Ledger(ledger.path, KEY)
    assert len(again) == 1
    again.add([row("b")])
    assert [json.loads(line)["prompt_id"] for line in ledger.path.read_text().splitlines()] == ["a", "b"]


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"prompt_id": "a"}'])
def test_a_line_that_is_no_row_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(row('a'))}\n{line}\n")
    with pytest.raises(UserError, match=r"a\.jsonl line 2: found .*accepted: a JSON object with prompt_id, seed"):
        Ledger(path, KEY)


@pytest.mark.parametrize("line", [row("a", file="x"), row("a", sha256="y"), [1], "x"])
def test_a_row_without_what_its_ledger_needs_is_refused(tmp_path: Path, line: object) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(line)}\n")
    with pytest.raises(UserError, match=r"line 1: found .*accepted: a JSON object with prompt_id, seed, file, sha256"):
        Ledger(path, KEY, ("file", "sha256"))


def test_settings_may_grow_but_not_change(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    register(path, {"seed": 1, "judge.a": "m 1"})
    register(path, {"seed": 1, "judge.b": "n 1"})
    assert json.loads(path.read_text()) == {"seed": 1, "judge.a": "m 1", "judge.b": "n 1"}
    with pytest.raises(UserError, match="judge.a: found 'm 2', but what is scored there had 'm 1'"):
        register(path, {"judge.a": "m 2"})
    assert json.loads(path.read_text())["judge.a"] == "m 1"


@pytest.mark.parametrize("damage", ["{", "[1]", ""])
def test_damaged_settings_are_named_and_kept(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "settings.json"
    path.write_text(damage)
    with pytest.raises(UserError, match="settings.json: cannot be read .*accepted: the file as the run wrote it"):
        register(path, {"seed": 1})
    assert path.read_text() == damage
