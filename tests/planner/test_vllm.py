"""Plans from a real vLLM on the CPU, with ShapeWorld's planner: runs where TEMPACT_VLLM names its executable."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed.processes import BRIEF
from rewards.tiny_server import VLLM, VLLM_ENVIRONMENT, free_port, running
from safetensors.torch import load_file, save_file

from tempact import train
from tempact.cli import EXIT_ABORTED, parse_run
from tempact.distributed import Ranks
from tempact.planner.planner import Planner
from tempact.planner.served import ServedSampler
from tempact.planner.server import ServerLost
from tempact.policies import build_policies, planner_folder
from tempact.reporting import read_metrics
from tempact.runs import run as run_module
from tempact.types import Prompt

EXECUTABLE = os.environ.get(VLLM, "")
START_S = 300.0
SMALL = ["shapeworld-smoke", *BRIEF]
PROMPTS = [Prompt("a", "A red circle jumps."), Prompt("b", "The square grows, and then the red circle turns blue.")]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXECUTABLE, reason="TEMPACT_VLLM names no vllm executable"),
    pytest.mark.usefixtures("log_handlers"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that docs/planner-server.md's command has started."""
    port = free_port()
    settings = VLLM_ENVIRONMENT | {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "PYTHONPATH": "",
        "PATH": os.pathsep.join([str(Path(EXECUTABLE).parent), os.environ["PATH"]]),
    }  # fmt: skip
    command = [EXECUTABLE, "serve", str(planner_folder("shapeworld")), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--generation-config", "vllm"]
    # the CPU's worker cannot take back a seeded draw, which a prompt in pieces asks for (0.32.0)
    command += ["--no-enable-chunked-prefill", "--enable-lora", "--max-lora-rank", "16"]
    with running(command, port, tmp_path_factory.mktemp("vllm") / "log", settings, START_S):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def sampler(url: str, tmp_path: Path) -> Iterator[ServedSampler]:
    planner = build_policies(parse_run(SMALL, "program")[0]).planner
    planner.config = replace(planner.config, sampler="served", server=url, server_outage_s=60.0, server_attempt_s=60.0)
    made = ServedSampler(planner, tmp_path / "adapters", Ranks())
    yield made
    made.close()


def move(planner: Planner, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in planner.parameters().values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def responder(sampler: ServedSampler):
    return lambda prompts, seeds: sampler.responses(sampler.begin(prompts, seeds))


def sample(sampler: ServedSampler, count: int = 8):
    return sampler.planner.sample(PROMPTS, count, seed=11, respond=responder(sampler))


def test_plans_are_the_trained_adapters_and_repeat(sampler: ServedSampler) -> None:
    """In fp32 the server's log-probs are the trainer's up to rounding, and a seed has its plan."""
    planner = sampler.planner
    for _ in range(2):
        metrics = sampler.publish(PROMPTS[0].text)
        assert metrics["planner/server_canary"] < 1e-3
        made = sample(sampler)
        gap = (planner.log_probs(made.tokens) - made.tokens.log_probs).abs().sum() / made.tokens.response_mask.sum()
        assert gap < 1e-4
        ends = torch.tensor(planner.generation.eos_token_id)
        for ids, attended in zip(made.tokens.input_ids, made.tokens.attention_mask, strict=True):
            own = ids[attended]
            assert torch.isin(own[-1], ends) or len(own) >= planner.generation.max_new_tokens
        assert len({plan.response for plan in made.plans}) > 2  # seeds differ
        again = sampler.planner.sample(PROMPTS[:1], 4, seed=11, respond=responder(sampler))
        assert [plan.response for plan in again.plans] == [plan.response for plan in made.plans[:4]]
        move(planner, 0.01)
    assert metrics["planner/server_swap_s"] < 2.0


def test_samples_have_the_trained_distribution(sampler: ServedSampler) -> None:
    """First tokens of many plans occur as often as the trainer's probabilities say."""
    planner = sampler.planner
    move(planner, 0.05)
    planner.generation.max_new_tokens = 1
    sampler.publish(PROMPTS[0].text)
    made = planner.sample(PROMPTS[:1], 400, seed=5, respond=responder(sampler))
    prompt = planner.prompt_ids(PROMPTS[0].text)
    probability = planner.next_log_probs(prompt, [0]).exp()[0]
    first = made.tokens.input_ids[:, len(prompt)]
    share = torch.bincount(first, minlength=len(probability)) / len(first)
    spread = (probability * (1 - probability) / len(first)).sqrt()
    likely = probability > 0.02
    assert ((share - probability).abs() <= 4 * spread + 1e-3)[likely].all() and likely.sum() >= 1


def test_the_canary_sees_a_wrong_adapter(sampler: ServedSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the iteration before is loaded in place of the new one."""
    planner, save = sampler.planner, sampler.planner.save_adapter
    sampler.publish(PROMPTS[0].text)
    move(planner, 0.003)
    folders: list[Path] = []
    monkeypatch.setattr(planner, "save_adapter", lambda folder: (folders.append(folder), save(folder)))
    sampler.publish(PROMPTS[0].text)
    kept = load_file(folders[0] / "adapter_model.safetensors")
    move(planner, 0.003)

    def old(folder: Path) -> None:
        save(folder)
        save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(planner, "save_adapter", old)
    with pytest.raises(ServerLost, match="samples with the adapter of an earlier iteration: the canary's log-probs"):
        sampler.publish(PROMPTS[0].text)


def test_what_the_server_refuses(sampler: ServedSampler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    planner, save = sampler.planner, sampler.planner.save_adapter
    monkeypatch.setattr(planner, "save_adapter", lambda folder: None)
    with pytest.raises(ServerLost, match=r"cannot read .*accepted: a planner.server_folder that trainer and server"):
        sampler.publish(PROMPTS[0].text)

    def misfit(folder: Path) -> None:
        save(folder)
        weights = load_file(folder / "adapter_model.safetensors")
        wider = {name: torch.zeros(2 * len(value), *value.shape[1:]) for name, value in weights.items()}
        save_file(wider, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(planner, "save_adapter", misfit)
    with pytest.raises(ServerLost, match=r"planner.server: .*(refuses the adapter|computes another model)"):
        sampler.publish(PROMPTS[0].text)
    sampler.name = "tempact-unknown"
    with pytest.raises(ServerLost, match="refuses a plan .status 404: The model `tempact-unknown` does not exist"):
        sample(sampler, 1)


def test_a_run(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run_module.Run, "finish", lambda self, stop: None)
    monkeypatch.setattr(run_module, "leave_report", lambda folder: [])
    served = ["--planner.sampler", "served", "--planner.server", url, "--output", str(tmp_path)]
    assert train.main([*SMALL, *served]) == 0
    nowhere = re.sub(r"\d+$", "9", url)
    more = ["--planner.server", nowhere, "--planner.server-attempt-s", "1", "--planner.server-outage-s", "1"]
    assert train.main([*SMALL, *served, "--trainer.iterations", "4", *more]) == EXIT_ABORTED
    told = capsys.readouterr().err
    assert "no answer for" in told and "saved after iteration 2" in told
    assert train.main([*SMALL, *served, "--trainer.iterations", "4"]) == 0
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["planner/sampling_gap"] < 1e-4 and row["planner/server_canary"] < 1e-3
        assert row["planner/server_swap_s"] < 2.0 and row["planner/importance"] == pytest.approx(1.0, abs=1e-4)
