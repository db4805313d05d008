"""The bench of served plans: its figures of both samplers, against a server in this process, and with a real vLLM."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed.processes import BRIEF
from planner.fake_server import FakeServer
from rewards.tiny_server import VLLM

from bench.bench_served_planner import command_line, configured, main, repetition, sampled, table
from tempact.cli import parse_run
from tempact.distributed import Ranks
from tempact.errors import EXIT_USER_ERROR, guarded
from tempact.planner.decode import Response
from tempact.planner.planner import Planner
from tempact.planner.served import ServedSampler
from tempact.policies import build_policies
from tempact.types import Prompt

PROMPTS = [Prompt("a", "A red circle jumps."), Prompt("b", "The square grows, and then it turns blue.")]


def planner() -> Planner:
    return build_policies(parse_run(["shapeworld-smoke", *BRIEF], "program")[0]).planner


@pytest.fixture
def sampler(tmp_path: Path) -> Iterator[ServedSampler]:
    own, server = planner(), FakeServer(planner())
    own.config = replace(own.config, sampler="served", server=server.url)
    made = ServedSampler(own, tmp_path / "served", Ranks())
    yield made
    made.close()
    server.stop()


def test_both_samplers_have_the_adapter_that_moved(sampler: ServedSampler) -> None:
    before = {name: parameter.detach().clone() for name, parameter in sampler.planner.parameters().items()}
    found = [repetition(sampler, PROMPTS, 2, number) for number in range(2)]
    assert all(not torch.equal(before[name], parameter) for name, parameter in sampler.planner.parameters().items())
    for each in found:
        served, inside, change = (each[name] for name in ("served", "inside", "change"))
        assert served["tokens"] == inside["tokens"] > 4
        assert served["sampling_gap"] < 1e-5 and served["importance"] == pytest.approx(1, abs=1e-5)
        assert served["tokens_per_second"] == pytest.approx(served["tokens"] / served["seconds"])
        assert 0 < change["written_and_loaded_s"] < change["seconds"] and change["canary"] < 1e-4
    assert found[1]["change"]["canary_others"] > 100 * found[1]["change"]["canary"]
    lines = table(found).splitlines()
    assert [line.split()[0] for line in lines] == ["sampler", "served", "inside", "adapter", "adapter"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_gap_is_told(sampler: ServedSampler) -> None:
    """A sampler whose log-probs are 1 nat too low a token, in one plan of two."""
    own = sampler.planner

    def off(prompts, seeds) -> list[Response]:
        one, two = own.respond(prompts, seeds)
        return [one._replace(log_probs=[value - 1 for value in one.log_probs]), two]

    found = sampled(own, off, PROMPTS[:1], 2)
    first = len(own.respond(*own.requests(PROMPTS[:1], 2, 11))[0].tokens)
    share = first / found["tokens"]
    assert found["sampling_gap"] == pytest.approx(share, rel=1e-4)
    assert found["sampling_k3"] == pytest.approx(share * (torch.e - 2), rel=1e-4)
    assert found["importance"] == pytest.approx((own.config.max_importance + 1) / 2, rel=1e-4)
    assert found["importance_truncated"] == 0.5


def test_the_server_is_started_as_documented(tmp_path: Path) -> None:
    given = Namespace(vllm="env A=b vllm", tiny=False, gpu_memory_utilization=0.3, tokens=100, plans=2)
    words = command_line(tmp_path / "planner", given, ["--enforce-eager"], 81)
    assert words[:6] == ["env", "A=b", "vllm", "serve", str(tmp_path / "planner"), "--port"] and words[6] == "81"
    assert words[-3:] == ["--gpu-memory-utilization", "0.3", "--enforce-eager"]
    for flag, value in (("--dtype", "bfloat16"), ("--max-lora-rank", "32"), ("--host", "127.0.0.1")):
        assert words[words.index(flag) + 1] == value
    config = configured(tmp_path / "planner", "http://127.0.0.1:81", given).planner
    assert (config.precision, config.sampler, config.max_new_tokens, config.lora.rank) == ("bf16", "served", 100, 32)


def test_what_is_not_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: main([str(tmp_path), "--vllm", "vllm", "--tiny", "--repeats", "0"])) == EXIT_USER_ERROR
    assert "--repeats: found 0; accepted: at least 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get(VLLM), reason=f"needs {VLLM}=/path/to/vllm, of vLLM for the CPU")
def test_with_vllm(tmp_path: Path) -> None:
    save = tmp_path / "results.json"
    assert main([str(tmp_path), "--vllm", os.environ[VLLM], "--tiny", "--repeats", "1", "--save", str(save)]) == 0
    found = json.loads(save.read_text())
    assert found["plans"] == 4 and found["versions"]["vllm"] and len(found["measured"]) == 1
    for sampler in ("served", "inside"):
        assert found["measured"][0][sampler]["tokens"] == 4 * found["tokens_of_a_plan"]
        assert found["measured"][0][sampler]["sampling_gap"] < 0.01
