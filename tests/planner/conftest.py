from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from distributed.processes import SMALL
from planner.fake_server import FakeServer
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from tempact.cli import parse_run
from tempact.config import LoraConfig, OptimConfig, PlannerConfig
from tempact.planner import server as client
from tempact.planner.planner import Planner
from tempact.policies import build_policies
from tempact.runs import run as run_module
from tempact.shapeworld.pretraining.planner import fit_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return fit_tokenizer(["user\n", "assistant\n", "The red circle moves."] * 2)


# what Qwen3's template does at its end: a thought is switched off by an empty one that the prompt holds already
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}\n{{ m.content }}\n{% endfor %}assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)


@pytest.fixture(scope="session")
def thinking_tokenizer(tokenizer):
    """As Qwen3's: a token of its own for each tag, which is not special."""
    own = copy.deepcopy(tokenizer)
    own.add_tokens(["<think>", "</think>"])
    own.chat_template = TEMPLATE
    return own


@pytest.fixture
def make_planner(tokenizer) -> Callable[..., Planner]:
    """A random little Qwen3 (or GPT-2) that ships a greedy-like generation config; the weights are always the same."""

    def make(
        adapter: Path | None = None,
        rank: int = 4,
        absolute_positions: bool = False,
        dtype: torch.dtype = torch.float32,
        tokenizer=tokenizer,
        **settings,
    ) -> Planner:
        torch.manual_seed(0)
        if absolute_positions:
            size = GPT2Config(
                vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, initializer_range=0.2, n_positions=256
            )  # fmt: skip
            model, targets = GPT2LMHeadModel(size), ("c_attn", "c_fc")
        else:
            size = Qwen3Config(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, head_dim=16, initializer_range=0.2,
                max_position_embeddings=256,
            )  # fmt: skip
            model, targets = Qwen3ForCausalLM(size), ("q_proj", "v_proj", "down_proj")
        model.generation_config = GenerationConfig(
            top_k=1, top_p=0.1, repetition_penalty=3.0, eos_token_id=[tokenizer.eos_token_id, 7]
        )
        settings = {
            "lora": LoraConfig(rank, 8, targets),
            "optim": OptimConfig(lr=1e-2),
            "max_new_tokens": 24,
            **settings,
        }
        config = PlannerConfig("tiny", **settings)
        return Planner(model.to(dtype), tokenizer, config, 24, 3, adapter)

    return make


def disturb(planner: Planner) -> None:
    """Moves the trained adapter away from its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in planner.parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def move():
    return disturb


@pytest.fixture(scope="module")
def brief() -> Iterator[None]:
    """Runs without evaluation, report and long pauses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "FIRST_PAUSE_S", 0.01)
        patch.setattr(run_module.Run, "finish", lambda self, stop: None)
        patch.setattr(run_module, "leave_report", lambda folder: [])
        yield


@pytest.fixture(scope="module")
def twin() -> Planner:
    """The planner of small runs, for a server that stands beside them."""
    return build_policies(parse_run([*SMALL], "program")[0]).planner


@pytest.fixture
def server(twin: Planner) -> Iterator[FakeServer]:
    server = FakeServer(twin)
    yield server
    server.stop()
