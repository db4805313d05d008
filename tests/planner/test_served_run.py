"""Training runs whose plans a server samples: the commands, with a server in this process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distributed.processes import BRIEF, trained
from planner.fake_server import FakeServer, Fault, error
from runs.same_run import equal, metrics
from safetensors.torch import load_file
from test_references import undocumented
from test_rollout_gap import another_policy  # noqa: F401

from tempact import train
from tempact.cli import EXIT_ABORTED, parse_run
from tempact.errors import EXIT_STOPPED, Stopped, UserError
from tempact.executor.executor import Executor
from tempact.policies import build_policies, build_trainer
from tempact.reporting import read_metrics
from tempact.rl.gspo import gspo_loss
from tempact.rl.importance import importance_weights
from tempact.runs.checkpoint import latest, verify
from tempact.trainer import RolloutGapTooWide

pytestmark = pytest.mark.usefixtures("log_handlers", "brief")
SMALL = ["shapeworld-smoke", *BRIEF]


def served(server: FakeServer, folder: Path, *more: str) -> list[str]:
    own = ["--planner.sampler", "served", "--planner.server", server.url, "--planner.server-attempt-s", "20"]
    return [*SMALL, *own, "--planner.server-outage-s", "20", "--output", str(folder), *more]


def names(server: FakeServer) -> list[str]:
    return [body["lora_name"] for body in server.sent("/v1/load_lora_adapter")]


@pytest.fixture(scope="module")
def whole(twin, tmp_path_factory: pytest.TempPathFactory) -> tuple[FakeServer, Path]:
    """A served run of this process, and its server."""
    server, folder = FakeServer(twin), tmp_path_factory.mktemp("served")
    assert train.main(served(server, folder)) == 0
    server.stop()
    return server, folder


def test_a_served_run_is_the_run_of_this_process(whole: tuple[FakeServer, Path], tmp_path: Path) -> None:
    server, folder = whole
    assert train.main([*SMALL, "--output", str(tmp_path)]) == 0
    inside, rows = read_metrics(tmp_path), read_metrics(folder)
    for own, other in zip(rows, inside, strict=True):
        assert own["planner/sampling_gap"] < 1e-4 and own["planner/server_canary"] < 1e-4
        assert own["planner/importance"] == pytest.approx(1.0, abs=1e-4) and own["planner/importance_truncated"] == 0
        assert undocumented(own) == []
        for name in ("planner/reward", "executor/reward", "planner/kl", "planner/loss", "planner/grad_norm"):
            assert own[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6, nan_ok=True), name
    assert rows[0]["planner/server_canary/others"] is None  # nothing differs before the first step
    assert rows[1]["planner/server_canary/others"] > 10 * rows[1]["planner/server_canary"]
    assert len(set(names(server))) == 2 and list(folder.glob("served/*")) == []


@pytest.mark.slow
def test_two_processes_ask_for_their_own_plans(
    whole: tuple[FakeServer, Path], server: FakeServer, tmp_path: Path
) -> None:
    alone = whole[0].sent("/v1/completions")
    arguments = served(server, tmp_path)
    trained(tmp_path, 2, *arguments[len(SMALL) : arguments.index("--output")])
    key = lambda body: [body[name] for name in ("seed", "max_tokens", "prompt", "logprobs")]  # noqa: E731
    own = server.sent("/v1/completions")
    assert sorted(map(key, own)) == sorted(map(key, alone)) and len(own) > 4
    assert len(names(server)) == 2 and not server.adapters
    for one, two in zip(read_metrics(whole[1]), read_metrics(tmp_path), strict=True):
        for name in ("planner/reward", "planner/grad_norm", "planner/sampling_gap", "planner/importance"):
            assert one[name] == pytest.approx(two[name], rel=1e-6, abs=1e-9), name


def assert_same_end(one: Path, other: Path) -> None:
    """Metrics, optimisers and adapters of the last iteration, to the last bit."""
    own = [latest(folder) for folder in (one, other)]
    assert own[0] is not None and own[1] is not None
    assert equal(*(verify(checkpoint.path).state for checkpoint in own))
    assert equal(*(load_file(checkpoint.planner_dir / "adapter_model.safetensors") for checkpoint in own))
    rows = [
        [{name: value for name, value in row.items() if not name.endswith("_s")} for row in metrics(folder)]
        for folder in (one, other)
    ]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_plans_asked_for_ahead_are_those_of_their_turn(
    whole: tuple[FakeServer, Path], server: FakeServer, tmp_path: Path
) -> None:
    assert train.main([*served(server, tmp_path), "--planner.server-ahead", "false"]) == 0
    assert_same_end(whole[1], tmp_path)


def test_the_next_plans_are_under_way_while_the_executor_is_updated(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = parse_run(served(server, tmp_path), "program")[0]
    own = build_trainer(config, build_policies(config))
    update, seen = Executor.update, []

    def watched(self: Executor, *given):
        deadline = time.monotonic() + 20
        while len(server.sent("/v1/completions")) < 2 * 3 and len(names(server)) > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append((len(names(server)), len(server.sent("/v1/completions"))))
        return update(self, *given)

    monkeypatch.setattr(Executor, "update", watched)
    phases: list[str] = []
    first, _second = own.iterations(phases.append)
    own.close()
    count = len(first.plans.plans)
    assert seen == [(2, 2 * (count + 1)), (2, 2 * (count + 1))]  # nothing is asked for after the last one
    assert phases.count("step") == 2 and not server.adapters


@pytest.mark.slow
def test_a_stop_while_the_executor_is_updated_takes_the_planners_step_back(
    whole: tuple[FakeServer, Path], server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    update, calls = Executor.update, []

    def stopped(self: Executor, *given):
        calls.append(len(server.sent("/v1/completions")))
        if len(calls) == 2:
            raise Stopped("SIGTERM")
        return update(self, *given)

    monkeypatch.setattr(Executor, "update", stopped)
    assert train.main(served(server, tmp_path)) == EXIT_STOPPED
    assert "saved after iteration 1" in capsys.readouterr().err and not server.adapters
    saved = latest(tmp_path)
    assert saved is not None and verify(saved.path).state["done"] == 1
    assert train.main(served(server, tmp_path)) == 0
    ends = [latest(folder) for folder in (whole[1], tmp_path)]
    assert equal(*(load_file(end.planner_dir / "adapter_model.safetensors") for end in ends if end))
    assert equal(*(verify(end.path).state for end in ends if end))


@pytest.mark.usefixtures("another_policy")
def test_a_roll_out_gap_takes_the_planners_step_back(server: FakeServer, tmp_path: Path) -> None:
    config = parse_run(served(server, tmp_path), "program")[0]
    own = build_trainer(config, build_policies(config))
    before = {name: p.detach().clone() for name, p in own.planner_policy.parameters.items()}
    iterations = own.iterations(lambda phase: None)
    first = next(iterations)
    assert first.metrics["planner/loss"] != 0 and not any("grad_norm" in name for name in first.metrics)
    assert all(torch.equal(before[name], p) for name, p in own.planner_policy.parameters.items())
    assert not own.planner_policy.optimizer.state and own.ema.updates == 0 and own.done == 1
    with pytest.raises(RolloutGapTooWide, match=r"executor.max_rollout_gap"):
        next(iterations)
    own.close()
    assert not server.adapters


def dead(server: FakeServer) -> Fault:
    def fault(path: str, body: dict, number: int) -> tuple[int, bytes] | None:
        return error(503, "engine is gone") if len(names(server)) > 1 and path == "/v1/completions" else None

    return fault


def no_folder(server: FakeServer) -> Fault:
    def fault(path: str, body: dict, number: int) -> tuple[int, bytes] | None:
        lost = path == "/v1/load_lora_adapter" and number
        return error(404, f"Loading lora failed: No adapter found for {body['lora_path']}") if lost else None

    return fault


def half(server: FakeServer) -> Fault:
    def fault(path: str, body: dict, number: int) -> tuple[int, bytes] | None:
        if len(names(server)) < 2 or path != "/v1/completions":
            return None
        status, data = server.answer(path, body)
        return status, data[: len(data) // 2]

    return fault


def stale(server: FakeServer) -> Fault:
    server.stale = lambda name: names(server)[0]
    return lambda path, body, number: None


def another_model(server: FakeServer) -> Fault:
    def fault(path: str, body: dict, number: int) -> tuple[int, bytes] | None:
        if len(names(server)) > 1:
            with torch.no_grad():
                server.twin.head.weight.copy_(1.5 * server.kept)
        return None

    server.kept = server.twin.head.weight.detach().clone()
    return fault


FAULTS: dict[str, tuple[Callable[[FakeServer], Fault], str, tuple[str, ...]]] = {
    "dead": (dead, "no answer for", ("--planner.server-outage-s", "1", "--planner.server-attempt-s", "1")),
    "no folder": (no_folder, "cannot read", ()),
    "half replies": (half, "4 replies to one request are not as asked for", ()),
    "old adapter": (stale, "samples with", ("--planner.optim.lr", "1e-3")),
    "another model": (another_model, "computes another model", ()),
}


SOON = ("dead",)  # the others' faults are also in test_served.py


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SOON else pytest.mark.slow) for name in FAULTS]
)
def test_a_fault_ends_in_a_saved_run_that_goes_on(
    name: str, server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant, told, more = FAULTS[name]
    server.fault = plant(server)
    try:
        assert train.main([*served(server, tmp_path), *more]) == EXIT_ABORTED == 3
    finally:
        if name == "another model":
            with torch.no_grad():
                server.twin.head.weight.copy_(server.kept)
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if "planner.server" in line]
    assert len(lines) == 1 and told in lines[0] and "saved after iteration 1" in lines[0], err
    saved = latest(tmp_path)
    assert saved is not None and verify(saved.path).state["done"] == 1 and not server.adapters
    server.fault, server.stale = (lambda path, body, number: None), (lambda name: name)
    assert train.main([*served(server, tmp_path), *(more if name == "old adapter" else ())]) == 0
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--planner.sampler", "served"], "planner.server: found nothing; accepted: the server's address"),
        (["--planner.sampler", "vllm"], "planner.sampler: found 'vllm'; accepted: inside, served"),
        (["--planner.server", "localhost:8000"], r"planner.server: found 'localhost:8000'; accepted: an address http"),
        (
            ["--planner.server-outage-s", "9"],
            "planner.server_outage_s: found 9.0; accepted: at least planner.server_att",
        ),
        (["--planner.max-importance", "0.5"], "planner.max_importance: found 0.5; accepted: at least 1"),
    ],
)
def test_settings_that_cannot_work(more: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse_run([*SMALL, *more], "program")
    parse_run([*SMALL, "--planner.sampler", "served", "--planner.server", "https://host:1/some/path/v1/"], "program")


def test_importance_weights() -> None:
    sampled = torch.tensor([[-1.0, -2.0, 9.0], [-1.0, -3.0, -1.0], [-1.0, -1.0, -1.0], [0.0, 0.0, 0.0]])
    moves = torch.tensor([[0.2, -0.6, 5.0], [2.0, 1.0, 0.0], [-3.0, -3.0, -3.0], [1.0, 1.0, 1.0]])
    mask = torch.tensor([[True, True, False], [True] * 3, [True] * 3, [False] * 3])
    weights, cut = importance_weights(sampled + moves, sampled, mask, 2.0)
    torch.testing.assert_close(weights, torch.tensor([math.exp(-0.2), 2.0, math.exp(-3.0), 1.0]))
    assert cut.tolist() == [False, True, False, False]


def test_a_plan_counts_by_its_importance(twin) -> None:
    """The gradient of GSPO's loss is weighed with each plan's advantage, and not the divergence's."""
    generator = torch.Generator().manual_seed(0)
    old, reference = (-3 * torch.rand(4, 6, generator=generator) for _ in range(2))
    sampled = old - 0.5 * torch.randn(4, 6, generator=generator)
    mask, every = torch.ones(4, 6, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.2])
    weights, _ = importance_weights(old, sampled, mask, 2.0)
    gradients = []
    for worth in (advantage * weights, advantage):
        log_probs = old.clone().requires_grad_()
        loss, _ = gspo_loss(log_probs, old, reference, mask, worth, every, clip_low=1, clip_high=1, kl_weight=0.0)
        loss.backward()
        gradients.append(log_probs.grad)
    torch.testing.assert_close(gradients[0], gradients[1] * weights[:, None])
