"""Plans from a server: what is asked for, what is read, how faults end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from planner.fake_server import FakeServer, error

from tempact.distributed import Ranks
from tempact.planner import server as client
from tempact.planner.planner import Planner
from tempact.planner.served import ServedSampler
from tempact.planner.server import API_KEY, Replies, ServerLost
from tempact.types import Prompt

PROMPTS = [Prompt("a", "A red circle jumps."), Prompt("b", "The square grows, and then the red circle turns blue.")]
INSTRUCTION = PROMPTS[0].text


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def served(make_planner, tmp_path: Path) -> Iterator[Callable[..., tuple[Planner, FakeServer, ServedSampler]]]:
    """A planner, a server and the sampler between them."""
    opened = []

    def make(
        twin: Planner | None = None, runtime: bool = True, **settings
    ) -> tuple[Planner, FakeServer, ServedSampler]:
        server = FakeServer(twin or make_planner(), runtime)
        address = {"sampler": "served", "server": server.url, "server_attempt_s": 30.0, "server_outage_s": 30.0}
        planner = make_planner(**address | settings)
        sampler = ServedSampler(planner, tmp_path / "adapters", Ranks())
        opened.extend([sampler.close, server.stop])
        return planner, server, sampler

    yield make
    for close in opened:
        close()


def responder(sampler: ServedSampler):
    return lambda prompts, seeds: sampler.responses(sampler.begin(prompts, seeds))


def sample(planner: Planner, sampler: ServedSampler, count: int = 3):
    return planner.sample(PROMPTS, count, seed=11, respond=responder(sampler))


def test_served_plans_are_those_of_the_planner(served, move) -> None:
    planner, _server, sampler = served()
    move(planner)
    sampler.publish(INSTRUCTION)
    made, own = sample(planner, sampler), planner.sample(PROMPTS, 3, seed=11)
    assert made.plans == own.plans and torch.equal(made.tokens.input_ids, own.tokens.input_ids)
    assert torch.equal(made.tokens.response_mask, own.tokens.response_mask)
    torch.testing.assert_close(made.tokens.log_probs, own.tokens.log_probs, rtol=0, atol=1e-5)
    few = planner.sample(PROMPTS[:1], 2, seed=11, respond=responder(sampler))
    assert few.plans == made.plans[:2]


def test_a_request_is_that_of_the_plan_alone(served) -> None:
    planner, server, sampler = served()
    sampler.publish(INSTRUCTION)
    sample(planner, sampler)
    planner.sample(PROMPTS[:1], 2, seed=11, respond=responder(sampler))
    canary, *plans = server.sent("/v1/completions")
    assert canary["logprobs"] == client.TOP and canary["max_tokens"] == 16
    first, other = plans[:6], plans[6:]
    assert len({body["seed"] for body in first}) == 6 and all(body in first for body in other)
    ids = planner.tokenizer([planner.prompt_text(p.text) for p in PROMPTS], add_special_tokens=False)["input_ids"]
    assert sorted(body["prompt"] for body in first) == sorted(3 * ids)
    expected = {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "max_tokens": 24, "ignore_eos": True, "n": 1,
        "stop_token_ids": planner.generation.eos_token_id, "return_token_ids": True, "logprobs": 0,
    }  # fmt: skip
    assert all(body | expected == body for body in first)


def test_the_planners_sampling_parameters_are_the_servers(served) -> None:
    planner, server, sampler = served(train=False, temperature=0.7, top_p=0.9, top_k=5)
    sampler.publish(INSTRUCTION)
    made = sample(planner, sampler)
    canary, *plans = server.sent("/v1/completions")
    assert (canary["temperature"], canary["top_p"], canary["top_k"]) == (1.0, 1.0, 0)
    assert {(body["temperature"], body["top_p"], body["top_k"]) for body in plans} == {(0.7, 0.9, 5)}
    assert made.plans == planner.sample(PROMPTS, 3, seed=11).plans


def test_each_iteration_has_a_name_of_its_own_and_leaves_nothing(served, move, tmp_path: Path) -> None:
    planner, server, sampler = served()
    names = []
    for _ in range(3):
        metrics = sampler.publish(INSTRUCTION)
        assert list(server.adapters) == [sampler.name] == [path.name for path in (tmp_path / "adapters").iterdir()]
        assert 0 < metrics["planner/server_swap_s"] < 5 and metrics["planner/server_canary"] < 1e-4
        names.append(sampler.name)
        move(planner)
    assert len(set(names)) == 3 and all(name.endswith(f"-{n}") for n, name in enumerate(names, 1))
    sampler.close()
    assert not server.adapters and not [*(tmp_path / "adapters").iterdir()]


def test_a_key_is_sent_and_not_told(served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY, "sk-canary-a17e")
    _planner, server, sampler = served()
    assert sampler.server.headers["authorization"] == "Bearer sk-canary-a17e"
    server.fault = lambda path, body, number: error(401, "Unauthorized")
    with pytest.raises(ServerLost, match="401") as raised:
        sampler.publish(INSTRUCTION)
    assert "sk-canary" not in str(raised.value)


def test_the_canary_is_quiet_before_the_first_change_and_where_nothing_changed(served) -> None:
    _, server, sampler = served()
    server.stale = lambda name: None  # no adapter, which is what a fresh one amounts to
    for _ in range(2):
        metrics = sampler.publish(INSTRUCTION)
        assert metrics["planner/server_canary"] < 1e-4 and metrics["planner/server_canary/others"] != 0


@pytest.mark.parametrize("stuck", ["first", "base"])
def test_the_canary_sees_an_adapter_that_is_not_used(served, move, stuck: str) -> None:
    planner, server, sampler = served(max_sampling_gap=1e6)
    sampler.publish(INSTRUCTION)
    move(planner)
    metrics = sampler.publish(INSTRUCTION)
    assert metrics["planner/server_canary"] < 1e-4 < 0.01 < metrics["planner/server_canary/others"]
    second = sampler.name
    server.stale = {"first": lambda name: second, "base": lambda name: None}[stuck]
    with torch.no_grad():
        for parameter in planner.parameters().values():
            parameter.mul_(1.02)  # a small step
    names = {"first": "the adapter of an earlier iteration", "base": "the adapter of the start"}
    with pytest.raises(ServerLost, match=f"samples with {names[stuck]}: the canary's log-probs"):
        sampler.publish(INSTRUCTION)


def test_the_canary_finds_a_step_that_rounding_hides_when_it_has_become_larger(served, move) -> None:
    """A server that rounds, and keeps an adapter: no alarm while that is within rounding, one as soon as it is not."""
    planner, server, sampler = served(max_sampling_gap=1e6)
    move(planner)
    answer = server.complete

    def rounded(body: dict) -> tuple[int, bytes]:
        status, data = answer(body)
        reply = json.loads(data)
        (choice,) = reply["choices"]
        for top in choice["logprobs"]["top_logprobs"]:
            for name, value in top.items():
                top[name] = min(0.0, round(value * 32) / 32)
        return status, json.dumps(reply).encode()

    server.complete = rounded
    sampler.publish(INSTRUCTION)
    first = sampler.name
    step = {name: 0.0003 * torch.randn_like(p) for name, p in planner.parameters().items()}
    server.stale = lambda name: first
    alarmed = 0
    for number in range(2, 200):
        with torch.no_grad():
            for name, parameter in planner.parameters().items():
                parameter.add_(step[name])
        try:
            sampler.publish(INSTRUCTION)
        except ServerLost as lost:
            alarmed = number
            assert "earlier iteration" in str(lost)
            break
    assert 3 <= alarmed < 200


def test_a_rounding_server_that_follows_is_believed(served, move) -> None:
    planner, server, sampler = served()
    move(planner)
    generator = torch.Generator().manual_seed(3)
    answer = server.complete

    def noisy(body: dict) -> tuple[int, bytes]:
        status, data = answer(body)
        reply = json.loads(data)
        for top in reply["choices"][0]["logprobs"]["top_logprobs"]:
            for name in top:
                top[name] = min(0.0, top[name] + 0.03 * torch.randn((), generator=generator).item())
        return status, json.dumps(reply).encode()

    server.complete = noisy
    for _ in range(11):
        sampler.publish(INSTRUCTION)
        with torch.no_grad():
            for parameter in planner.parameters().values():
                parameter.add_(0.0002 * torch.randn(parameter.shape, generator=generator))


def test_another_base_model_is_seen(served, make_planner, move) -> None:
    twin = make_planner()
    with torch.no_grad():
        twin.head.weight.mul_(1.5)
    _, _, sampler = served(twin)
    with pytest.raises(
        ServerLost,
        match="computes another model: .* nats from .*; accepted: at most planner.max_sampling",
    ):
        sampler.publish(INSTRUCTION)
    _, _, sampler = served(make_planner(rank=2))  # an adapter that does not fit
    with pytest.raises(ServerLost, match="refuses the adapter .*does not fit.*accepted: a server of tiny with"):
        sampler.publish(INSTRUCTION)


def test_a_server_without_runtime_adapters_and_one_that_cannot_read_the_folder(served, tmp_path: Path) -> None:
    _, _, sampler = served(runtime=False)
    with pytest.raises(ServerLost, match="takes no adapters while it runs; .*VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        sampler.publish(INSTRUCTION)
    planner, _, sampler = served()
    save = planner.save_adapter
    planner.save_adapter = lambda folder: save(tmp_path / "elsewhere")
    with pytest.raises(ServerLost, match=r"cannot read .*adapters.tempact-.*-1 .*accepted: a planner.server_folder"):
        sampler.publish(INSTRUCTION)
    (tmp_path / "file").write_text("")
    sampler.folder = tmp_path / "file"
    planner.save_adapter = save
    with pytest.raises(ServerLost, match=r"planner.server_folder: .*: not writable"):
        sampler.publish(INSTRUCTION)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def shorter(data: bytes) -> bytes:
    """The half of a response, whole as JSON."""
    reply = json.loads(data)
    choice = reply["choices"][0]
    choice["token_ids"] = choice["token_ids"][:-1]
    choice["logprobs"]["token_logprobs"] = choice["logprobs"]["token_logprobs"][:-1]
    return json.dumps(reply).encode()


def without_a_number(data: bytes) -> bytes:
    reply = json.loads(data)
    reply["choices"][0]["logprobs"]["token_logprobs"][0] = None
    return json.dumps(reply).encode()


def late(data: bytes) -> bytes:
    time.sleep(2.5)
    return data


def test_faults_that_pass_leave_the_plans_as_they_are(served, move) -> None:
    """Every request fails twice, each in its own way, of which a slow reply is one, once."""
    planner, server, sampler = served(server_attempt_s=2.0, server_outage_s=30.0)
    move(planner)
    sampler.publish(INSTRUCTION)
    expected = sample(planner, sampler)
    seeds = [body["seed"] for body in server.sent("/v1/completions")[1:]]
    faults = dict(zip(seeds, ("429", "503", cut, shorter, without_a_number, late), strict=True))
    seen = dict.fromkeys(seeds, 0)

    def fault(path: str, body: dict, number: int) -> tuple[int, bytes] | None:
        own = faults[body["seed"]]
        seen[body["seed"]] += 1
        if seen[body["seed"]] > (1 if own is late else 2):
            return None
        return error(int(own), "too many") if isinstance(own, str) else (200, own(server.answer(path, body)[1]))

    server.fault = fault
    made = sample(planner, sampler)
    assert made.plans == expected.plans and torch.equal(made.tokens.log_probs, expected.tokens.log_probs)
    assert [*seen.values()] == [3, 3, 3, 3, 3, 2]


def test_a_server_that_goes_away_is_waited_for_and_then_lost(served) -> None:
    planner, server, sampler = served(server_outage_s=0.6)
    sampler.publish(INSTRUCTION)
    server.stop()
    began = time.monotonic()
    with pytest.raises(ServerLost, match=r"no answer for [\d.]+ s, planner.server_outage_s \(ConnectionRefused"):
        sample(planner, sampler)
    assert 0.5 < time.monotonic() - began < 4
    server.start()  # without the adapter
    with pytest.raises(ServerLost, match="refuses a plan .status 404: The model .* does not exist"):
        sample(planner, sampler)


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (b"{}", "no completion with token ids and log-probs, KeyError: 'choices'"),
        (
            b'{"model": "base", "choices": [{"token_ids": [1], "logprobs": {"token_logprobs": [0]}}]}',
            "the model 'base'",
        ),
    ],
)
def test_a_server_that_always_answers_something_else_is_lost_at_once(served, reply: bytes, told: str) -> None:
    planner, server, sampler = served()
    sampler.publish(INSTRUCTION)
    server.fault = lambda path, body, number: (200, reply)
    with pytest.raises(ServerLost, match=f"{client.BAD_REPLIES} replies to one request are not as asked for .{told}"):
        sample(planner, sampler, 1)


def test_a_loading_whose_reply_is_lost_counts(served) -> None:
    _, server, sampler = served()

    def fault(path: str, body: dict, number: int) -> tuple[int, bytes] | None:
        if path == "/v1/load_lora_adapter" and not number:
            server.answer(path, body)
            return error(503, "gone")
        return None

    server.fault = fault
    sampler.publish(INSTRUCTION)
    assert list(server.adapters) == [sampler.name]


def test_plans_that_are_asked_for_ahead_are_those_of_their_turn(served, move) -> None:
    planner, server, sampler = served()
    made, metrics = sampler.sample(1, PROMPTS, 2, 11)
    move(planner)
    sampler.ahead(2, PROMPTS, 2, 12)
    assert len(server.sent("/v1/load_lora_adapter")) == 2
    ahead, _ = sampler.sample(2, PROMPTS, 2, 12)
    assert len(server.sent("/v1/completions")) == 2 * (1 + 4)  # each once, and the canaries
    assert ahead.plans == planner.sample(PROMPTS, 2, seed=12).plans and made.plans != ahead.plans
    assert metrics.keys() == {"planner/server_canary", "planner/server_canary/others", "planner/server_swap_s"}
    sampler.ahead(3, PROMPTS, 2, 13)
    move(planner)  # what was asked ahead is dropped, and another adapter takes its turn
    sampler.forget()
    turn, _ = sampler.sample(3, PROMPTS, 2, 13)
    assert turn.plans == planner.sample(PROMPTS, 2, seed=13).plans
    assert len(server.sent("/v1/load_lora_adapter")) == 4 and list(server.adapters) == [sampler.name]


def test_a_server_that_takes_nothing_ahead_is_asked_again(served) -> None:
    planner, server, sampler = served(server_outage_s=0.3)
    server.stop()
    sampler.ahead(1, PROMPTS, 2, 11)
    assert sampler.ready is None
    with pytest.raises(ServerLost, match="no answer"):
        sampler.sample(1, PROMPTS, 2, 11)
    server.start()
    assert sampler.sample(1, PROMPTS, 2, 11)[0].plans == planner.sample(PROMPTS, 2, seed=11).plans


def test_all_plans_are_asked_for_together(served) -> None:
    _, server, sampler = served()

    def fault(path: str, body: dict, number: int) -> tuple[int, bytes]:
        time.sleep(0.5)
        return 200, str(body["seed"]).encode()

    server.fault = fault
    assert sampler.server.ask(*[client.Call("/v1/completions", {"seed": i}, int) for i in range(40)]) == [*range(40)]
    assert server.most_together == 40


def test_dropped_calls_end_soon(served) -> None:
    _planner, server, sampler = served(server_attempt_s=60.0, server_outage_s=60.0)
    sampler.publish(INSTRUCTION)
    server.fault = lambda path, body, number: time.sleep(1.5)
    calls = [client.Call("/v1/completions", {"seed": i}, bytes) for i in range(4)]
    replies = Replies(sampler.server, calls)
    time.sleep(0.2)
    began = time.monotonic()
    replies.drop()
    replies.pool.shutdown(wait=True)
    assert time.monotonic() - began < 1.0
