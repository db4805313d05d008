"""The books of one cache over many iterations of random plans: the pools stay as large as what they hold."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from csrc_triton import ForkableKVCache
from tempact.config import WINDOWS
from tempact.executor.kv_history import FIRST_FRAMES
from tempact.executor.rollout import Branch, _Bookkeeping, enough_rows, walk_chunks
from tempact.executor.sampler import RolloutSettings, WindowPolicy
from tempact.models.wan.transformer import TextKV
from tempact.presets import get_preset

PLANS, CONTINUATIONS, FRAME_TOKENS = 2, 4, 4
SWITCHES = 0.3  # of the chunks begin under another prompt


def settings_of(window: str, text_switch: str) -> RolloutSettings:
    """Those of `self-forcing` or, where a switch rewrites the window, of `longlive`, with this window."""
    preset = RolloutSettings.of(get_preset("longlive" if text_switch == "recache" else "self-forcing").executor)
    return replace(preset, window=WindowPolicy(**vars(WINDOWS[window])), text_switch=text_switch)


def iteration(cache: ForkableKVCache, settings: RolloutSettings, drawn: random.Random) -> None:
    """The reservations, forks and drops of a roll-out of random plans; nothing is computed."""
    plans = drawn.randint(1, PLANS)
    forks = [drawn.randrange(1, settings.chunks) * settings.chunk for _ in range(plans)]
    prompts = []
    for _ in range(plans):
        own = ["0"]
        for chunk in range(1, settings.chunks):
            own.append(str(chunk) if drawn.random() < SWITCHES else own[-1])
        prompts.append(own)
    nothing = torch.empty(plans * CONTINUATIONS, 0, settings.frames)
    with _Bookkeeping(cast(Any, None), cache, settings, FRAME_TOKENS) as history:

        def make(start: int, branches: list[Branch], _: TextKV) -> Tensor:
            history.context([branch.cached for branch in branches], start)
            return nothing

        loop = walk_chunks(
            history, prompts, lambda _: TextKV([]), make, lambda *_: nothing,
            continuations=CONTINUATIONS, forks=forks,
        )  # fmt: skip
        for _ in loop:
            pass


@pytest.mark.parametrize(
    ("window", "text_switch", "iterations"),
    [
        ("tempact-self-forcing", "cross_attention", 1000),
        ("longlive", "recache", 1000),
        ("infinity-rope", "cross_attention", 100),
        ("longlive-infinite", "recache", 100),
        pytest.param("infinity-rope", "cross_attention", 1000, marks=pytest.mark.slow),
        pytest.param("longlive-infinite", "recache", 1000, marks=pytest.mark.slow),
    ],
)
def test_pools_do_not_creep(window: str, text_switch: str, iterations: int) -> None:
    """Their rows stay within a 24th of the most used at once, which is what a dry run plans for the earliest fork."""
    settings, drawn = settings_of(window, text_switch), random.Random(0)
    cache = ForkableKVCache(
        1, 1, 1, rows=FIRST_FRAMES * FRAME_TOKENS, dtype=torch.bfloat16, device=torch.device("cpu"), page=FRAME_TOKENS
    )
    for _ in range(iterations):
        iteration(cache, settings, drawn)
        assert cache.rows_used == 0
    assert cache.rows_peak > 3 * FIRST_FRAMES * FRAME_TOKENS
    assert cache.rows_total <= 25 / 24 * cache.rows_peak
    planned = enough_rows(settings, PLANS, CONTINUATIONS, settings.chunk, FRAME_TOKENS)
    assert cache.rows_peak <= planned <= 1.05 * cache.rows_peak
