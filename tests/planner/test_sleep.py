"""A server that sleeps but for its plans: the order of what is asked, and how faults end."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from distributed.processes import BRIEF, trained
from planner.fake_server import FakeServer, error
from test_references import undocumented

from tempact import train
from tempact.cli import EXIT_ABORTED
from tempact.distributed import Ranks
from tempact.planner import sleep
from tempact.planner.served import ServedSampler
from tempact.planner.server import ServerLost
from tempact.reporting import read_metrics
from tempact.runs import run as run_module
from tempact.runs.checkpoint import latest, verify
from tempact.types import Prompt
from tempact.worlds import ShapeWorld

pytestmark = pytest.mark.usefixtures("log_handlers", "brief")
PROMPTS = [Prompt("a", "A red circle jumps.")]
SMALL = ["shapeworld-smoke", *BRIEF]
LOAD, UNLOAD, PLAN = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/completions"
SLEEP, WAKE, STATE = "/sleep?level=1", "/wake_up", "/is_sleeping"


@pytest.fixture
def server(server: FakeServer) -> FakeServer:
    """It can sleep, and is awake."""
    server.sleeping = False
    return server


@pytest.fixture
def make(server: FakeServer, make_planner, tmp_path: Path) -> Iterator:
    """A sampler of the server, whose planner has these settings beside those that let it sleep."""
    opened = []

    def sampler(**settings) -> ServedSampler:
        address = {"sampler": "served", "server": server.url, "server_attempt_s": 30.0, "server_outage_s": 30.0}
        planner = make_planner(**address | {"server_sleep": True, "server_ahead": False} | settings)
        server.twin = make_planner()
        opened.append(ServedSampler(planner, tmp_path / "adapters", Ranks()))
        return opened[-1]

    yield sampler
    for each in opened:
        each.close()


def arguments(server: FakeServer, folder: Path, *more: str) -> list[str]:
    own = ["--planner.sampler", "served", "--planner.server", server.url, "--planner.server-ahead", "false"]
    limits = ["--planner.server-attempt-s", "20", "--planner.server-outage-s", "20"]
    return [*SMALL, *own, *limits, "--planner.server-sleep", "true", "--output", str(folder), *more]


def paths(server: FakeServer) -> list[str]:
    """What was asked, plans asked at once as one."""
    all_ = [path for path, _ in server.requests]
    return [path for before, path in zip(["", *all_], all_, strict=False) if (path, before) != (PLAN, PLAN)]


def test_the_server_is_awake_from_the_adapter_to_the_plans_alone(make, server: FakeServer, move) -> None:
    sampler, rows = make(), []
    for number in (1, 2):
        server.sleeping = True
        plans, metrics = sampler.sample(number, PROMPTS, 3, seed=11)
        assert server.sleeping and len(plans.plans) == 3
        assert 0 < metrics["planner/server_wake_s"] < 5 and 0 < metrics["planner/server_sleep_s"] < 5
        assert undocumented(metrics) == []
        rows.append(metrics)
        move(sampler.planner)
    first = [WAKE, STATE, LOAD, PLAN, SLEEP, STATE]
    assert paths(server) == [*first, WAKE, STATE, LOAD, PLAN, UNLOAD, PLAN, SLEEP, STATE]
    assert rows[1]["planner/server_canary"] < 1e-4 < rows[1]["planner/server_canary/others"]  # adapters outlive sleep
    sampler.close()
    assert paths(server)[-1] == UNLOAD and server.sleeping


def test_a_server_is_not_asked_of_sleep_by_a_sampler_that_leaves_it_awake(make, server: FakeServer) -> None:
    _, metrics = make(server_sleep=False).sample(1, PROMPTS, 2, seed=11)
    assert paths(server) == [LOAD, PLAN] and not {"planner/server_wake_s", "planner/server_sleep_s"} & metrics.keys()


def test_plans_of_a_server_that_sleeps_are_those_of_one_that_does_not(make, server: FakeServer) -> None:
    made = [make(server_sleep=slept).sample(1, PROMPTS, 3, seed=11)[0] for slept in (False, True)]
    assert made[0].plans == made[1].plans and torch.equal(made[0].tokens.log_probs, made[1].tokens.log_probs)


def test_memory_of_the_trainer_is_given_back_before_the_server_wakes_up(
    make, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append(len(server.requests)))
    sleep.release(torch.device("cpu"))
    assert asked == []
    monkeypatch.setattr("tempact.planner.served.release", lambda device: sleep.release(torch.device("cuda")))
    make().sample(1, PROMPTS, 2, seed=11)
    assert asked == [0] and paths(server)[0] == WAKE


def lost(sampler: ServedSampler, told: str) -> None:
    with pytest.raises(ServerLost, match=told):
        sampler.sample(1, PROMPTS, 2, seed=11)


def test_a_wake_up_that_hangs_or_fails_is_a_server_lost(make, server: FakeServer) -> None:
    hanging = threading.Event()
    server.fault = lambda path, body, number: hanging.wait(5) and None if path == WAKE else None
    began = time.monotonic()
    lost(make(server_attempt_s=0.2, server_outage_s=0.5), "no answer for . s, planner.server_outage_s .no reply within")
    hanging.set()
    assert time.monotonic() - began < 4 and LOAD not in paths(server)
    server.fault = lambda path, body, number: error(500, "CUDA Error: out of memory") if path == WAKE else None
    lost(make(), "does not wake up .status 500: CUDA Error: out of memory")
    server.fault = lambda path, body, number: (200, b"") if path == WAKE else None  # and goes on sleeping
    server.sleeping = True
    lost(make(), "4 replies to one request are not as asked for .it is still asleep")
    server.fault = lambda path, body, number: (200, b'{"status": "ok"}') if path == STATE else None
    lost(make(), "not whether it sleeps")
    assert LOAD not in paths(server)


def test_a_server_that_stays_awake_is_lost(make, server: FakeServer) -> None:
    server.fault = lambda path, body, number: (200, b"") if path == SLEEP else None
    lost(make(), "4 replies to one request are not as asked for .it is still awake")
    server.fault = lambda path, body, number: error(400, "level") if path == SLEEP else None
    lost(make(), "does not fall asleep .status 400: level")


@pytest.mark.parametrize("asleep", [True, False, None])
@pytest.mark.parametrize("sleeps", [True, False])
def test_the_start_of_a_run(asleep: bool | None, sleeps: bool, server: FakeServer, make) -> None:
    server.sleeping = asleep
    config = make(server_sleep=sleeps).planner.config
    if sleeps and asleep is None:
        command = "VLLM_SERVER_DEV_MODE=1 .*vllm serve MODEL --host 127.0.0.1 --enable-sleep-mode "
        command += ".*or planner.server_sleep false"
        with pytest.raises(ServerLost, match=f"has no sleep mode .status 404: Not Found.; accepted: {command}"):
            sleep.begin(config)
        return
    sleep.begin(config)
    assert server.sleeping == (None if asleep is None else sleeps)
    if not sleeps:
        assert (WAKE in paths(server)) == (asleep is True)
        server.stop()
        sleep.begin(config)  # the first plans tell it


def test_a_run_of_a_server_that_cannot_sleep_ends_before_weights_are_loaded(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.sleeping = None
    monkeypatch.setattr(ShapeWorld, "rewards", lambda *given: pytest.fail("weights of rewards are loaded"))
    monkeypatch.setattr(run_module, "build_policies", lambda config: pytest.fail("weights are loaded"))
    assert train.main(arguments(server, tmp_path)) == EXIT_ABORTED
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "planner.server" in line]
    assert "has no sleep mode" in line and "no iteration was started" in line


def test_a_run_that_fails_while_its_server_is_awake_leaves_it_asleep(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fault = lambda path, body, number: error(400, "no") if path == LOAD and number == 1 else None
    assert train.main(arguments(server, tmp_path)) == EXIT_ABORTED
    assert "saved after iteration 1" in capsys.readouterr().err and server.sleeping
    assert [path for path in paths(server) if path in (SLEEP, WAKE)] == [SLEEP, WAKE, SLEEP, WAKE, SLEEP]


def test_a_run_that_loses_its_server_asleep_is_resumed(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second wake-up is refused: the run is saved and goes on, and the server sleeps between its plans."""
    woken: list[int] = []

    def fault(path: str, body: dict, number: int) -> tuple[int, bytes] | None:
        woken.append(number) if path == WAKE else None
        return error(400, "not now") if path == WAKE and number == 1 else None

    server.fault = fault
    assert train.main(arguments(server, tmp_path)) == EXIT_ABORTED
    told = capsys.readouterr().err
    assert "does not wake up" in told and "saved after iteration 1" in told and server.sleeping
    before = len(server.requests)
    assert train.main(arguments(server, tmp_path)) == 0
    saved = latest(tmp_path)
    assert saved is not None and verify(saved.path).state["done"] == 2
    own = [path for path, _ in server.requests[before:]]
    assert own[:5] == [SLEEP, STATE, WAKE, STATE, LOAD] and server.sleeping and woken == [0, 1, 2]
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2] and not server.adapters
    assert all(row["planner/server_wake_s"] > 0 and row["planner/server_sleep_s"] > 0 for row in rows)


class Threads(Ranks):
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, meeting: threading.Barrier, values: dict[int, object]):
        super().__init__(rank, meeting.parties)
        self.meeting_point, self.values = meeting, values

    @property
    def alone(self) -> bool:
        return False

    def gather(self, value):
        self.values[self.rank] = value
        self.meeting_point.wait(20)
        found = [self.values[rank] for rank in range(self.size)]
        self.meeting_point.wait(20)
        return found


def test_the_first_of_two_lets_the_server_sleep_once_both_have_their_plans(
    make, make_planner, server: FakeServer, tmp_path: Path
) -> None:
    """The second's plans come late, while the first has its own long since."""
    meeting, values = threading.Barrier(2), {}
    samplers = [make(), make()]
    for rank, sampler in enumerate(samplers):
        sampler.ranks = Threads(rank, meeting, values)
    _asked, seeds = samplers[0].planner.requests(PROMPTS, 4, 11)
    ended: list[int] = []

    def fault(path: str, body: dict, number: int) -> None:
        if path == PLAN and body["seed"] in seeds:
            time.sleep(0.3 if body["seed"] in seeds[2:] else 0.0)
            ended.append(len(server.sent(SLEEP)))

    server.fault = fault
    with ThreadPoolExecutor(2) as pool:
        given = [pool.submit(sampler.sample, 1, PROMPTS, 4, 11) for sampler in samplers]
        (one, metrics), (two, others) = [each.result(20) for each in given]
    assert one.plans == two.plans and len(one.plans) == 4 and metrics == others
    assert paths(server)[:3] == [WAKE, STATE, LOAD] and paths(server)[-2:] == [SLEEP, STATE]
    assert ended == [0] * 4 and [len(server.sent(path)) for path in (WAKE, SLEEP, LOAD)] == [1, 1, 1]


@pytest.mark.slow
def test_two_processes_of_a_run_wake_the_server_and_let_it_sleep_together(server: FakeServer, tmp_path: Path) -> None:
    given = arguments(server, tmp_path)
    trained(tmp_path, 2, *given[len(SMALL) : given.index("--output")])
    own = paths(server)
    assert own.count(SLEEP) == 3 and own.count(WAKE) == 2 and own[:5] == [SLEEP, STATE, WAKE, STATE, LOAD]
    turns = [path for path in own if path in (SLEEP, WAKE, PLAN)]
    between = "".join({SLEEP: "s", WAKE: "w", PLAN: "p"}[path] for path in turns)
    assert re.fullmatch(r"s(wp+s){2}", between) and server.sleeping and len(read_metrics(tmp_path)) == 2
