"""Files of instructions: what is read, and one line for what is wrong."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from tempact.errors import UserError
from tempact.planner.prompt_file import LARGEST_SEED, read_prompts
from tempact.types import Prompt, Step

STEPS = [{"start": 0, "end": 6, "prompt": "a"}, {"start": 6, "end": 18, "prompt": "b"}]
PLAN = json.dumps(STEPS).replace('"', '""')


def written(folder: Path, text: str, name: str = "prompts.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def test_a_csv_file_with_everything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = (
        "\ufeffprompt_id, prompt,category,plan,seed,source\r\n"
        f'one,"A cat, ""Tom"", sits.",hard,"{PLAN}",7,web\r\n'
        "\r\n"
        ",,,,,\r\n"
        "two,A dog\r\n"
        ',"Two\nlines",,,,\r\n'
    )
    with caplog.at_level(logging.WARNING):
        first, second, third = read_prompts(written(tmp_path, text), 18, 3)
    assert first.prompt == Prompt("one", 'A cat, "Tom", sits.', "hard") and first.seed == 7
    assert first.plan is not None and first.plan.steps == (Step(0, 6, "a"), Step(6, 18, "b"))
    assert first.plan.instruction == first.prompt.text
    assert second.prompt == Prompt("two", "A dog", "") and second.plan is None and second.seed is None
    assert third.prompt == Prompt("", "Two\nlines", "")
    assert [r.where.rpartition(" line ")[2] for r in (first, second, third)] == ["2", "5", "7"]
    (warning,) = caplog.messages
    assert warning.endswith("not read: source; read: prompt, prompt_id, category, plan, seed")


def test_a_jsonl_file_with_everything(tmp_path: Path) -> None:
    rows = [
        {"prompt": " A cat. ", "prompt_id": 17, "plan": STEPS, "seed": 0},
        {"prompt": "A\u2028dog.", "plan": {"steps": STEPS}, "category": None},
        {"prompt": "A cat.", "plan": json.dumps(STEPS)},
    ]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    first, second, third = read_prompts(written(tmp_path, text, "p.JSONL"), 18, 3)
    assert first.prompt == Prompt("17", "A cat.", "") and first.seed == 0
    assert second.prompt.text == "A\u2028dog." and second.where.endswith("line 3")
    assert {tuple(r.plan.steps) for r in (first, second, third) if r.plan} == {(Step(0, 6, "a"), Step(6, 18, "b"))}


def test_a_plan_is_fitted_to_the_video_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = json.dumps({"prompt": "x", "plan": STEPS})
    (request,) = read_prompts(written(tmp_path, text, "p.jsonl"), 24, 6)
    assert request.plan is not None and request.plan.steps[-1] == Step(6, 24, "b")
    assert "p.jsonl line 1: plan: ends at F" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.csv", "text\na\n", "p.csv line 1: found the columns 'text'; accepted: prompt among them, none twice"),
        ("p.csv", "prompt,seed,prompt\na\n", "line 1: found the columns 'prompt, seed, prompt'"),
        ("p.csv", "", "p.csv line 1: found the columns ''"),
        ("p.csv", "prompt,seed\n", "p.csv: found no prompts; accepted: at least one line with a prompt"),
        ("p.csv", "prompt,seed\n ,3\n", "p.csv line 2: prompt: found nothing; accepted: a text that is not empty"),
        ("p.csv", "prompt,seed\na,b\n", "p.csv line 2: seed: found 'b'; accepted: a whole number from 0 to"),
        ("p.csv", "prompt,seed\na,-1\n", "p.csv line 2: seed: found '-1'"),
        ("p.csv", f"prompt,seed\na,{LARGEST_SEED + 1}\n", "p.csv line 2: seed: found"),
        ("p.csv", "prompt\nA cat, sits\n", "p.csv line 2: found 2 cells; accepted: at most 1, one a column (quote"),
        ("p.csv", 'prompt\n"A cat\n', "p.csv line 2: found no CSV ("),
        (
            "p.csv",
            "prompt,prompt_id\na,1\nb,1\n",
            "p.csv line 3: prompt_id: found '1' as in line 2; accepted: each once",
        ),
        ("p.csv", "prompt,plan\na,nothing\n", "p.csv line 2: plan: found no steps; accepted: a JSON file with steps"),
        ("p.csv", "prompt\n\udcff\n", "p.csv: cannot be read ("),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "p.jsonl line 2: found no JSON ("),
        ("p.jsonl", '"a"\n', "p.jsonl line 1: found 'a'; accepted: an object with a prompt"),
        ("p.jsonl", '{"text": "a"}', "p.jsonl line 1: prompt: found nothing"),
        ("p.jsonl", '{"prompt": ["a"]}', "p.jsonl line 1: prompt: found ['a']; accepted: a text that is not empty"),
        (
            "p.jsonl",
            '{"prompt": "a", "plan": true}',
            "p.jsonl line 1: plan: found True; accepted: steps, as in a plan file",
        ),
        ("p.jsonl", '{"prompt": "a", "seed": 1.5}', "p.jsonl line 1: seed: found 1.5; accepted: a whole number"),
        ("p.jsonl", "[" * 100_000, "p.jsonl line 1: found no JSON ("),
        ("p.txt", "a", "p.txt: found '.txt'; accepted: a .csv or .jsonl file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as caught:
        read_prompts(path, 18, 3)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone.csv: cannot be read"):
        read_prompts(tmp_path / "gone.csv", 18, 3)
