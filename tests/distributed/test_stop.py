"""Requests to stop of several processes: noted within a collective, counted once, and the last thing undisturbed."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tempact.errors import Stopped, StopRequest


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    with StopRequest().listening() as request:
        yield request
        request.handled()


def test_a_signal_within_a_collective_is_raised_after_it(stop: StopRequest) -> None:
    steps = []
    with pytest.raises(Stopped, match="SIGTERM"), stop.held():
        with stop.held():
            signal.raise_signal(signal.SIGTERM)
            steps.append("inner")
        steps.append("outer")
    assert steps == ["inner", "outer"] and stop


def test_a_signal_within_a_collective_of_what_is_finished_first_is_only_noted(stop: StopRequest) -> None:
    stop.close("saving")
    with stop.held():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert stop.name in ("SIGTERM", "SIGINT")
    with pytest.raises(Stopped):
        stop.open()


def test_an_error_within_a_collective_goes_before_a_signal(stop: StopRequest) -> None:
    with pytest.raises(ValueError, match="torn"), stop.held():
        signal.raise_signal(signal.SIGTERM)
        raise ValueError("torn")


def test_one_request_may_come_as_several_signals(stop: StopRequest) -> None:
    stop.once = True
    stop.close("saving")
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.raise_signal(number)
    assert stop.name == "SIGTERM"
    with pytest.raises(Stopped, match="SIGTERM"):
        stop.open()


def test_of_one_process_the_second_signal_gives_up(stop: StopRequest) -> None:
    stop.close("saving")
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGUSR1"):
        signal.raise_signal(signal.SIGUSR1)


def test_the_last_thing_is_not_interrupted(stop: StopRequest) -> None:
    stop.last = True
    with stop.held():
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    assert stop.name in ("SIGTERM", "SIGINT")
