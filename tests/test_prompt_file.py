"""Prompt files as people have them: read whole, or refused with the row that does not fit."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from tempact.errors import UserError
from tempact.prompt_file import LONGEST, FilePrompts, read_prompts
from tempact.types import Prompt

TWO = [Prompt("row-1", "A cat sits, then jumps."), Prompt("row-2", "Un café ☕ «ferme»")]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "accepted: " in message and "\n" not in message
    return message


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_csv_and_jsonl_say_the_same(tmp_path: Path, bom: bytes, newline: str) -> None:
    texts = [prompt.text for prompt in TWO]
    table = newline.join(["prompt", *(f'"{text}"' for text in texts), ""])
    lines = newline.join([*(json.dumps({"prompt": text}) for text in texts), ""])
    assert read_prompts(write(tmp_path, "a.csv", bom + table.encode())) == TWO
    assert read_prompts(write(tmp_path, "a.jsonl", bom + lines.encode())) == TWO
    assert read_prompts(write(tmp_path, "a.txt", bom + newline.join([*texts, " ", ""]).encode())) == TWO


def test_columns_may_stand_in_any_order_beside_others(tmp_path: Path) -> None:
    path = write(
        tmp_path, "a.CSV", ' category ,seed,prompt,prompt_id\nanimal,3,"A cat\nsits, ""still"".",c1\n,,  A dog ,\nx\n'
    )
    assert "row 3: found no prompt" in refusal(path)
    path.write_text(path.read_text().removesuffix("x\n"))
    assert read_prompts(path) == [Prompt("c1", 'A cat\nsits, "still".', "animal"), Prompt("row-2", "A dog", "")]
    lines = '{"prompt_id": 7, "plan": [1], "prompt": "A cat", "category": null}\n'
    assert read_prompts(write(tmp_path, "a.jsonl", lines)) == [Prompt("7", "A cat", "")]


SHEETS = [  # as spreadsheets and data frames write two prompts with a category
    ("a.txt", 'prompt\tcategory\r\nA cat sits, then jumps.\tx\r\n"A ""dog"""\t\r\n', "utf-16"),  # "Unicode text"
    ("a.csv", 'Prompt\tCategory\nA cat sits, then jumps.\tx\n"A ""dog"""\t\n', "utf-16-be"),
    ("a.tsv", 'prompt\tcategory\nA cat sits, then jumps.\tx\n"A ""dog"""\t\n', "utf-8"),
    ("a.csv", 'prompt;category\nA cat sits, then jumps.;x\n"A ""dog""";\n', "utf-8-sig"),
    ("a.csv", 'sep=;\r\nprompt;category\r\nA cat sits, then jumps.;x\r\n"A ""dog""";\r\n', "utf-8"),
    ("a.csv", 'category|prompt\nx|A cat sits, then jumps.\n|"A ""dog"""\n', "utf-8"),
    ("a.csv", ',PROMPT,category,,\n0,"A cat sits, then jumps.",x,,\n1,"A ""dog""",,,,\n', "utf-8"),
    ("a.csv", 'prompt,category,"a, b"\n"A cat sits, then jumps.",x\n"A ""dog""",,\n', "utf-8"),
    (
        "a.jsonl",
        '{"Prompt": "A cat sits, then jumps.", "category": "x"}\n{"prompt": "A \\"dog\\"", "category": NaN}\n',
        "utf-16",
    ),
]


@pytest.mark.parametrize(("name", "text", "encoding"), SHEETS)
def test_tables_of_spreadsheets_and_data_frames(tmp_path: Path, name: str, text: str, encoding: str) -> None:
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    found = read_prompts(write(tmp_path, name, mark + text.encode(encoding)))
    assert found == [Prompt("row-1", "A cat sits, then jumps.", "x"), Prompt("row-2", 'A "dog"')]


def test_a_table_of_one_column_as_text(tmp_path: Path) -> None:
    """Its header is no prompt, and a comma does not end a cell; a text file without a header stays one."""
    path = write(tmp_path, "a.txt", "Prompt\nA cat sits, then jumps.\n".encode("utf-16"))
    assert read_prompts(path) == TWO[:1]
    path.write_text("A prompt, and then\tanother\n")
    assert [prompt.text for prompt in read_prompts(path)] == ["A prompt, and then\tanother"]


@pytest.mark.parametrize(
    "first", ["prompt, he said", "Prompt; a cat", "a cat | prompt", "A fox, prompt, leaps, category"]
)
def test_a_first_line_with_the_word_prompt_is_no_header(tmp_path: Path, first: str) -> None:
    path = write(tmp_path, "a.txt", f"{first}\nA dog\n")
    assert [prompt.text for prompt in read_prompts(path)] == [first, "A dog"]


@pytest.mark.parametrize("header", ["Prompt,Seed,Plan,", "prompt;prompt-id;category", "prompt\tcategory\tsource"])
def test_a_text_files_header_has_names_of_columns_or_tabs(tmp_path: Path, header: str) -> None:
    assert [prompt.text for prompt in read_prompts(write(tmp_path, "a.txt", f"{header}\nA dog\n"))] == ["A dog"]


def test_whole_numbers_that_a_table_made_fractions(tmp_path: Path) -> None:
    text = '{"prompt": "x", "prompt_id": 7.0, "category": 2.0}\n{"prompt": "y", "prompt_id": NaN}\n'
    assert read_prompts(write(tmp_path, "a.jsonl", text)) == [Prompt("7", "x", "2"), Prompt("row-2", "y")]


def test_empty_rows_and_repeated_prompts_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, "a.csv", "prompt,category\n\nA cat,x\n ,\n,\nA dog,\n A cat ,y\n")
    with caplog.at_level(logging.WARNING):
        assert read_prompts(path) == [Prompt("row-2", "A cat", "x"), Prompt("row-5", "A dog")]
    assert caplog.messages == [f"{path}: 3 empty rows are left out", f"{path}: 1 repeated prompts are left out"]
    lines = '\n{"prompt": "A cat"}\n{"prompt": "", "category": null}\n'
    assert read_prompts(write(tmp_path, "a.jsonl", lines)) == [Prompt("row-2", "A cat")]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install -e '.[parquet]'")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    rows = {"prompt": [*(prompt.text for prompt in TWO), None], "prompt_id": [1, 2, None], "other": [b"", b"", b""]}
    parquet.write_table(pyarrow.table(rows), path)
    assert [(p.prompt_id, p.text) for p in read_prompts(path)] == [("1", TWO[0].text), ("2", TWO[1].text)]
    parquet.write_table(pyarrow.table({"caption": ["x"]}), path)
    assert "found the columns caption; accepted: a column called prompt" in refusal(path)
    path.write_bytes(path.read_bytes()[:-20])
    assert "accepted: a parquet file" in refusal(path)


def test_parquet_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert "needs pyarrow; accepted: pip install" in refusal(write(tmp_path, "a.parquet", b"PAR1"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "", "found the columns none; accepted: a column called prompt"),
        ("a.csv", "prompt\n", "found no prompts; accepted: at least one row"),
        ("a.csv", "prompt\n\n \n", "found no prompts"),
        ("a.csv", "text,Prompts\nA cat,\n", "found the columns text, Prompts; accepted: a column called prompt"),
        ("a.csv", "id,prompts\n1,A cat\n", "called prompt (nearest: prompts)"),
        ("a.csv", "prompt,prompt\nA,B\n", "found the column prompt twice; accepted: each once"),
        ("a.csv", "prompt,category\nA cat sits, then jumps,animal\n", "row 1: found 3 cells; accepted: 2, as in"),
        ("a.csv", 'prompt\nA cat\n"A dog\n', "accepted: CSV"),
        ("a.csv", "prompt,category\nA cat,x\n,animal\n", "row 2: found no prompt; accepted: a text of 1 to"),
        ("a.csv", f"prompt\n{'a' * (LONGEST + 1)}\n", f"row 1: found {LONGEST + 1} characters"),
        ("a.csv", "prompt,prompt_id\nA cat,1\nA dog,1\n", "row 2: prompt_id: found '1', which row 1 has"),
        ("a.csv", b"prompt\nA caf\xe9\n", "found bytes that are no UTF-8 (at "),
        ("a.csv", b"\xff\xfep\x00r", "found bytes that are no UTF-16"),
        ("a.txt", "A cat".encode("utf-16-le"), "found zero bytes, as in UTF-16 without a byte order mark; accepted"),
        ("a.csv", "prompt;category;;\nA cat;x;y;\n", "row 1: found 4 cells; accepted: 2, as in the header"),
        ("a.csv", "text;category\nA cat;x\n", "found the columns text;category; accepted: a column called prompt"),
        ("a.csv", "Prompt,PROMPT\nA,B\n", "found the column prompt twice"),
        ("a.jsonl", '{"prompt": "A cat", "prompt": "A dog"}\n', "row 1: cannot be read (a key is given twice)"),
        ("a.jsonl", '{"prompt": "A cat", "prompt_id": 7.5}\n', "row 1: prompt_id: found 7.5; accepted: text"),
        (
            "a.jsonl",
            '{"prompts": ["A cat", "A dog"]}\n',
            "row 1: prompts: found ['A cat', 'A dog']; accepted: \"prompt\"",
        ),
        ("a.jsonl", '{"prompt": NaN, "category": "x"}\n', "row 1: found no prompt"),
        ("a.jsonl", '{"prompt": "A cat"}\n{"prompt": "A d', "row 2: cannot be read"),
        ("a.jsonl", '{"prompt": "A cat"}\n["A dog"]\n', "row 2: found list; accepted: a JSON object"),
        ("a.jsonl", '{"prompt": "A cat"}\n{"text": "A dog"}\n', "row 2: found the columns text; accepted"),
        ("a.jsonl", '{"prompt": ["A cat"]}\n', "row 1: prompt: found ['A cat']; accepted: text"),
        ("a.jsonl", '{"prompt": 3}\n', "row 1: prompt: found 3; accepted: text"),
        ("a.jsonl", '{"prompt": "A cat", "prompt_id": true}\n', "row 1: prompt_id: found True; accepted: text"),
        ("a.jsonl", '{"prompt": "A \\ud800 cat"}\n', "row 1: prompt: found 'A \\ud800 cat'; accepted: text"),
        ("a.xlsx", "", "found the ending '.xlsx'; accepted: .csv, .tsv, .jsonl, .parquet, .txt"),
    ],
)
def test_what_is_no_prompt_file_is_refused(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    assert words in refusal(write(tmp_path, name, content))


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in refusal(tmp_path / "gone.csv")
    (tmp_path / "folder.jsonl").mkdir()
    assert "cannot be read (Is a directory)" in refusal(tmp_path / "folder.jsonl")


def test_prompts_are_drawn_by_seed_without_repetition(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "prompt\n" + "".join(f"prompt {i}\n" for i in range(20)))
    source = FilePrompts(path, 20)
    drawn = source.draw(20, 1)
    assert sorted(p.text for p in drawn) == sorted(f"prompt {i}" for i in range(20))
    assert source.draw(5, 2) == FilePrompts(path, 3).draw(5, 2) != source.draw(5, 3)
    with pytest.raises(UserError, match="found 20 prompts; accepted: at least data.prompts_per_iteration \\(21\\)"):
        FilePrompts(path, 21)
