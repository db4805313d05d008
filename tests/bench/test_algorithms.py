"""The command that makes the algorithm table: its rows, what is trained again, the file, table and chart."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from bench import bench_algorithms
from bench.bench_algorithms import DEFAULT, ROWS, again, draw, earlier, markdown, results, runs_of
from tempact.cli import parse_run
from tempact.config import flatten
from tempact.errors import UserError

PRESET = "shapeworld-smoke"


def asked(folder: Path, **more: object) -> argparse.Namespace:
    given = {
        "folder": folder,
        "preset": PRESET,
        "rows": [DEFAULT, "RLOO"],
        "seeds": [4, 5],
        "threads": 2,
        "known": ROWS,
    }
    return argparse.Namespace(**(given | more))


@pytest.mark.parametrize("name", ROWS)
def test_the_keys_of_every_row_are_accepted_and_change_what_they_name(name: str) -> None:
    plain, own = (flatten(parse_run(["shapeworld-full", *keys], "program")[0]) for keys in ((), ROWS[name]))
    assert {key for key in own if own[key] != plain[key]} == {word[2:] for word in ROWS[name] if word.startswith("--")}


def test_rows_are_commands_of_a_user_and_are_judged_on_the_validation_split(tmp_path: Path) -> None:
    runs = runs_of(asked(tmp_path), ["--executor.eta", "0.5"])
    assert [(own.name, own.seed) for own in runs] == [(DEFAULT, 4), ("RLOO", 4), (DEFAULT, 5), ("RLOO", 5)]
    folder = tmp_path / "rloo-seed-5"
    train = ["tempact.train", PRESET, "--seed", "5", "--threads", "2", "--executor.eta", "0.5", *ROWS["RLOO"]]
    assert runs[3].run.command[2:] == [*train, "--output", str(folder)]
    own = str(folder) + "-validation"
    assert runs[3].validation.command[2:] == ["tempact.evaluate", own, "--split", "validation", "--threads", "2"]
    assert runs[3].validation.after is runs[3].run
    longer = runs_of(asked(tmp_path), [], iterations={"RLOO": 150})
    assert [own.run.folder.name for own in longer] == [f"rloo-seed-{seed}-150-iterations" for seed in (4, 5)]
    assert longer[0].run.command[-4:] == ["--trainer.iterations", "150", "--output", str(longer[0].run.folder)]


def run(seed: int, gain: float) -> dict[str, object]:
    return {
        "seed": seed, "iterations": 120, "seconds_an_iteration": 3.9, "score": 0.75, "gain": gain,
        "ci95": [gain - 0.1, gain + 0.1], "gain_verifier": gain, "gain_matcher": gain / 2, "validation": gain,
        "quality": -0.01, "clearness": -0.02, "duplicates": [0.018, 0.016],
    }  # fmt: skip


def test_the_table_has_means_and_the_spread_of_seeds(tmp_path: Path) -> None:
    rows = [
        {"row": DEFAULT, "keys": "", "equal": "samples", "runs": [run(0, 0.4), run(1, 0.5)]},
        {"row": "RLOO", "keys": "--planner.loss rloo", "equal": "seconds", "runs": [run(0, 0.3)]},
    ]
    first, second = markdown(rows).splitlines()[2:]
    assert first == (
        "| default | samples | 2 | 3.90 | 0.750 | +45.0% [+40.0%, +50.0%] | +45.0% | +22.5% | +45.0% | -1.0% | -2.0% "
        "| 0.018 to 0.016 |"
    )
    assert second.startswith("| RLOO | seconds | 1 | 3.90 | 0.750 | +30.0% | +30.0% |")
    draw(tmp_path / "chart.png", rows)
    assert (tmp_path / "chart.png").stat().st_size > 5000


def test_an_iteration_takes_the_median_of_seconds(tmp_path: Path) -> None:
    own = runs_of(asked(tmp_path), [])[0]
    own.run.folder.mkdir()
    times = [100.0, 102.0, 104.0, 106.5, 500.0]  # a checkpoint was saved in the last one, say
    rows = [{"step": step, "time_s": time} for step, time in enumerate(times, 1)]
    (own.run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert own.seconds == 2.25


def test_rows_of_other_speed_are_given_the_seconds_of_the_default() -> None:
    speeds = {DEFAULT: 2.0, "RLOO": 2.1, "DiffusionNFT": 4.0, "GRPO": 1.6}
    rows = [
        {"row": name, "equal": "samples", "runs": [run(0, 0.4) | {"iterations": 12, "seconds_an_iteration": speed}]}
        for name, speed in speeds.items()
    ]
    slow = {"row": "no KL", "equal": "seconds", "runs": [run(0, 0.4) | {"seconds_an_iteration": 9.0}]}
    assert again([*rows, slow]) == {"DiffusionNFT": 6, "GRPO": 15}
    with pytest.raises(UserError, match="--equal-seconds: found no row 'default'"):
        again(rows[1:])


def test_runs_of_a_results_file_stay_and_are_not_made_again(tmp_path: Path) -> None:
    file, values = tmp_path / "table.json", {"trainer.iterations": 2}  # of a time when there was no other key
    rows = [
        {"row": DEFAULT, "keys": "", "equal": "samples", "runs": [run(4, 0.4)]},
        {"row": "RLOO", "keys": " ".join(ROWS["RLOO"]), "equal": "seconds", "runs": [run(5, 0.3)]},
    ]
    file.write_text(json.dumps({"preset": PRESET, "keys": "", "configuration": values, "rows": rows}))
    given = asked(tmp_path, save=file, together=1)
    kept = earlier(given, [])
    left = runs_of(given, [], kept)
    assert [(own.name, own.seed) for own in left] == [("RLOO", 4), (DEFAULT, 5), ("RLOO", 5)]
    assert [own.seed for own in runs_of(given, [], kept, {"RLOO": 150})] == [4]
    assert results(given, [], left, kept)["rows"] == rows
    with pytest.raises(
        UserError,
        match="--save: found a file of preset shapeworld-smoke with keys '' at .*; accepted: one of preset shapeworld ",
    ):
        earlier(asked(tmp_path, save=file, preset="shapeworld"), [])
    with pytest.raises(
        UserError,
        match="--save: found a file of preset shapeworld-smoke .*; accepted: .* with keys '--executor.eta 0.5'",
    ):
        earlier(given, ["--executor.eta", "0.5"])
    rows[1]["keys"] = "--planner.loss gspo"
    file.write_text(json.dumps({"preset": PRESET, "keys": "", "configuration": values, "rows": rows}))
    with pytest.raises(
        UserError, match="found row 'RLOO' with keys '--planner.loss gspo'; accepted: '--planner.loss r"
    ):
        earlier(given, [])
    rows[1]["row"] = "larger steps"
    file.write_text(json.dumps({"preset": PRESET, "keys": "", "configuration": values, "rows": rows}))
    with pytest.raises(
        UserError, match="found row 'larger steps' .*; accepted: a row of ROWS, or --own 'larger steps'"
    ):
        earlier(given, [])
    given.known = ROWS | {"larger steps": ("--planner.loss", "gspo")}
    kept = earlier(given, [])
    assert results(given, [], [], kept)["rows"] == rows
    values["trainer.iterations"] = 3
    file.write_text(json.dumps({"preset": PRESET, "keys": "", "configuration": values, "rows": rows}))
    with pytest.raises(
        UserError, match="--save: found a file made with trainer.iterations 3 at .*; accepted: one made with 2, or"
    ):
        earlier(given, [])
    given.rows = ["larger steps"]
    assert runs_of(given, [], kept)[0].run.command[6:10] == ["--threads", "2", "--planner.loss", "gspo"]


def test_a_folder_is_asked_for() -> None:
    with pytest.raises(UserError, match="FOLDER: found nothing; accepted: a folder for the runs, or --show FILE"):
        bench_algorithms.main([])


@pytest.mark.slow
def test_two_rows_of_the_smallest_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "table.json"
    words = ["--preset", "shapeworld-smoke", "--rows", DEFAULT, "no KL", "--seeds", "0", "--together", "1"]
    command = [str(tmp_path / "runs"), *words, "--threads", "1", "--save", str(file)]
    assert bench_algorithms.main(command) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["row"], row["equal"], len(row["runs"])) for row in rows] == [
        (DEFAULT, "samples", 1), ("no KL", "samples", 1),
    ]  # fmt: skip
    assert rows[0]["runs"][0]["iterations"] == 2 and {"gain_verifier", "gain_matcher"} <= rows[0]["runs"][0].keys()
    told = capsys.readouterr().out
    assert told.splitlines()[-1].startswith("| no KL | samples | 1 |") and file.with_suffix(".png").is_file()
    assert bench_algorithms.main(command) == 0  # nothing is left to do
    assert "exit code" not in capsys.readouterr().out
