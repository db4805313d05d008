"""Requests from files: a row's own plan and seed, and one line for what is wrong with them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from tempact.config import LARGEST_SEED
from tempact.errors import UserError
from tempact.planner.plans import read_plan, read_requests
from tempact.types import Prompt, Step

STEPS = [{"start": 0, "end": 6, "prompt": "a"}, {"start": 6, "end": 18, "prompt": "b"}]
READ = (Step(0, 6, "a"), Step(6, 18, "b"))
PLAN = json.dumps(STEPS).replace('"', '""')


def written(folder: Path, text: str, name: str = "prompts.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_csv_file_with_everything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = (
        "prompt_id, prompt,category,plan,seed,source\n"
        f'one,"A cat, ""Tom"", sits.",hard,"{PLAN}",7,web\n'
        ",,,,,\n"
        "two,A dog\n"
        ",A dog,,, ,\n"
    )
    with caplog.at_level(logging.INFO):
        first, second, third = read_requests(written(tmp_path, text), 18, 3)
    assert first.prompt == Prompt("one", 'A cat, "Tom", sits.', "hard") and first.seed == 7
    assert first.plan is not None and first.plan.steps == READ and first.plan.instruction == first.prompt.text
    assert second.prompt == Prompt("two", "A dog", "") and second.plan is None and second.seed is None
    assert third.prompt == Prompt("", "A dog", "") and third.seed is None  # as often as it is asked for
    assert [r.where.rpartition(": row ")[2] for r in (first, second, third)] == ["1", "3", "4"]
    assert caplog.messages[-1].endswith("not read: source; read: prompt, category, prompt_id, plan, seed")


def test_a_jsonl_file_with_everything(tmp_path: Path) -> None:
    rows = [
        {"prompt": " A cat. ", "prompt_id": 17, "plan": STEPS, "seed": 0},
        {"prompt": "A\u2028dog.", "plan": {"steps": STEPS}, "category": None},
        {"prompt": "A cat.", "plan": json.dumps(STEPS), "seed": "12"},
    ]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    first, second, third = read_requests(written(tmp_path, text, "p.JSONL"), 18, 3)
    assert first.prompt == Prompt("17", "A cat.", "") and first.seed == 0 and third.seed == 12
    assert second.prompt.text == "A\u2028dog." and second.where.endswith("row 3")
    assert {tuple(r.plan.steps) for r in (first, second, third) if r.plan} == {READ}


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install -e '.[parquet]'")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["x", "y"], "plan": [STEPS, None], "seed": [3, None]}), path)
    first, second = read_requests(path, 18, 3)
    assert first.plan is not None and first.plan.steps == READ and first.seed == 3
    assert second.plan is None and second.seed is None


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_seeds_that_a_table_made_fractions(tmp_path: Path, ending: str) -> None:
    rows = {"prompt": ["x", "y"], "seed": [42.0, float("nan")], "plan": [None, None]}
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install -e '.[parquet]'")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(rows), path)
    elif ending == "csv":
        path.write_text("prompt,seed\nx,42.0\ny,\n")
    else:
        path.write_text("\n".join(json.dumps({key: rows[key][i] for key in rows}) for i in range(2)))
    assert [request.seed for request in read_requests(path, 18, 3)] == [42, None]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_list_of_prompts_is_a_plan_of_equal_steps(tmp_path: Path, ending: str) -> None:
    path, lists = tmp_path / f"a.{ending}", [["A", "B", "C"], ["D", "E"]]
    if ending == "parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install -e '.[parquet]'")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"prompts": lists}), path)
    else:
        path.write_text("\n".join(json.dumps({"prompts": own}) for own in lists))
    first, second = read_requests(path, 18, 3)
    assert first.prompt.text == "A B C" and first.plan is not None and second.plan is not None
    assert first.plan.steps == (Step(0, 6, "A"), Step(6, 12, "B"), Step(12, 18, "C"))
    assert second.plan.steps == (Step(0, 9, "D"), Step(9, 18, "E"))


LONG = "A fox. " * 115 + "Last."  # 810 characters


def test_long_prompts_of_a_users_plan_are_kept(tmp_path: Path) -> None:
    steps = [{"start": 0, "end": 6, "prompt": LONG}, {"start": 6, "end": 18, "prompt": LONG * 40}]
    path = written(tmp_path, json.dumps(steps), "plan.json")
    plan = read_plan(path, "x", 18, 3)
    assert plan.steps == (Step(0, 6, LONG), Step(6, 18, LONG * 40)) and plan.repairs == ()
    (request,) = read_requests(written(tmp_path, json.dumps({"prompt": "x", "plan": steps}), "p.jsonl"), 18, 3)
    assert request.plan is not None and request.plan.steps == plan.steps


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_plan_file_of_another_program(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text("```json\n" + json.dumps({"prompt": "x", "Steps": STEPS}) + "\n```", encoding=encoding)
    assert read_plan(path, "x", 18, 3).steps == READ


OFF = [  # what is lost in a user's plan, as it is said
    (
        json.dumps(STEPS, indent=1).replace("},", "}"),
        "line 7, column 2: Expecting ',' delimiter; accepted: a JSON file",
    ),
    (json.dumps(STEPS, indent=1).replace('"b"', '"b",'), "line 1"),
    (str(STEPS), "line 1, column 3: Expecting property name"),
    (json.dumps(STEPS).replace('"a"', '"a\n"'), "line 1, column 37: Invalid control character"),
    (
        json.dumps(STEPS, indent=1).replace('"a"', '"a", "end": 3'),
        "line 5, column 18: end is given twice; accepted: each key once",
    ),
    (
        "[{" + json.dumps(STEPS)[2:-2].replace("}, {", ", ") + "}]",
        "line 1, column 40: a key is given twice; accepted: a",
    ),
    (json.dumps(STEPS)[:-9], "line 1, column 65: "),
    (
        json.dumps([STEPS[0], {"start": 6, "end": 18}]),
        "step 2: found no text to read in {'start': 6, 'end': 18}; accepted",
    ),
    (json.dumps([STEPS[0], None]), 'step 2: found no text to read in None; accepted: a text "prompt" in each step'),
    (json.dumps([STEPS[0], STEPS[1] | {"start": "soon"}]), "step 2: start: found 'soon'; accepted: \"start\" and"),
    (json.dumps([STEPS[0], STEPS[1] | {"end": True}]), "step 2: end: found True"),
    (json.dumps([STEPS[0], STEPS[1] | {"end": float("nan")}]), "step 2: end: found nan"),
    (
        json.dumps([{"prompt": "a", "end_s": 6}, {"prompt": "b", "start_s": 6}]),
        "step 1: found the keys end_s; accepted",
    ),
    (json.dumps([{"prompt": "a", "frames": 6}, {"prompt": "b", "frames": 12}]), "step 1: start: found [6]; accepted"),
    (
        json.dumps({"prompts": list("abcdefg")}),
        "found 7 steps in 6 chunks; accepted: one step for each chunk, or fewer",
    ),
    (json.dumps([STEPS, STEPS]), "found several plans; accepted: the steps of one plan"),
]


HARMLESS = [  # keys of steps without all bounds that hold no bound
    *([{key: first, "prompt": "a"}, {key: first + 1, "prompt": "b"}] for key in ("id", "Step", "shot_index", "order")
      for first in (0, 1)),
    [{"id": "1", "prompt": "a"}, {"id": "2", "prompt": "b"}],
    [{"start": 0, "prompt": "a", "camera": "pan"}, {"start": 9, "prompt": "b", "fade": True, "note": None}],
    [{"prompt": "a", "camera": {"start": 0, "end": 6, "prompt": "zoom"}, "start": 0}, {"prompt": "b", "tags": []}],
    [{"start": 0, "end": 9, "prompt": "a", "fps": 16}, {"start": 9, "prompt": "b", "camera": "2 pans to 1 side"}],
]  # fmt: skip


@pytest.mark.parametrize("steps", HARMLESS)
def test_keys_that_hold_no_bound_are_passed_over(tmp_path: Path, steps: list, caplog: pytest.LogCaptureFixture) -> None:
    plan = read_plan(written(tmp_path, json.dumps(steps), "plan.json"), "x", 18, 3)
    assert plan.steps == (Step(0, 9, "a"), Step(9, 18, "b")) and "keys ignored" in caplog.text


MAY_BE_BOUNDS = [
    ("id", 6), ("id", 0), ("time", "0:06"), ("time", "0-6 s"), ("at", [0, 6]), ("seconds", {"a": 0, "b": 6}),
    ("frame_number", 1), ("start_time", 0.5), ("end_time", "6 seconds"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), MAY_BE_BOUNDS)
def test_a_bound_under_another_name_is_refused(tmp_path: Path, key: str, value: object) -> None:
    path = written(
        tmp_path, json.dumps([{"prompt": "a", "camera": "pan", key: value}, {"prompt": "b", key: 9}]), "p.json"
    )
    with pytest.raises(UserError, match=rf"step 1: found the keys {key}; accepted: \"start\" and \"end\", whole"):
        read_plan(path, "x", 18, 3)


@pytest.mark.parametrize(("text", "words"), OFF)
def test_what_a_users_plan_would_lose_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = written(tmp_path, text, "plan.json")
    with pytest.raises(UserError) as caught:
        read_plan(path, "x", 18, 3)
    assert str(caught.value).startswith(f"{path}: {words}") and "\n" not in str(caught.value)
    rows = written(tmp_path, json.dumps({"prompt": "x", "plan": text}), "p.jsonl")
    with pytest.raises(UserError) as caught:
        read_requests(rows, 18, 3)
    assert str(caught.value).startswith(f"{rows}: row 1: plan: {words}")


def test_a_plan_is_fitted_to_the_video_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = json.dumps({"prompt": "x", "plan": STEPS})
    (request,) = read_requests(written(tmp_path, text, "p.jsonl"), 24, 6)
    assert request.plan is not None and request.plan.steps[-1] == Step(6, 24, "b")
    assert "p.jsonl: row 1: plan: ends at F" in caplog.text


@pytest.mark.parametrize(("rounding", "switch"), [("nearest", 39), ("up", 42)])
def test_plans_from_files_switch_where_the_backbone_does(tmp_path: Path, rounding: str, switch: int) -> None:
    steps = [{"start": 0, "end": 40, "prompt": "a"}, {"start": 40, "end": 120, "prompt": "b"}]
    expected = (Step(0, switch, "a"), Step(switch, 120, "b"))
    plan = read_plan(written(tmp_path, json.dumps(steps), "plan.json"), "x", 120, 3, rounding)
    assert plan.steps == expected
    path = written(tmp_path, json.dumps({"prompt": "x", "plan": steps}), "p.jsonl")
    (request,) = read_requests(path, 120, 3, rounding)
    assert request.plan is not None and request.plan.steps == expected


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.csv", "text\na\n", "p.csv: found the columns text; accepted: a column called prompt"),
        ("p.csv", "prompt,seed\na,b\n", "p.csv: row 1: seed: found 'b'; accepted: a whole number from 0 to"),
        ("p.csv", "prompt,seed\na,-1\n", "p.csv: row 1: seed: found '-1'"),
        ("p.csv", f"prompt,seed\na,{LARGEST_SEED + 1}\n", "p.csv: row 1: seed: found"),
        ("p.csv", "prompt,prompt_id\na,1\na,1\n", "p.csv: row 2: prompt_id: found '1', which row 1 has"),
        ("p.csv", "prompt,plan\na,nothing\n", "p.csv: row 1: plan: found no steps; accepted: a JSON file with steps"),
        ("p.jsonl", '{"prompt": "a", "plan": true}', "p.jsonl: row 1: plan: found True; accepted: steps, as in a plan"),
        ("p.jsonl", '{"prompt": "a", "seed": 1.5}', "p.jsonl: row 1: seed: found 1.5; accepted: a whole number"),
        ("p.jsonl", '{"prompt": "a", "seed": true}', "p.jsonl: row 1: seed: found True; accepted: a whole number"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        read_requests(written(tmp_path, text, name), 18, 3)
    assert words in str(caught.value) and "\n" not in str(caught.value)
