"""One seed, one thread and no network for every test; what needs a GPU says so when it is skipped."""

from __future__ import annotations

import importlib.util
import logging
import os
import random
from collections.abc import Iterator

os.environ.update(
    HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg", WANDB_MODE="offline", OMP_NUM_THREADS="1"
)

import torch

if not torch.cuda.is_available():  # before any kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import interpreter
import numpy as np
import pytest

# the models are so small that threads cost more than they bring, and sums come out the same on any machine
torch.set_num_threads(1)
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    interpreter.work_once()
hypothesis.settings.register_profile("tempact", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tempact")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("markexpr")
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs an NVIDIA GPU: run `pytest -m gpu` on one"
    if "slow" not in asked:
        reasons["slow"] = "takes more than a minute: run `pytest -m slow`"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def log_handlers() -> Iterator[None]:
    """The commands put their own handlers on the root logger."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
