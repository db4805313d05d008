"""Progress lines where there is no terminal, and a bar where there is one."""

from __future__ import annotations

import io
import logging
import math

import pytest
from rich.console import Console

from tempact.runs import logs as module
from tempact.runs.logs import Progress, duration, setup_logging


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_come_first_last_and_now_and_then(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Progress("training", 10, done=2, live=False) as progress:
        assert caplog.messages == ["training: 10 iterations, 2 already done"]
        for i in range(8):
            progress.phase("rollout")
            clock[0] += 2.0
            progress.step({"order": 0.5 + i / 10})
    lines = caplog.messages[1:]
    assert [line.split("  ")[0] for line in lines] == [
        "training: 3/10",
        "training: 6/10",
        "training: 9/10",
        "training: 10/10",
    ]
    assert lines[0] == "training: 3/10  2.0 s each, 14 s left  order 0.500" and lines[-1].endswith(
        "0 s left  order 1.200"
    )


def test_time_left_follows_the_recent_pace(clock: list[float]) -> None:
    progress = Progress("training", 100, live=False)
    assert math.isnan(progress.left_s)
    for took in [10.0] + [1.0] * 30:
        clock[0] += took
        progress.step({})
    assert progress.left_s == pytest.approx(69 * (1.0 + 9.0 * 0.8**30))


def test_a_terminal_shows_phase_rewards_and_time_left(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(module, "console", Console(file=screen, force_terminal=True, width=140))
    with Progress("training", 4) as progress:
        clock[0] += 90.0
        progress.step({"order": 0.25})
        progress.phase("update")
    shown = screen.getvalue()
    assert "1/4" in shown and "4:30 min left" in shown and "order 0.250" in shown and "update" in shown


def test_phases_without_a_count_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Progress("evaluation", 0, live=False) as progress:
        progress.tell("step-prompt, hard")
    assert caplog.messages == ["evaluation: started", "evaluation: step-prompt, hard"]


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59.4, 187, 7500, float("nan"))] == ["0 s", "59 s", "3:07 min", "2:05 h", "?"]


def test_other_ranks_only_warn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        monkeypatch.setenv("RANK", "3")
        setup_logging()
        logging.getLogger("tempact.x").info("hello")
        logging.getLogger("tempact.x").warning("careful")
        shown = capsys.readouterr().err
    finally:
        root.handlers[:], root.level = before
    assert "hello" not in shown and "rank 3 WARNING careful" in shown
