"""The own prompts are balanced and annotated; files of others are read or refused in one line."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import pytest

from tempact.errors import UserError
from tempact.evaluation import prompts as prompts_module
from tempact.evaluation.prompts import (
    CATEGORIES,
    SETS,
    OrderPrompt,
    choose_prompts,
    n_grams,
    overlap,
    own_prompts,
    read_prompts,
)

STEPS = {"simple": {1, 2}, "hard": {3, 4}}


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("name", SETS)
def test_a_set_has_100_prompts_balanced_over_what_they_are_about(name: str) -> None:
    prompts = own_prompts(name)
    assert len(prompts) == len({prompt.text for prompt in prompts}) == len({p.prompt_id for p in prompts}) == 100
    assert Counter(prompt.category for prompt in prompts) == dict.fromkeys(CATEGORIES, 25)
    for count in (4, 20, 48):  # the first ones are balanced too
        assert set(Counter(prompt.category for prompt in prompts[:count]).values()) == {count // 4}


@pytest.mark.parametrize("name", SETS)
def test_steps_are_annotated_and_as_many_as_the_set_says(name: str) -> None:
    counts = Counter(len(prompt.steps) for prompt in own_prompts(name))
    assert set(counts) == STEPS[name] and min(counts.values()) >= 40
    for prompt in own_prompts(name):
        assert all(2 <= len(step.split()) <= 15 for step in prompt.steps), prompt.prompt_id
        assert len(set(prompt.steps)) == len(prompt.steps) and prompt.set == name
        assert 10 <= len(prompt.text.split()) <= 60 and prompt.text.endswith(".")


def test_no_two_own_prompts_are_made_from_one_template() -> None:
    prompts = own_prompts("simple") + own_prompts("hard")
    seen: dict[tuple[str, ...], str] = {}
    for prompt in prompts:
        for gram in n_grams([prompt.text], 6):
            assert seen.setdefault(gram, prompt.prompt_id) == prompt.prompt_id, gram


def test_the_authors_csv_loads(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'prompt,category\n"A cat, then\na dog.",animal\nA man runs.,person\n', "utf-8-sig")
    found = read_prompts(path, "hard")
    assert found[0] == OrderPrompt("hard-0001", "hard", "animal", "A cat, then a dog.")
    assert found[1].category == "person" and found[1].prompt_id == "hard-0002"


def test_jsonl_and_text_load(tmp_path: Path) -> None:
    row = {"prompt": "Tea is poured.", "prompt_id": "../x", "steps": ["Tea is poured"], "category": "object"}
    found = read_prompts(write(tmp_path / "a.jsonl", json.dumps(row) + "\n\n"), "simple")
    assert found[0].steps == ("Tea is poured",) and "/" not in found[0].prompt_id and "." not in found[0].prompt_id
    lines = read_prompts(write(tmp_path / "a.txt", "one bird\n\ntwo birds\n"), "vbench")
    assert [prompt.text for prompt in lines] == ["one bird", "two birds"]


def test_a_prompt_given_twice_is_taken_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = read_prompts(write(tmp_path / "a.txt", "a bird\na  bird\na fish\n"), "x")
    assert [prompt.text for prompt in found] == ["a bird", "a fish"] and "row 2" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "text,category\nx,y\n", "found the columns text, category; accepted: a column called prompt"),
        ("a.csv", "prompt,category\nx,y\n ,z\n", "row 2: found no prompt"),
        ("a.jsonl", '{"prompt": "a"}\n[1]\n', "row 2: found list; accepted: a JSON object"),
        ("a.jsonl", '{"prompt": 3}\n', "row 1: prompt: found 3"),
        ("a.jsonl", '{"prompt": "a", "steps": [1]}\n', "row 1: steps: found '[1]'"),
        ("a.jsonl", '{"prompt": "a", "prompt_id": "i"}\n{"prompt": "b", "prompt_id": "i"}\n', "found 'i' again"),
        ("a.txt", "\n", "found no prompts"),
        ("a.xlsx", "", "found the ending '.xlsx'; accepted: .csv, .tsv, .jsonl, .parquet, .txt"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        read_prompts(write(tmp_path / name, text), "x")
    assert words in str(caught.value) and name in str(caught.value)


def test_what_is_not_utf_8_or_not_there_is_refused(tmp_path: Path) -> None:
    for path in (write(tmp_path / "a.txt", "\xe9t\xe9", "latin-1"), tmp_path / "none.csv"):
        with pytest.raises(UserError, match=r"cannot be read|no UTF-8"):
            read_prompts(path, "x")


def test_sets_are_chosen_and_cut(tmp_path: Path) -> None:
    chosen = choose_prompts((), {"simple": 3, "hard": None})
    assert [len(chosen[name]) for name in SETS] == [3, 100]
    one = write(tmp_path / "one.txt", "a bird\n")
    assert list(choose_prompts([f"hard={one}"], {"simple": None})) == ["hard"]
    for files, counts, words in (
        ([f"hard={one}"], {"hard": 2}, "--hard: found 2; accepted: 1 to 1"),
        ((), {"simple": 0}, "--simple: found 0"),
        ([str(one)], {}, "SET=FILE"),
        ([f"hard={one}", f"hard={one}"], {}, "each set once"),
        ([f"../a={one}"], {}, "SET=FILE"),
    ):
        with pytest.raises(UserError, match=words):
            choose_prompts(files, counts)


def test_overlap_counts_shared_n_grams_and_finds_the_longest_run() -> None:
    own = [
        OrderPrompt("p", "simple", "", "The red cat sits on a mat, then sleeps."),
        OrderPrompt("q", "simple", "", "Rain!"),
    ]
    found = overlap(own, ["A dog SITS on a mat; then it barks.", "rain"])
    assert " ".join(found.longest) == "sits on a mat then" and found.prompt == "p" and found.equal == 1
    # 7 of p's 3-grams are its own words' windows, 3 of them shared
    assert found.shared[3] == pytest.approx(3 / 7) and found.shared[5] == pytest.approx(1 / 5) and found.shared[6] == 0


def test_the_overlap_command_reports_every_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = own_prompts("hard")[0].text
    path = write(tmp_path / "theirs.txt", first + "\n")
    assert prompts_module.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "simple: shared" in lines[0] and "equal prompts: 0" in lines[0]
    assert "equal prompts: 1" in lines[1] and f"longest run: {len(prompts_module.words(first))} words" in lines[1]
    assert prompts_module.main([str(tmp_path / "none.csv")]) == 2
