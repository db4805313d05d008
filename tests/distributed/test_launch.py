"""Starting the processes of a run on one machine: exit codes, the one line, signals, restarts; with small workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tempact import train
from tempact.distributed import launch as launching
from tempact.distributed.launch import launch

REPOSITORY = Path(__file__).parents[2]
# after its folder, argument i is what rank i does
WORKER = """
import os, signal, sys, time
from pathlib import Path
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
folder = Path(os.environ["TEMPACT_LAUNCH"])

def stopped(number, frame):
    Path(sys.argv[1], f"signal-{rank}").open("a").write(f"{number} ")
    time.sleep(float(saves))
    os._exit(int(then))

what = sys.argv[2 + rank]
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
if what.startswith("once-"):
    what = what[5:] if first else "0"
verb, _, rest = what.partition(":")
if verb == "told":
    print("error: a cause", file=sys.stderr, flush=True)
    (folder / "told").touch()
    sys.exit(int(rest))
elif verb == "first-told":
    if first:
        (folder / "told").touch()
    sys.exit(int(rest))
elif verb == "kill":
    os.kill(os.getpid(), int(rest))
elif verb == "waits":
    saves, then = rest.split(",")
    signal.signal(signal.SIGTERM, stopped)
    Path(sys.argv[1], f"ready-{rank}").touch()
    time.sleep(60)
elif verb == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(sys.argv[1], f"ready-{rank}").write_text(str(os.getpid()))
    time.sleep(60)
elif verb == "env":
    os.write(1, (" ".join(os.environ[name] for name in rest.split(",")) + "\\n").encode())
elif verb == "store":
    import torch.distributed as dist
    dist.init_process_group("gloo")
    values = [None] * world
    dist.all_gather_object(values, rank)
    os.write(1, f"{values}\\n".encode())  # whole: print writes the line's end by itself
    dist.destroy_process_group()  # else gloo's threads may abort a process that ends
else:
    sys.exit(int(verb))
"""


@pytest.fixture
def entry(tmp_path: Path) -> tuple[str, ...]:
    file = tmp_path / "worker.py"
    file.write_text(WORKER)
    return str(file), str(tmp_path)


def rank(number: int, how: str) -> str:
    return f"error: rank {number} on {os.uname().nodename} {how}\n"


@pytest.mark.parametrize(
    ("workers", "code", "told"),
    [
        (["0", "0"], 0, ""),
        (["1", "waits:0,130"], 1, rank(0, "ended with exit code 1")),
        (["waits:0,130", "2"], 2, rank(1, "ended with exit code 2")),
        (["told:2", "waits:0,0"], 2, "error: a cause\n"),
        (["waits:0,3", "told:3"], 3, "error: a cause\n"),
        (["130", "130"], 130, ""),
        (["0", "130"], 130, ""),
        (["waits:0.3,1", "130"], 1, rank(0, "ended with exit code 1")),  # it could not save
        (["waits:0,1", f"kill:{signal.SIGKILL:d}"], 137, rank(1, "was ended by SIGKILL")),
        (["waits:0,1", f"kill:{signal.SIGSEGV:d}"], 139, rank(1, "was ended by SIGSEGV")),
        ([f"kill:{signal.SIGTERM:d}", "waits:0,130"], 130, ""),  # before a process can take signals
    ],
)
def test_the_exit_code_is_that_of_the_first_failure_and_it_is_told_once(
    workers: list[str], code: int, told: str, entry: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(workers, 2, 0, entry) == code
    assert capfd.readouterr() == ("", told)


def test_a_process_that_was_killed_comes_before_those_that_miss_it(
    entry: tuple[str, ...], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "POLL_S", 3.0)  # both are seen at once, on a slow machine too
    monkeypatch.setattr(time, "time", lambda: 5.0)
    assert launch(["0", "1", "kill:9"], 3, 0, entry) == 137
    assert capfd.readouterr().err == rank(2, "was ended by SIGKILL")


def test_processes_have_torchruns_variables_and_one_thread(
    entry: tuple[str, ...], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = "RANK,LOCAL_RANK,WORLD_SIZE,LOCAL_WORLD_SIZE,GROUP_RANK,MASTER_ADDR,OMP_NUM_THREADS"
    assert launch([f"env:{names}"] * 2, 2, 0, entry) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["0 0 2 2 0 127.0.0.1 1", "1 1 2 2 0 127.0.0.1 1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    launch(["env:OMP_NUM_THREADS"], 1, 0, entry)
    assert capfd.readouterr().out == "3\n"


def test_processes_meet_in_the_launchers_store(entry: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(["store"] * 2, 2, 0, entry) == 0
    assert capfd.readouterr() == ("[0, 1]\n" * 2, "")


def test_lost_processes_start_again_as_often_as_asked(
    entry: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(["0", "once-kill:9"], 2, 2, entry) == 0
    lost = rank(1, "was ended by SIGKILL")[:-1].replace("error", "warning")
    assert capfd.readouterr() == ("", f"{lost}; all processes start again (1 of 2)\n")
    assert launch(["0", "kill:9"], 2, 1, entry) == 137
    assert capfd.readouterr().err == f"{lost}; all processes start again (1 of 1)\n{rank(1, 'was ended by SIGKILL')}"


def test_what_was_told_before_a_restart_is_no_longer_told(
    entry: tuple[str, ...], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert launch(["first-told:1"], 1, 1, entry) == 1
    assert capfd.readouterr().err.splitlines()[1:] == [rank(0, "ended with exit code 1").strip()]


@pytest.mark.parametrize("code", [2, 3, 130])
def test_what_would_end_so_again_is_not_started_again(
    code: int, entry: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch([f"told:{code}"], 1, 3, entry) == code
    assert capfd.readouterr().err == "error: a cause\n"


# signals to the launcher

PARENT = (
    "import sys; from tempact.distributed.launch import launch; from tempact.errors import guarded; "
    "sys.exit(guarded(lambda: launch({!r}, {}, {}, {!r})))"
)


def started(workers: list[str], entry: tuple[str, ...], restarts: int = 0) -> subprocess.Popen[str]:
    """A launcher in a session of its own whose processes are ready."""
    code = PARENT.format(workers, len(workers), restarts, entry)
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    ready, deadline = Path(entry[1]), time.monotonic() + 60
    while len([*ready.glob("ready-*")]) < len(workers):
        assert parent.poll() is None and time.monotonic() < deadline, parent.communicate()
        time.sleep(0.05)
    return parent


def signals(entry: tuple[str, ...]) -> list[str]:
    return [file.read_text() for file in sorted(Path(entry[1]).glob("signal-*"))]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_asks_every_process_once_and_waits_until_the_last_has_saved(
    number: int, entry: tuple[str, ...]
) -> None:
    """Rank 1 leaves at once, which must not hurry rank 0; a restart is not what was asked for."""
    parent = started(["waits:1,130", "waits:0,130"], entry, restarts=2)
    parent.send_signal(number)
    assert parent.communicate(timeout=30) == ("", "") and parent.returncode == 130
    assert signals(entry) == [f"{signal.SIGTERM:d} "] * 2


def test_a_process_that_fails_to_save_is_told_and_gives_its_code(entry: tuple[str, ...]) -> None:
    parent = started(["waits:0.2,1", "waits:0,130"], entry)
    parent.send_signal(signal.SIGTERM)
    assert parent.communicate(timeout=30) == ("", rank(0, "ended with exit code 1")) and parent.returncode == 1


def test_the_third_signal_ends_what_does_not_listen(entry: tuple[str, ...]) -> None:
    parent = started(["deaf"], entry)
    for _ in range(3):
        time.sleep(0.3)
        assert parent.poll() is None
        parent.send_signal(signal.SIGINT)
    assert parent.communicate(timeout=30) == ("", "stopped by SIGINT\n") and parent.returncode == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path(entry[1], "ready-0").read_text()), 0)


# options


def test_the_options_of_the_launcher_are_not_those_of_its_processes() -> None:
    words = ["shapeworld", "--gpus", "2", "--seed", "3", "--max-restarts=1", "--max_restarts", "2", "--dry-run"]
    assert launching.without(words, "gpus", "max_restarts") == ["shapeworld", "--seed", "3", "--dry-run"]


@pytest.mark.parametrize(
    ("arguments", "ranks", "told"),
    [
        (["--gpus", "-1"], "1", "--gpus: found -1; accepted: 0 (as started), or 1 to 64"),
        (["--gpus", "65"], "1", "--gpus: found 65; accepted: 0 (as started), or 1 to 64"),
        (["--gpus", "two"], "1", "--gpus: found 'two'; accepted: a whole number"),
        (["--gpus", "2", "--max-restarts", "-1"], "1", "--max_restarts: found -1; accepted: at least 0"),
        (["--gpus", "2", "--sed", "1"], "1", "--sed: unknown option; nearest: --seed"),
        (["--max-restarts", "2"], "1", "--max_restarts: found 2 without --gpus; accepted: with --gpus N"),
        (["--gpus", "2"], "4", "--gpus: found 2 in one of 4 processes, as torchrun starts them; accepted: nothing"),
        (["--gpus", "1"], "2", "--gpus: found 1 in one of 2 processes"),
    ],
)
def test_wrong_options_are_one_line_before_any_process(
    arguments: list[str], ranks: str, told: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setattr(launching, "launch", None)
    assert train.main(["shapeworld-smoke", *arguments]) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"error: {told}") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "started"),
    [
        (["--gpus", "3"], (["shapeworld-smoke"], 3, 0)),
        (["--gpus", "2", "--seed", "4", "--max-restarts", "5"], (["shapeworld-smoke", "--seed", "4"], 2, 5)),
        (["--gpus", "1", "--max-restarts", "1"], (["shapeworld-smoke"], 1, 1)),
        (["--gpus", "1"], None),
        (["--gpus", "0"], None),
        ([], None),
        (["--gpus", "3", "--help"], None),
        (["--gpus", "3", "--dry-run", "--device", "cpu"], None),
    ],
)
def test_processes_are_started_for_training_alone(
    arguments: list[str], started: tuple | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple] = []
    monkeypatch.setattr(launching, "launch", lambda *given: seen.append(given) or 7)

    def trained(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tempact.runs.run.train", trained)
    monkeypatch.setattr("tempact.diagnostics.dry_run.dry_run", lambda config, gib, ranks: ([f"{ranks} ranks"], True))
    try:
        code = train.main(["shapeworld-smoke", *arguments])
    except SystemExit as ended:
        code = ended.code
    assert seen == ([(*started, ("-m", "tempact.train"))] if started else []) and (code == 7) is bool(started)


@pytest.mark.parametrize(
    ("device", "gpus", "processes"), [("auto", 1, 3), ("cuda", 2, 3), ("cpu", 1, 3), ("auto", 0, 3), ("auto", 4, 3)]
)
def test_processes_that_share_a_gpu_are_warned_of(
    device: str, gpus: int, processes: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    launching.warn_of_few_gpus(device, processes)
    plural = "s" * (gpus > 1)
    warned = f"warning: --gpus: 3 processes share {gpus} GPU{plural}, and exchange through gloo\n"
    assert capfd.readouterr().err == (warned if device != "cpu" and 0 < gpus < 3 else "")
