"""The cache's size as a dry run plans it, against roll-outs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from executor.window_policies import POLICIES

from tempact.executor.footprint import cache_rows
from tempact.executor.policy import Executor
from tempact.executor.rollout import RolloutSettings, gaussian_noise
from tempact.presets import get_preset
from tempact.types import Plan, Step

Make = Callable[..., Executor]
CPU = torch.device("cpu")
FRAME_TOKENS = 4  # of `make_executor`


@pytest.mark.parametrize("fork", [0, 3, 12])
@pytest.mark.parametrize(("plans", "continuations", "frames"), [(1, 3, 15), (2, 2, 27), (1, 1, 15)])
@pytest.mark.parametrize("changes", POLICIES)
def test_it_is_the_size_that_a_rollout_leaves(
    make_executor: Make, changes: dict, plans: int, continuations: int, frames: int, fork: int
) -> None:
    """A prompt a chunk, which recaches most; the last chunk's context counts, although nothing is kept of it."""
    executor = make_executor(frames=frames, smooth_prompts=False, **changes)
    plan = Plan("i", tuple(Step(start, start + 3, f"step {start}") for start in range(0, frames, 3)))
    executor.rollout([plan] * plans, [fork] * plans, gaussian_noise(0, executor.noise_shape(plans, continuations), CPU))
    cache = executor.calls.cache(1)
    assert cache.nbytes // cache.row_nbytes == cache.rows_total
    planned = cache_rows(executor.settings, plans, continuations, fork)
    # pools grow by eighths, which are rounded to rows of other sizes
    assert planned * FRAME_TOKENS == pytest.approx(cache.rows_total, rel=0.02, abs=FRAME_TOKENS)


def test_a_window_bounds_it_and_a_recache_takes_the_window_twice() -> None:
    settings = RolloutSettings.of(get_preset("longlive").executor)
    rows = [cache_rows(replace(settings, frames=frames), 1, 8, 3) for frames in (30, 60)]
    assert rows[0] == rows[1]
    plain = cache_rows(replace(settings, text_switch="cross_attention"), 1, 8, 3)
    assert plain < rows[0]
