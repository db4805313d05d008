"""`python -m tempact.evaluate`: the benchmark with ShapeWorld's policies and a fake judge, killed and begun again."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest
from rewards.judge_server import GOOD, Server

from tempact import evaluate
from tempact.cli import from_yaml
from tempact.config import JudgeSettings
from tempact.evaluation.judges import JudgedVideo, Verdict
from tempact.evaluation.ledger import Ledger
from tempact.evaluation.statistics import read_origin
from tempact.executor.executor import Executor
from tempact.rewards.judges import JudgeOutage
from tempact.runs import evaluation
from tempact.worlds import WEIGHTS

KEYS = ("prompt_id", "condition", "seed", "judge")
KEY = "sk-canary-7c1f"
EVENTS = ("the circle moves to the right", "the square vanishes", "the circle grows", "the square blinks")
START = "A red circle is at the top left and a blue square is at the bottom right."
# what the killed process runs: the real command with a judge that is slow and writes down whom it was asked about
KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, str(Path("tests").resolve()))
import test_evaluate
from tempact import evaluate
from tempact.runs import evaluation
from tempact.worlds import WEIGHTS
evaluation.served_judges = test_evaluate.fake_judges(Path(sys.argv[1]), pause_s=0.05)
sys.exit(evaluate.main(sys.argv[2:]))
"""


class LoggedJudge:
    """Scores by brightness; appends a line to a file for every video that it is asked about."""

    def __init__(self, name: str, asked: Path, pause_s: float, outage_after: int):
        self.name, self.version, self.asked = name, f"model of {name}", asked
        self.pause_s, self.left = pause_s, outage_after

    def submit(self, videos: Sequence[JudgedVideo]) -> list[Future[Verdict]]:
        futures = []
        for video in videos:
            future: Future[Verdict] = Future()
            self.left -= 1
            if self.left < 0:
                future.set_exception(JudgeOutage("judge in-domain: no answer"))
            else:
                with self.asked.open("a") as file:
                    file.write(f"{self.name} {video.prompt.prompt_id} {video.frames.shape[0]}\n")
                time.sleep(self.pause_s)
                level = video.frames.float().mean().item() / 255
                future.set_result(Verdict({"combined": level, "temporal_order": level / 2}, "", (0, 1)))
            futures.append(future)
        return futures


def fake_judges(asked: Path, pause_s: float = 0.0, outage_after: int = 10**9):
    @contextmanager
    def served(names: Sequence[str], settings: JudgeSettings, processes: int) -> Iterator[list[LoggedJudge]]:
        yield [LoggedJudge(name, asked, pause_s, outage_after) for name in names]

    return served


@pytest.fixture
def prompts(tmp_path: Path) -> list[str]:
    """ShapeWorld instructions, in files of the authors' layout."""
    simple = [f"{START} First, {EVENTS[i]}." for i in range(2)]
    hard = [f"{START} First, {EVENTS[i]}. Then {EVENTS[1 - i]}. Finally, {EVENTS[i + 2]}." for i in range(1)]
    given = []
    for name, texts in (("simple", simple), ("hard", hard)):
        path = tmp_path / f"temporal_eval_{name}.csv"
        path.write_text("prompt,category\n" + "".join(f'"{text}",object\n' for text in texts))
        given.append(f"{name}={path}")
    return given


def arguments(prompts: list[str], output: Path, *more: str) -> list[str]:
    return [
        "shapeworld", "--suite", "temporal-order", "--prompts", *prompts, "--output", str(output),
        "--pickscore", "no", "--judge", "in-domain", "held-out", "--device", "cpu",
        "--planner.max_new_tokens", "48", "--executor.timesteps", "1000", "500", *more,
    ]  # fmt: skip


def scores(folder: Path) -> dict:
    return {tuple(row[name] for name in KEYS): row["scores"] for row in Ledger(folder / "scores.jsonl", KEYS)}


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 130)],
)
@pytest.mark.slow
def test_a_killed_evaluation_goes_on_without_scoring_anything_twice(
    number: int,
    code: int,
    prompts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked, folder = tmp_path / "asked.txt", tmp_path / "out"
    line = arguments(prompts, folder, "--evaluation.batch", "2", "--evaluation.strips", "1")
    killed = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(asked), *line], cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until and not (asked.is_file() and len(asked.read_text().splitlines()) >= 5):
            assert killed.poll() is None
            time.sleep(0.01)
    finally:
        os.kill(killed.pid, number)
        killed.wait(20)
    before = scores(folder)
    assert 0 < len(before) < 24 and killed.returncode == code
    asked_before = asked.read_text().splitlines()
    kept = {path: path.stat().st_mtime_ns for path in (folder / "videos").rglob("*.mp4")}

    monkeypatch.setattr(evaluation, "served_judges", fake_judges(asked))
    assert evaluate.main(line) == 0
    after = scores(folder)
    assert len(after) == 3 * 2 * 2 * 2 and all(after[key] == value for key, value in before.items())
    lines = (folder / "scores.jsonl").read_text().splitlines()
    assert len(lines) == len(after)  # no key stands there twice
    # only what a judge was answering at the moment of the kill was asked about once more
    in_hand = len(asked_before) - len(before)
    assert len(asked.read_text().splitlines()) == 24 + in_hand and in_hand <= 2
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    shown = capsys.readouterr().out.splitlines()
    assert [Path(line).name for line in shown] == [f"temporal-order.{end}" for end in ("json", "md", "html")]

    unbroken = tmp_path / "unbroken"
    assert evaluate.main(arguments(prompts, unbroken, "--evaluation.batch", "2", "--evaluation.strips", "0")) == 0
    found = [json.loads((one / "temporal-order.json").read_text()) for one in (folder, unbroken)]
    assert found[0]["tables"] == found[1]["tables"] and found[0]["dropped"] == found[1]["dropped"]


def test_an_outage_is_exit_code_3_and_the_same_command_goes_on(
    prompts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, folder = tmp_path / "asked.txt", tmp_path / "out"
    line = arguments(prompts[:1], folder, "--seeds", "1", "--simple", "1", "--evaluation.strips", "0")
    monkeypatch.setattr(evaluation, "served_judges", fake_judges(asked, outage_after=1))
    assert evaluate.main(line) == 3
    assert "goes on from here" in capsys.readouterr().err and len(scores(folder)) in (1, 2)
    monkeypatch.setattr(evaluation, "served_judges", fake_judges(asked))
    assert evaluate.main(line) == 0
    assert len(scores(folder)) == 4 == len(asked.read_text().splitlines())


def test_judges_behind_a_server_score_once_and_no_key_is_written(
    prompts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Over HTTP: a good reply is V, a rejection that repeats the key is missing, and neither is asked about again, but
    for a server's first rejection, which may be one of the reply's format."""
    replies = itertools.cycle([(200, json.dumps(GOOD["video"])), (400, f"your key {KEY} is not worth a score")])
    servers = [Server(lambda kind: next(replies), (200, ["m"])) for _ in range(2)]
    for prefix, server, model in zip(("", "HELD_OUT_"), servers, ("m", "gemini"), strict=True):
        for name, value in (("BASE_URL", server.address), ("MODEL", model), ("API_KEY", KEY)):
            monkeypatch.setenv(f"TEMPACT_JUDGE_{prefix}{name}", value)
    folder = tmp_path / "out"
    line = arguments(prompts[:1], folder, "--seeds", "1", "--evaluation.strips", "1")
    line += ["--judges.cache", str(tmp_path / "replies.sqlite"), "--judges.attempts", "1"]
    try:
        assert evaluate.main(line) == 0
        asked = [len(server.requests) for server in servers]
        assert evaluate.main(line) == 0
        assert [len(server.requests) for server in servers] == asked and min(asked) == 4  # 2 prompts, 2 conditions
        assert sum(asked) in (9, 10)
    finally:
        for server in servers:
            server.close()
    rows = list(Ledger(folder / "scores.jsonl", KEYS))
    scored = [row["scores"] for row in rows if row["scores"]]
    assert len(rows) == 8 and len(scored) in (4, 5) and all(score["combined"] == pytest.approx(0.9) for score in scored)
    assert all("HTTP 400" in row["missing"] for row in rows if not row["scores"])
    assert all(row["picks"] == [0, 5, 9, 14, 18, 23] for row in rows)
    shown = capfd.readouterr()
    assert KEY not in shown.out + shown.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8 and all(KEY.encode() not in path.read_bytes() for path in files)


def test_export_needs_no_judge(prompts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "all_dimension.txt"
    texts.write_text(f"{START} First, {EVENTS[0]}.\n")
    line = ["shapeworld", "--suite", "temporal-order", "--prompts", f"vbench={texts}", "--export", "vbench"]
    line += ["--seeds", "2", "--conditions", "single-prompt", "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert evaluate.main(line) == 0
    folder = tmp_path / "out" / "vbench" / "single-prompt"
    assert capsys.readouterr().out.splitlines() == [str(folder)]
    assert sorted(path.name for path in folder.iterdir()) == [f"{START} First, {EVENTS[0]}.-{i}.mp4" for i in (0, 1)]


@pytest.mark.slow
def test_shapeworlds_suite_goes_on_with_the_next_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Executor.rollout
    made: list[int] = []

    def counted(self, plans, *given):
        if len(made) == 2 and not (tmp_path / "second").exists():
            signal.raise_signal(signal.SIGTERM)
        made.append(len(plans))
        return real(self, plans, *given)

    monkeypatch.setattr(Executor, "rollout", counted)
    monkeypatch.chdir(tmp_path)
    line = [
        "shapeworld-smoke",
        "--device",
        "cpu",
        "--simple",
        "2",
        "--hard",
        "1",
        "--executor.timesteps",
        "1000",
        "500",
    ]
    assert evaluate.main(line) == 130
    (tmp_path / "second").touch()
    assert evaluate.main(line) == 0
    assert made == [2, 2, 1, 1]  # two methods on the simple set, then on the hard one, each once
    folder = tmp_path / "runs" / "shapeworld-smoke-untrained"
    rows = json.loads((folder / "evaluation.json").read_text())
    assert {row["method"] for row in rows} == {"single-prompt", "step-prompt"}
    assert (folder / "report.html").is_file() and (folder / "videos" / "index.json").is_file()
    lines = [path.read_text().splitlines() for path in (folder / "evaluation").rglob("scores.jsonl")]
    assert [len(each) for each in lines] == [2 * (2 + 1) * 5]
    made.clear()
    assert evaluate.main([*line, "--threads", "1"]) == 0 and made == []
    assert json.loads((folder / "evaluation.json").read_text()) == rows

    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "report.html"}
    assert evaluate.main([*line, "--seed", "7", "--split", "validation"]) == 0 and made == [2, 2, 1, 1]
    assert all(path.read_bytes() == data for path, data in kept.items())
    (other,) = (folder / "evaluations").iterdir()
    assert other.name.startswith("validation-seed-7-simple-2-hard-1-")
    found = read_origin(folder), read_origin(other)
    assert [(one.split, one.seed, one.videos, one.checkpoint) for one in found if one] == [
        (split, seed, {"simple": 2, "hard": 1}, "untrained") for split, seed in (("test", 1234), ("validation", 7))
    ]
    assert found[0].weights == found[1].weights and found[0].suite != found[1].suite
    assert from_yaml(other / "config.yaml").evaluation.seed == 7 and (other / "report.html").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_stop_an_evaluation_from_its_start_on(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr(evaluate, "_configured", lambda *given: signal.raise_signal(number))
    assert evaluate.main(["shapeworld"]) == 130 and "stopped" in capsys.readouterr().err
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("weights", "suite"),
    [
        ("COPY", "shapeworld"),
        ("shapeworld", "shapeworld"),
        ("random-tiny", "temporal-order"),
        ("random", "temporal-order"),
        ("WAN", "temporal-order"),
    ],
)
def test_the_kind_of_weights_decides_the_suite(
    weights: str, suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(WEIGHTS / "executor", tmp_path / "COPY")
    (tmp_path / "WAN").mkdir()
    (tmp_path / "WAN" / "model.safetensors").touch()
    chosen: list[tuple[str, dict[str, int]]] = []
    monkeypatch.setattr(evaluation, "evaluate_shapeworld", lambda *given: chosen.append(("shapeworld", {})) or 0)
    monkeypatch.setattr(
        evaluation, "evaluate_benchmark", lambda *given: chosen.append(("temporal-order", given[3].frames)) or 0
    )
    monkeypatch.chdir(tmp_path)
    line = ["shapeworld", "--executor.weights", weights]
    assert evaluate.main(line) == 0 and evaluate.main([*line, "--suite", "temporal-order"]) == 0
    lengths = {"simple": 24, "hard": 24} if suite == "shapeworld" else {"simple": 36, "hard": 60}
    assert chosen[0][0] == suite and chosen[1] == ("temporal-order", lengths)


def test_shapeworlds_suite_refuses_other_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["shapeworld", "--executor.weights", "random-tiny", "--suite", "shapeworld"]) == 2
    assert "executor.weights: found random-tiny, whose videos" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["nowhere"], "nowhere: holds no config.yaml; accepted: the folder of a training run, or a preset"),
        (["shapeworld", "--judge", "in-domain"], "--judge: is not for --suite shapeworld"),
        (["shapeworld", "--threads", "-1"], "threads: found -1; accepted: at least 0"),
        (["shapeworld", "--split", "train"], "--split: invalid choice: 'train'"),
        (["shapeworld", "--evaluation.split", "train"], "evaluation.split: found 'train'; accepted: test, validation"),
        (["self-forcing", "--split", "validation"], "--split: is not for --suite temporal-order"),
        (["self-forcing", "--strict", "4"], "--strict: is not for --suite temporal-order"),
        (["self-forcing", "--suite", "shapeworld-strict"], "whose videos ShapeWorld's evaluation cannot score"),
        (
            ["shapeworld", "--strict", "4"],
            "--strict: is not for --suite shapeworld; accepted: --simple, --hard, --seed",
        ),
        (
            ["shapeworld", "--suite", "shapeworld-strict", "--hard", "4"],
            "--hard: is not for --suite shapeworld-strict; accepted: --strict, --seed, --split",
        ),
        (["shapeworld", "--suite", "shapeworld-strict", "--strict", "0"], "--strict: found 0; accepted: at least 1"),
        (["shapeworld", "--evaluation.suite", "hard"], "evaluation.suite: found 'hard'; accepted: shapeworld, shape"),
        (["shapeworld", "--simple", "0"], "--simple: found 0; accepted: at least 1"),
        (["shapeworld", "--seed", "-1"], "evaluation.seed: found -1; accepted: 0 to 4611686018427387904"),
        (["shapeworld", "--best-of", "0"], "--best-of: found 0; accepted: at least 1"),
        (
            ["self-forcing", "--best-of", "2", "--conditions", "single-prompt"],
            "--best-of: found 2; accepted: with --con",
        ),
        (["shapeworld", "--bogus"], "unrecognized arguments: --bogus"),
        (["shapeworld", "--evaluation.strip", "2"], "nearest: --evaluation.strips"),
        (["self-forcing", "--seeds", "0"], "--seeds: found 0"),
        (["self-forcing", "--hard", "101"], "--hard: found 101; accepted: 1 to 100"),
        (["self-forcing", "--conditions", "trained"], "--conditions: found 'trained' for an untrained preset"),
        (["self-forcing", "--frames", "hard=61"], "--frames: found 'hard=61'; accepted: SET=NUMBER"),
        (["self-forcing", "--frames", "easy=60"], "a set of simple, hard"),
        (["self-forcing", "--judge", "--pickscore", "no"], "--judge: found none"),
        (["self-forcing", "--judge", "qwen"], "--judge: invalid choice: 'qwen'"),
        (["self-forcing", "--prompts", "hard=none.csv"], "none.csv: cannot be read"),
    ],
)
def test_bad_options_are_one_line_before_anything_is_loaded_or_written(
    given: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(given) == 2
    shown = capsys.readouterr().err
    assert words in shown and shown.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_parsing_imports_no_torch() -> None:
    code = (
        "import sys; from tempact import evaluate; code = evaluate.main(['self-forcing', '--seeds', '0']); "
        "print(code, {'torch', 'transformers', 'openai', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "2 set()\n", done.stderr
