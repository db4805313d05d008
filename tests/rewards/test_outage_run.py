"""A training run on ShapeWorld whose rewards come from a judge's server that goes away: the real command."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rewards.fault_proxy import Apart, Behaviour
from rewards.judge_cases import KEY
from rewards.judge_server import GOOD, Server

from tempact import train
from tempact.cli import EXIT_ABORTED
from tempact.errors import EXIT_USER_ERROR, UserError
from tempact.files import LEDGER
from tempact.presets import get_preset
from tempact.reporting import read_metrics
from tempact.rewards.judged import check_judges
from tempact.rewards.judges import JudgeRefusal
from tempact.rewards.judges import client as judge_client
from tempact.runs import run as run_module
from tempact.runs.checkpoint import defect, latest
from tempact.worlds import world_of

ITERATIONS = 3
ROLES = ("plan_quality", "temporal_following", "step_following")


@contextmanager
def judge() -> Iterator[Apart]:
    server = Apart(Behaviour(verdicts=True, delay_s=0.01))
    try:
        yield server
    finally:
        server.stop()


def environment(server: Apart | Server) -> dict[str, str]:
    address = server.url if isinstance(server, Apart) else server.address
    return {"TEMPACT_JUDGE_BASE_URL": address, "TEMPACT_JUDGE_MODEL": "judge", "TEMPACT_JUDGE_API_KEY": KEY}


def command(folder: Path, **keys: object) -> list[str]:
    given = {
        "trainer.iterations": ITERATIONS, "judges.shapeworld": "true", "output": folder / "run", "device": "cpu",
        "judges.cache": folder / "judges.sqlite", "judges.attempt_s": 2, "planner.max_new_tokens": 64, **keys,
    }  # fmt: skip
    return ["shapeworld-smoke", *(str(part) for name, value in given.items() for part in (f"--{name}", value))]


def rows(folder: Path) -> list[dict[str, float]]:
    path = folder / "run" / "metrics.jsonl"
    return read_metrics(folder / "run") if path.exists() else []


def after_the_first_iteration(folder: Path, act: Callable[[], None]) -> threading.Thread:
    """Does something once, as soon as the run has logged an iteration."""

    def watch() -> None:
        end = time.monotonic() + 240
        while not rows(folder) and time.monotonic() < end:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def telling(noticed: threading.Event, warning: Callable[..., None]) -> Callable[..., None]:
    """The logger's method, which also says that there was a warning."""

    def warn(*given: object) -> None:
        warning(*given)
        noticed.set()

    return warn


def check_whole(folder: Path) -> None:
    """Every iteration is there once and every score is a judge's."""
    assert [row["step"] for row in rows(folder)] == list(range(1, ITERATIONS + 1))
    for row in rows(folder):
        for role in ROLES:
            assert row[f"judge/{role}/missing"] == 0 and row[f"judge/{role}/calls"] > 0
        assert math.isfinite(row["rewards/temporal_following/mean"]) and row["rewards/plan_quality/missing"] == 0


def check_no_key(folder: Path, *texts: str) -> None:
    """Configuration, metrics, samples, checkpoints, report, cache."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "judges.sqlite"} <= {path.name for path in files}
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert not [text for text in texts if KEY in text]


@pytest.fixture
def unevaluated(monkeypatch: pytest.MonkeyPatch, log_handlers: None) -> None:
    """Runs end before their evaluation."""
    monkeypatch.setattr(run_module, "evaluate", lambda *given, **more: None)


@pytest.mark.slow
@pytest.mark.usefixtures("unevaluated")
def test_a_run_waits_for_its_judges(tmp_path: Path, monkeypatch, capfd: pytest.CaptureFixture[str]) -> None:
    with judge() as server:
        for name, value in environment(server).items():
            monkeypatch.setenv(name, value)
        waited: list[int] = []
        noticed = threading.Event()
        monkeypatch.setattr(judge_client.log, "warning", telling(noticed, judge_client.log.warning))

        def away() -> None:
            server.die()
            noticed.wait(60)
            time.sleep(1)
            waited.append(len(rows(tmp_path)))
            server.revive()

        thread = after_the_first_iteration(tmp_path, away)
        assert train.main(command(tmp_path)) == 0
        thread.join()
    assert waited[0] < ITERATIONS
    check_whole(tmp_path)
    shown = capfd.readouterr()
    assert "does not answer" in shown.err
    check_no_key(tmp_path, shown.out, shown.err)


@pytest.mark.usefixtures("unevaluated")
def test_an_outage_past_the_limit_saves_and_stops(tmp_path: Path, monkeypatch, capfd) -> None:
    """Exit code 3 and a whole checkpoint of the last iteration that ended; the rest is made once judges are back."""
    with judge() as server:
        for name, value in environment(server).items():
            monkeypatch.setenv(name, value)
        thread = after_the_first_iteration(tmp_path, server.die)
        limits = {"judges.attempt_s": 0.5, "judges.outage_s": 1}  # a run that goes on may have others
        assert train.main(command(tmp_path, **limits)) == EXIT_ABORTED == 3
        thread.join()
        done = len(rows(tmp_path))
        saved = latest(tmp_path / "run")
        assert 1 <= done < ITERATIONS and saved is not None and defect(saved.path) is None
        assert saved.state["done"] == done
        shown = capfd.readouterr().err
        assert "no answer from 127.0.0.1" in shown and f"saved after iteration {done}" in shown
        server.revive()
        assert train.main([*command(tmp_path), "--resume", "auto"]) == 0
    check_whole(tmp_path)
    check_no_key(tmp_path, shown)


@pytest.mark.slow
@pytest.mark.usefixtures("unevaluated")
def test_a_run_whose_requests_are_spent_saves_and_stops(tmp_path: Path, monkeypatch, capfd) -> None:
    """Exit code 3 and one line; the same limit stops it again before weights load. Without one the run ends."""
    ledger, limit = tmp_path / "run" / LEDGER, "judges.max_calls"

    def requests() -> int:
        return sum(each["requests"] for each in json.loads(ledger.read_text()).values())

    def errors() -> list[str]:
        return [line for line in capfd.readouterr().err.splitlines() if "ERROR" in line]

    with judge() as server:
        for name, value in environment(server).items():
            monkeypatch.setenv(name, value)
        assert train.main(command(tmp_path, **{limit: 20})) == EXIT_ABORTED
        done = len(rows(tmp_path))
        saved = latest(tmp_path / "run")
        assert 1 <= done < ITERATIONS and saved is not None and saved.state["done"] == done and requests() == 20
        (line,) = errors()
        assert "judges: 20 requests are spent (plan_quality " in line and f"saved after iteration {done}" in line
        assert "judges.max_calls is 20; one above 20, or 0 for no limit, lets the run go on" in line
        with monkeypatch.context() as unloaded:
            unloaded.setattr(run_module, "build_policies", lambda *given: pytest.fail("weights were loaded"))
            assert train.main(command(tmp_path, **{limit: 20})) == EXIT_ABORTED
        assert ["20 requests" in line for line in errors()] == [True] and requests() == 20
        assert train.main(command(tmp_path)) == 0
    check_whole(tmp_path)
    paid = sum(row.get(f"judge/{role}/requests", 0) for row in rows(tmp_path) for role in ROLES)
    assert 0 < paid <= requests() - len(ROLES)  # the example is of no iteration


@pytest.mark.usefixtures("unevaluated", "soon_asked_again")
@pytest.mark.parametrize(
    ("answer", "code", "told"),
    [
        ((200, "I like it."), EXIT_ABORTED, "judge plan_quality: no score for an example: 4 attempts; the last: "),
        ((401, "wrong key"), EXIT_USER_ERROR, "HTTP 401"),
        ((404, "no such model"), EXIT_USER_ERROR, "HTTP 404"),
        ((403, {"message": "no", "code": "insufficient_quota"}), EXIT_USER_ERROR, "HTTP 403"),
        ((400, "no pictures here"), EXIT_ABORTED, "no score for an example: 127.0.0.1"),
    ],
)
def test_a_judge_that_judges_nothing_is_found_before_the_first_rollout(
    tmp_path: Path, monkeypatch, capfd, answer: tuple[int, object], code: int, told: str
) -> None:
    monkeypatch.setattr(run_module, "build_policies", lambda *given: pytest.fail("weights were loaded"))
    with Server(lambda kind: answer) as server:
        for name, value in environment(server).items():
            monkeypatch.setenv(name, value)
        assert train.main(command(tmp_path)) == code
    shown = capfd.readouterr().err
    assert [told in line for line in shown.splitlines() if line.startswith("error: ") or "ERROR" in line] == [True], (
        shown
    )
    assert not rows(tmp_path) and KEY not in shown
    assert (tmp_path / "run").exists() == (code == EXIT_ABORTED)  # what could not even begin leaves nothing


def test_a_refusal_before_all_examples_are_asked_is_a_mistake_of_the_user() -> None:
    """The client raises it for the next question."""

    def asked(*given: object) -> Any:
        raise JudgeRefusal("judge step_following: HTTP 401: wrong key")

    with pytest.raises(UserError, match="^judge step_following: HTTP 401: wrong key$"):
        check_judges([asked])  # type: ignore[list-item]


@pytest.mark.usefixtures("unevaluated")
def test_the_example_is_asked_once_for_all_starts_of_a_run(tmp_path: Path, monkeypatch) -> None:
    seen: list[str] = []

    def says(kind: str) -> tuple[int, str]:
        seen.append(kind)
        return 200, json.dumps(GOOD[kind])

    monkeypatch.setattr(run_module, "build_policies", lambda *given: pytest.fail("weights were loaded"))
    with Server(says) as server:
        for name, value in environment(server).items():
            monkeypatch.setenv(name, value)
        for _ in range(2):
            with pytest.raises(pytest.fail.Exception):
                train.main(command(tmp_path))
            assert sorted(seen) == ["part", "plan", "video"]


def test_a_run_without_judges_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_client, "JudgeClient", lambda config: pytest.fail("a client was made"))
    world_of(get_preset("shapeworld-smoke")).rewards(torch.device("cpu")).check()


def test_without_judges_in_the_environment_nothing_is_made(tmp_path: Path, monkeypatch, capsys) -> None:
    for name in [name for name in os.environ if name.startswith(("TEMPACT_JUDGE_", "LLM_", "VLLM_"))]:
        monkeypatch.delenv(name)
    assert train.main(command(tmp_path)) == EXIT_USER_ERROR
    shown = capsys.readouterr()
    assert shown.err.startswith("error: environment: found no address of the judge plan_quality")
    assert shown.err.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sixty_seconds_without_judges(tmp_path: Path) -> None:
    """The command in a process of its own, with the limits that it has by itself, up to its evaluation and report."""
    with judge() as server:
        shown = tmp_path / "shown.txt"

        def away() -> None:
            server.die()
            time.sleep(60)
            server.revive()

        thread = after_the_first_iteration(tmp_path, away)
        with shown.open("w") as output:
            code = subprocess.call(
                [sys.executable, "-m", "tempact.train", *command(tmp_path)],
                stdout=output, stderr=output, env=os.environ | environment(server),
            )  # fmt: skip
        thread.join()
    assert code == 0, shown.read_text()[-3000:]
    assert "does not answer" in shown.read_text()
    check_whole(tmp_path)
    check_no_key(tmp_path)
