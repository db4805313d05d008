"""Videos of prompts over ranks: the files of one process, paths in its order, ends that all share."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from distributed.forked import in_ranks

from tempact import generate
from tempact.errors import UserError
from tempact.runs import generation

HOST = os.uname().nodename
START = "A red circle is at the top left and a blue square is at the bottom right."
PROMPTS = (
    f"{START} First, the circle grows.",
    f"{START} First, the square vanishes.",
)
FAST = (
    "--device", "cpu", "--threads", "1", "--executor.timesteps", "1000",
    "--planner.max_new_tokens", "48", "--plans", "2",
)  # fmt: skip


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two prompts, one of them with a seed of its own, two videos each."""
    monkeypatch.chdir(tmp_path)
    seeds = ("", "7")
    rows = [f'"{text}",{seed}' for text, seed in zip(PROMPTS, seeds, strict=True)]
    Path("prompts.csv").write_text("prompt,seed\n" + "\n".join(rows) + "\n")
    return ["shapeworld-smoke", "--prompts", "prompts.csv", "--count", "2", *FAST]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def told(capfd: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    """Names that were printed, and lines that are no information."""
    shown = capfd.readouterr()
    return [Path(path).name for path in shown.out.splitlines()], [
        each for each in shown.err.splitlines() if "INFO" not in each
    ]


@pytest.mark.slow
def test_files_and_printed_paths_are_those_of_one_process(
    line: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Though rank 0 is slow, so that its videos come after those of others."""
    assert generate.main([*line, "--output", "1"]) == 0
    printed, _ = told(capfd)
    assert len(printed) == 2 * 2 * 3 and "-seed7-" in printed[6] and "-seed8-" in printed[9]
    real, made = generation.write_video, Path("made")

    def slow(*given) -> list[Path]:
        if os.environ["RANK"] == "0":
            time.sleep(0.5)
        with made.open("a") as file:
            file.write(os.environ["RANK"])
        return real(*given)

    monkeypatch.setattr(generation, "write_video", slow)
    for size in (2, 3):
        made.write_text("")
        assert in_ranks(size, lambda size=size: generate.main([*line, "--output", str(size)])) == [0] * size
        assert told(capfd) == (printed, [])
        assert files(Path(str(size))) == files(Path("1"))
        assert len(made.read_text()) == 4 and set(made.read_text()) == set("012"[:size])


def test_more_ranks_than_videos(line: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Also where each takes the best of several continuations."""
    line = ["shapeworld-smoke", "--prompt", PROMPTS[0], *FAST, "--best-of", "2"]
    assert generate.main([*line, "--output", "1"]) == 0
    printed, _ = told(capfd)
    assert in_ranks(3, lambda: generate.main([*line, "--output", "3"])) == [0, 0, 0]
    assert told(capfd) == (printed, []) and files(Path("3")) == files(Path("1"))


def ends(rank: int, end: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank's second video ends so."""
    real, made = generation.write_video, list[int]()

    def write(*given) -> list[Path]:
        made.append(1)
        if os.environ["RANK"] == str(rank) and len(made) == 2:
            end()
        return real(*given)

    monkeypatch.setattr(generation, "write_video", write)


def raising(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("rank", "error", "code", "cause"),
    [
        (1, ValueError("planted"), 1, "ValueError: planted"),
        (0, UserError("x.mp4: found that ffmpeg cannot write it"), 2, "x.mp4: found that ffmpeg cannot write it"),
    ],
)
def test_an_error_of_one_rank_ends_all_in_one_line(
    rank: int, error: Exception, code: int, cause: str, line: list[str], monkeypatch, capfd
) -> None:
    ends(rank, partial(raising, error), monkeypatch)
    assert in_ranks(2, lambda: generate.main(line)) == [code, code]
    _, lines = told(capfd)
    assert len(lines) == 1 and lines[0].startswith("error: ") and cause in lines[0], lines
    assert (f"rank 1 on {HOST}, video " in lines[0]) is bool(rank)
    assert Path("videos", "tracebacks.txt").exists() is (code == 1)


def test_a_signal_to_one_rank_stops_all(line: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """The same command then makes what is missing, and what is there again, to the same bits."""
    with pytest.MonkeyPatch.context() as patch:
        ends(1, lambda: signal.raise_signal(signal.SIGTERM), patch)
        assert in_ranks(2, lambda: generate.main(line)) == [130, 130]
    _, lines = told(capfd)
    assert len(lines) == 1 and "SIGTERM: what is written stays" in lines[0], lines
    before = files(Path("videos"))
    assert in_ranks(3, lambda: generate.main(line)) == [0, 0, 0]
    after = files(Path("videos"))
    assert len(after) == 12 and after.items() >= before.items() and before


def test_a_reader_that_went_away_ends_all_without_a_word(line: list[str], monkeypatch, capfd) -> None:
    def unread() -> int:
        reader, writer = os.pipe()
        os.close(reader)
        if os.environ["RANK"] == "0":
            sys.stdout = open(writer, "w")  # noqa: SIM115
        return generate.main(line)

    assert in_ranks(2, unread)[0] == 141
    assert told(capfd)[1] == []


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        (["--prompts", "none.csv"], "none.csv: cannot be read"),
        (["--prompts", "bad.txt"], "bad.txt: row 1: instruction: not understood"),
        (["--prompt", PROMPTS[0], "--seed", "-1"], "--seed: found -1"),
        (["--prompt", PROMPTS[0], "--plan", "none.json"], "none.json"),
    ],
)
def test_bad_input_is_told_once_and_nothing_is_written(given: list[str], cause: str, line: list[str], capfd) -> None:
    Path("bad.txt").write_text("A dog barks.\n")
    assert in_ranks(2, lambda: generate.main(["shapeworld-smoke", *given, *FAST])) == [2, 2]
    _, lines = told(capfd)
    assert len(lines) == 1 and lines[0].startswith(f"error: {cause}"), lines
    assert sorted(path.name for path in Path().iterdir()) == ["bad.txt", "prompts.csv"]
