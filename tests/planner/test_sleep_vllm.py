"""A real vLLM on the CPU that sleeps but for its plans: runs where TEMPACT_VLLM names its executable.

vLLM's worker for the CPU keeps its memory: what stops is its scheduler, and its caches are emptied.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from planner.test_vllm import PROMPTS, SMALL, pytestmark, sample, sampler, url  # noqa: F401  marks and fixtures

from tempact import train
from tempact.planner.served import ServedSampler
from tempact.planner.sleep import fall_asleep, wake_up
from tempact.reporting import read_metrics
from tempact.runs import run as run_module


@pytest.fixture(scope="module", autouse=True)
def dev_mode() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        yield


def test_what_is_asked_of_a_server_that_sleeps_waits(sampler: ServedSampler) -> None:  # noqa: F811
    sampler.publish(PROMPTS[0].text)
    before = sample(sampler, 2)
    assert 0 < fall_asleep(sampler.server) < 5
    waiting = sampler.begin([sampler.planner.prompt_ids(PROMPTS[0].text)], [1])
    time.sleep(2)
    assert not waiting.results[0].done()
    assert 0 < wake_up(sampler.server) < 5
    assert len(sampler.responses(waiting)) == 1
    assert [plan.response for plan in sample(sampler, 2).plans] == [plan.response for plan in before.plans]


def test_a_run(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(run_module.Run, "finish", lambda self, stop: None)
    monkeypatch.setattr(run_module, "leave_report", lambda folder: [])
    served = ["--planner.sampler", "served", "--planner.server", url, "--output", str(tmp_path)]
    slept = ["--planner.server-ahead", "false", "--planner.server-sleep", "true"]
    assert train.main([*SMALL, *served, *slept]) == 0
    # asleep; a run that never lets the server sleep wakes it
    assert train.main([*SMALL, *served, "--trainer.iterations", "3"]) == 0
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(0 < row["planner/server_wake_s"] < 5 and 0 < row["planner/server_sleep_s"] < 5 for row in rows[:2])
    assert all(row["planner/sampling_gap"] < 1e-4 and row["planner/server_canary"] < 1e-3 for row in rows)
