"""`tempact.doctor judges` against servers that judge well, badly, not at all, or are not there."""

from __future__ import annotations

import itertools
import json
import socket
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from rewards.judge_server import GOOD, Server

from tempact import doctor
from tempact.diagnostics.judges import findings, why_unreachable
from tempact.rewards import Span
from tempact.rewards.judged import canned, canned_video
from tempact.rewards.judges.config import ROLES

KEY = "sk-canary-0d9a"


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(says=lambda kind: (200, json.dumps(GOOD[kind])), models=(200, ["m", "n"])) -> Server:
        servers.append(Server(says, models))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def environment(address: str, **more: str) -> dict[str, str]:
    return {"TEMPACT_JUDGE_BASE_URL": address, "TEMPACT_JUDGE_MODEL": "m", "TEMPACT_JUDGE_API_KEY": KEY} | more


def lines_of(found: dict[str, str], timeout_s: float = 5.0) -> list[tuple[str, str]]:
    lines = list(findings(timeout_s, found))
    assert all("\n" not in line and KEY not in line for _, line in lines)
    return lines


def test_good_judges(serve, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    for name, value in environment(server.address).items():
        monkeypatch.setenv(name, value)
    assert doctor.main(["judges"]) == 0
    printed = capsys.readouterr().out.splitlines()
    host = server.address.removeprefix("http://")
    scores = dict(zip(ROLES, ("0.90", "0.90", "0.80"), strict=True))
    assert len(printed) == 3
    for line, (role, score) in zip(printed, scores.items(), strict=True):
        assert line.startswith(f"ok    judge {role}: {host}, m: score {score} in ") and line.endswith(" s")
    assert [len(asked["messages"][1]["content"]) - 1 for asked in server.requests[1:]] == [6, 6]  # pictures


def test_every_server_of_a_role_is_asked_and_the_dead_one_is_named(serve) -> None:
    server = serve()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    started = time.monotonic()
    lines = lines_of(environment(f"{dead},{server.address}"), 60.0)
    assert time.monotonic() - started < 10  # no outage is waited for
    assert [status for status, _ in lines] == ["fault", "ok"] * 3
    assert "nothing answers at 127.0.0.1:" in lines[0][1] and "docs/judges.md" in lines[0][1]


@pytest.mark.parametrize(
    ("status", "reply", "found"),
    [
        (200, "I like it.", "not one JSON object"),
        (200, json.dumps({"score": 1}), "Field required"),
        (200, json.dumps(GOOD["plan"] | {"coverage": 7}), "coverage: Input should be less than or equal to 1"),
        (200, f"<think>{KEY}", "the thinking block is not closed"),
        (400, f"bad key {KEY}", "HTTP 400"),
        (500, "out of memory", "HTTP 500"),
    ],
)
def test_what_is_wrong_is_said(serve, status: int, reply: str, found: str) -> None:
    server = serve(lambda kind: (status, reply) if kind == "plan" else (200, json.dumps(GOOD[kind])))
    lines = lines_of(environment(server.address), 1.0)
    assert [state for state, _ in lines] == ["fault", "ok", "ok"]
    assert found in lines[0][1] and "judge plan_quality: 127.0.0.1:" in lines[0][1]


@pytest.mark.parametrize(
    ("models", "found"),
    [
        ((401, {"message": f"wrong key {KEY}"}), "HTTP 401"),
        ((403, {"message": "no"}), "HTTP 403"),
        ((200, list("abcdefg")), "the server has no model m; it serves a, b, c, d, e, ..."),
        ((200, [KEY]), "it serves ***"),
    ],
)
def test_a_wrong_key_or_model_is_said_at_once(serve, models: tuple[int, object], found: str) -> None:
    started = time.monotonic()
    lines = lines_of(environment(serve(models=models).address), 60.0)
    assert time.monotonic() - started < 10
    assert [state for state, _ in lines] == ["fault"] * 3 and all(found in line for _, line in lines), lines


@pytest.mark.parametrize("models", [(404, "no such page"), (500, "no"), (200, [])])
def test_a_server_that_lists_no_models_is_asked_all_the_same(serve, models: tuple[int, object]) -> None:
    assert [state for state, _ in lines_of(environment(serve(models=models).address))] == ["ok"] * 3


def test_a_low_score_is_noted(serve) -> None:
    server = serve(lambda kind: (200, json.dumps(GOOD[kind] | ({"final": 0, "action": 0} if kind == "part" else {}))))
    assert [status for status, _ in lines_of(environment(server.address))] == ["ok", "ok", "note"]


def test_what_the_environment_lacks_is_said_for_each_role(serve, monkeypatch, capsys) -> None:
    lines = lines_of({"VLLM_BASE_URL": serve().address, "VLLM_MODEL": "m"})
    assert [status for status, _ in lines] == ["fault", "ok", "ok"]
    assert "LLM_BASE_URL" in lines[0][1]
    for prefix in ("TEMPACT_JUDGE_", "VLLM_", "LLM_"):
        monkeypatch.delenv(f"{prefix}BASE_URL", raising=False)
    assert doctor.main(["judges"]) == 2
    assert capsys.readouterr().out.count("fault judge") == 3


@pytest.mark.parametrize("arguments", [["--tiemout", "3"], ["--timeout", "0"], ["--timeout", "x"], ["extra"]])
def test_wrong_options_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["judges", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "accepted: " in error and error.count("\n") == 1


def test_the_held_out_judge_is_asked_where_it_has_an_address(serve) -> None:
    server, other = serve(), serve(models=(200, ["gemini"]))
    own = {"TEMPACT_JUDGE_HELD_OUT_BASE_URL": other.address, "TEMPACT_JUDGE_HELD_OUT_MODEL": "gemini"}
    lines = lines_of(environment(server.address, **own))
    assert [status for status, _ in lines] == ["ok"] * 4 and len(other.requests) == 1
    assert lines[3][1].startswith(f"judge held_out: {other.address.removeprefix('http://')}, gemini: score 0.90 in ")


def test_a_name_that_is_no_host() -> None:
    assert "nothing answers at no-such-host.invalid:443" in why_unreachable("https://no-such-host.invalid/v1")


def test_the_canned_video_follows_the_canned_plan() -> None:
    plans, frames, spans = canned()
    video = canned_video()
    assert frames.shape == (1, 1, *video.shape) and video.dtype == torch.uint8
    red = (video[:, 0] > 180) & (video[:, 1] < 80)
    blue = (video[:, 2] > 180) & (video[:, 0] < 80)
    columns = torch.arange(video.shape[-1], dtype=torch.float32)
    centres = [(mask.float().sum(0) @ columns / mask.sum()).item() for mask in red]
    assert centres[0] < 0.2 * video.shape[-1] and centres[21] > 0.8 * video.shape[-1]
    assert all(b >= a - 0.5 for a, b in itertools.pairwise(centres)) and centres[21] == centres[-1]
    assert not blue[:22].any() and blue[22:].any((1, 2)).all()  # the switch at latent frame 6 is pixel frame 21
    assert spans == [Span(21, 44, plans[0].steps[1])] and plans[0].steps[1].start == 6
