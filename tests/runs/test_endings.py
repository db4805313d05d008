"""How a run ends before its end: signals, exceptions, nothing to learn; what is saved, said and gone on with."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs.same_run import ARGUMENTS, SHORT_EVALUATION, assert_same_run, metrics, start

from tempact.cli import EXIT_ABORTED
from tempact.errors import EXIT_STOPPED, EXIT_USER_ERROR, REMIND_S, Stopped, StopRequest
from tempact.executor.executor import Executor
from tempact.planner.planner import Planner
from tempact.reporting import read_metrics
from tempact.rewards import RewardSet, Scoring
from tempact.rl import PolicyOptimizer
from tempact.runs import ending
from tempact.runs import run as run_module
from tempact.runs.checkpoint import verify

pytestmark = pytest.mark.usefixtures("log_handlers")


@pytest.fixture
def unevaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "evaluate", lambda *given, **more: None)


def once(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int, act: Callable[[], None]) -> None:
    """`act` happens in the `call`-th call of a function, before what the function does."""
    plain, calls = getattr(owner, name), [0]

    def counted(*given, **more):
        calls[0] += 1
        if calls[0] == call:
            act()
        return plain(*given, **more)

    monkeypatch.setattr(owner, name, counted)


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith("step-"))


@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [
        pytest.param(Planner, "sample", signal.SIGTERM, marks=pytest.mark.slow),
        (Executor, "rollout", signal.SIGINT),
        pytest.param(Scoring, "scores", signal.SIGHUP, marks=pytest.mark.slow),
        (Planner, "update", signal.SIGUSR1),
    ],
    ids=["plan", "rollout", "rewards", "update"],
)
def test_a_signal_before_the_first_step_saves_the_state_before_the_iteration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unevaluated: None,
    owner: type, name: str, number: signal.Signals,
) -> None:  # fmt: skip
    before = signal.getsignal(number)
    once(monkeypatch, owner, name, 2, lambda: signal.raise_signal(number))
    assert start(tmp_path) == EXIT_STOPPED and signal.getsignal(number) is before
    assert [row["step"] for row in read_metrics(tmp_path)] == [1] and steps(tmp_path) == ["step-000001"]
    told = capsys.readouterr()
    assert f"{number.name}: saved after iteration 1; the same command goes on from there" in told.err
    assert f"report: {tmp_path}/report.html" in told.out and (tmp_path / "report.html").is_file()


def test_a_run_stopped_in_an_update_goes_on_with_the_same_bits(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        once(patch, Executor, "velocities", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert start(tmp_path) == EXIT_STOPPED  # the planner's gradient is made, its step is not
    assert verify(tmp_path / "checkpoints" / "step-000001").state["done"] == 1
    assert start(tmp_path) == 0
    assert_same_run(unbroken, tmp_path)


@pytest.mark.slow
def test_a_signal_after_the_first_step_finishes_the_iteration(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        once(patch, PolicyOptimizer, "step", 3, lambda: signal.raise_signal(signal.SIGTERM))
        assert start(tmp_path) == EXIT_STOPPED
    assert "finishing iteration 2, then saving first; once more to give that up" in capsys.readouterr().err
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2] and steps(tmp_path) == ["step-000002"]
    assert start(tmp_path) == 0
    assert_same_run(unbroken, tmp_path)


@pytest.mark.slow
def test_a_second_signal_gives_the_iteration_up_and_loses_nothing_before_it(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        once(patch, PolicyOptimizer, "step", 4, twice)  # the planner has made its step of the second iteration
        assert start(tmp_path) == EXIT_STOPPED
    assert steps(tmp_path) == ["step-000001"] and [row["step"] for row in metrics(tmp_path)] == [1]
    assert start(tmp_path) == 0
    assert_same_run(unbroken, tmp_path)


def test_a_signal_while_the_state_is_saved_says_what_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unevaluated: None
) -> None:
    once(monkeypatch, Executor, "rollout", 3, lambda: signal.raise_signal(signal.SIGTERM))
    once(monkeypatch, Planner, "save_adapter", 1, lambda: signal.raise_signal(signal.SIGTERM))
    assert start(tmp_path) == EXIT_STOPPED
    assert "SIGTERM: not saved (SIGTERM), iterations after 0 are lost" in capsys.readouterr().err
    assert steps(tmp_path) == []


def test_a_signal_before_the_first_iteration_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    once(monkeypatch, run_module, "build_policies", 1, lambda: signal.raise_signal(signal.SIGTERM))
    assert start(tmp_path / "run") == EXIT_STOPPED
    assert "SIGTERM: stopped before the first iteration; nothing is lost" in capsys.readouterr().err
    once(monkeypatch, Executor, "rollout", 1, lambda: signal.raise_signal(signal.SIGTERM))
    assert start(tmp_path / "other") == EXIT_STOPPED
    assert "SIGTERM: no iteration was finished" in capsys.readouterr().err
    assert not (tmp_path / "other" / "checkpoints").exists()


@pytest.mark.slow
def test_a_run_stopped_in_its_evaluation_goes_on_with_it(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        once(patch, Executor, "rollout", 6, lambda: signal.raise_signal(signal.SIGTERM))
        assert start(tmp_path) == EXIT_STOPPED
    assert "SIGTERM: saved after iteration 3; the same command goes on with the evaluation" in capsys.readouterr().err
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "evaluation").rglob("videos/*/*")}
    assert made and not (tmp_path / "evaluation.json").exists()
    assert start(tmp_path) == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made  # not made a second time
    assert_same_run(unbroken, tmp_path)


def test_signals_that_a_process_ignores_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with StopRequest().listening() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class Swallowing:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_comes_in_a_destructor_is_not_lost() -> None:
    unwound: list[str] = []
    with pytest.raises(Stopped, match="SIGTERM"), StopRequest().listening():
        Swallowing()  # Python ignores what its destructor raises
        try:
            time.sleep(20)
        finally:
            time.sleep(3 * REMIND_S)  # on its way out it is not raised again
            unwound.append("whole")
    assert unwound == ["whole"] and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    "command", [["train", *ARGUMENTS], ["generate", "--prompt", "A red circle is at the top left."]]
)
def test_a_command_that_is_terminated_ends_with_130_and_without_a_traceback(tmp_path: Path, command: list[str]) -> None:
    """A process of its own, at a moment that nobody has chosen."""
    started = [sys.executable, "-m", "tempact.cli", *command, "--output", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(started, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    time.sleep(3)
    process.terminate()
    _, told = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED and "Traceback" not in told, told


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill -9", "SIGTERM"])
def test_a_run_that_is_ended_at_random_moments_reaches_the_bits_of_an_unbroken_one(
    unbroken: Path, tmp_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "tempact.train", *ARGUMENTS, *SHORT_EVALUATION, "--output", str(tmp_path)]
    moments, ended = random.Random(int(number)), 0
    for _ in range(40):
        more = ["--threads", "1", "--trainer.checkpoint_every", "1"]
        process = subprocess.Popen([*command, *more], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        try:
            _, told = process.communicate(timeout=moments.uniform(5, 25))
            assert process.returncode == 0, told
            break
        except subprocess.TimeoutExpired:
            sent = time.monotonic()
            process.send_signal(number)
            _, told = process.communicate()
            ended += 1
            assert time.monotonic() - sent < 20 and "Traceback" not in told, told
            assert number is signal.SIGKILL or process.returncode in (0, EXIT_STOPPED), told
    else:
        raise AssertionError("the run never ended")
    assert ended >= 3
    assert_same_run(unbroken, tmp_path)


@pytest.mark.parametrize(
    "call",
    [pytest.param(3, id="before the first step"), pytest.param(4, id="between two steps")],
)
@pytest.mark.slow
def test_an_unexpected_exception_saves_the_last_whole_iteration(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], call: int
) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    with monkeypatch.context() as patch:
        once(patch, PolicyOptimizer, "step", call, fail)
        assert start(tmp_path) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    file = tmp_path / "tracebacks.txt"
    expected = f"error: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB; traceback in {file}; "
    assert told == [f"{expected}saved after iteration 1; the same command goes on from there"]
    assert "in fail" in file.read_text() and steps(tmp_path) == ["step-000001"]
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    assert start(tmp_path) == 0
    assert_same_run(unbroken, tmp_path)


@pytest.mark.slow
def test_a_signal_while_an_exception_is_noted_takes_nothing_of_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unevaluated: None
) -> None:
    def fail() -> None:
        raise KeyError("planted")

    once(monkeypatch, Planner, "update", 2, fail)
    once(monkeypatch, ending, "failed", 1, lambda: signal.raise_signal(signal.SIGTERM))
    assert start(tmp_path) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(told) == 1 and "KeyError: 'planted'" in told[0] and "saved after iteration 1" in told[0]


@pytest.mark.slow
def test_a_mistake_of_the_user_in_mid_run_is_one_line_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unevaluated: None
) -> None:
    (tmp_path / "mine_in_mid_run.py").write_text(
        "calls = []\ndef broken(prompts, plans, frames, spans):\n    calls.append(1)\n"
        "    return frames.float().mean((2, 3, 4, 5)) / 255 if len(calls) < 3 else 'none'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert start(tmp_path / "run", "--rewards.custom", "mine_in_mid_run:broken") == EXIT_USER_ERROR
    told = capsys.readouterr().err
    assert "saved after iteration 2" in told and "error: rewards.custom: broken: found str" in told
    assert "Traceback" not in told and steps(tmp_path / "run") == ["step-000002"]


def test_rewards_that_are_no_use_end_the_run_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unevaluated: None
) -> None:
    plain = RewardSet.whole

    def refused(*given: object):
        scored = plain(*given)
        scored.temporal_following[:] = scored.step_following[:] = float("nan")  # a judge that answers prose
        return scored

    with monkeypatch.context() as patch:
        patch.setattr(RewardSet, "whole", refused)
        assert start(tmp_path, "--trainer.max_idle_iterations", "2") == EXIT_ABORTED
    told = capsys.readouterr().err
    assert "planner: 2 iterations in a row without a group whose rewards can be compared" in told
    assert "saved after iteration 2" in told and steps(tmp_path) == ["step-000002"]
    assert start(tmp_path, "--trainer.max_idle_iterations", "2") == 0  # judges that answer again


@pytest.mark.slow
def test_a_run_shorter_than_the_limit_that_learned_nothing_does_not_end_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unevaluated: None
) -> None:
    plain = RewardSet.whole

    def refused(*given: object):
        scored = plain(*given)
        scored.temporal_following[:] = scored.step_following[:] = float("nan")
        return scored

    monkeypatch.setattr(RewardSet, "whole", refused)
    assert start(tmp_path, "--trainer.max_idle_iterations", "50") == EXIT_ABORTED
    assert steps(tmp_path) == ["step-000003"]


@pytest.mark.parametrize("iteration", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_step_that_ruins_the_executor_is_taken_back_and_its_checkpoint_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unevaluated: None,
    iteration: int,
) -> None:  # fmt: skip
    plain, calls = PolicyOptimizer.step, [0]

    def ruin(policy: PolicyOptimizer, progress: float) -> dict[str, float]:
        metrics = plain(policy, progress)
        calls[0] += 1
        if calls[0] == 2 * iteration:  # the executor's step: finite weights, useless latents
            with torch.no_grad():
                for parameter in policy.parameters.values():
                    parameter.fill_(1e19)
        return metrics

    monkeypatch.setattr(PolicyOptimizer, "step", ruin)
    more = ["--trainer.checkpoint_every", "1", "--trainer.keep_checkpoints", "1"]
    assert start(tmp_path, *more) == EXIT_ABORTED
    told, good = capsys.readouterr().err, iteration - 1
    assert f"iteration {iteration + 1}: found no video whose latents are finite" in told
    assert f"saved after iteration {good}" in told and steps(tmp_path) == [f"step-{good:06d}"]
    state = verify(tmp_path / "checkpoints" / f"step-{good:06d}").state
    assert all(bool((value.abs() < 100).all()) for value in state["executor"].values())
    assert start(tmp_path, *more) == 0 and [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_an_exception_in_start_up_is_one_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise KeyError("weights")

    once(monkeypatch, run_module, "build_policies", 1, fail)
    assert start(tmp_path) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(told) == 1 and told[0].startswith("error: KeyError: 'weights'; traceback in ")
    assert told[0].endswith("tracebacks.txt; no iteration was started")
    assert "in fail" in (tmp_path / "tracebacks.txt").read_text()


def test_a_signal_that_was_handled_does_not_come_again() -> None:
    with StopRequest().listening() as stop:
        try:
            signal.raise_signal(signal.SIGTERM)
        except Stopped:
            stop.handled()
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        time.sleep(3 * REMIND_S)  # would raise


@pytest.mark.slow
def test_going_on_from_an_earlier_checkpoint_sets_the_later_course_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--trainer.checkpoint_every", "1", "--trainer.keep_checkpoints", "1"]
    run = tmp_path / "run"
    assert start(run, *more[:2], "--trainer.keep_checkpoints", "3") == 0
    first, text = run / "checkpoints" / "step-000001", (run / "metrics.jsonl").read_text()
    table = (run / "evaluation.json").read_bytes()
    capsys.readouterr()
    assert start(run, *more, "--resume", str(first), "--trainer.iterations", "1") == 0
    assert steps(run) == ["step-000001"] and [row["step"] for row in read_metrics(run)] == [1]
    aside = run / "checkpoints" / "aside"
    assert sorted(path.name[:11] for path in aside.glob("step-*")) == ["step-000002", "step-000003"]
    records = aside / "records-1"
    assert (records / "metrics.jsonl").read_text() == text and (records / "evaluation.json").read_bytes() == table
    assert (records / "samples" / "step-000003.jsonl").is_file() and (records / "videos" / "index.json").is_file()
    assert {path.name[:11] for path in (run / "samples").iterdir()} == {"step-000001"}
    told = capsys.readouterr()
    assert "set aside" in told.err and "table of step-000001" in told.out
    (run / "metrics.jsonl").unlink()  # nothing to put aside is no fault
    assert start(run, *more, "--trainer.iterations", "2") == 0  # auto goes on from step 1, not from the abandoned 3
    assert [row["step"] for row in read_metrics(run)] == [2] and steps(run) == ["step-000002"]


@pytest.mark.slow
def test_a_run_that_goes_on_from_another_run_keeps_its_records_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], unevaluated: None
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    assert start(one, "--trainer.iterations", "2", "--trainer.checkpoint_every", "1") == 0
    shutil.copytree(one, other)
    shutil.rmtree(other / "checkpoints")  # ended before its first save
    marked = (other / "metrics.jsonl").read_text().replace('"step": 1,', '"step": 1, "mark": -99,')
    (other / "metrics.jsonl").write_text(marked)
    assert start(other, "--resume", str(one / "checkpoints" / "step-000002")) == 0
    assert [row["step"] for row in read_metrics(other)] == [3]
    assert "-99" in (other / "checkpoints" / "aside" / "records-1" / "metrics.jsonl").read_text()
    code = start(other, "--resume", str(one / "checkpoints" / "step-000002"))
    assert code == EXIT_USER_ERROR and "holds step-000003 of its own" in capsys.readouterr().err


def test_a_stop_in_a_destructor_is_no_traceback() -> None:
    class Failing:
        def __del__(self) -> None:
            raise ValueError("planted")

    hook = sys.unraisablehook
    seen: list[object] = []
    sys.unraisablehook = seen.append  # type: ignore[assignment]
    try:
        with pytest.raises(Stopped, match="SIGTERM"), StopRequest().listening():
            Failing()
            Swallowing()
            time.sleep(20)
    finally:
        sys.unraisablehook = hook
    assert [type(ignored.exc_value) for ignored in seen] == [ValueError]  # type: ignore[attr-defined]
